"""Writing restored pictures as a video that says about itself what the source said.

The result grows in a temporary file beside its destination and takes its name only when it is complete. Time stamps
are the source's; audio, subtitles, chapters, attachments and tags are copied by `passthrough`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from pipeline.colour import (
    MATRIX_BT709,
    MATRIX_RGB,
    RANGE_FULL,
    RANGE_UNSPECIFIED,
    effective_matrix,
    from_rgb,
    is_rgb_format,
    with_side_data,
)
from pipeline.encoder_options import EncoderOptions, EncoderSettings, container_for, resolve
from pipeline.image_sequence import encode_png
from pipeline.passthrough import Passthrough
from pipeline.video_container import Limits, main_video_stream, open_input
from pipeline.video_errors import DestinationError, EncodeError
from pipeline.video_probe import VideoInfo
from pipeline.video_reader import VideoFrame

_MAX_ENCODER_RATE = 240
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 31)
_BIT_EXACT = 0x400  # AVFMT_FLAG_BITEXACT
_CODEC_BIT_EXACT = 1 << 23  # AV_CODEC_FLAG_BITEXACT


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written: the file or folder, the number of pictures, and whatever could not be carried over."""

    path: Path
    frames: int
    warnings: tuple[str, ...]


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
        source_path: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(dst)
        self.frames = 0
        self.warnings: list[str] = []
        self._source = source
        self._size = (width, height)
        self._options = options or EncoderOptions()
        self._overwrite = overwrite
        self._done = False
        self._last_pts: int | None = None
        check_destination(self.path, source.path, overwrite=overwrite)
        self._partial = self.path.with_name(f".{self.path.stem}.{secrets.token_hex(4)}.partial{self.path.suffix}")
        self._is_folder = not self.path.suffix
        self._passthrough: Passthrough | None = None
        self._output: av.container.OutputContainer | None = None
        try:
            if self._is_folder:
                self._open_folder(source_path)
            else:
                self._open_file(source_path)
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
            EncodeError: wrong size, time stamps out of order, or the encoder refused it.
        """
        height, width = frame.rgb_HWC.shape[:2]
        if (width, height) != self._size:
            raise EncodeError(
                f"A picture of {width}x{height} was given to a writer of {self._size[0]}x{self._size[1]}.",
                remedy="Resize it first.",
            )
        if self._last_pts is not None and frame.pts <= self._last_pts:
            raise EncodeError(
                f"Picture {self.frames} has the time stamp {frame.pts}, the one before {self._last_pts}.",
                remedy="Write pictures in the order in which they are shown.",
            )
        self._last_pts = frame.pts
        if self._is_folder:
            (self._partial / f"{self.frames:06d}.png").write_bytes(encode_png(frame.rgb_HWC))
            self.frames += 1
            return
        picture = from_rgb(
            frame.rgb_HWC,
            self._settings.pix_fmt,
            self._matrix,
            self._settings.colour_range,
            threads=self._options.threads,
        )
        picture = self._dressed(picture, frame)
        picture.pts, picture.time_base = frame.pts, frame.time_base
        self._durations[frame.pts] = frame.duration
        if not self.frames:
            self._first_pts = frame.pts
        try:
            self._mux(self._video.encode(picture))
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"Picture {self.frames} could not be encoded ({error}).", remedy="Try another codec or container."
            ) from error
        self.frames += 1

    def close(self) -> WriteReport:
        """Finish the file, move it to its name and report what could not be carried.

        Raises:
            EncodeError: no picture was written, or the end of the file could not be written.
        """
        if self._done:
            raise EncodeError(f"{self.path.name} was closed already.", remedy="Open a new writer.")
        if not self.frames:
            self.abort()
            raise EncodeError("No picture was written.", remedy="Check that the source has pictures.")
        try:
            if not self._is_folder:
                self._finish_file()
            self._publish()
        except (av.FFmpegError, ValueError, OSError) as error:
            self.abort()
            raise EncodeError(
                f"{self.path.name} could not be finished ({error}).", remedy="Check the free space, or write .mkv."
            ) from error
        self._done = True
        return WriteReport(self.path, self.frames, tuple(self.warnings))

    def abort(self) -> None:
        """Remove everything half-written; safe to call at any time and more than once."""
        if self._done:
            return
        self._done = True
        output, self._output = self._output, None
        if output is not None:
            try:
                output.close()
            except (av.FFmpegError, ValueError, OSError):
                pass  # the file goes away anyway, and the first error is the one to show
        if self._passthrough is not None:
            self._passthrough.close()
        if self._partial.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self._partial.unlink(missing_ok=True)

    def _open_folder(self, source_path: str | os.PathLike[str] | None) -> None:
        self._partial.mkdir()
        if source_path is not None and not self._source.is_sequence:
            others = [stream.describe() for stream in self._source.streams if not stream.is_main]
            if others:
                self.warnings.append(f"a folder of pictures holds no other streams: {', '.join(others)} left out")
            self.warnings.append("a folder of pictures holds no time stamps")

    def _open_file(self, source_path: str | os.PathLike[str] | None) -> None:
        source = self._source
        self._muxer = container_for(self.path.suffix)
        width, height = self._size
        self._settings: EncoderSettings = resolve(self._options, source, self._muxer, width, height)
        self.warnings.extend(self._settings.warnings)
        self.warnings.extend(_uncarried(source, self._settings.codec, self._muxer))
        self._matrix = effective_matrix(source.colour, width, height)
        self._durations: dict[int, int] = {}
        self._captions_lost = False
        container_options = {}
        if self._muxer in ("mp4", "mov"):
            container_options["movflags"] = "use_metadata_tags" if _needs_free_tags(source) else "faststart"
        if self._muxer in ("matroska", "webm"):
            # Sound that starts before zero (encoder delay) would make libav shift every stream. Matroska's blocks count
            # from their cluster with a sign, so they can say it.
            container_options["avoid_negative_ts"] = "disabled"
        self._output = av.open(str(self._partial), mode="w", format=self._muxer, container_options=container_options)
        if self._options.bit_exact:
            self._output.flags |= _BIT_EXACT
        copies = source_path is not None and not source.is_sequence
        self._passthrough = Passthrough(source_path, self._output, self._muxer) if copies and source_path else None
        if self._passthrough is not None:
            self._passthrough.streams_before_main()
        self._video = self._add_video()
        if self._passthrough is not None:
            self._passthrough.describe_main(self._video)
            self._passthrough.streams_after_main()
        try:
            self._output.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"{self.path.name} could not be started ({error}).", remedy="Write .mkv, which holds most streams."
            ) from error

    def _add_video(self) -> Any:
        assert self._output is not None
        source, settings = self._source, self._settings
        rate = source.average_rate if 0 < source.average_rate <= _MAX_ENCODER_RATE else Fraction(25)
        stream: Any = self._output.add_stream(settings.encoder, rate=rate, options=dict(settings.options))
        context = stream.codec_context
        context.width, context.height = self._size
        context.pix_fmt = settings.pix_fmt
        context.time_base = source.time_base
        stream.time_base = source.time_base
        context.sample_aspect_ratio = source.sample_aspect_ratio
        tags = source.colour
        matrix = tags.matrix
        if is_rgb_format(source.pix_fmt) or matrix == MATRIX_RGB:
            matrix = MATRIX_BT709  # RGB has no matrix; the one that was chosen for it must be written down
            self._matrix = matrix
            self.warnings.append("the source is RGB; it was converted to YUV with the BT.709 matrix")
        self._matrix_tag = matrix
        context.colorspace, context.color_primaries, context.color_trc = matrix, tags.primaries, tags.transfer
        context.color_range = (
            settings.colour_range
            if tags.range != RANGE_UNSPECIFIED or settings.colour_range == RANGE_FULL
            else RANGE_UNSPECIFIED
        )
        if self._options.bit_exact:
            context.flags |= _CODEC_BIT_EXACT
        if source.display_matrix is not None:
            stream.set_display_matrix(source.display_matrix)
        return stream

    def _dressed(self, picture: av.VideoFrame, frame: VideoFrame) -> av.VideoFrame:
        """The picture with the tags and the side data that its encoder takes from pictures."""
        tags = self._source.colour
        kept = [item for item in frame.side_data if item[0] == "a53_cc" and self._settings.codec in ("h264", "hevc")]
        if len(kept) < len(frame.side_data) and not self._captions_lost:
            self._captions_lost = True
            self.warnings.append(f"closed captions inside the picture stream: {self._settings.codec} cannot carry them")
        if kept:
            picture = with_side_data(picture, kept)
        picture.colorspace, picture.color_primaries, picture.color_trc = self._matrix_tag, tags.primaries, tags.transfer
        return picture

    def _mux(self, packets: list[Any]) -> None:
        """Write encoded packets, each after the copied packets that come before it in time."""
        assert self._output is not None
        for packet in packets:
            if packet.pts in self._durations:
                packet.duration = self._durations.pop(packet.pts)
            if self._passthrough is not None and packet.dts is not None and packet.time_base:
                self._passthrough.mux_until(packet.dts * packet.time_base)
            self._output.mux(packet)

    def _finish_file(self) -> None:
        assert self._output is not None
        self._mux(self._video.encode(None))
        if self._passthrough is not None:
            self._passthrough.mux_until(None)
            self.warnings.extend(self._passthrough.warnings)
            self._passthrough.close()
        output, self._output = self._output, None
        output.close()
        self._name_shift()

    def _name_shift(self) -> None:
        """Say so if the container moved the start, as MPEG-TS does with times below zero."""
        with open_input(self._partial, _ANY_SIZE) as written:
            stream = main_video_stream(written, self.path.name)
            first = next((packet.pts for packet in written.demux(stream) if packet.pts is not None), None)
            if first is None or stream.time_base is None:
                return
            shift_s = float(first * stream.time_base - self._first_pts * self._source.time_base)
        if abs(shift_s) > 0.001:
            self.warnings.append(f"all streams start {1000 * shift_s:.1f} ms later: {self._muxer} has no earlier times")

    def _publish(self) -> None:
        if not self._is_folder:
            with self._partial.open("rb") as written:
                os.fsync(written.fileno())
        elif self._overwrite and self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self._partial, self.path)


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


def _needs_free_tags(source: VideoInfo) -> bool:
    """Whether the file has tags beyond those that MP4 has boxes for."""
    return any(key.lower() not in _MP4_TAGS for key in source.metadata)


_MP4_TAGS = {
    "title", "artist", "album", "album_artist", "comment", "composer", "copyright", "creation_time", "date",
    "description", "encoder", "genre", "grouping", "lyrics", "synopsis", "show", "episode_id", "network", "track",
    "disc", "major_brand", "minor_version", "compatible_brands",
}  # fmt: skip


_NAMED_LOSSES = {
    "DYNAMIC_HDR_PLUS": "HDR10+ dynamic metadata",
    "DYNAMIC_HDR_VIVID": "HDR Vivid dynamic metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
    "DOVI_RPU_BUFFER": "Dolby Vision metadata",
    "AFD": "active format description",
    "STEREO3D": "stereo 3D layout",
    "SPHERICAL": "spherical projection",
    "ICC_PROFILE": "ICC profile",
    "AMBIENT_VIEWING_ENVIRONMENT": "ambient viewing environment",
    "S12M_TIMECODE": "time codes inside the pictures",
    "GOP_TIMECODE": "time codes inside the pictures",
}


def _uncarried(source: VideoInfo, codec: str, muxer: str) -> list[str]:
    """What the pictures carry and the result will not."""
    if source.rotation_deg and muxer == "mpegts":
        lost_with_container = ["rotation: mpegts has none"]
    elif source.sample_aspect_ratio != 1 and muxer in ("matroska", "webm") and codec not in ("h264", "hevc"):
        lost_with_container = [f"sample aspect ratio: not stored for {codec} in {muxer}; H.264, H.265 or MP4 keep it"]
    else:
        lost_with_container = []
    lost = {words for name, words in _NAMED_LOSSES.items() if name in source.side_data}
    if codec not in ("h264", "hevc", "av1"):
        if source.mastering:
            lost.add("HDR10 mastering display")
        if source.content_light:
            lost.add("HDR10 content light level")
    if any(component.is_alpha for component in av.VideoFormat(source.pix_fmt).components):
        lost.add("transparency")
    return lost_with_container + [f"{words}: not carried into {codec}" for words in sorted(lost)]
