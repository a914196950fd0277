"""Reading a video picture by picture, in presentation order and constant memory.

The reader knows nothing of what happens to the pictures. Damage does not stop it: what decodes is delivered, and
`damage` says in plain words what did not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain
from types import TracebackType
from typing import Any, Literal, Self

import av
import numpy as np

from pipeline.colour import to_rgb
from pipeline.image_sequence import ImageSequence
from pipeline.interlacing import PULLDOWN_KEEPS, Deinterlacer, FieldFilter, PulldownRemover
from pipeline.truncation import early_end
from pipeline.video_container import (
    Limits,
    OpenVideo,
    VideoSource,
    check_size,
    decoder_bounds,
    main_video_stream,
    open_input,
    source_name,
)
from pipeline.video_errors import UnreadableVideo
from pipeline.video_probe import VideoInfo, probe

Deinterlace = Literal["auto", "on", "off", "pulldown"]
# What a picture carries beside its pixels and what an encoder can put back.
_CARRIED_SIDE_DATA = {"A53_CC": "a53_cc"}
_MAX_NOTES = 20
# How much further back each attempt to jump into a file goes.
_SEEK_BACK_S = (0, 1, 3, 10, 30, 100)
# Containers that say of every packet when it is shown, or can compute it from where the packet lies.
_TIMED_CONTAINERS = {
    "mov",
    "matroska",
    "mpegts",
    "mpeg",
    "flv",
    "asf",
    "ogg",
    "nut",
    "mxf",
    "ivf",
    "dv",
    "yuv4mpegpipe",
}

# In a program stream not every picture has a stamp; those that libav computes may be off by as many pictures.
_GUESSED_STEPS = 4
_PACKED = re.compile(rb"\x00\x00\x01\xb2DivX\d+(?:b|Build)\d+p")
# Codecs whose packets libav does not put into the order of presentation where the container does not.
_UNORDERED_CODECS = {"h264", "hevc"}


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """One picture.

    `rgb_HWC` is uint8, or uint16 in full scale for sources deeper than 8 bits. `pts` and `duration` are in units of
    `time_base`; where the file says no duration it is that of the average rate. `index` counts presented pictures from
    0. `side_data` holds (name, bytes) of what belongs to this picture and is not pixels, such as closed captions.
    """

    rgb_HWC: np.ndarray
    pts: int
    time_base: Fraction
    duration: int
    index: int
    key_frame: bool
    side_data: tuple[tuple[str, bytes], ...] = ()


class VideoReader:
    """Iterate over the pictures of a file or of a folder of PNG or JPEG pictures; a context manager.

    Args:
        path: the source, local or remote; a handle of its own is opened for each pass.
        deinterlace: "auto" filters when the source is interlaced, "on" always, "off" never; "pulldown" makes film of
            telecined video again (see `PulldownRemover`; `info` then has the film's rate, and ranges are read from the
            beginning).
        limits: see `Limits`.
        threads: decoder threads; the pictures do not depend on it.
        start_pts, stop_pts: deliver only pictures with start_pts <= pts < stop_pts (stream time base), the same as a
            sequential read gives. The file is read from the key frame before if `start_pts` is the stamp of a picture,
            or one tick after it, and from its beginning otherwise or where a jump cannot be exact.
        first_index: the index of the first delivered picture.
        seek: jump to the key frame before `start_pts`; False reads, and drops, all that is before it.
        info: what `probe` said of this path, to save probing again.
        packets: takes the picture's packets out of an open container, in order, and may keep those of other streams.

    Attributes:
        info: the probed source.
        step: one picture's time at the average rate, in ticks of the stream's time base; at least 1.
        damage: filled while reading; empty means that everything decoded.
        stamps_repaired: a picture had no time stamp, or one that did not increase, and got one by its neighbours'.

    Raises:
        VideoNotFound, UnreadableVideo, NoVideoStream, FrameTooLarge, FrameTooSmall: see `video_errors`.
    """

    def __init__(
        self,
        path: VideoSource,
        *,
        deinterlace: Deinterlace = "auto",
        limits: Limits | None = None,
        threads: int = 2,
        start_pts: int | None = None,
        stop_pts: int | None = None,
        first_index: int = 0,
        seek: bool = True,
        info: VideoInfo | None = None,
        packets: Callable[[av.container.InputContainer, av.video.stream.VideoStream], Iterator[Any]] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.info = info or probe(path, limits=self.limits)
        self.damage: list[str] = []
        self.frames_read = 0
        self._source = path
        self._name = source_name(path)
        self._threads = threads
        self._start_pts, self._stop_pts = start_pts, stop_pts
        self._first_index = first_index
        self._seek = seek
        self._packets = packets or (lambda container, stream: container.demux(stream))
        self.stamps_repaired = False
        self._deinterlace = deinterlace
        self._deinterlacer = self._new_deinterlacer()
        self._source_step = _step(self.info)
        self._stamps_guessed = self.info.container == "mpeg"
        if deinterlace == "pulldown":
            self._seek = False
            self.info = presented(self.info, deinterlace)
        self.step = _step(self.info)
        self._opened: OpenVideo | None = None
        self._last_pts: int | None = None
        self._passed_pts = 0
        self._left_out = 0
        self._packed = False
        self._size_noted = False

    @property
    def deinterlaces(self) -> bool:
        """Whether the pictures go through the deinterlacer."""
        return self._deinterlacer is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; safe to call again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __iter__(self) -> Iterator[VideoFrame]:
        frames = self._sequence() if self.info.is_sequence else self._file()
        for frame in frames:
            self.frames_read += 1
            yield frame
        self._check_count()

    def stamps(self) -> Iterator[tuple[int, bytes]]:
        """(pts, closed captions) of every picture that decodes, without converting any: for comparing files."""
        if self.info.is_sequence:
            sequence = ImageSequence(self.info.path, self.limits)
            yield from ((index, b"") for index, one in enumerate(sequence.pictures(self.damage)) if one is not None)
            return
        for picture in self.pictures():
            yield picture.pts or 0, b"".join(data for _, data in _carried(picture))

    def pictures(self) -> Iterator[av.VideoFrame]:
        """Every picture of a file as it decodes, with its time stamp: neither deinterlaced nor converted."""
        if self.info.is_sequence:
            yield from (one for one in ImageSequence(self.info.path, self.limits).pictures(self.damage) if one)
            return
        container, stream = self._open()
        for picture in self._decoded(container, stream):
            self._stamp(picture)
            self.frames_read += 1
            yield picture
        self._check_count()

    def _new_deinterlacer(self) -> FieldFilter | None:
        if self._deinterlace == "pulldown":
            return PulldownRemover(self.info.average_rate)
        every = self._deinterlace == "on"
        if every or (self._deinterlace == "auto" and self.info.interlaced):
            return Deinterlacer(every=every or not self.info.interlaced_flagged)
        return None

    def _sequence(self) -> Iterator[VideoFrame]:
        sequence = ImageSequence(self.info.path, self.limits)
        for index, picture in enumerate(sequence.pictures(self.damage)):
            if picture is None or not self._wanted(index):
                continue
            rgb_HWC = to_rgb(picture, self.info.colour, width=self.info.width, height=self.info.height)
            yield VideoFrame(
                rgb_HWC, index, self.info.time_base, 1, self._first_index + self.frames_read, key_frame=True
            )

    def _open(self) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
        self.close()
        self._opened = open_input(self._source, self.limits)
        container = self._opened.container
        stream = main_video_stream(container, self._name)
        context = stream.codec_context
        context.thread_count = self._threads
        context.thread_type = "AUTO"
        context.options = decoder_bounds(self.limits)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        return container, stream

    def _file(self) -> Iterator[VideoFrame]:
        known = len(self.damage)
        found = self._jump()
        if found is not None:
            frames = self._presented(*found)
            first = next(frames, None)
            # A jump is believed when it leads to the very picture that was asked for, or to the one right after the
            # last that was not, by stamps as they are.
            arrived = first is not None and self._start_pts in (first.pts, self._passed_pts + 1)
            if first is not None and arrived and not self.stamps_repaired:
                yield first
                yield from frames
                return
            self._last_pts, self.stamps_repaired = None, False
            self._deinterlacer = self._new_deinterlacer()
        del self.damage[known:]
        container, stream = self._open()
        yield from self._presented(self._decoded(container, stream), stream)

    def _presented(
        self, decoded_pictures: Iterator[av.VideoFrame], stream: av.video.stream.VideoStream
    ) -> Iterator[VideoFrame]:
        """The wanted ones of these pictures, stamped, deinterlaced and converted."""
        time_base = stream.time_base or self.info.time_base
        for decoded in decoded_pictures:
            self._stamp(decoded)
            if self._deinterlacer is None:
                pictures: Iterator[av.VideoFrame] = iter((decoded,))
            else:
                pictures = self._deinterlacer.push(decoded, time_base)
            for picture in pictures:
                if self._past_the_end(picture):
                    return
                if self._wanted(picture.pts):
                    yield self._frame(picture, time_base)
                else:
                    self._passed_pts = picture.pts or 0
        if self._deinterlacer is not None:
            for picture in self._deinterlacer.flush():
                if self._wanted(picture.pts):
                    yield self._frame(picture, time_base)

    def _jump(self) -> tuple[Iterator[av.VideoFrame], av.video.stream.VideoStream] | None:
        """Decoded pictures from before `start_pts` on, each the same as if the file had been read from its beginning.

        That holds from a key picture on: what is shown before the first one after a jump may lean on pictures that were
        jumped over. Containers without an index (MPEG-TS) jump to any place; if no key picture lies between there and
        the wanted one, the jump was too short. None: this place is to be reached from the beginning.
        """
        if self._start_pts is None or not self._seek:
            return None
        # The deinterlacer needs the picture before the first wanted one, hence strictly before.
        # Where stamps are guessed, that of the key picture is no evidence; that of a picture after it is.
        target = self._start_pts - int(self.deinterlaces or self._stamps_guessed)
        if target <= self.info.start_pts:
            return None
        container, stream = self._open()
        if not _can_jump(container, stream):
            return None
        self._prime(container, stream)
        if self._packed:
            return None
        for back_s in _SEEK_BACK_S:
            at = target - round(back_s / (stream.time_base or 1))
            if at < self.info.start_pts:
                return None
            try:
                container.seek(at, stream=stream, backward=True)
                pictures = self._decoded(container, stream)
                key = _first_key(pictures, target)
            except (av.FFmpegError, UnreadableVideo):
                return None
            if key is not None:
                return chain((key,), pictures), stream
        return None

    def _prime(self, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> None:
        """Decode the first picture: some encoders say only there who they are, and decoders follow their habits."""
        next(self._decoded(container, stream), None)

    def _decoded(
        self, container: av.container.InputContainer, stream: av.video.stream.VideoStream
    ) -> Iterator[av.VideoFrame]:
        """Every picture that can be decoded; what goes wrong is noted."""
        packets = self._packets(container, stream)
        broken = 0
        # The stamps of packets that went in; as many pictures come out, in the order in which they are shown.
        waiting: list[int] | None = [] if _only_counts(container, stream) else None
        # An edit list may leave out pictures at both ends; those that others lean on are decoded, but not shown.
        self._left_out = max(0, stream.frames - len(stream.index_entries))
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, EOFError) as error:
                self._note(f"the container ends in damage ({_words(error)})")
                yield from self._drain(stream)
                break
            if packet.is_corrupt:
                self._note("a packet is incomplete", packet.pts)
            if waiting is None and _is_packed(container, packet):
                waiting, self._packed = [], True
            if waiting is not None and packet.pts is not None:
                heappush(waiting, packet.pts)
            self._left_out += packet.is_discard
            try:
                frames = packet.decode()
            except (av.FFmpegError, EOFError) as error:
                broken += 1
                if waiting:
                    heappop(waiting)
                self._note("a picture cannot be decoded", packet.pts, f" ({_words(error)})")
                continue
            for frame in frames:
                if waiting:
                    frame.pts = heappop(waiting)
                if frame.is_corrupt:
                    self._note("a picture is damaged and concealed", frame.pts)
                yield frame
        if broken and not self.frames_read and self._last_pts is None:
            raise UnreadableVideo(
                f"{self._name}: none of its pictures can be decoded.", remedy="Recover it or use another copy."
            )

    def _drain(self, stream: av.video.stream.VideoStream) -> Iterator[av.VideoFrame]:
        try:
            yield from stream.codec_context.decode(None)
        except (av.FFmpegError, EOFError):
            return

    def _stamp(self, frame: av.VideoFrame) -> None:
        """Give every picture a time stamp above the one before; containers without stamps get the average rate."""
        pts = frame.pts
        if pts is None:
            self.stamps_repaired = True
            pts = self.info.start_pts if self._last_pts is None else self._last_pts + self._source_step
        elif self._last_pts is not None and pts <= self._last_pts:
            self.stamps_repaired = True
            if self._stamps_guessed and self._last_pts - pts < self._source_step * _GUESSED_STEPS:
                pts = self._last_pts + self._source_step
            else:
                self._note("a time stamp does not increase", pts)
                pts = self._last_pts + 1
        frame.pts = self._last_pts = pts

    def _wanted(self, pts: int | None) -> bool:
        at = pts or 0
        return (self._start_pts is None or at >= self._start_pts) and (self._stop_pts is None or at < self._stop_pts)

    def _past_the_end(self, frame: av.VideoFrame) -> bool:
        return self._stop_pts is not None and (frame.pts or 0) >= self._stop_pts

    def _frame(self, picture: av.VideoFrame, time_base: Fraction) -> VideoFrame:
        info = self.info
        if (picture.width, picture.height) != (info.width, info.height):
            check_size(picture.width, picture.height, self.limits, self._name)
            if not self._size_noted:
                self._size_noted = True
                self._note(
                    f"the picture size changes to {picture.width}x{picture.height}",
                    picture.pts,
                    f"; such pictures are scaled to {info.width}x{info.height}",
                )
        return VideoFrame(
            rgb_HWC=to_rgb(picture, info.colour, width=info.width, height=info.height, threads=self._threads),
            pts=picture.pts or 0,
            time_base=time_base,
            duration=picture.duration or self.step,
            index=self._first_index + self.frames_read,
            key_frame=bool(picture.key_frame),
            side_data=_carried(picture),
        )

    def _check_count(self) -> None:
        """A container that knows its size, or how many pictures it has, tells when some are missing at the end."""
        if self._start_pts is not None or self._stop_pts is not None or self.info.is_sequence:
            return
        shorter = early_end(self._source, self.info.container)
        if shorter:
            self._note(shorter)
        if self._deinterlace == "pulldown":
            return  # how many of the last five are left depends on where the film ends
        promised = self.info.frames if self.info.container.startswith("mov") else None
        if promised and self.frames_read < promised - self._left_out:
            self._note(f"{self.frames_read} of {promised - self._left_out} pictures could be decoded")

    def _note(self, text: str, pts: int | None = None, more: str = "") -> None:
        """Add a sentence to `damage`, unless it is of a picture outside the range: that is for others to report."""
        if pts is not None and not self._wanted(pts):
            return
        place = f" at {float(pts * self.info.time_base):.3f} s" if pts is not None else ""
        if len(self.damage) < _MAX_NOTES:
            self.damage.append(text + place + more)
        elif len(self.damage) == _MAX_NOTES:
            self.damage.append("and more of the like")


def _can_jump(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> bool:
    """Whether a jump into this container is sure to arrive where it says.

    AVI counts packets instead of timing them: after a jump the count is right only if its index names every packet.
    It never says which pictures are shown in which order. Bare streams of pictures have neither.
    """
    name = container.format.name.partition(",")[0]
    if name == "avi":
        return (
            not _only_counts(container, stream) and bool(stream.frames) and len(stream.index_entries) >= stream.frames
        )
    return name in _TIMED_CONTAINERS


def _only_counts(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> bool:
    """Whether the time stamps of these packets say only where they lie in the file, not when they are shown."""
    context = stream.codec_context
    return container.format.name == "avi" and context.name in _UNORDERED_CODECS and context.has_b_frames


def _is_packed(container: av.container.InputContainer, packet: Any) -> bool:
    """Whether this MPEG-4 packet of AVI says that two pictures may lie in one, and the next one is then empty."""
    return container.format.name == "avi" and packet.is_keyframe and bool(_PACKED.search(bytes(packet)[:4096]))


def _first_key(pictures: Iterator[av.VideoFrame], target: int) -> av.VideoFrame | None:
    """The first key picture, if it is shown at `target` or before; None if the first one comes too late."""
    for picture in pictures:
        if picture.pts is None or picture.pts > target:
            return None
        if picture.key_frame:
            return picture
    return None


def _step(info: VideoInfo) -> int:
    """One picture's time at the average rate, in ticks."""
    return max(1, round(1 / (info.average_rate * info.time_base)))


def presented(info: VideoInfo, deinterlace: Deinterlace) -> VideoInfo:
    """What a probed source is like as a reader with this choice delivers it: "pulldown" gives it the film's rate."""
    if deinterlace != "pulldown":
        return info
    frames = round(info.frames * PULLDOWN_KEEPS) if info.frames else None
    return replace(info, average_rate=info.average_rate * PULLDOWN_KEEPS, frames=frames)


def _carried(picture: av.VideoFrame) -> tuple[tuple[str, bytes], ...]:
    side_data: Any = picture.side_data
    return tuple(
        (_CARRIED_SIDE_DATA[item.type.name], bytes(item)) for item in side_data if item.type.name in _CARRIED_SIDE_DATA
    )


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
