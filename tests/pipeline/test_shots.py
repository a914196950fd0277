"""The cut detector on made scenes: what is a cut, what looks like one, and that it can be stopped and taken up."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from pipeline.shots import CutDetector


def scene(seed: int, height: int = 180, width: int = 880) -> np.ndarray:
    """A large picture of random soft shapes in the colours of one place (float HWC, 0..255)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    picture_HWC = np.broadcast_to(rng.uniform(30, 180, 3), (height, width, 3)).copy()
    for _ in range(40):
        at_y, at_x, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(10, 70)
        inside = ((y - at_y) ** 2 + (x - at_x) ** 2) < size**2
        picture_HWC[inside] = 0.6 * picture_HWC[inside] + 0.4 * rng.uniform(0, 255, 3)
    return picture_HWC


def shot(
    picture_HWC: np.ndarray, count: int, *, speed: tuple[float, float] = (2, 1), seed: int = 0
) -> list[np.ndarray]:
    """A camera moving over a picture, 200x120, with noise."""
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(count):
        x, y = int(index * speed[0]), int(index * speed[1])
        noisy = picture_HWC[y : y + 120, x : x + 200] + rng.normal(0, 3, (120, 200, 3))
        frames.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return frames


def cuts(frames: Iterable[np.ndarray], detector: CutDetector | None = None) -> list[int]:
    detector = detector or CutDetector()
    return [index for index, frame in enumerate(frames) if detector.update(frame)]


@pytest.mark.parametrize("seed", range(8))
def test_a_hard_cut_is_found_at_its_first_picture_and_nowhere_else(seed: int) -> None:
    frames = shot(scene(seed), 8) + shot(scene(seed + 100), 8) + shot(scene(seed + 200), 8)
    assert cuts(frames) == [8, 16]


def test_motion_noise_and_a_fast_pan_are_no_cuts() -> None:
    assert cuts(shot(scene(1), 30, speed=(4, 2))) == []
    assert cuts(shot(scene(21), 15, speed=(40, 0))) == []


def test_a_flash_is_no_cut_and_neither_is_the_picture_after_it() -> None:
    frames = shot(scene(3), 20)
    frames[8] = np.clip(frames[8].astype(int) * 2 + 90, 0, 255).astype(np.uint8)
    frames[13] = np.full_like(frames[13], 255)
    assert cuts(frames) == []


def test_a_slow_fade_is_no_cut_but_a_new_scene_after_black_is() -> None:
    first = [(frame * (1 - k / 12)).astype(np.uint8) for k, frame in enumerate(shot(scene(4), 13))]
    black = [np.zeros_like(first[0])] * 3
    frames = first + black + shot(scene(5), 6)
    assert cuts(frames) == [16]
    assert cuts(first + black + shot(scene(4), 6)) == []


def test_the_decision_needs_no_later_picture() -> None:
    frames = shot(scene(6), 6) + shot(scene(7), 6)
    assert cuts(frames[:7]) == [6]


def test_depth_does_not_matter() -> None:
    frames = shot(scene(8), 6) + shot(scene(9), 6)
    assert cuts([frame.astype(np.uint16) * 257 for frame in frames]) == cuts(frames) == [6]


def test_a_stream_goes_on_from_the_tensors_as_if_it_had_not_stopped() -> None:
    frames = shot(scene(10), 9) + shot(scene(11), 9) + shot(scene(12), 9)
    for stop in (1, 8, 9, 10, 20):
        first = CutDetector()
        before = cuts(frames[:stop], first)
        second = CutDetector.from_tensors(first.tensors())
        assert before + [stop + index for index in cuts(frames[stop:], second)] == [9, 18]
        whole = CutDetector()
        cuts(frames, whole)
        assert all((second.tensors()[name] == whole.tensors()[name]).all() for name in whole.tensors())


def test_a_new_detector_has_no_tensors() -> None:
    assert CutDetector().tensors() == {}
    assert cuts(shot(scene(13), 4), CutDetector.from_tensors({})) == []


def test_the_smallest_pictures_and_a_change_of_size() -> None:
    small = [frame[::8, ::12] for frame in shot(scene(14), 4)]
    assert small[0].shape[:2] == (15, 17)
    assert cuts(small) == []
    assert cuts([*small, *shot(scene(14), 2)]) == [4]
