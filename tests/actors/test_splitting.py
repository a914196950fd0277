"""Parts of a shot: restored after their warm-up, whoever restores them, and gone on with without another one."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.assemble import assemble_video
from actors.step_batch import StepBatch
from actors.upscaler import Upscaler
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.records import VideoPlan
from jobs.sources import Item
from pipeline.segments import SegmentWriter
from pipeline.stream_diffvsr import StreamDiffVSRPipeline
from pipeline.video import EncoderOptions, VideoReader, VideoWriter, probe
from tests.actors.test_assemble import assembly_of
from tests.films import frame_hashes, make_film

WARM_UP, SEGMENT = 3, 4
PARTS = (12, 8, 10)  # of a shot of 30 frames: what is no whole segment is the last part's


@pytest.fixture(scope="module", params=["progressive", "interlaced"])
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shot of 30 frames; key frames lie elsewhere than parts begin."""
    interlaced = request.param == "interlaced"
    return make_film(tmp_path_factory.mktemp("film") / f"{request.param}.mkv", (30,), interlaced=interlaced)


def plan_of(source: Path, destination: Path) -> VideoPlan:
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), str(destination), source.name, info.size_bytes, info.version)
    settings = Settings(
        steps=1, codec="ffv1", pix_fmt="yuv444p", segment_seconds=SEGMENT / 25, split_seconds=12 / 25,
        warm_up_frames=WARM_UP,
    )  # fmt: skip
    plan = plan_video(item, plan_options(settings), "model")
    assert [shot.frames for shot in plan.shots] == list(PARTS)
    return plan


def run(actor: Upscaler, row: Any) -> list[dict[str, Any]]:
    records = actor({name: np.array([value]) for name, value in row.items()})
    return [{name: column[0] for name, column in record.items()} for record in records]


def restore(plan: VideoPlan, area: Path, actors: list[Upscaler], seed: int) -> None:
    """Restore all parts in a random order, each on one of the actors."""
    rows = rows_of(plan, f"{area}/segments", f"{area}/states")
    area.mkdir(parents=True)
    random.Random(seed).shuffle(rows)
    for number, row in enumerate(rows):
        assert run(actors[number % len(actors)], row)[-1]["kind"] == "done"


def by_definition(plan: VideoPlan, model: Path, target: Path, warm_up: int) -> list[str]:
    """The frames when each part is a fresh stream that begins `warm_up` frames before it, all read in one go."""
    pipe, info = StreamDiffVSRPipeline.from_pretrained(model), probe(plan.source)
    with VideoReader(plan.source, threads=1) as reader:
        frames = list(reader)
    options = EncoderOptions(codec="ffv1", pix_fmt="yuv444p")
    with VideoWriter(target, info, width=plan.out_width, height=plan.out_height, options=options) as writer:
        for shot in plan.shots:
            first = max(0, shot.first_index - warm_up)
            state = pipe.start(seed=0, index=first)
            for frame in frames[first : shot.first_index + shot.frames]:
                (restored,) = pipe([frame.rgb_HWC], state, steps=1)
                if frame.index >= shot.first_index:
                    writer.write(dataclasses.replace(frame, rgb_HWC=restored))
    return frame_hashes(target)


def test_parts_are_streams_that_begin_with_their_warm_up(
    film: Path, model: Path, actors: list[Upscaler], tmp_path: Path
) -> None:
    plan = plan_of(film, tmp_path / "out.mkv")
    assert [shot.warm_up for shot in plan.shots] == [0, WARM_UP, WARM_UP]
    restore(plan, tmp_path / "area", actors, seed=1)
    draft = assemble_video(assembly_of(plan, str(tmp_path / "area")))
    assert draft.frames == 30 and [part.frames for part in draft.parts] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert draft.seconds["warm_up"] > 0
    restored = frame_hashes(tmp_path / "out.mkv")
    assert restored == by_definition(plan, model, tmp_path / "wanted.mkv", WARM_UP)
    other = by_definition(plan, model, tmp_path / "other.mkv", 0)  # without a warm-up it is another film
    assert restored[: PARTS[0]] == other[: PARTS[0]] and restored[PARTS[0]] != other[PARTS[0]]
    # Once more, all on one actor and in another order: the same bits.
    again = plan.model_copy(update={"destination": str(tmp_path / "again.mkv")})
    restore(again, tmp_path / "again", actors[:1], seed=2)
    assemble_video(assembly_of(again, str(tmp_path / "again")))
    assert frame_hashes(tmp_path / "again.mkv") == restored


class PowerCut(BaseException):
    """Ends an actor wherever it is; nothing catches it."""


@pytest.mark.parametrize(("written", "steps_left"), [(2, WARM_UP + 10), (4, 6), (6, 6), (9, 2)])
def test_only_a_part_without_a_finished_segment_warms_up_again(
    film: Path,
    actors: list[Upscaler],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
    steps_left: int,
) -> None:
    """The last part is cut off after `written` of its ten frames, and goes on with the state after its last segment."""
    plan = plan_of(film, tmp_path / "out.mkv")
    whole, cut = (rows_of(plan, str(tmp_path / area / "s"), str(tmp_path / area / "t"))[-1] for area in ("w", "c"))
    (tmp_path / "w").mkdir()
    (tmp_path / "c").mkdir()
    run(actors[0], whole)
    write, step, count = SegmentWriter.write, StepBatch.step, {"written": 0, "steps": 0}

    def write_until(self: SegmentWriter, picture: Any) -> None:
        count["written"] += 1
        if count["written"] > written:
            raise PowerCut
        write(self, picture)

    def counted(self: StepBatch, *arguments: Any) -> Any:
        count["steps"] += 1
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(SegmentWriter, "write", write_until)
        run(actors[0], cut)
    monkeypatch.setattr(StepBatch, "step", counted)
    assert run(actors[1], cut)[-1]["kind"] == "done"
    assert count["steps"] == steps_left
    bytes_of = {
        area: {path.name: path.read_bytes() for path in (tmp_path / area / "s").iterdir() if path.suffix != ".json"}
        for area in ("w", "c")
    }
    assert bytes_of["c"] == bytes_of["w"] and len(bytes_of["w"]) == 3
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "c" / "s").glob("*.json"))]
    assert [record["first_index"] for record in records] == [20, 24, 28]
    assert ["warm_up" in record["seconds"] for record in records] == [True, False, False]


def test_a_source_that_has_other_pictures_than_planned_is_noticed_in_the_warm_up(
    film: Path, actors: list[Upscaler], tmp_path: Path
) -> None:
    plan = plan_of(film, tmp_path / "out.mkv")
    (tmp_path / "area").mkdir()
    row = rows_of(plan, str(tmp_path / "area" / "s"), str(tmp_path / "area" / "t"))[1]
    last = run(actors[0], {**row, "warm_up": row["warm_up"] + 1})[-1]
    assert last["kind"] == "failed" and json.loads(last["details"])["code"] == "decode-mismatch"
