"""What a client of the live service has sent and may have to send again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from infra.protocol import DropReason, Flag, FrameHeader

MOST_BYTES: Final = 256 << 20


@dataclass(slots=True)
class KeptFrame:
    """One frame. `size` is its width and height; `answered` the header of its answer, once it has come."""

    header: FrameHeader
    payload: bytes | memoryview
    size: tuple[int, int]
    sent_at: float = 0.0
    answered: FrameHeader | None = None


class KeptFrames:
    """Frames by id, in order, from the oldest that the service may ask for to the newest that waits to be sent.

    Args:
        in_groups: a frame can only be decoded after those since the last key frame (h264), which are kept for it.
        most_bytes: beyond it the oldest answered frames go. Should the service then ask for one of them, the stream
            begins anew, and says so.
    """

    def __init__(self, *, in_groups: bool, most_bytes: int = MOST_BYTES) -> None:
        self._in_groups, self._most_bytes = in_groups, most_bytes
        self._frames: dict[int, KeptFrame] = {}
        self._bytes = 0
        self._passed_cut = False  # by a dropped frame, for the next one
        self.begins_at = 0  # no frame with a smaller id is needed, or there is none

    def __getitem__(self, id_: int) -> KeptFrame:
        return self._frames[id_]

    def get(self, id_: int) -> KeptFrame | None:
        """Return a frame, or None if it is not kept."""
        return self._frames.get(id_)

    def add(self, frame: KeptFrame) -> None:
        """Keep a frame, newer than all others."""
        if self._passed_cut:
            _mark_cut(frame)
            self._passed_cut = False
        self._frames[frame.header.id] = frame
        self._bytes += len(frame.payload)
        while self._bytes > self._most_bytes:
            oldest = next(iter(self._frames))
            if self._frames[oldest].answered is None:
                break
            self._remove(oldest)
            self.begins_at = oldest + 1

    def first_from(self, id_: int) -> int | None:
        """Return the smallest id from `id_` on that is kept."""
        return next((kept for kept in self._frames if kept >= id_), None)

    def count_from(self, id_: int) -> int:
        """Return how many frames from `id_` on are kept."""
        return sum(1 for kept in self._frames if kept >= id_)

    def answered(self, header: FrameHeader) -> None:
        """Take note of an answer. A dropped frame is needed no more, except by a decoder."""
        frame = self._frames.get(header.id)
        if frame is None:
            return
        frame.answered = header
        if header.reason is not DropReason.NONE and not self._in_groups:
            self._remove(header.id)
            if Flag.CUT in frame.header.flags:  # it counts for the next frame, wherever that is restored
                following = self.first_from(header.id)
                if following is None:
                    self._passed_cut = True
                else:
                    _mark_cut(self._frames[following])

    def forget_below(self, id_: int) -> None:
        """Drop the frames that the service will not ask for again."""
        below = self.resend_from(id_)
        for kept in [kept for kept in self._frames if kept < below]:
            self._remove(kept)

    def resend_from(self, id_: int) -> int:
        """Return the first id that has to be sent so that frame `id_` can be decoded."""
        if not self._in_groups:
            return id_
        keys = [kept for kept, frame in self._frames.items() if Flag.KEY in frame.header.flags and kept <= id_]
        return max(keys, default=id_)

    def begin_anew(self) -> int:
        """Forget what has been answered, as far as no decoder needs it; returns the first id to send."""
        unanswered = next((kept for kept, frame in self._frames.items() if frame.answered is None), None)
        if unanswered is None:
            first = max(self._frames, default=self.begins_at - 1) + 1
        else:
            first = self.resend_from(unanswered)
        for kept in [kept for kept in self._frames if kept < first]:
            self._remove(kept)
        self.begins_at = 0
        return first

    def _remove(self, id_: int) -> None:
        self._bytes -= len(self._frames.pop(id_).payload)


def _mark_cut(frame: KeptFrame) -> None:
    frame.header = replace(frame.header, flags=frame.header.flags | Flag.CUT)


def header_to_send(frame: KeptFrame, *, acknowledged: int, receipt: int) -> FrameHeader:
    """Return the header with which a frame is sent, the first time or again."""
    told = frame.answered
    return FrameHeader(
        frame.header.id,
        frame.header.pts,
        frame.header.flags,
        level=told.level if told else 0,
        reason=told.reason if told else DropReason.NONE,
        receipt=receipt,
        acknowledged=acknowledged,
    )
