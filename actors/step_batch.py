"""Steps of several streams as one step of the model: rows that run side by side in one actor share its batches.

Each row is restored by a thread of its own; a step waits a moment for those of the others. Frames of equal size go
together. Knows no videos. Whether streams share batches changes a result by rounding only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.errors import FailureClass, TilesFixed, failure_class
from pipeline.engine import StandIn
from pipeline.errors import MemoryLimitError

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.state import StreamState
    from pipeline.tiling import Window

logger = logging.getLogger(__name__)

# How long a step waits for rows that are not ready: less than it would cost to run alone, in general.
PATIENCE_S = 0.05


@dataclass(slots=True, eq=False)
class _Request:
    frame_13HW: Tensor
    state: StreamState
    steps: int | None
    window: Window | None = None
    flow_2HW: Tensor | None = None
    output_13HW: Tensor | None = None
    error: BaseException | None = None
    taken: bool = field(default=False)

    @property
    def finished(self) -> bool:
        return self.output_13HW is not None or self.error is not None


class StepBatch:
    """The model as several threads use it. `sizes` counts the batches by how many streams each had.

    When memory runs out, a batch is halved, and no later one is larger than what then went through; a single stream is
    tried again in smaller tiles. With `fixed_tiles` it is not: other tiles are other pixels, and which frame memory
    runs out at is chance.
    """

    def __init__(
        self,
        pipe: Engine,
        *,
        largest: int,
        fixed_tiles: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.sizes: dict[int, int] = {}
        self._pipe = pipe
        self._largest = largest
        self._fixed_tiles = fixed_tiles
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._rows = 0
        self._busy = False

    @contextmanager
    def row(self) -> Iterator[None]:
        """Around the restoration of one row: the others wait for the steps of this one meanwhile."""
        with self._changed:
            self._rows += 1
        try:
            yield
        finally:
            with self._changed:
                self._rows -= 1
                self._changed.notify_all()

    def step(
        self,
        frame_13HW: Tensor,
        state: StreamState,
        steps: int | None,
        window: Window | None = None,
        flow_2HW: Tensor | None = None,
    ) -> Tensor:
        """Return the output (1,3,4h,4w) of the next frame (1,3,h,w) of one stream.

        With a window only that is restored (`pipeline.static_windows`), and the frame goes by itself: no two windows
        are of one size.

        Args:
            flow_2HW: to the previous frame, where it is known already; not for windows.

        Raises:
            PipelineError: as `StreamDiffVSRPipeline.step`; the states of the whole batch are as before.
        """
        mine = _Request(frame_13HW, state, steps, window, flow_2HW)
        patient_until = time.monotonic() + self._patience_s
        with self._changed:
            self._waiting.append(mine)
            self._changed.notify_all()
            while not mine.finished:
                left_s = patient_until - time.monotonic()
                if not mine.taken and not self._busy and (left_s <= 0 or self._is_complete()):
                    batch = self._take(mine)
                    break
                self._changed.wait(left_s if left_s > 0 and not mine.taken else None)
            else:
                return _outcome(mine)
        self._run(batch)
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        return _outcome(mine)

    def _is_complete(self) -> bool:
        return len(self._waiting) >= min(self._rows, self._largest)

    def _take(self, mine: _Request) -> list[_Request]:
        others = [one for one in self._waiting if one is not mine and one.window is None]
        alike = [one for one in others if one.frame_13HW.shape == mine.frame_13HW.shape]
        batch = [mine, *alike][: self._largest] if mine.window is None else [mine]
        for one in batch:
            one.taken = True
            self._waiting.remove(one)
        self._busy = True
        return batch

    def _restore(self, batch: list[_Request]) -> Tensor:
        first = batch[0]
        if first.window is not None:
            from pipeline.static_windows import step_window  # with diffusers, which a stand-in has no use for

            return step_window(self._pipe, first.frame_13HW, first.state, first.steps, first.window)
        frames_B3HW, states = torch.cat([one.frame_13HW for one in batch]), [one.state for one in batch]
        steps = [one.steps for one in batch]
        return step_with_flow(self._pipe, frames_B3HW, states, steps, [one.flow_2HW for one in batch])

    def _run(self, batch: list[_Request]) -> None:
        try:
            output_B3HW = self._restore(batch)
        except BaseException as error:
            if len(batch) > 1 and failure_class(error) is FailureClass.OUT_OF_MEMORY:
                half = len(batch) // 2
                self._largest = half
                self._run(batch[:half])
                self._run(batch[half:])
                return
            if failure_class(error) is FailureClass.OUT_OF_MEMORY and not isinstance(error, MemoryLimitError):
                if self._fixed_tiles:
                    error = _fixed(error)
                elif self._pipe.halve_tiles():
                    logger.warning("memory ran out; the next attempt uses smaller tiles: %s", self._pipe.tiling)
                    self._run(batch)
                    return
            for one in batch:
                one.error = error
            return
        self.sizes[len(batch)] = self.sizes.get(len(batch), 0) + 1
        for one, output_3HW in zip(batch, output_B3HW, strict=True):
            one.output_13HW = output_3HW[None]


def step_with_flow(
    pipe: Engine,
    frames_B3HW: Tensor,
    states: Sequence[StreamState],
    steps: Sequence[int | None],
    flows: Sequence[Tensor | None],
) -> Tensor:
    """Step the engine with the flow (2,4h,4w) of those streams of which it is known."""
    if isinstance(pipe, StandIn) or all(flow is None for flow in flows):
        return pipe.step(frames_B3HW, states, steps=steps)
    return pipe.step(frames_B3HW, states, steps=steps, flow_B2HW=flows)


def _fixed(error: BaseException) -> TilesFixed:
    told = TilesFixed(
        "Memory ran out, and --exact does not change tiles on the way.",
        code="out-of-memory-exact",
        remedy="Give a smaller --memory-gb: that makes an exact run in other tiles, from the beginning.",
    )
    told.__cause__ = error
    return told


def _outcome(request: _Request) -> Tensor:
    if request.error is not None:
        raise request.error
    assert request.output_13HW is not None
    return request.output_13HW
