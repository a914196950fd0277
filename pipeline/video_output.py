"""The file that a result becomes: its container, the streams copied from the source beside the picture, its place.

It grows in a temporary file beside its destination and takes its name only when it is complete. Where the packets of
the picture come from, an encoder or segments encoded before, it does not know.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from pipeline.encoder_options import container_for
from pipeline.passthrough import Passthrough
from pipeline.picture_encoder import PictureEncoder
from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input
from pipeline.video_errors import EncodeError
from pipeline.video_probe import VideoInfo

_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)
BIT_EXACT = 0x400  # AVFMT_FLAG_BITEXACT


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written: the file or folder, the number of pictures, and whatever could not be carried over."""

    path: Path
    frames: int
    warnings: tuple[str, ...]


class VideoOutput:
    """One result that is being written: a file, or a folder where the name has no suffix.

    Args:
        path: the destination.
        source: the probed source.

    Attributes:
        partial: where it grows. is_folder: whether it is a folder of pictures.
        muxer: libav's name of the format; "" for a folder.
        warnings: what could not be carried over, in words.

    Raises:
        UnsupportedOutput: no result has such a suffix.
    """

    def __init__(self, path: Path, source: VideoInfo) -> None:
        self.path = path
        self.is_folder = not path.suffix
        self.muxer = "" if self.is_folder else container_for(path.suffix)
        self.partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
        self.warnings: list[str] = []
        self._source = source
        self._passthrough: Passthrough | None = None
        self._output: av.container.OutputContainer | None = None

    def open_folder(self, *, copies: bool) -> None:
        """Make the folder; `copies`: other streams of the source were to be kept."""
        self.partial.mkdir()
        if copies and not self._source.is_sequence:
            others = [stream.describe() for stream in self._source.streams if not stream.is_main]
            if others:
                self.warnings.append(f"a folder of pictures holds no other streams: {', '.join(others)} left out")
            self.warnings.append("a folder of pictures holds no time stamps")

    def open_file(
        self,
        encoder: PictureEncoder,
        source_path: VideoSource | None,
        *,
        bit_exact: bool,
        fragmented: bool = False,
    ) -> Any:
        """Begin the file with the stream of `encoder` and those copied from `source_path`; returns the video stream.

        Raises:
            EncodeError: the container refuses what it is to hold.
        """
        self.warnings.extend(encoder.warnings)
        container_options = {}
        if self.muxer in ("mp4", "mov"):
            container_options["movflags"] = _movflags(self._source, fragmented=fragmented)
        if self.muxer in ("matroska", "webm"):
            # Sound that starts before zero (encoder delay) would make libav shift every stream. Matroska's blocks count
            # from their cluster with a sign, so they can say it.
            container_options["avoid_negative_ts"] = "disabled"
        output = av.open(str(self.partial), mode="w", format=self.muxer, container_options=container_options)
        self._output = output
        if bit_exact:
            output.flags |= BIT_EXACT
        if source_path is not None and not self._source.is_sequence:
            self._passthrough = Passthrough(source_path, output, self.muxer)
            self._passthrough.streams_before_main()
        video = encoder.add_stream(output)
        if self._passthrough is not None:
            self._passthrough.describe_main(video)
            self._passthrough.streams_after_main()
        try:
            output.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"{self.path.name} could not be started ({error}).",
                remedy=encoder.remedy or "Write .mkv, which holds most streams.",
            ) from error
        return video

    def mux(self, packets: Iterable[Any]) -> None:
        """Write packets of the picture, each after the copied packets that come before it in time."""
        assert self._output is not None
        for packet in packets:
            if self._passthrough is not None and packet.dts is not None and packet.time_base:
                self._passthrough.mux_until(packet.dts * packet.time_base)
            self._output.mux(packet)

    def finish(self, first_pts: int, *, overwrite: bool = False) -> None:
        """Write what is left of the other streams, end the file and move it to its name.

        Args:
            first_pts: of the first picture, in the source's time base.
            overwrite: replace a folder that is there.
        """
        if self.is_folder:
            if overwrite and self.path.is_dir():
                shutil.rmtree(self.path)
        else:
            self._end_file(first_pts)
        os.replace(self.partial, self.path)

    def abort(self) -> None:
        """Remove everything half-written; safe to call at any time and more than once."""
        output, self._output = self._output, None
        if output is not None:
            try:
                output.close()
            except (av.FFmpegError, ValueError, OSError):
                pass  # the file goes away anyway, and the first error is the one to show
        if self._passthrough is not None:
            self._passthrough.close()
        if self.partial.is_dir():
            shutil.rmtree(self.partial, ignore_errors=True)
        else:
            self.partial.unlink(missing_ok=True)

    def _end_file(self, first_pts: int) -> None:
        assert self._output is not None
        if self._passthrough is not None:
            self._passthrough.mux_until(None)
            self.warnings.extend(self._passthrough.warnings)
            self._passthrough.close()
        output, self._output = self._output, None
        output.close()
        self._name_shift(first_pts)
        with self.partial.open("rb") as written:
            os.fsync(written.fileno())

    def _name_shift(self, first_pts: int) -> None:
        """Say so if the container moved the start, as MPEG-TS does with times below zero."""
        with open_input(self.partial, _ANY_SIZE) as written:
            stream = main_video_stream(written, self.path.name)
            first = next((packet.pts for packet in written.demux(stream) if packet.pts is not None), None)
            if first is None or stream.time_base is None:
                return
            shift_s = float(first * stream.time_base - first_pts * self._source.time_base)
        if abs(shift_s) > 0.001:
            self.warnings.append(f"all streams start {1000 * shift_s:.1f} ms later: {self.muxer} has no earlier times")


def _movflags(source: VideoInfo, *, fragmented: bool) -> str:
    # With fragments the header is written after the first of them, so that it can say where each stream begins.
    flags = ["frag_keyframe", "delay_moov", "default_base_moof"] if fragmented else ["faststart"]
    if any(key.lower() not in _MP4_TAGS for key in source.metadata):
        flags.append("use_metadata_tags")
    return "+".join(flags)


# Tags that MP4 has boxes for; libav writes others only when it is told to, and then those alone.
_MP4_TAGS = {
    "title", "artist", "album", "album_artist", "comment", "composer", "copyright", "creation_time", "date",
    "description", "encoder", "genre", "grouping", "lyrics", "synopsis", "show", "episode_id", "network", "track",
    "disc", "major_brand", "minor_version", "compatible_brands",
}  # fmt: skip
