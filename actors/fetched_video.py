"""A short video that a request names by its address: fetched within a policy, decoded within limits, a clip of pixels.

The file is fetched whole before libav sees it, and opened with the one demuxer that its first bytes call for. Blocking.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import numpy as np

from actors.container_sniff import sniff
from actors.oip import Clip, ClipLimits, bad, too_many_frames
from actors.upload import as_refusal
from infra.downloads import fetch_whole
from infra.protocol import LARGEST_SIDE
from pipeline.video import Limits, VideoReader

if TYPE_CHECKING:
    from infra.network import FetchPolicy

_THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class _FetchedVideo:
    """A file in memory, as `VideoReader` opens what is not on this machine."""

    demuxer: str
    content: bytes
    name: str = "The video"
    comes_once: bool = False

    def open(self) -> BinaryIO:
        return cast(BinaryIO, io.BytesIO(self.content))


def fetch_clip(address: str, policy: FetchPolicy, *, limits: ClipLimits, limit_bytes: int) -> Clip:
    """Return the frames of the video at an address. Deep colour becomes 8 bits.

    Raises:
        NetworkError: the policy does not let it be fetched, or it cannot be.
        BadMessage, FrameTooLarge: it is no video, or too much of one.
    """
    content = fetch_whole(address, policy, limit_bytes=limit_bytes)
    container = sniff(content, whole=True)
    assert container is not None
    video = _FetchedVideo(container.demuxer, content)
    most_pixels = limits.max_result_bytes // 3  # an answer has at least as many pixels as its frames
    frames: list[bytes] = []
    size = 0, 0
    try:
        reader = VideoReader(
            video, limits=Limits(max_pixels=most_pixels, max_side=LARGEST_SIDE), threads=_THREADS, deinterlace="auto"
        )
        with reader:
            for frame in reader:
                if len(frames) >= limits.max_frames:
                    raise too_many_frames(limits.max_frames)
                rgb_HWC = frame.rgb_HWC
                if rgb_HWC.dtype != np.uint8:
                    rgb_HWC = ((rgb_HWC.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
                height, width = rgb_HWC.shape[:2]
                if size not in ((0, 0), (width, height)):
                    raise bad("The video changes its size.", "Send its frames instead.", code="video-size-changes")
                size = width, height
                frames.append(np.ascontiguousarray(rgb_HWC).tobytes())
                if len(frames) * len(frames[0]) > limits.max_result_bytes:
                    raise too_many_frames(len(frames) - 1)
    except Exception as error:
        raise as_refusal(error) from None
    if not frames:
        raise bad("The video has no picture.", "Name another one.", code="video-empty")
    return Clip("raw", tuple(frames), (size,) * len(frames))
