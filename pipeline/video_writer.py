"""Writing restored pictures as a video that says about itself what the source said.

Time stamps are the source's; audio, subtitles, chapters, attachments and tags are copied by `passthrough`. The encoder
is `picture_encoder`'s, the file `video_output`'s.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import av

from pipeline.encoder_options import EncoderOptions
from pipeline.image_sequence import encode_png
from pipeline.picture_encoder import PictureEncoder, PictureOrder
from pipeline.video_container import VideoSource
from pipeline.video_errors import DestinationError, EncodeError
from pipeline.video_output import VideoOutput, WriteReport
from pipeline.video_probe import VideoInfo
from pipeline.video_reader import VideoFrame


class VideoWriter:
    """Encode pictures into `dst`; a context manager that aborts when its block raises.

    Args:
        dst: a file (.mp4 .m4v .mov .mkv .webm .ts .m2ts .mts), or a path without suffix for a folder of PNG pictures.
        source: the probed source; gives time base, colour, aspect, orientation and tags.
        width, height: size of the pictures to come, in pixels.
        options: see `EncoderOptions`.
        source_path: where audio, subtitles and the rest are copied from; None writes the picture alone.
        overwrite: replace an existing `dst` at the end instead of refusing it.

    Raises:
        DestinationError: `dst` exists, is the source, or its folder cannot be written.
        UnsupportedOutput: container, codec, format and size do not go together.
        EncodeError: the encoder or the muxer failed; nothing is left behind.
    """

    def __init__(
        self,
        dst: str | os.PathLike[str],
        source: VideoInfo,
        *,
        width: int,
        height: int,
        options: EncoderOptions | None = None,
        source_path: VideoSource | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(dst)
        self._overwrite = overwrite
        self._done = False
        check_destination(self.path, source.path, overwrite=overwrite)
        options = options or EncoderOptions()
        self._order = PictureOrder(width, height)
        self._output = VideoOutput(self.path, source)
        self._encoder: PictureEncoder | None = None
        try:
            if self._output.is_folder:
                self._output.open_folder(copies=source_path is not None)
            else:
                self._encoder = PictureEncoder(source, self._output.muxer, width=width, height=height, options=options)
                self._output.open_file(self._encoder, source_path, bit_exact=options.bit_exact)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._done:
            self.close()

    def write(self, frame: VideoFrame) -> None:
        """Add one picture; its `pts` must be above the last one's.

        Raises:
            EncodeError: wrong size, time stamps out of order, or the encoder or the muxer refused it.
        """
        self._order.check(frame)
        if self._encoder is None:
            (self._output.partial / f"{self._order.frames - 1:06d}.png").write_bytes(encode_png(frame.rgb_HWC))
            return
        packets = self._encoder.encode(frame)
        try:
            self._output.mux(packets)
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"Picture {self._order.frames - 1} could not be written ({error}).",
                remedy="Check the free space, or try another container.",
            ) from error

    def close(self) -> WriteReport:
        """Finish the file, move it to its name and report what could not be carried.

        Raises:
            EncodeError: no picture was written, or the end of the file could not be written.
        """
        if self._done:
            raise EncodeError(f"{self.path.name} was closed already.", remedy="Open a new writer.")
        if not self._order.frames:
            self.abort()
            raise EncodeError("No picture was written.", remedy="Check that the source has pictures.")
        found: list[str] = []
        try:
            if self._encoder is not None:
                self._output.mux(self._encoder.flush())
                found = self._encoder.found
            self._output.finish(self._order.first_pts, overwrite=self._overwrite)
        except (av.FFmpegError, ValueError, OSError) as error:
            self.abort()
            raise EncodeError(
                f"{self.path.name} could not be finished ({error}).", remedy="Check the free space, or write .mkv."
            ) from error
        self._done = True
        return WriteReport(self.path, self._order.frames, (*self._output.warnings, *found))

    def abort(self) -> None:
        """Remove everything half-written; safe to call at any time and more than once."""
        if not self._done:
            self._done = True
            self._output.abort()


def check_destination(dst: Path, src: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        DestinationError: it is the source, exists without leave to overwrite, or its folder cannot be written.
    """
    if dst.exists() and src.exists() and dst.samefile(src):
        raise DestinationError(f"{dst} is the source itself.", remedy="Choose another name for the result.")
    occupied = dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))
    if occupied and not overwrite:
        raise DestinationError(f"{dst} exists already.", remedy="Choose another name, or allow overwriting.")
    if not dst.parent.is_dir():
        raise DestinationError(f"The folder {dst.parent} does not exist.", remedy="Create it first.")
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        raise DestinationError(f"The folder {dst.parent} cannot be written.", remedy="Choose another, or its rights.")
