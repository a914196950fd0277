"""Opening one video with libav, and nothing else than this one: a local file, or bytes that somebody else fetches.

The demuxers are named one by one: formats that fetch other files (HLS, DASH, concat, SDP, image patterns, AVISynth)
are not in the list, the only protocol is `file`, and the declared size is checked before a decoder allocates for it.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, runtime_checkable

import av
from typing_extensions import TypeIs  # typing has it from Python 3.13 on

from pipeline.video_errors import FrameTooLarge, FrameTooSmall, NoVideoStream, UnreadableVideo, VideoNotFound

# Self-contained formats only. `mov` resolves references to other files only with an option that is never set here.
DEMUXERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,ogg,flv,asf,mxf,dv,yuv4mpegpipe,nut"
_PROTOCOLS = "file"
_MAX_STREAMS = 128
_CHROMA_LOCATIONS = ("left", "center", "topleft", "top", "bottomleft", "bottom")
# The log level is libav's only global that is touched here, and only for the length of one description.
_LOG_LEVEL = threading.Lock()


# What is asked for at once of a handle; small files and headers are read in one go, and Python is called seldom.
_READ_BYTES = 1 << 17
# Of a video that comes while it is read: how much is waited for, and how much film is looked at, to know its streams.
_STREAM_READ_BYTES = 1 << 15
_STREAM_ANALYSIS_US = 1_000_000


class RemoteVideo(Protocol):
    """A video that is no local file. `name` is its last part, with the suffix."""

    @property
    def name(self) -> str:
        """The last part of its address."""

    def open(self) -> BinaryIO:
        """Return a fresh handle that can seek; whoever opened it closes it."""


@runtime_checkable
class ReceivedVideo(RemoteVideo, Protocol):
    """A video that somebody sent. What it is has been settled before libav sees a byte: nothing is guessed.

    Attributes:
        demuxer: libav's name of the only format that it may be.
        comes_once: it comes while it is read: its handles cannot seek, and there is none after the last.
    """

    demuxer: str
    comes_once: bool


VideoSource = str | os.PathLike[str] | RemoteVideo


def source_name(source: VideoSource) -> str:
    """The name of a source for messages: the last part of its path or address."""
    return source.name if is_remote(source) else Path(source).name


def is_remote(source: VideoSource) -> TypeIs[RemoteVideo]:
    """Whether the source is opened by itself, not by its path."""
    return not isinstance(source, str | os.PathLike)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a source may ask for; checked on the header, before a picture is allocated.

    `min_side` is the smallest picture that the model restores; `max_side` and `max_pixels` bound memory.
    """

    min_side: int = 16
    max_side: int = 8192
    max_pixels: int = 8192 * 4320


def decoder_bounds(limits: Limits) -> dict[str, str]:
    """What a decoder may allocate. Twice the limit, because libav rounds sizes up first; `check_size` is exact."""
    return {"max_pixels": str(2 * limits.max_pixels)}


def check_size(width: int, height: int, limits: Limits, name: str) -> None:
    """Raise `FrameTooLarge` or `FrameTooSmall` with the size, the limit and what can be done."""
    if width > limits.max_side or height > limits.max_side or width * height > limits.max_pixels:
        raise FrameTooLarge(
            f"{name} declares {width}x{height} pixels; the limit is {limits.max_side} a side and "
            f"{limits.max_pixels} in all.",
            remedy="Scale it down first, or raise the limit if the header is right.",
        )
    if width < limits.min_side or height < limits.min_side:
        raise FrameTooSmall(
            f"{name} is {width}x{height} pixels; the smallest side that can be restored is {limits.min_side}.",
            remedy="Enlarge it first by plain interpolation.",
        )


class OpenVideo:
    """An open container with the handle that it reads from; a context manager that gives the container."""

    def __init__(self, container: av.container.InputContainer, handle: BinaryIO | None) -> None:
        self.container = container
        self._handle = handle

    def __enter__(self) -> av.container.InputContainer:
        return self.container

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release both; safe to call again."""
        self.container.close()
        if self._handle is not None:
            self._handle.close()


class _Named:
    """A handle as PyAV takes it, with the name by which libav guesses formats that do not tell themselves."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self.name = name
        self.read = handle.read
        self.can_seek = handle.seekable()
        if self.can_seek:  # PyAV takes a handle with these two for one that can
            self.seek, self.tell = handle.seek, handle.tell


def check_declared_sizes(source: VideoSource, limits: Limits) -> None:
    """Compare the sizes in the header with the limits while no decoder may run, so that nothing is allocated.

    Raises:
        FrameTooLarge: a video stream declares a size beyond the limits.
        VideoNotFound, UnreadableVideo: as in `open_input`.
    """
    # No codec has this name: libav then reads the header and opens no decoder to find out more.
    with open_input(source, limits, {"codec_whitelist": "none"}) as container:
        for stream in container.streams.video:
            if stream.codec_context is not None and stream.codec_context.width and stream.codec_context.height:
                size = stream.codec_context.width, stream.codec_context.height
                check_size(max(size[0], limits.min_side), max(size[1], limits.min_side), limits, source_name(source))


def open_input(source: VideoSource, limits: Limits, extra: dict[str, str] | None = None) -> OpenVideo:
    """Open a video for reading.

    Args:
        source: a local file, or a remote one, of which a handle is opened.
        limits: bounds what a decoder may allocate.
        extra: further libav container options; set by this module's callers, never by users.

    Raises:
        VideoNotFound: nothing there, or not a file.
        UnreadableVideo: empty, not media, a format that is not allowed, or a header that cannot be read.
        Whatever the handle of a remote video raises.
    """
    if is_remote(source):
        handle = source.open()
        try:
            demuxer = source.demuxer if isinstance(source, ReceivedVideo) else None
            return OpenVideo(_open(_Named(handle, source.name), source.name, limits, extra, demuxer), handle)
        except BaseException:
            handle.close()
            raise
    file = Path(source)
    if not file.exists():
        raise VideoNotFound(f"{file} does not exist.")
    if not file.is_file():
        raise VideoNotFound(f"{file} is not a file.", remedy="Give a video file, or a folder of PNG or JPEG pictures.")
    if not os.access(file, os.R_OK):
        raise UnreadableVideo(f"{file} may not be read.", remedy="Change its permissions.")
    if file.stat().st_size == 0:
        raise UnreadableVideo(f"{file} is empty (0 bytes).", remedy="Copy or download it again.")
    # `file:` keeps a name with a colon in it from being taken for a protocol.
    return OpenVideo(_open(f"file:{file.absolute()}", str(file), limits, extra), None)


def _open(
    place: Any, name: str, limits: Limits, extra: dict[str, str] | None, demuxer: str | None = None
) -> av.container.InputContainer:
    comes_once = isinstance(place, _Named) and not place.can_seek
    try:
        return av.open(
            place,
            mode="r",
            format=demuxer,
            options=decoder_bounds(limits),
            container_options={
                "protocol_whitelist": _PROTOCOLS,
                "format_whitelist": DEMUXERS,
                "max_streams": str(_MAX_STREAMS),
                **({"analyzeduration": str(_STREAM_ANALYSIS_US)} if comes_once else {}),
                **(extra or {}),
            },
            metadata_errors="replace",
            buffer_size=_STREAM_READ_BYTES if comes_once else _READ_BYTES,
        )
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise UnreadableVideo(
            f"{name} cannot be opened as video ({_reason(error)}).",
            remedy="Check that it is a complete video file of a supported kind.",
        ) from error


def main_video_stream(container: av.container.InputContainer, name: str) -> av.video.stream.VideoStream:
    """The stream to restore: the default one, else the largest; never a cover picture.

    Raises:
        NoVideoStream: there is none.
        UnreadableVideo: there is one, but this build has no decoder for it.
    """
    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & still]
    if not moving:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise NoVideoStream(f"{name} has no video stream (found: {kinds}).")
    best = max(
        moving,
        key=lambda stream: (
            bool(stream.disposition & av.stream.Disposition.default),
            stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0,
            -stream.index,
        ),
    )
    if best.codec_context is None:
        raise UnreadableVideo(
            f"{name}: no decoder for the codec of video stream {best.index}.",
            remedy="Convert it to a common codec without loss (FFV1, H.264 lossless) first.",
        )
    return best


def chroma_location(container: Any, stream_index: int) -> str | None:
    """Where the chroma samples of a stream lie ("left", "center", "topleft", ...), None if it does not say.

    PyAV has no attribute for it, but libav's own description of a file names it.
    """
    line = re.search(rf"^ *Stream #0:{stream_index}\b.*$", _description(container), re.MULTILINE)
    # `yuv420p(tv, bt709, top first, left)`: the field order has similar words, so only a whole item counts.
    items = {item for group in re.findall(r"\(([^()]*)\)", line.group(0) if line else "") for item in group.split(", ")}
    return next((place for place in _CHROMA_LOCATIONS if place in items), None)


def dolby_vision(container: Any, stream_index: int) -> tuple[int, int] | None:
    """(profile, compatibility) of a stream's Dolby Vision configuration record, None without one.

    Compatibility says what the picture is without its metadata: 0 nothing, 1 HDR10, 2 SDR, 4 HLG, 6 HDR10 of a disc.
    """
    streams = re.split(r"^ *Stream #0:(\d+)\b", _description(container), flags=re.MULTILINE)
    described = dict(zip(streams[1::2], streams[2::2], strict=True)).get(str(stream_index), "")
    found = re.search(r"DOVI configuration record:.*\bprofile: (\d+),.*\bcompatibility id: (\d+)", described)
    return (int(found[1]), int(found[2])) if found else None


def _description(container: Any) -> str:
    """What libav says of an open file at its verbose level."""
    with _LOG_LEVEL:
        before = av.logging.get_level()
        try:
            av.logging.set_libav_level(av.logging.VERBOSE)
            av.logging.set_level(av.logging.VERBOSE)
            return str(container.dumps_format())
        finally:
            av.logging.set_libav_level(av.logging.INFO)
            av.logging.set_level(before)


def _reason(error: BaseException) -> str:
    """The library's own words without its paths and numbers."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, ValueError) and "Invalid argument" in text:
        return "not a supported container format"
    return text or type(error).__name__
