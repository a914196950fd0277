"""The policy of steps: what it gives to still, moving and new pictures, and that its memory is in the state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pipeline.errors import InputError, StateError
from pipeline.state import StreamState
from pipeline.step_policy import Choice, StepPolicy, choose

SETTLED_AT_ONCE = StepPolicy(settle=0, longest_hold=5)
Picture = np.ndarray[Any, Any]


def follow(policy: StepPolicy, frames: Sequence[Picture], state: StreamState | None = None) -> list[Choice]:
    """Choose for each frame as a stream does; the outputs are of no interest."""
    state = state or StreamState(model_sha256="a" * 64)
    choices = []
    for frame in frames:
        choices.append(choose(policy, frame, state))
        if choices[-1].level:
            state.advance(torch.zeros(3, 4, 4), torch.zeros(3, 1, 1))
        else:
            state.hold()
        state.policy = choices[-1].memory
    return choices


def levels(policy: StepPolicy, frames: Sequence[Picture], state: StreamState | None = None) -> list[int]:
    return [choice.level for choice in follow(policy, frames, state)]


def noisy(frame: Picture, number: int, sigma: float) -> Picture:
    noise = np.random.default_rng(number).normal(0, sigma, frame.shape)
    return (frame + noise).round().clip(0, 255).astype(np.uint8)


def picture(seed: int, side: int = 160) -> Picture:
    """Light and dark patches of all sizes, as in a photograph."""
    layers = []
    for cells in (4, 10, 40):
        grid = np.random.default_rng(seed + cells).uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        layers.append(cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float64))
    return (np.average(layers, axis=0, weights=(4, 3, 2))).clip(0, 255).astype(np.uint8)


def pan(count: int, down: int, across: int) -> list[Picture]:
    """A camera that moves over a picture, by so many pixels a frame."""
    whole = picture(3)
    return [np.ascontiguousarray(whole[down * k :, across * k :][:90, :126]) for k in range(count)]


SCENE = picture(0)[:90, :126]


@pytest.mark.parametrize("sigma", [0.0, 1.0, 3.0])
def test_a_still_picture_is_held_and_refreshed_whatever_its_noise(sigma: float) -> None:
    still = [noisy(SCENE, number, sigma) for number in range(14)]
    assert levels(SETTLED_AT_ONCE, still) == [4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]


def test_a_picture_settles_before_it_is_held() -> None:
    assert levels(StepPolicy(settle=3, longest_hold=2), [SCENE] * 9) == [4, 1, 1, 1, 0, 0, 1, 0, 0]
    touched = SCENE.copy()
    touched[40:56, 40:56] = 255 - touched[40:56, 40:56]
    found = levels(StepPolicy(settle=3), [SCENE] * 5 + [touched] * 5)
    assert found == [4, 1, 1, 1, 0, 1, 1, 1, 1, 0], "what came in settles as well"


@pytest.mark.parametrize("side", [3, 8])
def test_a_small_thing_that_moves_ends_the_hold(side: int) -> None:
    touched = SCENE.copy()
    touched[-side:, -side:] = np.where(touched[-side:, -side:] < 128, 255, 0)  # in the corner, where blocks are cut
    assert levels(SETTLED_AT_ONCE, [SCENE, SCENE, touched, touched]) == [4, 0, 1, 0]


def test_what_moves_alone_is_restored_in_its_window() -> None:
    policy = StepPolicy(settle=1, longest_hold=4, window_share=0.3)
    places = [8, 8, 8, 10, 12, 14, 14, 14]
    frames = []
    for left in places:
        frame = SCENE.copy()
        frame[40:50, left : left + 10] = 255 - frame[40:50, left : left + 10]
        frames.append(frame)
    found = follow(policy, frames)
    assert [choice.level for choice in found] == [4, 1, 0, 1, 1, 1, 1, 0]
    windows = [choice.window for choice in found]
    # After four frames that were not restored whole one is; it is the fourth of hold, window, window, window.
    assert [window is not None for window in windows] == [False, False, False, True, True, True, False, False]
    for before, left, window in zip(places[2:], places[3:6], windows[3:6], strict=False):
        assert window is not None and window.top <= 40 and window.bottom >= 50
        assert window.left <= before and window.right >= left + 10, "where it was is new as well"
    assert follow(policy.model_copy(update={"window_share": 0.01}), frames)[3].window is None
    assert follow(policy.model_copy(update={"window_share": None}), frames)[3].window is None


def test_what_was_held_outside_of_a_window_is_compared_with_what_it_shows() -> None:
    policy = StepPolicy(settle=0, longest_hold=100, window_share=0.3, noise_gain=0)
    frames = [SCENE // 2 + 60]
    for number in range(1, 8):
        frame = frames[0] - np.uint8(number // 3)  # a level each three frames, everywhere
        frame[:8, :8] = 20 * number
        frames.append(frame)
    found = follow(policy, frames)
    assert [choice.window is not None for choice in found] == [False, True, True, True, True, True, False, True]


def test_slow_change_adds_up_against_the_restored_frame() -> None:
    fading = [SCENE // 2 + np.uint8(60 - number // 2) for number in range(12)]
    found = levels(StepPolicy(settle=0, longest_hold=100, noise_gain=0), fading)
    assert found == [4, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], "a level each two frames, where 1.5 are granted"


def test_what_is_new_gets_more_steps_and_what_only_moves_gets_few() -> None:
    other = picture(1)[:90, :126]
    half = SCENE.copy()
    half[30:60, 30:60] = other[30:60, 30:60]
    assert levels(StepPolicy(), [SCENE, half]) == [4, 2]
    assert levels(StepPolicy(), [SCENE, other]) == [4, 4]
    # Of a pan only what comes in at the border is new.
    for down, across in ((2, 4), (3, 5)):
        share = follow(StepPolicy(), pan(2, down, across))[1].new_share
        assert 0 < share < 0.15, (down, across)


def test_the_start_a_cut_and_every_nth_frame_get_the_most() -> None:
    state, policy = StreamState(model_sha256="a" * 64), StepPolicy(levels=(4, 1), shares=(0.15,), full_every=3)
    moving = pan(9, 1, 1)
    assert levels(policy, moving[:5], state) == [4, 1, 1, 4, 1]
    state.reset()
    assert levels(policy, moving[5:], state) == [4, 1, 1, 4]
    assert levels(StepPolicy(), [SCENE, SCENE[:64, :64], SCENE[:64, :64]])[1] == 4, "another size is another scene"


def test_numbers_from_a_table_or_the_environment_are_the_same_policy() -> None:
    given = StepPolicy.of({"levels": (4.0, 1.0), "shares": [0.1], "longest_hold": 3.0})
    assert given == StepPolicy(levels=(4, 1), shares=(0.1,), longest_hold=3)
    assert StepPolicy.of(given.model_dump(mode="json")) == given


def test_eight_and_sixteen_bits_get_the_same() -> None:
    frames = [*(frame[:33, :47] for frame in pan(4, 1, 2)), SCENE[:33, :47], SCENE[:33, :47]]
    wide = [frame.astype(np.uint16) * 257 for frame in frames]
    assert levels(SETTLED_AT_ONCE, frames) == levels(SETTLED_AT_ONCE, wide)


def test_a_stream_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    policy = StepPolicy(settle=2, longest_hold=3, full_every=7)
    frames = [*[SCENE] * 6, *pan(6, 0, 3), *pan(4, 1, 1), *[SCENE] * 8]
    expected = levels(policy, frames)
    assert set(expected) == {4, 2, 1, 0}
    for at in range(1, len(frames)):
        state = StreamState(model_sha256="a" * 64)
        before = levels(policy, frames[:at], state)
        loaded = StreamState.load(io.BytesIO(state.to_bytes()))
        assert before + levels(policy, frames[at:], loaded) == expected, at


def test_choosing_changes_nothing() -> None:
    state = StreamState(model_sha256="a" * 64)
    follow(StepPolicy(), [SCENE], state)
    before = state.to_bytes()
    first, second = choose(StepPolicy(), SCENE, state), choose(StepPolicy(), SCENE, state)
    assert first.level == second.level and state.to_bytes() == before, "a step that fails is tried again"


def test_a_held_frame_counts_and_keeps_both_pictures() -> None:
    state = StreamState(model_sha256="a" * 64, index=3)
    with pytest.raises(StateError, match="Frame 3"):
        state.hold()
    output, given = torch.rand(3, 8, 8), torch.rand(3, 2, 2)
    state.advance(output, given)
    assert state.hold() is output and state.prev_input_3HW is given and state.index == 5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"levels": [1, 4], "shares": [0.1]}, "most first"),
        ({"levels": [4, 2, 1], "shares": [0.1]}, "one entry fewer"),
        ({"levels": [4, 0], "shares": [0.1]}, "most first"),
        ({"shares": [0.1, 0.2]}, "largest first"),
        ({"longest_hold": 0}, "longest_hold"),
        ({"holds": 3}, "holds"),
    ],
)
def test_an_impossible_policy_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        StepPolicy.of(values)
    assert "longest_hold" in (caught.value.remedy or "")
