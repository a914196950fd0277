"""Telling interlaced from progressive pictures by what they show, where their flags say nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.interlacing import Deinterlacer, FieldStatistics
from tests.video_files import picture


def moving(time: float) -> np.ndarray:
    """A textured scene that moves sideways by 5 pixels per unit of time."""
    y, x = np.mgrid[0:64, 0:96].astype(float)
    at = x + 5 * time
    grey = 120 + 60 * np.sin(at / 4) + 30 * np.sin(at / 2.3 + y / 3) + 20 * np.cos(y / 5)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, 2)


def woven(index: int) -> np.ndarray:
    rgb_HWC = moving(2 * index)
    rgb_HWC[1::2] = moving(2 * index + 1)[1::2]
    return rgb_HWC


def frame_of(rgb_HWC: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format="yuv420p")


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (woven, True),
        (lambda index: moving(2 * index), False),
        (picture, False),
        (lambda index: moving(0), False),
        # Fine horizontal lines are no combs: they do not come from motion.
        (lambda index: np.where(np.arange(64)[:, None, None] % 2, 180, moving(0)).astype(np.uint8), False),
    ],
    ids=["woven", "progressive", "a small thing moves", "nothing moves", "striped"],
)
def test_unflagged_pictures_are_judged_by_their_motion(scene: Callable[[int], np.ndarray], expected: bool) -> None:
    statistics = FieldStatistics()
    for index in range(12):
        statistics.add(frame_of(scene(index)))
    assert statistics.interlaced() is expected


def test_without_pictures_nothing_is_known() -> None:
    assert FieldStatistics().interlaced() is None


def test_the_filter_gives_every_picture_its_own_time_stamp() -> None:
    deinterlacer = Deinterlacer(every=True)
    stamps = [0, 1001, 2002, 4004, 9000]
    out: list[av.VideoFrame] = []
    for index, stamp in enumerate(stamps):
        frame = frame_of(woven(index))
        frame.pts, frame.time_base = stamp, Fraction(1, 30000)
        out += deinterlacer.push(frame, Fraction(1, 30000))
        assert len(out) == index  # one picture late, for it needs the next field
    out += deinterlacer.flush()
    assert [frame.pts for frame in out] == stamps
    assert {frame.time_base for frame in out} == {Fraction(1, 30000)}
