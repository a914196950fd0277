"""A window of a frame is restored as in the whole frame; outside it nothing changes, in output and state."""

from __future__ import annotations

import pytest
import torch

from pipeline import Guidance, StateError, StreamDiffVSRPipeline
from pipeline.frames import frame_to_tensor
from pipeline.state import StreamState
from pipeline.static_windows import BLEND, step_window
from pipeline.tiling import Window
from tests.moving_texture import make_clip

HEIGHT, WIDTH = 96, 144
FRAMES = [frame_to_tensor(frame) for frame in make_clip(3, HEIGHT, WIDTH)]
WINDOW = Window(16, 32, 24, 48)


def started(pipe: StreamDiffVSRPipeline) -> StreamState:
    state = pipe.start(seed=4)
    pipe.step(FRAMES[0], [state], steps=1)
    return state


@pytest.mark.parametrize("steps", [1, 2])
def test_a_window_as_large_as_the_frame_is_the_whole_step(pipe: StreamDiffVSRPipeline, steps: int) -> None:
    one, other = started(pipe), started(pipe)
    for frame in FRAMES[1:]:
        whole = pipe.step(frame, [one], steps=steps)
        window = step_window(pipe, frame, other, steps, Window(0, HEIGHT, 0, WIDTH))
        assert torch.allclose(window, whole, atol=1e-5)
    assert torch.equal(one.prev_input_3HW, other.prev_input_3HW) and one.index == other.index == 3


def test_outside_of_the_window_output_and_input_stay(pipe: StreamDiffVSRPipeline) -> None:
    state = started(pipe)
    before, given = state.prev_output_3HW, state.prev_input_3HW
    assert before is not None and given is not None
    output = step_window(pipe, FRAMES[1], state, 1, WINDOW)
    touched = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    WINDOW.of(touched).fill_(True)
    assert state.prev_input_3HW is not None and state.prev_output_3HW is not None and state.index == 2
    assert torch.equal(state.prev_input_3HW[:, touched], FRAMES[1][0][:, touched])
    assert torch.equal(state.prev_input_3HW[:, ~touched], given[:, ~touched])
    blended = torch.zeros(4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    WINDOW.grown(BLEND, HEIGHT, WIDTH).times(4).of(blended).fill_(True)
    assert torch.equal(output[0][:, ~blended], before[:, ~blended])
    assert torch.equal(output[0], state.prev_output_3HW)
    inside = WINDOW.times(4)
    assert not torch.allclose(inside.of(output[0]), inside.of(before), atol=1e-3)
    assert given is not state.prev_input_3HW and before is not state.prev_output_3HW, "a saved state keeps its tensors"


def test_where_no_window_can_be_had_the_whole_frame_is_restored(pipe: StreamDiffVSRPipeline) -> None:
    first, alone = pipe.start(seed=4), pipe.start(seed=4)
    assert torch.equal(step_window(pipe, FRAMES[0], first, 1, WINDOW), pipe.step(FRAMES[0], [alone], steps=1))
    usual, pipe.guidance = pipe.guidance, Guidance(artg=False)
    try:
        assert torch.equal(step_window(pipe, FRAMES[1], first, 1, WINDOW), pipe.step(FRAMES[1], [alone], steps=1))
    finally:
        pipe.guidance = usual


def test_another_models_state_is_refused_and_left_as_it_is(pipe: StreamDiffVSRPipeline) -> None:
    state = started(pipe)
    state.model_sha256 = "b" * 64
    before = state.to_bytes()
    with pytest.raises(StateError):
        step_window(pipe, FRAMES[1], state, 1, WINDOW)
    assert state.to_bytes() == before
