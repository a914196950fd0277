"""The side-by-side picture and video of a restoration: input, bicubic, restored, and the original if there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from actors.pictures import Picture, resize, side_by_side

if TYPE_CHECKING:
    from pipeline.video import VideoFrame, VideoInfo

PICTURE_AT = 10  # zero-based frame of the picture: late enough that the stream has a past


class Comparison:
    """Writes `STEM.compare.mp4` and `STEM.compare.png` frame by frame; `files` names what was written.

    The picture shows frame 10, or the last one of a shorter video.
    """

    def __init__(self, stem: Path, info: VideoInfo, *, width: int, height: int, truth: str | None) -> None:
        from pipeline.video import EncoderOptions, VideoReader, VideoWriter

        self._picture_path = stem.with_name(f"{stem.name}.compare.png")
        self._video_path = stem.with_name(f"{stem.name}.compare.mp4")
        self._width, self._height = width, height
        self._truth = VideoReader(truth) if truth else None
        self._truth_frames = iter(self._truth) if self._truth else None
        self._panels = 4 if truth else 3
        self._picture: Picture | None = None
        # Players show 4:2:0, which has no odd sizes.
        odd = (width * self._panels) % 2 or height % 2
        options = EncoderOptions(codec="h264", pix_fmt="yuv444p" if odd else "yuv420p")
        self._writer = VideoWriter(self._video_path, info, width=width * self._panels, height=height, options=options)

    def write(self, source: VideoFrame, restored: Picture) -> None:
        """Add one frame: `source` as decoded, `restored` at output size."""
        small = source.rgb_HWC
        panels = [
            ("input", resize(small, self._width, self._height, "nearest")),
            ("bicubic", resize(small, self._width, self._height, "cubic")),
            ("Upriver", restored),
        ]
        if self._truth_frames is not None:
            original = next(self._truth_frames, None)
            there = original.rgb_HWC if original is not None else restored * 0
            panels.append(("original", resize(there, self._width, self._height)))
        picture = side_by_side(panels)
        if source.index <= PICTURE_AT or self._picture is None:
            self._picture = picture
        self._writer.write(dataclasses.replace(source, rgb_HWC=picture))

    def close(self) -> list[str]:
        """Finish both files and return their paths."""
        from PIL import Image

        self._writer.close()
        self._close_truth()
        if self._picture is not None:
            Image.fromarray(self._picture).save(self._picture_path)
        return [str(self._video_path), str(self._picture_path)]

    def abort(self) -> None:
        """Remove what was written."""
        self._writer.abort()
        self._close_truth()
        self._picture_path.unlink(missing_ok=True)

    def _close_truth(self) -> None:
        if self._truth is not None:
            self._truth.__exit__(None, None, None)
