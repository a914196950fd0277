"""Interlacing: is a video interlaced, and the filters that make progressive pictures of it.

Bwdif interpolates a missing line from both neighbouring fields in time; it therefore returns a picture only after the
next one went in. That is the one place where a frame waits for its successor, and only for interlaced sources. Film
that was spread over fields (3:2 pulldown) needs no interpolation: its fields are put together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph

# Shares of pictures that decide; only pictures with motion have a say on their content.
_FLAGGED_SHARE = 0.5
_COMBED_SHARE = 0.6
_MIN_MOVING_PICTURES = 4
# A pixel moves when it changes by more than noise does (8-bit levels); fewer such pixels than this prove nothing.
_MOTION_LEVELS = 12
_MIN_MOVING_PIXELS = 64
# Woven fields make neighbouring lines differ more than lines of one field do; in real progressive pictures the
# nearer line is the more similar one, with a ratio of 0.5 to 0.9.
_COMB_RATIO = 1.02


class FieldStatistics:
    """Counts of what the first pictures say: by their flags, and by their content where something moves."""

    def __init__(self) -> None:
        self.pictures = 0
        self.flagged = 0
        self.moving = 0
        self.combed = 0
        self._before_HW: np.ndarray | None = None

    def add(self, frame: av.VideoFrame) -> None:
        """Take one decoded picture into account."""
        self.pictures += 1
        self.flagged += int(frame.interlaced_frame)
        luma_HW = frame.reformat(format="gray").to_ndarray().astype(np.int16)
        before_HW, self._before_HW = self._before_HW, luma_HW
        if before_HW is None or before_HW.shape != luma_HW.shape or luma_HW.shape[0] < 4:
            return
        moving_HW = np.abs(luma_HW - before_HW)[1:-1] > _MOTION_LEVELS
        if int(moving_HW.sum()) < _MIN_MOVING_PIXELS:
            return
        self.moving += 1
        nearest = np.abs(luma_HW[1:-1] - luma_HW[:-2])[moving_HW].mean()
        same_field = np.abs(luma_HW[2:] - luma_HW[:-2])[moving_HW].mean()
        self.combed += bool(nearest > _COMB_RATIO * max(same_field, 1.0))

    def interlaced(self) -> bool | None:
        """True by majority of the flags, or when most moving pictures are combed; None without pictures."""
        if not self.pictures:
            return None
        if self.flagged >= _FLAGGED_SHARE * self.pictures:
            return True
        return self.moving >= _MIN_MOVING_PICTURES and self.combed >= _COMBED_SHARE * self.moving


class FieldFilter:
    """A chain of libavfilter's filters over a stream of pictures; stamps stay in the stream's time base."""

    def __init__(self, chain: list[tuple[str, str]]) -> None:
        self._chain = chain
        self._graph: Graph | None = None
        self._time_base = Fraction(1, 90000)
        self._origin = 0

    def push(self, frame: av.VideoFrame, time_base: Fraction) -> Iterator[av.VideoFrame]:
        """Give one picture, get those that are finished."""
        if self._graph is None:
            self._time_base = time_base
            self._graph = _graph(frame, time_base, self._chain)
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
                frame: Any = self._graph.pull()
            except (av.BlockingIOError, EOFError):
                return
            # Filters have clocks of their own: bwdif counts in half ticks, decimate in pictures.
            if frame.pts is not None and frame.time_base is not None:
                frame.pts = round(frame.pts * frame.time_base / self._time_base) + self._origin
                frame.duration = round(frame.duration * frame.time_base / self._time_base)
                frame.time_base = self._time_base
            yield frame


class Deinterlacer(FieldFilter):
    """bwdif; one picture out for one in, with the same time stamp.

    Args:
        every: treat every picture as interlaced; otherwise only those that are flagged.
    """

    def __init__(self, *, every: bool) -> None:
        super().__init__([("bwdif", f"mode=send_frame:parity=auto:deint={'all' if every else 'interlaced'}")])


class PulldownRemover(FieldFilter):
    """Film out of fields: four pictures for every five of telecined video, evenly spaced in time.

    Fields are matched with those of the neighbours that they were cut from; where none fits (video among the film) a
    picture is deinterlaced. Of five pictures, the one most like the one before it is dropped. What comes out depends on
    all that went in before, so that it has to be fed from the beginning.

    Args:
        rate: pictures a second of the source, which is taken to be constant.
    """

    def __init__(self, rate: Fraction) -> None:
        super().__init__(
            [
                # The matching counts pictures: it is told the rate, and that the first one is at zero. Film whose
                # fields are repeated by flags comes as film; it is shown for five pictures of video here again.
                ("fps", f"fps={rate.numerator}/{rate.denominator}"),
                ("fieldmatch", "order=auto:mode=pc_n:combmatch=full"),
                ("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
                ("decimate", "cycle=5"),
            ]
        )
        self._rate = rate

    def push(self, frame: av.VideoFrame, time_base: Fraction) -> Iterator[av.VideoFrame]:
        if self._graph is None:
            self._origin = frame.pts or 0
        # Flagged film lies on whole and half pictures of video; a quarter keeps both away from where rounding turns.
        frame.pts = (frame.pts or 0) - self._origin + round(1 / (4 * self._rate * time_base))
        return super().push(frame, time_base)


PULLDOWN_KEEPS = Fraction(4, 5)


def _graph(frame: av.VideoFrame, time_base: Fraction, chain: list[tuple[str, str]]) -> Graph:
    graph = Graph()
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    for name, options in [*chain, ("buffersink", "")]:
        following = graph.add(name, options)
        last.link_to(following)
        last = following
    graph.configure()
    return graph
