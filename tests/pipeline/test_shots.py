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


def flashed(frame: np.ndarray, at: tuple[float, float], gain: float, offset: float) -> np.ndarray:
    """A frame lit unevenly: brightest at a place given in shares of its sides, burnt out where it is too much."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    near = np.exp(-((x / width - at[0]) ** 2 + (y / height - at[1]) ** 2) / 0.5)[..., None]
    return np.clip(frame * (1 + (gain - 1) * near) + offset * near, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_uneven_flashes_of_up_to_three_pictures_are_no_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = shot(scene(seed + 30), 30)
    for first in (6, 14, 22):
        for index in range(first, first + int(rng.integers(1, 4))):
            frames[index] = flashed(frames[index], tuple(rng.uniform(0, 1, 2)), rng.uniform(1, 3), rng.uniform(20, 150))
    assert cuts(frames) == []


@pytest.mark.parametrize("speed", [10, 30, 60])
def test_a_whip_pan_is_no_cut_also_over_fine_texture(speed: int) -> None:
    rng = np.random.default_rng(speed)
    texture = rng.normal(110, 40, (180, 880, 1)).repeat(3, 2)
    fine_HWC = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1) + np.roll(texture, (1, 1), (0, 1))) / 4
    for picture_HWC in (fine_HWC, scene(40 + speed)):
        assert cuts(shot(picture_HWC, 11, speed=(speed, 3))) == []


def test_a_zoom_is_no_cut() -> None:
    whole = scene(50)[:, :300]
    frames = []
    for step in range(16):
        height = int(180 * 0.94**step)
        width = height * 300 // 180
        rows = np.linspace(90 - height / 2, 89 + height / 2, 120).astype(int)
        columns = np.linspace(150 - width / 2, 149 + width / 2, 200).astype(int)
        frames.append(whole[rows][:, columns].astype(np.uint8))
    assert cuts(frames) == cuts(frames[::-1]) == []


def test_a_burnt_out_scene_that_stays_is_a_shot_of_its_own() -> None:
    white = [np.maximum(frame, 250) for frame in shot(scene(60), 8)]
    for frame in white:
        frame[50:70, 80:140] = (20, 20, 60)
    found = cuts(shot(scene(61), 8) + white)
    assert len(found) == 1 and 8 <= found[0] <= 11


def test_the_tensors_of_the_detector_before_are_still_read() -> None:
    """Version 1: a grid of 18 x 32 shares of white, three pictures, no count of burnt ones."""
    before, after = shot(scene(70), 6), shot(scene(71), 4)
    new = CutDetector()
    cuts(before, new)
    tensors = new.tensors()
    coarse_KYX = tensors["grids"].double().reshape(-1, 18, 2, 32, 2).mean((2, 4)).float() / 65535
    old = {"grids": coarse_KYX[-3:], "colours": tensors["colours"][-3:], "usual": tensors["usual"]}
    assert cuts(before[-1:] + after, CutDetector.from_tensors(old)) == [1]
