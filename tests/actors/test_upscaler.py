"""The actor by itself, called as Ray Data calls it, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.records import Row
from actors.upscaler import EngineOptions, Upscaler
from infra.own_code import code_fingerprint
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.sources import Item
from pipeline.segments import SegmentWriter
from pipeline.video import VideoReader
from tests.random_model import save_random_model
from tests.video_files import make_bad_files, make_video_files

SEGMENT_FRAMES = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    """A random model on one thread of the CPU."""
    model = save_random_model(tmp_path_factory.mktemp("model") / "random")
    return EngineOptions(
        model=str(model),
        device="cpu",
        dtype="fp32",
        flow="auto",
        threads=1,
        max_pixels=10**7,
        version=code_fingerprint(),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole sources and damaged ones, by name."""
    folder = tmp_path_factory.mktemp("videos")
    return make_video_files(folder / "good") | make_bad_files(folder / "bad")


@pytest.fixture(scope="module")
def actor(engine: EngineOptions) -> Upscaler:
    """An actor that has its model."""
    return Upscaler(dataclasses.asdict(engine))


def row_of(source: Path, area: Path | str, **changes: Any) -> Row:
    """The first shot of a source, in segments of five frames."""
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), f"{area}/out.mp4", source.name, info.size_bytes, info.version)
    options = plan_options(Settings(steps=1, preset="ultrafast", cuts=False))
    plan = plan_video(item, options, "model").model_copy(update={"segment_frames": SEGMENT_FRAMES})
    if not str(area).startswith("s3://") and "gone" not in str(area):
        Path(area).mkdir(exist_ok=True)
    (row,) = rows_of(plan, f"{area}/segments", f"{area}/states")
    return Row(**{**row, **changes})  # type: ignore[typeddict-item]  # names of its fields


def run(actor: Upscaler, row: Row) -> list[dict[str, Any]]:
    """Return the records of a row, each with its details as a dictionary."""
    batch = {name: np.array([value]) for name, value in row.items()}
    records = []
    for record in actor(batch):
        assert all(len(column) == 1 for column in record.values())
        plain = {name: column[0] for name, column in record.items()}
        records.append({**plain, "details": json.loads(plain["details"])})
    return records


def content(area: Path) -> dict[str, bytes]:
    """Everything in the work area but the records, which tell times."""
    return {
        path.relative_to(area).as_posix(): path.read_bytes()
        for path in sorted(area.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


class PowerCut(BaseException):
    """Ends an actor wherever it is; nothing catches it."""


def cut_power_at(monkeypatch: pytest.MonkeyPatch, frame: int) -> None:
    write = SegmentWriter.write
    written = 0

    def until(self: SegmentWriter, picture: Any) -> None:
        nonlocal written
        written += 1
        if written > frame:
            raise PowerCut
        write(self, picture)

    monkeypatch.setattr(SegmentWriter, "write", until)


def test_a_row_ends_with_one_done_record(actor: Upscaler, videos: dict[str, Path], tmp_path: Path) -> None:
    row = row_of(videos["mjpeg_avi"], tmp_path)
    records = run(actor, row)
    kinds = [record["kind"] for record in records if record["kind"] != "progress"]
    assert kinds == ["started", "segment", "segment", "segment", "segment", "done"]
    assert {record["row_id"] for record in records} == {row["row_id"]}
    assert [record["details"]["replayed"] for record in records if record["kind"] == "segment"] == [False] * 4
    done = records[-1]
    assert done["frames"] == 16 and done["details"]["width"] == 384 and done["details"]["resumed"] == 0
    segments = sorted(path.name for path in (tmp_path / "segments").iterdir())
    assert [name[:12] for name in segments[::2]] == [f"00000-{number:06d}" for number in range(4)]
    # the one that makes the last segment again, should it turn out to be damaged
    assert [path.name[:12] for path in (tmp_path / "states").iterdir()] == ["00000-000002"]


@pytest.mark.parametrize("frame", [2, 5, 7, 13])
def test_a_row_that_is_cut_off_goes_on_and_ends_with_the_same_bytes(
    actor: Upscaler, videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(actor, row_of(videos["mjpeg_avi"], whole))
    row = row_of(videos["mjpeg_avi"], cut)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_power_at(patch, frame)
        run(actor, row)
    finished = frame // SEGMENT_FRAMES
    records = [record for record in run(actor, row) if record["kind"] == "segment"]
    assert [record["details"]["replayed"] for record in records] == [n < finished for n in range(4)]
    assert content(cut) == content(whole)
    # A finished row is told again, and nothing is done.
    again = run(actor, row)
    assert [record["kind"] for record in again] == ["started", *["segment"] * 4, "done"]
    assert again[-1]["details"]["resumed"] == 16 and content(cut) == content(whole)


@pytest.mark.parametrize("what", ["segment", "state", "old segment", "record"])
def test_what_is_damaged_is_made_again(
    actor: Upscaler, videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(actor, row_of(videos["mjpeg_avi"], whole))
    row = row_of(videos["mjpeg_avi"], cut)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_power_at(patch, 11)
        run(actor, row)
    pattern = {
        "segment": "segments/00000-000001.*.mp4", "state": "states/00000-000001.*", "record": "segments/*1.json",
        "old segment": "segments/00000-000000.*.mp4",
    }  # fmt: skip
    (victim,) = cut.glob(pattern[what])
    damaged = bytearray(victim.read_bytes())
    if what == "old segment":
        del damaged[-1:]  # of older segments only the size is looked at; their hashes are, before they are joined
    else:
        damaged[len(damaged) // 2] ^= 0xFF
    victim.write_bytes(bytes(damaged))
    records = [record for record in run(actor, row) if record["kind"] == "segment"]
    replayed = [record["details"]["replayed"] for record in records]
    assert replayed == ([False] * 4 if what == "old segment" else [True, False, False, False])
    assert content(cut) == content(whole)


def test_a_worker_that_was_given_up_changes_nothing(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path
) -> None:
    row = row_of(videos["mjpeg_avi"], tmp_path)
    late = Upscaler(dataclasses.asdict(engine))(
        {name: np.array([value]) for name, value in {**row, "seed": 5}.items()}  # its pictures are other ones
    )
    assert next(late)["kind"][0] == "started"
    assert run(Upscaler(dataclasses.asdict(engine)), row)[-1]["kind"] == "done"
    before = content(tmp_path)
    (tmp_path / "segments" / "00000-000003.json").unlink()
    ended = list(late)[-1]
    assert ended["kind"][0] in ("done", "failed")
    for name, data in content(tmp_path).items():
        assert before.get(name, data) == data


def test_a_row_that_fails_says_why_and_leaves_nothing(actor: Upscaler, videos: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "film.avi"
    source.write_bytes(videos["mjpeg_avi"].read_bytes())
    row = row_of(source, tmp_path / "area")
    source.write_bytes(b"a letter")
    records = run(actor, row)
    assert [record["kind"] for record in records] == ["started", "failed"]
    details = records[-1]["details"]
    assert details["failure_class"] == "source-unreadable" and details["code"] == "source-changed"
    assert details["message"] and details["remedy"] and details["seconds"] >= 0
    assert os.listdir(tmp_path / "area") == []


def test_other_frames_than_planned_are_no_result(actor: Upscaler, videos: dict[str, Path], tmp_path: Path) -> None:
    row = row_of(videos["mjpeg_avi"], tmp_path)
    for changes in ({"frames": 17}, {"start_pts": row["start_pts"] + 1}):
        last = run(actor, Row(**{**row, **changes}))[-1]  # type: ignore[typeddict-item]
        assert last["details"]["failure_class"] == "decode", changes
        assert list((tmp_path / "segments").iterdir()) == []


def test_an_error_in_the_middle_keeps_what_is_closed_and_nothing_else(
    actor: Upscaler, videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SegmentWriter.write
    written = 0

    def full(self: SegmentWriter, frame: Any) -> None:
        nonlocal written
        written += 1
        if written == 8:
            raise OSError(28, "No space left on device")
        write(self, frame)

    monkeypatch.setattr(SegmentWriter, "write", full)
    details = run(actor, row_of(videos["mjpeg_avi"], tmp_path))[-1]["details"]
    assert details["failure_class"] == "storage" and "No space left" in details["message"]
    assert [path.name[:12] for path in sorted((tmp_path / "segments").iterdir())] == ["00000-000000"] * 2


def test_an_object_store_gets_the_same_bytes(
    actor: Upscaler, videos: dict[str, Path], tmp_path: Path, s3_bucket: str
) -> None:
    run(actor, row_of(videos["mjpeg_avi"], tmp_path))
    source = f"{s3_bucket}/film.avi"
    storage_for(source).write(source, videos["mjpeg_avi"].read_bytes())
    info = storage_for(source).stat(source)
    assert info is not None
    local = row_of(videos["mjpeg_avi"], s3_bucket)
    row = Row(**{**local, "source": source, "source_version": info.version})  # type: ignore[typeddict-item]
    assert run(actor, row)[-1]["kind"] == "done"
    found = {
        one.place.removeprefix(f"{s3_bucket}/"): storage_for(one.place).read(one.place)
        for part in ("segments", "states")
        for one in storage_for(s3_bucket).list(f"{s3_bucket}/{part}")
        if not one.place.endswith(".json")
    }
    assert found == content(tmp_path)
    assert run(actor, row)[-1]["details"]["resumed"] == 16


def test_a_model_that_cannot_be_loaded_is_a_failure_of_that_class(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path
) -> None:
    broken = Upscaler(dataclasses.asdict(dataclasses.replace(engine, model=str(tmp_path / "none"))))
    assert run(broken, row_of(videos["mjpeg_avi"], tmp_path))[-1]["details"]["failure_class"] == "model"


def test_another_model_than_planned_is_refused(engine: EngineOptions, videos: dict[str, Path], tmp_path: Path) -> None:
    """As when it was replaced in its bucket before this node fetched it."""
    other = Upscaler(dataclasses.asdict(dataclasses.replace(engine, model_sha256="0" * 64)))
    for _ in range(2):
        details = run(other, row_of(videos["mjpeg_avi"], tmp_path))[-1]["details"]
        assert (details["failure_class"], details["code"]) == ("model", "model-changed")


def test_another_version_or_unseen_files_are_refused(
    engine: EngineOptions, actor: Upscaler, videos: dict[str, Path], tmp_path: Path
) -> None:
    other = Upscaler(dataclasses.asdict(dataclasses.replace(engine, version="0.0.0")))
    row = row_of(videos["mjpeg_avi"], tmp_path)
    assert run(other, row)[-1]["details"]["code"] == "worker-version"
    unseen = run(actor, row_of(videos["mjpeg_avi"], tmp_path / "gone"))[-1]["details"]
    assert unseen["code"] == "worker-sees-no-file" and str(tmp_path / "gone") in unseen["message"]


@pytest.mark.parametrize(
    ("memory_gb", "numerics"), [(None, "bfloat16 by openvino"), (8.0, "float32")], ids=["free", "within a limit"]
)
def test_the_backend_that_is_asked_for_restores_and_is_told(
    engine: EngineOptions,
    actor: Upscaler,
    videos: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory_gb: float | None,
    numerics: str,
) -> None:
    """With a limit the reference runs, in whatever format suits it there: a backend's need is not in the estimate."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dtype = "bf16" if memory_gb is None else "fp32"
    other = dataclasses.replace(engine, backend="openvino", dtype=dtype, memory_gb=memory_gb)
    pictures = []
    for name, one in (("reference", actor), ("asked", Upscaler(dataclasses.asdict(other)))):
        row = row_of(videos["mjpeg_avi"], tmp_path / name)
        records = run(one, row)
        segments = [json.loads(path.read_text()) for path in sorted((tmp_path / name / "segments").glob("*.json"))]
        assert records[-1]["kind"] == "done" and segments
        assert {segment["dtype"] for segment in segments} == {"float32" if name == "reference" else numerics}
        pictures.append(
            [
                frame.rgb_HWC
                for segment in segments
                for frame in VideoReader(tmp_path / name / "segments" / segment["name"])
            ]
        )
    assert len(pictures[0]) == len(pictures[1]) == row["frames"]
    worst = max(np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(*pictures, strict=True))
    assert worst < 1.5  # levels, through the encoder
