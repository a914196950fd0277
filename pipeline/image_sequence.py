"""A folder of numbered PNG or JPEG pictures, read and written as a video.

Pictures are taken in natural order (`frame2` before `frame10`). There are no time stamps: picture k has pts k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.colour import ColourTags, bit_depth_of, from_rgb
from pipeline.video_container import Limits, check_size, decoder_bounds
from pipeline.video_errors import UnreadableVideo, VideoNotFound
from pipeline.video_probe import StreamInfo, VideoInfo

SEQUENCE_RATE = Fraction(25)
_DECODERS = {".png": "png", ".jpg": "mjpeg", ".jpeg": "mjpeg"}


class ImageSequence:
    """The pictures of one folder.

    Raises:
        VideoNotFound: the folder holds no PNG or JPEG file.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.limits = limits
        self.files = sorted((file for file in folder.iterdir() if is_picture(file)), key=natural_key)
        if not self.files:
            raise VideoNotFound(
                f"{folder} holds no PNG or JPEG pictures.", remedy="Give a video file or a folder of pictures."
            )

    def pictures(self, damage: list[str]) -> Iterator[av.VideoFrame | None]:
        """Each picture decoded, or None (and a note in `damage`) where a file cannot be read."""
        size: tuple[int, int] | None = None
        for file in self.files:
            try:
                picture = decode_picture(file, self.limits)
            except UnreadableVideo as error:
                damage.append(error.message)
                yield None
                continue
            if size is None:
                size = (picture.width, picture.height)
            elif (picture.width, picture.height) != size:
                damage.append(
                    f"{file.name} is {picture.width}x{picture.height}, the first picture {size[0]}x{size[1]}; "
                    "it is scaled"
                )
            yield picture


def is_picture(file: Path) -> bool:
    """A regular, visible file with a PNG or JPEG suffix."""
    return file.suffix.lower() in _DECODERS and not file.name.startswith(".") and file.is_file()


def natural_key(file: Path) -> list[tuple[int, int, str]]:
    """Sort key by which numbers inside names count as numbers."""
    parts = re.split(r"(\d+)", file.name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def decode_picture(file: Path, limits: Limits) -> av.VideoFrame:
    """Decode one PNG or JPEG file.

    Raises:
        UnreadableVideo: not a picture, or damaged.
        FrameTooLarge, FrameTooSmall: its header is beyond the limits (checked before decoding).
    """
    data = file.read_bytes()
    size = _declared_size(data)
    if size is None:
        raise UnreadableVideo(f"{file.name} is not a PNG or JPEG picture.", remedy="Remove it from the folder.")
    check_size(*size, limits, file.name)
    decoder = av.CodecContext.create("png" if data[:4] == b"\x89PNG" else "mjpeg", "r")
    decoder.options = decoder_bounds(limits)
    try:
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except (av.FFmpegError, EOFError) as error:
        raise UnreadableVideo(
            f"{file.name} is damaged ({getattr(error, 'strerror', error)}).", remedy="Replace the picture."
        ) from error
    if not frames:
        raise UnreadableVideo(f"{file.name} is damaged (no picture inside).", remedy="Replace the picture.")
    frame: av.VideoFrame = frames[0]
    return frame


def probe_sequence(folder: Path, limits: Limits) -> VideoInfo:
    """Describe a folder of pictures by its first readable one.

    Raises:
        VideoNotFound, UnreadableVideo, FrameTooLarge, FrameTooSmall
    """
    sequence = ImageSequence(folder, limits)
    damage: list[str] = []
    picture = next((picture for picture in sequence.pictures(damage) if picture is not None), None)
    if picture is None:
        raise UnreadableVideo(f"{folder}: none of its pictures can be decoded.", remedy="Check the files.")
    pix_fmt = picture.format.name
    codec = _DECODERS[sequence.files[0].suffix.lower()]
    return VideoInfo(
        path=folder,
        container="folder",
        width=picture.width,
        height=picture.height,
        rotation_deg=picture.rotation,
        sample_aspect_ratio=Fraction(1),
        pix_fmt=pix_fmt,
        bit_depth=bit_depth_of(pix_fmt),
        codec=codec,
        average_rate=SEQUENCE_RATE,
        time_base=1 / SEQUENCE_RATE,
        frames=len(sequence.files),
        duration_s=float(len(sequence.files) / SEQUENCE_RATE),
        interlaced=False,
        colour=ColourTags(
            int(picture.colorspace),
            int(picture.color_primaries),
            int(picture.color_trc),
            int(picture.color_range),
            "center" if codec == "mjpeg" else None,
        ),
        streams=(StreamInfo(0, "video", codec, 0, {}, 1 / SEQUENCE_RATE, 0, is_main=True),),
        is_sequence=True,
    )


def encode_png(rgb_HWC: np.ndarray) -> bytes:
    """One picture as PNG: 8 bits per component for uint8, 16 for uint16; lossless."""
    height, width = rgb_HWC.shape[:2]
    pix_fmt = "rgb48be" if rgb_HWC.dtype == np.uint16 else "rgb24"
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pix_fmt
    encoder.time_base = Fraction(1, 25)
    frame = from_rgb(rgb_HWC, pix_fmt, 0, 2)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a PNG's IHDR or a JPEG's start-of-frame segment (ITU-T T.81 B.2.2)."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + length
    return None
