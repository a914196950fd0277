"""A few frames of a source beside their restorations: judged by `pipeline.consistency`, and as small pictures.

Three short stretches of a video are decoded from both files, no more, so that a report of a large archive stays cheap.
Knows no jobs.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.consistency import Consistency
    from pipeline.video import VideoInfo

_SPOTS = (0.2, 0.5, 0.8)  # of the duration
_FRAMES = 3  # that follow each other, at each spot
_JUDGED_WIDTH, _JUDGED_HEIGHT = 480, 360  # of the source: its middle, so that 4K costs no more than a tape
_WHOLE_WIDTH = 480
_DETAIL_WIDTH, _DETAIL_HEIGHT = 480, 320
_QUALITY = 85

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Still:
    """A JPEG as a `data:` address, with its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Spot:
    """One stretch of a video: when it is, how consistent it is, and its middle frame in both files (RGB, uint8)."""

    at_s: float
    consistency: Consistency
    source_HWC: Picture
    result_HWC: Picture
    stretch: Fraction  # sample aspect ratio
    rotation_deg: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One frame as people see it: the source enlarged by bicubic interpolation, and the result.

    The detail, at most half as wide and high, is cut from where the source has most of it; None for small pictures.
    """

    whole: tuple[Still, Still]
    detail: tuple[Still, Still] | None


def judge(source: Any, result: Any) -> list[Spot]:
    """Return three stretches of a video with their consistency; fewer where the video is short.

    Args:
        source, result: local paths or remote files, as `pipeline.video` takes them.

    Raises:
        VideoError: one of the files cannot be read.
    """
    from pipeline.consistency import consistency
    from pipeline.video import Limits, probe

    generous = Limits(min_side=1, max_side=8 * 8192, max_pixels=16 * 8192 * 4320)
    small, large = probe(source, limits=generous), probe(result, limits=generous)
    spots = []
    seen: set[Fraction] = set()
    for share in _SPOTS:
        before = _frames_at(source, small, generous, share * _usable_s(small))
        if len(before) < 2 or before[0][0] in seen:
            continue
        seen.add(before[0][0])
        after = _frames_at(result, large, generous, float(before[0][0]), step=1 / small.average_rate)
        pairs = list(_matched(before, after, Fraction(1, 2) / small.average_rate))
        if len(pairs) < 2:
            continue
        box = _middle(pairs[0][1], pairs[0][2])
        told = consistency(
            _tensor([_cut(picture, box) for _, picture, _ in pairs]),
            _tensor([_cut(picture, box) for _, _, picture in pairs]),
        )
        at, source_HWC, result_HWC = pairs[len(pairs) // 2]
        spots.append(Spot(float(at), told, source_HWC, result_HWC, small.sample_aspect_ratio, small.rotation_deg))
    return spots


def pair(spot: Spot) -> Pair:
    """Return the pictures of a stretch, small enough for a page."""
    import cv2

    height, width = spot.result_HWC.shape[:2]
    enlarged = np.asarray(cv2.resize(spot.source_HWC, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    sides = (enlarged, spot.result_HWC)
    wide, high = _as_seen(width, height, spot)
    shrink = min(1.0, _WHOLE_WIDTH / wide)
    size = max(1, round(wide * shrink)), max(1, round(high * shrink))
    whole = tuple(_still(_turned(side, spot.rotation_deg), size) for side in sides)
    detail = None
    if width >= _DETAIL_WIDTH and height >= _DETAIL_HEIGHT:
        x, y, w, h = _most_detail(spot.source_HWC, width, height)
        cut = [side[y : y + h, x : x + w] for side in sides]
        detail = tuple(_still(_turned(side, spot.rotation_deg), _as_seen(w, h, spot)) for side in cut)
    return Pair(whole, detail)  # type: ignore[arg-type]  # two sides each


def _usable_s(info: VideoInfo) -> float:
    if info.duration_s:
        return info.duration_s
    return float((info.frames or 1) / info.average_rate)


def _frames_at(
    place: Any, info: VideoInfo, limits: Any, at_s: float, step: Fraction = Fraction(0)
) -> list[tuple[Fraction, Picture]]:
    """Return frames from `at_s` on, each with its time since the first time stamp; half a `step` earlier ones too."""
    from pipeline.video import VideoReader

    start = info.start_pts + math.floor((Fraction(at_s) - step / 2) / info.time_base)
    found = []
    with VideoReader(place, limits=limits, threads=1, start_pts=start, info=info) as reader:
        for frame in reader:
            at = (frame.pts - info.start_pts) * info.time_base
            rgb_HWC = frame.rgb_HWC
            if rgb_HWC.dtype != np.uint8:
                rgb_HWC = (rgb_HWC >> 8).astype(np.uint8)
            found.append((at, rgb_HWC))
            if len(found) == _FRAMES + (step > 0):
                break
    return found


def _matched(
    before: list[tuple[Fraction, Picture]], after: list[tuple[Fraction, Picture]], tolerance: Fraction
) -> Iterator[tuple[Fraction, Picture, Picture]]:
    for at, picture in before[:_FRAMES]:
        nearest = min(after, key=lambda other: abs(other[0] - at), default=None)
        if nearest is not None and abs(nearest[0] - at) <= tolerance:
            yield at, picture, nearest[1]


def _middle(source_HWC: Picture, result_HWC: Picture) -> tuple[float, float, float, float]:
    """The middle that is judged, in shares of the picture: left, top, right, bottom."""
    height, width = source_HWC.shape[:2]
    x = max(0, width - _JUDGED_WIDTH) // 2
    y = max(0, height - _JUDGED_HEIGHT) // 2
    return x / width, y / height, (width - x) / width, (height - y) / height


def _cut(picture_HWC: Picture, box: tuple[float, float, float, float]) -> Picture:
    height, width = picture_HWC.shape[:2]
    left, top, right, bottom = box
    return picture_HWC[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


def _tensor(pictures: list[Picture]) -> Any:
    import torch

    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _as_seen(width: int, height: int, spot: Spot) -> tuple[int, int]:
    """The size on a screen: sample aspect ratio and rotation applied."""
    wide, high = max(1, round(width * spot.stretch)), height
    return (high, wide) if spot.rotation_deg % 180 else (wide, high)


def _turned(picture_HWC: Picture, rotation_deg: int) -> Picture:
    return np.rot90(picture_HWC, round(rotation_deg / 90) % 4)


def _most_detail(source_HWC: Picture, width: int, height: int) -> tuple[int, int, int, int]:
    """The window of the result (x, y, w, h) whose source has the strongest edges."""
    import cv2

    w, h = min(_DETAIL_WIDTH, width // 2), min(_DETAIL_HEIGHT, height // 2)
    grey = cv2.cvtColor(source_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
    edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
    scale = width / source_HWC.shape[1]
    box = max(1, round(w / scale)), max(1, round(h / scale))
    total = cv2.blur(edges, box)
    half_x, half_y = box[0] // 2, box[1] // 2
    inner = total[half_y : total.shape[0] - half_y or None, half_x : total.shape[1] - half_x or None]
    y, x = np.unravel_index(int(inner.argmax()), inner.shape) if inner.size else (0, 0)
    return min(round(float(x) * scale), width - w), min(round(float(y) * scale), height - h), w, h


def _still(picture_HWC: Picture, size: tuple[int, int]) -> Still:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(picture_HWC))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return Still(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", *picture.size)
