"""A shot whose steps are chosen per frame: as the policy says, and the same when it is gone on with elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.assemble import assemble_video
from actors.restoration import step_alone
from actors.step_batch import StepBatch
from actors.upscaler import Upscaler
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.records import VideoPlan
from jobs.sources import Item
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.step_policy import StepPolicy, choose
from pipeline.stream_diffvsr import StreamDiffVSRPipeline
from pipeline.tiling import Window
from pipeline.video import EncoderOptions, VideoReader, VideoWriter, probe
from tests.actors.test_assemble import assembly_of
from tests.films import frame_hashes
from tests.moving_texture import make_clip
from tests.video_files import write_exactly

POLICY: Any = {"settle": 1, "longest_hold": 3, "levels": [2, 1], "shares": [0.1]}
STILL = [2, 1, 0, 0, 0, 1, 0, 0, 0, 1]  # levels of the frames that stand still


@pytest.fixture(params=[None, 0.6], ids=["whole", "windows"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> VideoPlan:
    """Ten frames that stand still, then six in which a square moves; a segment of four ends while frames are held."""
    source, moving = tmp_path / "film.mkv", [make_clip(1, 48, 64)[0]]
    for left in range(8, 32, 4):
        moving.append(moving[0].copy())
        moving[-1][16:28, left : left + 10] = (250, 20, 90)
    write_exactly(source, [moving[0]] * 9 + moving)
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), str(tmp_path / "out.mkv"), source.name, info.size_bytes, info.version)
    settings = Settings(
        steps="auto", step_policy={**POLICY, "window_share": request.param}, codec="ffv1", pix_fmt="yuv444p",
        segment_seconds=4 / 25,
    )  # fmt: skip
    found = plan_video(item, plan_options(settings), "model")
    assert [shot.frames for shot in found.shots] == [16]
    return found


def by_definition(plan: VideoPlan, model: Path, target: Path) -> tuple[list[str], list[int], int]:
    """The frames, levels and number of windows of one stream that follows the policy."""
    pipe, policy = StreamDiffVSRPipeline.from_pretrained(model), StepPolicy.of(dict(plan.options["step_policy"]))
    state, levels, windows = pipe.start(seed=0), [], 0
    options = EncoderOptions(codec="ffv1", pix_fmt="yuv444p")
    with (
        VideoReader(plan.source, threads=1) as reader,
        VideoWriter(target, probe(plan.source), width=256, height=192, options=options) as writer,
    ):
        for frame in reader:
            choice = choose(policy, frame.rgb_HWC, state)
            levels.append(choice.level)
            if choice.level:
                window = None if choice.window is None else Window(*choice.window)
                windows += window is not None
                output_3HW = step_alone(pipe, frame_to_tensor(frame.rgb_HWC), state, choice.level, window)[0]
            else:
                output_3HW = state.hold()
            state.policy = choice.memory
            writer.write(dataclasses.replace(frame, rgb_HWC=tensor_to_frame(output_3HW, np.dtype(np.uint8))))
    return frame_hashes(target), levels, windows


def test_frames_get_what_the_policy_says_whoever_goes_on(
    plan: VideoPlan, model: Path, actors: list[Upscaler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, levels, windows = by_definition(plan, model, tmp_path / "wanted.mkv")
    assert (windows > 2) == (plan.options["step_policy"]["window_share"] is not None)
    assert levels[:10] == STILL and 0 not in levels[10:]
    asked: list[int | None] = []
    step = StepBatch.step

    def noted(self: StepBatch, frame_13HW: Any, state: Any, steps: int | None, *window: Any) -> Any:
        asked.append(steps)
        return step(self, frame_13HW, state, steps, *window)

    monkeypatch.setattr(StepBatch, "step", noted)
    area = tmp_path / "area"
    area.mkdir()
    (row,) = rows_of(plan, f"{area}/segments", f"{area}/states")
    batch = {name: np.array([value]) for name, value in row.items()}
    first = actors[0](batch)
    assert next(record for record in first if record["kind"][0] == "segment")["frames"][0] >= 4
    first.close()  # type: ignore[attr-defined]  # a generator: the worker is lost
    assert 0 not in asked, "a held frame asks the model for nothing"
    asked.clear()
    assert list(actors[1](batch))[-1]["kind"][0] == "done"
    # The second worker begins inside a hold: from what it was told, not from a frame that it restored itself.
    assert asked in ([level for level in levels[done:] if level] for done in (4, 8, 12))
    draft = assemble_video(assembly_of(plan, str(area)))
    assert draft.frames == 16 and frame_hashes(tmp_path / "out.mkv") == expected
