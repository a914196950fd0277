"""Flow ahead of its step: the processor looks for it while a device is busy with the frame before.

Flow from a frame to the one before needs both input frames and nothing that networks make of them. So it can be had
before its step begins, as soon as the frame is there; no output waits for it, and none depends on when it was made. The
numbers are those that the step itself would have found, bit for bit.

It pays where the estimator runs on the processor and the networks elsewhere (`helps`). Where both share a processor it
moves work from one thread to another.

Knows: frames as arrays, one estimator, threads, and which frame a stream's next flow leads to. Does not know: states,
queues, or when a frame is dropped.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from pipeline.flow import DISFlow, upscale_flow

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.engine import Engine


@dataclass(frozen=True, slots=True, eq=False)
class FlowSearch:
    """The flow from one frame to another, wanted, under way or found.

    Attributes:
        current_HWC, previous_HWC: the frames, RGB, uint8 or full-scale uint16.
    """

    current_HWC: NDArray[np.integer]
    previous_HWC: NDArray[np.integer]
    _found: Future[Tensor]

    def is_for(self, current_HWC: NDArray[np.integer], previous_HWC: NDArray[np.integer] | None) -> bool:
        """Whether it is the flow between these very arrays."""
        return self.current_HWC is current_HWC and self.previous_HWC is previous_HWC

    def flow(self, device: torch.device) -> Tensor | None:
        """Return the flow (2,4h,4w) in output pixels on `device`, as soon as it is found; None if that was called off.

        Raises:
            Exception: what the estimator raised in its thread.
        """
        try:
            found_12hw = self._found.result()
        except CancelledError:
            return None
        return upscale_flow(found_12hw.to(device))[0]

    def call_off(self) -> None:
        """Nobody wants it any more: if it was not begun, it will not be."""
        self._found.cancel()


class FlowAhead:
    """Threads that look for flow; close it when no stream needs it any more.

    Args:
        flow: the estimator.
        threads: searches at a time; each stream has one at most.
    """

    def __init__(self, flow: DISFlow, threads: int = 1) -> None:
        self._flow = flow
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="flow-ahead")  # started when they are needed

    def start(self, current_HWC: NDArray[np.integer], previous_HWC: NDArray[np.integer]) -> FlowSearch | None:
        """Begin to look for the flow between two frames; None where there is none: they differ in size or type."""
        if current_HWC.shape != previous_HWC.shape or current_HWC.dtype != previous_HWC.dtype:
            return None
        return FlowSearch(current_HWC, previous_HWC, self._pool.submit(self._flow.search, current_HWC, previous_HWC))

    def close(self) -> None:
        """Call off what was not begun, and wait for the threads to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class NextFlow:
    """The flow of one stream's next frame; of one search at a time, so that one flow at most waits for its step.

    For each frame: `take` what was found for it, `begin` its step, `look` at the frame after it as soon as that is
    there, and say when the step is `done`. A frame that gets the output of the one before changes nothing and is not
    told. What was looked for in vain (a frame was dropped, a scene began) is let go; the step then estimates its flow.
    """

    def __init__(self, ahead: FlowAhead) -> None:
        self._ahead = ahead
        self._restoring_HWC: NDArray[np.integer] | None = None
        self._restored_HWC: NDArray[np.integer] | None = None  # the frame that is the state's previous input
        self._search: FlowSearch | None = None

    def take(self, frame_HWC: NDArray[np.integer]) -> FlowSearch | None:
        """Return the search for the flow from this frame to the stream's previous input, if there is one."""
        search, self._search = self._search, None
        if search is not None and not search.is_for(frame_HWC, self._restored_HWC):
            search.call_off()
            return None
        return search

    def begin(self, frame_HWC: NDArray[np.integer] | None) -> None:
        """A frame is restored; None: the stream's previous input will be no frame, but a part of one, or nothing."""
        self._restoring_HWC, self._restored_HWC = frame_HWC, None

    def look(self, following_HWC: NDArray[np.integer]) -> None:
        """Begin to look for the flow from the frame that follows to the one that is being restored."""
        if self._restoring_HWC is not None and self._search is None:
            self._search = self._ahead.start(following_HWC, self._restoring_HWC)

    def done(self) -> None:
        """The frame has been restored: it is the stream's previous input now."""
        self._restoring_HWC, self._restored_HWC = None, self._restoring_HWC


def can_run_ahead(flow: object) -> TypeGuard[DISFlow]:
    """Whether an estimator can look for flow in frames that are on no device yet, with the same outcome."""
    return type(flow) is DISFlow and flow.size == "input"


def helps(pipe: Engine) -> bool:
    """Whether flow ahead makes steps shorter: the processor estimates it, and would be idle while networks run."""
    return pipe.device.type != "cpu"


def flow_ahead(pipe: Engine, *, threads: int = 1, always: bool = False) -> FlowAhead | None:
    """Return what looks for the flow of a pipeline's next frames; None where it cannot or does not help.

    Args:
        always: also where it does not help.
    """
    return FlowAhead(pipe.flow, threads) if can_run_ahead(pipe.flow) and (always or helps(pipe)) else None
