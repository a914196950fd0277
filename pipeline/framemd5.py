"""Checksums by which an archive proves that nothing changed: of a file, and of each picture as it decodes.

The list of pictures is in FFmpeg's `framemd5` format, version 2: what `ffmpeg -f framemd5` writes of the same file with
its own time stamps kept. It outlives a change of container and of lossless codec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import av
import numpy as np

from pipeline.video_container import Limits, VideoSource
from pipeline.video_reader import VideoReader


def sha256_line(sha256: str, name: str) -> str:
    """Return the content of a `.sha256` file, which `sha256sum --check` reads; `name` is the file's beside it."""
    return f"{sha256}  {name}\n"


def framemd5(source: VideoSource, *, limits: Limits | None = None) -> Iterator[str]:
    """Yield the lines, without line ends, for every picture of a file; it is read once, in constant memory.

    Args:
        limits: see `Limits`.

    Raises:
        VideoNotFound, UnreadableVideo, NoVideoStream, FrameTooLarge, FrameTooSmall: see `video_errors`.
    """
    with VideoReader(source, deinterlace="off", limits=limits) as reader:
        info = reader.info
        yield "#format: frame checksums"
        yield "#version: 2"
        yield "#hash: MD5"
        yield f"#tb 0: {_ratio(info.time_base.as_integer_ratio())}"
        yield "#media_type 0: video"
        yield "#codec_id 0: rawvideo"
        yield f"#dimensions 0: {info.width}x{info.height}"
        yield f"#sar 0: {_ratio(info.sample_aspect_ratio.as_integer_ratio())}"
        yield "#stream#, dts,        pts, duration,     size, hash"
        for picture in reader.pictures():
            size, digest = 0, hashlib.md5(usedforsecurity=False)
            for plane in _planes(picture):
                size += len(plane)
                digest.update(plane)
            pts, duration = picture.pts or 0, picture.duration or reader.step
            yield f"0, {pts:>10}, {pts:>10}, {duration:>8}, {size:>8}, {digest.hexdigest()}"


def _ratio(parts: tuple[int, int]) -> str:
    return f"{parts[0]}/{parts[1]}"


def _planes(picture: av.VideoFrame) -> Iterator[bytes]:
    """The samples of each plane without the padding behind its lines."""
    layout = picture.format
    for number, plane in enumerate(picture.planes):
        if len(picture.planes) == 1:
            length = plane.width * layout.padded_bits_per_pixel // 8
        else:
            length = plane.width * sum((one.bits + 7) // 8 for one in layout.components if one.plane == number)
        lines = np.frombuffer(bytes(plane), np.uint8)[: plane.height * plane.line_size].reshape(
            plane.height, plane.line_size
        )
        yield lines[:, :length].tobytes()
