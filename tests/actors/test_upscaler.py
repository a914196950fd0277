"""The actor by itself, called as Ray Data calls it, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.upscaler import EngineOptions, Upscaler
from infra.settings import Settings
from jobs.old_plan import Item, plan_row, probe_item, row_options
from pipeline.video import probe
from tests.random_model import save_random_model
from tests.video_files import make_bad_files, make_video_files


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
        version=version("upriver"),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole sources and damaged ones, by name."""
    folder = tmp_path_factory.mktemp("videos")
    return make_video_files(folder / "good") | make_bad_files(folder / "bad")


def run(engine: EngineOptions, source: Path, work_file: Path, **settings: object) -> list[dict[str, Any]]:
    """Return the records of one row, each with its details as a dictionary."""
    options = row_options(Settings(steps=1, preset="ultrafast", **settings), compare=False, truth=None)  # type: ignore[arg-type]
    item = Item(str(source), "unused", source.name, 0, "")
    row = plan_row(item, probe_item(item, 10**7, options), 4, work_file, 0, options)
    batch = {name: np.array([value]) for name, value in row.items()}
    records = []
    for record in Upscaler(dataclasses.asdict(engine))(batch):
        assert all(len(column) == 1 for column in record.values())
        plain = {name: column[0] for name, column in record.items()}
        records.append({**plain, "details": json.loads(plain["details"])})
    return records


def test_a_row_ends_with_one_done_record(engine: EngineOptions, videos: dict[str, Path], tmp_path: Path) -> None:
    records = run(engine, videos["mjpeg_avi"], tmp_path / "w.mkv")
    assert [record["kind"] for record in records if record["kind"] != "progress"] == ["started", "done"]
    assert {record["row_id"] for record in records} == {"000004"}
    done = records[-1]
    assert done["frames"] == 16 and done["details"]["width"] == 384 and done["details"]["damage"] == []
    assert done["details"]["output_bytes"] == (tmp_path / "w.mkv").stat().st_size
    assert 0 < done["details"]["seconds"]["model"] < done["details"]["seconds"]["total"]
    assert probe(tmp_path / "w.mkv").height == 256
    assert os.listdir(tmp_path) == ["w.mkv"]


def test_a_row_that_fails_says_why_and_leaves_nothing(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path
) -> None:
    records = run(engine, videos["text"], tmp_path / "w.mkv")
    assert [record["kind"] for record in records] == ["started", "failed"]
    details = records[-1]["details"]
    assert details["failure_class"] == "source-unreadable" and details["code"] == "video-unreadable"
    assert details["message"] and details["remedy"] and details["seconds"] >= 0
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_middle_removes_what_was_written(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.video import VideoWriter

    write = VideoWriter.write

    def full(self: VideoWriter, frame: Any) -> None:
        if self.frames == 5:
            raise OSError(28, "No space left on device")
        write(self, frame)

    monkeypatch.setattr(VideoWriter, "write", full)
    details = run(engine, videos["mjpeg_avi"], tmp_path / "w.mkv")[-1]["details"]
    assert details["failure_class"] == "storage" and "No space left" in details["message"]
    assert os.listdir(tmp_path) == []


def test_the_same_row_again_gives_the_same_file(engine: EngineOptions, videos: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert run(engine, videos["png_folder"], tmp_path / name)[-1]["kind"] == "done"
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_model_that_cannot_be_loaded_is_a_failure_of_that_class(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path
) -> None:
    broken = dataclasses.replace(engine, model=str(tmp_path / "none"))
    assert run(broken, videos["mjpeg_avi"], tmp_path / "w.mkv")[-1]["details"]["failure_class"] == "model"


def test_another_version_or_unseen_files_are_refused(
    engine: EngineOptions, videos: dict[str, Path], tmp_path: Path
) -> None:
    other = dataclasses.replace(engine, version="0.0.0")
    assert run(other, videos["mjpeg_avi"], tmp_path / "w.mkv")[-1]["details"]["code"] == "worker-version"
    unseen = run(engine, videos["mjpeg_avi"], tmp_path / "gone" / "w.mkv")[-1]["details"]
    assert unseen["code"] == "worker-sees-no-file" and str(tmp_path / "gone") in unseen["message"]
