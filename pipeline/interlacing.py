"""Interlacing: is a video interlaced, and the filter that makes progressive pictures of it (bwdif).

Bwdif interpolates a missing line from both neighbouring fields in time; it therefore returns a picture only after the
next one went in. That is the one place where a frame waits for its successor, and only for interlaced sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av
from av.filter import Graph

# Shares of pictures, over those about which the detector is sure.
_FLAGGED_SHARE = 0.5
_COMBED_SHARE = 0.6
_MIN_COMBED = 4


class FieldStatistics:
    """Counts of what the first pictures say: by their flags, and by their content (FFmpeg's idet)."""

    def __init__(self) -> None:
        self.pictures = 0
        self.flagged = 0
        self.combed = 0
        self.progressive = 0
        self._graph: Graph | None = None

    def add(self, frame: av.VideoFrame) -> None:
        """Take one decoded picture into account."""
        self.pictures += 1
        self.flagged += int(frame.interlaced_frame)
        if self._graph is None:
            self._graph = _graph(frame, Fraction(1, 1000), "idet", "intl_thres=1.04:prog_thres=1.5")
        try:
            self._graph.push(frame)
            self._pull()
        except (av.FFmpegError, ValueError):
            return  # a picture that the filter cannot take (a change of size, an exotic format) just has no say

    def _pull(self) -> None:
        while self._graph is not None:
            try:
                judged = self._graph.pull()
            except (av.BlockingIOError, EOFError):
                return
            verdict = judged.metadata.get("lavfi.idet.multiple.current_frame", "")
            self.combed += verdict in ("tff", "bff")
            self.progressive += verdict == "progressive"

    def interlaced(self) -> bool | None:
        """True by majority of the flags, or when the content is clearly combed; None without pictures."""
        if not self.pictures:
            return None
        if self.flagged >= _FLAGGED_SHARE * self.pictures:
            return True
        sure = self.combed + self.progressive
        return self.combed >= _MIN_COMBED and self.combed >= _COMBED_SHARE * sure


class Deinterlacer:
    """bwdif over a stream of pictures; one picture out for one in, with the same time stamp.

    Args:
        every: treat every picture as interlaced; otherwise only those that are flagged.
    """

    def __init__(self, *, every: bool) -> None:
        self._options = f"mode=send_frame:parity=auto:deint={'all' if every else 'interlaced'}"
        self._graph: Graph | None = None
        self._time_base = Fraction(1, 90000)

    def push(self, frame: av.VideoFrame, time_base: Fraction) -> Iterator[av.VideoFrame]:
        """Give one picture, get those that are finished."""
        if self._graph is None:
            self._time_base = time_base
            self._graph = _graph(frame, time_base, "bwdif", self._options)
        self._graph.push(frame)
        yield from self._finished()

    def flush(self) -> Iterator[av.VideoFrame]:
        """The pictures that were still waiting for a successor."""
        if self._graph is None:
            return
        self._graph.push(None)
        yield from self._finished()
        self._graph = None

    def _finished(self) -> Iterator[av.VideoFrame]:
        while self._graph is not None:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, EOFError):
                return
            # The filter counts in half ticks, because it could also deliver one picture per field.
            if frame.pts is not None and frame.time_base is not None:
                frame.pts = round(frame.pts * frame.time_base / self._time_base)
                frame.time_base = self._time_base
            yield frame


def _graph(frame: av.VideoFrame, time_base: Fraction, name: str, options: str) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    work = graph.add(name, options)
    sink = graph.add("buffersink")
    source.link_to(work)
    work.link_to(sink)
    graph.configure()
    return graph
