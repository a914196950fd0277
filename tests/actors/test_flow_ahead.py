"""Flow of the next frame is looked for while the model has this one: the same pictures, and no time in the step."""

from __future__ import annotations

import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.records import Row
from actors.restoration import Restoration, step_alone
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.sources import Item
from pipeline import StreamDiffVSRPipeline
from pipeline.flow import DISFlow
from pipeline.reference_step import ReferenceStep
from tests.moving_texture import make_clip
from tests.random_model import save_random_model

POLICY: dict[str, object] = {"settle": 1, "longest_hold": 3, "levels": [2, 1], "shares": [0.1]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained(save_random_model(tmp_path_factory.mktemp("model") / "random"))


def scenes() -> list[NDArray[np.uint8]]:
    """Six frames that move, six that stand still, six in which a square moves."""
    moving = make_clip(6, 48, 64)
    still = [moving[-1]] * 6
    square = []
    for left in range(8, 32, 4):
        square.append(still[0].copy())
        square[-1][16:28, left : left + 10] = (250, 20, 90)
    return [*moving, *still, *square]


def row_of(folder: Path, frames: list[NDArray[np.uint8]], **options: Any) -> Row:
    source = folder / "film.mkv"
    if not source.exists():
        with av.open(source, "w") as output:
            stream = output.add_stream("libx264rgb", rate=25, options={"qp": "0", "g": "4"})
            stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "rgb24"
            for number, picture_HWC in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture_HWC)
                frame.pts, frame.time_base = number, Fraction(1, 25)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), str(folder / "out.mkv"), source.name, info.size_bytes, info.version)
    chosen = Settings(cuts=False, codec="ffv1", pix_fmt="yuv444p", **options)
    area = folder / f"area-{len(list(folder.iterdir()))}"
    (row,) = rows_of(plan_video(item, plan_options(chosen), "model"), f"{area}/segments", f"{area}/states")
    return row


class Restored:
    """What one run gave: outputs, whether flow was known, and seconds for each frame."""

    def __init__(self, pipe: StreamDiffVSRPipeline, row: Row, *, look_ahead: bool) -> None:
        self.outputs: list[Tensor] = []
        self.known: list[bool] = []

        def step(*arguments: Any, **known: Any) -> Tensor:
            # the reader is as far ahead as it gets: what follows is there to be looked at
            time.sleep(0.02)
            self.outputs.append(step_alone(pipe, *arguments, **known).clone())
            self.known.append("flow_2HW" in known)
            return self.outputs[-1]

        began = time.perf_counter()
        with Restoration(pipe, row, threads=1, max_pixels=10**6, step=step, look_ahead=look_ahead) as task:
            for _ in task.run():
                pass
        self.seconds = time.perf_counter() - began


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": "auto", "step_policy": POLICY},
        {"steps": "auto", "step_policy": {**POLICY, "window_share": 0.6}},
    ],
    ids=["fixed", "held", "windows"],
)
def test_the_pictures_are_the_same(pipe: StreamDiffVSRPipeline, options: dict[str, Any], tmp_path: Path) -> None:
    threads = threading.active_count()
    usual = Restored(pipe, row_of(tmp_path, scenes(), **options), look_ahead=False)
    ahead = Restored(pipe, row_of(tmp_path, scenes(), **options), look_ahead=True)
    assert len(ahead.outputs) == len(usual.outputs)
    assert all(torch.equal(a, b) for a, b in zip(ahead.outputs, usual.outputs, strict=True))
    assert not any(usual.known) and not ahead.known[0]
    assert Counter(ahead.known)[True] >= (15 if options["steps"] == 1 else 6)
    if options["steps"] == 1:
        assert len(ahead.outputs) == 18
    assert threading.active_count() == threads


def test_nothing_is_looked_for_where_it_does_not_help(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DISFlow, "search", lambda *_: pytest.fail("the networks need the processor"))
    with Restoration(pipe, row_of(tmp_path, scenes()[:3], steps=1), threads=1, max_pixels=10**6) as task:
        assert len(list(task.run())) >= 3


STEP_S, FLOW_S = 0.06, 0.05


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and flow take their time elsewhere, as on a device and in OpenCV: Python's lock is free meanwhile."""

    def restore(_: object, frames_B3hw: Tensor, *__: object) -> Tensor:
        time.sleep(STEP_S)
        return torch.zeros(len(frames_B3hw), 3, 4 * frames_B3hw.shape[2], 4 * frames_B3hw.shape[3])

    def search(_: object, current_Bhw: NDArray[np.uint8], previous_Bhw: NDArray[np.uint8]) -> Tensor:
        time.sleep(FLOW_S * len(current_Bhw))
        return torch.zeros(len(current_Bhw), 2, *current_Bhw.shape[1:])

    monkeypatch.setattr(ReferenceStep, "run", restore)
    monkeypatch.setattr(DISFlow, "_search", search)


def test_a_step_does_not_wait_for_flow(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch)
    frames = make_clip(16, 48, 64)
    usual = Restored(pipe, row_of(tmp_path, frames, steps=1), look_ahead=False).seconds
    ahead = Restored(pipe, row_of(tmp_path, frames, steps=1), look_ahead=True).seconds
    assert usual - ahead > 0.6 * FLOW_S * (len(frames) - 1)


def test_an_error_of_the_search_is_an_error_of_the_step(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no flow in this")

    monkeypatch.setattr(DISFlow, "search", fails)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no flow in this"):
        Restored(pipe, row_of(tmp_path, scenes(), steps=1), look_ahead=True)
    assert threading.active_count() == threads
