"""Flow that is looked for before its step: the same numbers, in time that would pass anyway."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline.engine import StandIn
from pipeline.errors import InputError
from pipeline.flow import DISFlow, NetFlow, ZeroFlow, _grey_levels, _grey_of_levels, upscale_flow
from pipeline.flow_ahead import FlowAhead, flow_ahead
from pipeline.frames import frame_to_tensor
from tests.moving_texture import make_clip

CPU = torch.device("cpu")


def pictures(kind: str, count: int = 3, height: int = 40, width: int = 56) -> list[NDArray[np.integer]]:
    clip: list[NDArray[np.integer]] = [*make_clip(count, height, width)]
    return clip if kind == "8 bit" else [frame.astype(np.uint16) * 251 + 17 for frame in clip]


@pytest.mark.parametrize("kind", ["8 bit", "16 bit"])
def test_grey_levels_do_not_depend_on_how_a_device_rounds(kind: str) -> None:
    """Of all numbers of three channels one in a thousand lies between two grey levels."""
    frame = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    levels = frame if kind == "8 bit" else frame.astype(np.uint16) * 257
    tensor = frame_to_tensor(levels)
    wanted = _grey_of_levels(levels)
    assert wanted.dtype == np.uint8 and wanted.min() < 40 and wanted.max() > 215
    red, green, blue = (frame[..., channel].astype(int) for channel in range(3))
    np.testing.assert_array_equal(wanted, (299 * red + 587 * green + 114 * blue + 500) // 1000)
    for nudge in (0, 3e-7, -3e-7):
        np.testing.assert_array_equal(_grey_levels(tensor + nudge)[0].numpy(), wanted)


@pytest.mark.parametrize("kind", ["8 bit", "16 bit"])
@pytest.mark.parametrize("size", [(16, 16), (17, 40), (40, 56)])
def test_it_is_the_flow_that_the_step_would_find(kind: str, size: tuple[int, int]) -> None:
    before, now, _ = pictures(kind, 3, *size)
    wanted = DISFlow()(frame_to_tensor(now), frame_to_tensor(before))
    assert torch.equal(upscale_flow(DISFlow().search(now, before)), wanted)
    ahead = FlowAhead(DISFlow())
    try:
        search = ahead.start(now, before)
        assert search is not None and search.is_for(now, before)
        assert not search.is_for(now.copy(), before) and not search.is_for(now, None)
        found = search.flow(CPU)
        assert found is not None and torch.equal(found, wanted[0])
    finally:
        ahead.close()


def test_some_streams_of_a_batch_have_their_flow_already(pipe: StreamDiffVSRPipeline) -> None:
    clips = [pictures("8 bit"), [frame[:, ::-1].copy() for frame in pictures("8 bit")], pictures("8 bit")[::-1]]

    def run(known: set[int]) -> Tensor:
        states = [pipe.start(seed=number) for number in range(3)]
        for number in (0, 2):  # the second one begins with the others' second frame
            pipe.step(frame_to_tensor(clips[number][0]), [states[number]], steps=1)
        frames = torch.cat([frame_to_tensor(clip[1]) for clip in clips])
        flows = [
            upscale_flow(DISFlow().search(clip[1], clip[0]))[0] if number in known else None
            for number, clip in enumerate(clips)
        ]
        return pipe.step(frames, states, steps=1, flow_B2HW=flows)

    wanted = run(set())
    for known in ({0}, {2}, {0, 2}, {0, 1, 2}):
        assert torch.equal(run(known), wanted)


def test_flow_of_another_size_or_number_is_refused(pipe: StreamDiffVSRPipeline) -> None:
    frame, state = frame_to_tensor(pictures("8 bit")[0]), pipe.start()
    for flows, code in (([None, None], "flow-count"), ([torch.zeros(2, 40, 56)], "tensor-shape")):
        with pytest.raises(InputError) as refused:
            pipe.step(frame, [state], steps=1, flow_B2HW=flows)
        assert refused.value.code == code and state.index == 0


def test_only_frames_that_are_alike_have_flow() -> None:
    ahead = FlowAhead(DISFlow())
    small, large = pictures("8 bit")[0], pictures("8 bit", 1, 64, 64)[0]
    assert ahead.start(small, large) is None and ahead.start(small.astype(np.uint16), small) is None
    ahead.close()


class Held(DISFlow):
    """Waits to be let go; then it may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.go, self.begun, self._error = threading.Event(), 0, error

    def search(self, current_HWC: NDArray[np.integer], previous_HWC: NDArray[np.integer]) -> Tensor:
        self.begun += 1
        assert self.go.wait(10)
        if self._error is not None:
            raise self._error
        return super().search(current_HWC, previous_HWC)


def test_an_error_of_the_thread_comes_out_where_the_flow_is_wanted() -> None:
    flow = Held(MemoryError("no room"))
    ahead = FlowAhead(flow)
    before, now, _ = pictures("8 bit")
    search = ahead.start(now, before)
    assert search is not None
    flow.go.set()
    with pytest.raises(MemoryError, match="no room"):
        search.flow(CPU)
    ahead.close()


def test_what_nobody_wants_is_not_begun_and_threads_end() -> None:
    threads = threading.active_count()
    flow = Held()
    ahead = FlowAhead(flow)
    before, now, after = pictures("8 bit")
    first, second, third = ahead.start(now, before), ahead.start(after, now), ahead.start(after, before)
    assert first is not None and second is not None and third is not None
    second.call_off()
    assert second.flow(CPU) is None
    threading.Timer(0.05, flow.go.set).start()
    ahead.close()
    assert flow.begun == 1 and third.flow(CPU) is None and first.flow(CPU) is not None
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


class Elsewhere:
    """A pipeline on a device that is not the processor."""

    def __init__(self, flow: object) -> None:
        self.flow, self.device = flow, torch.device("cuda")


def test_it_is_used_where_it_helps(pipe: StreamDiffVSRPipeline) -> None:
    assert pipe.flow.name == "dis" and flow_ahead(pipe) is None, "the processor is busy with the networks"
    assert flow_ahead(pipe, always=True) is not None
    assert flow_ahead(Elsewhere(DISFlow())) is not None  # type: ignore[arg-type]
    for flow in (DISFlow("output"), ZeroFlow(), NetFlow(), Held()):
        assert flow_ahead(Elsewhere(flow), always=True) is None  # type: ignore[arg-type]
    assert flow_ahead(StandIn("stand-in:1"), always=True) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["8 bit", "16 bit"])
def test_beside_a_gpu_it_is_the_flow_that_the_step_would_find(kind: str) -> None:
    device = torch.device("cuda")
    before, now, _ = pictures(kind)
    wanted = DISFlow()(frame_to_tensor(now, device), frame_to_tensor(before, device))
    ahead = FlowAhead(DISFlow())
    search = ahead.start(now, before)
    assert search is not None
    found = search.flow(device)
    ahead.close()
    assert found is not None and torch.equal(found, wanted[0])
