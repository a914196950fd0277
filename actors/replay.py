"""The offline replay of a live stream: what it sent, computed again from its log, one frame at a time.

A stream's log is in the headers of its answers: id, index, level, reset. What the replay gives is *equivalent* to what
was sent, whatever batches, hand-overs and losses there were on the way; so a doubt about a stream can be settled later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from actors.pictures import resize
from infra.protocol import DropReason, Flag, FrameHeader
from pipeline.frames import frame_to_tensor, tensor_to_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.engine import Engine


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One restored frame of a stream.

    Attributes:
        id: its number. index: its number in the restored stream.
        level: denoising steps, 0 for a plain resize. reset: the stream had no memory at it.
    """

    id: int
    index: int
    level: int
    reset: bool

    @classmethod
    def from_header(cls, header: FrameHeader) -> Self | None:
        """Return the entry of an answer; None if its frame was dropped, which leaves no trace in a stream."""
        if header.reason is not DropReason.NONE:
            return None
        return cls(header.id, header.index, header.level, Flag.RESET in header.flags)


def replay(
    pipe: Engine,
    log: Iterable[LogEntry],
    frame_of: Callable[[int], NDArray[np.uint8]],
    *,
    seed: int = 0,
    size_of: Callable[[int, int], tuple[int, int]] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the restored pictures of a stream in the order of its log, before the stream's codec.

    Args:
        frame_of: returns the frame (h,w,3) with an id, as the service decoded it.
        seed: of the stream's hello.
        size_of: returns width and height of the result for those of a frame, as
            ``partial(infra.protocol.output_size, hello)`` does; None: four times the frame, as the model makes it.
    """
    state = pipe.start(seed=seed)
    for entry in log:
        frame_HWC = frame_of(entry.id)
        height, width = frame_HWC.shape[:2]
        out_width, out_height = (4 * width, 4 * height) if size_of is None else size_of(width, height)
        if entry.reset:
            state.reset()
        state.index = entry.index
        if entry.level == 0:
            state.skip()
            yield np.asarray(resize(frame_HWC, out_width, out_height, "cubic"), dtype=np.uint8)
            continue
        output_13HW = pipe.step(frame_to_tensor(frame_HWC), [state], steps=[entry.level])
        restored_HWC = np.asarray(tensor_to_frame(output_13HW[0], np.dtype(np.uint8)), dtype=np.uint8)
        yield np.asarray(resize(restored_HWC, out_width, out_height), dtype=np.uint8)
