"""A model as live streams use it: batched steps that never mix up their streams, and what they cost by measurement.

All methods but `cost_s` run in the one thread that owns the device. Knows frames and states, no sessions.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from actors.batch_policy import LearnedBatches
from actors.errors import FailureClass, failure_class
from actors.hardware import usable_cores
from actors.step_batch import step_with_flow
from pipeline.flow_ahead import flow_ahead
from pipeline.frames import frame_to_tensor
from pipeline.shots import CutDetector
from pipeline.step_policy import StepPolicy, choose

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.engine import Engine
    from pipeline.flow_ahead import FlowSearch
    from pipeline.state import StreamState

logger = logging.getLogger(__name__)

_SMOOTHING: Final = 0.2
_WARM_SIZE: Final = (96, 128)  # height and width of the step that shows that the model works


@dataclass(slots=True, eq=False)
class StepRequest:
    """One frame of one stream. `cut`: the client says that a scene begins; `find_cuts`: look whether one does.

    Attributes:
        steps: denoising steps; 0 for a plain resize, which is not made here: only the state advances.
        policy: may lower `steps`, by what the frame shows, but not to 0.
        search: for the flow to the stream's previous input, where it began before the step.
        output_3HW: the restored frame, nominal [-1, 1], on the engine's device; None for a plain resize.
        reset: the stream had no memory at this frame. error: why there is no output; the state is as before then.
    """

    rgb_HWC: NDArray[np.uint8]
    state: StreamState
    steps: int
    cut: bool = False
    find_cuts: bool = True
    policy: StepPolicy | None = None
    search: FlowSearch | None = None
    output_3HW: Tensor | None = None
    index: int = 0
    reset: bool = False
    error: BaseException | None = None


class LiveEngine:
    """One loaded model.

    Args:
        pipe: the pipeline or a stand-in.
        name: by which clients ask for it.
        largest_batch: streams that are stepped together at most. How many are is learned from what steps cost.
        threads: CPU threads of a step.
    """

    def __init__(self, pipe: Engine, name: str, *, largest_batch: int, threads: int) -> None:
        self.pipe, self.name = pipe, name
        self.model_sha256 = pipe.model_sha256
        self.sizes: dict[int, int] = {}  # batches by how many streams each had
        self.steps = 0
        self.batches = LearnedBatches(largest_batch)
        self.ahead = flow_ahead(pipe, threads=max(1, min(largest_batch, usable_cores() - 1)))
        self._threads = threads
        self._pixel_s: dict[int, float] = {}  # seconds per input pixel and frame, by step count
        self._frame_s: dict[tuple[int, int, int], float] = {}  # by height, width, step count

    @property
    def largest_batch(self) -> int:
        """Streams that are stepped together at most; less than at first where memory ran out."""
        return self.batches.largest

    def batch_for(self, height: int, width: int, steps: int, waiting: int, budget_s: float | None) -> int:
        """Return how many of the `waiting` streams with frames of this size to step together now.

        Args:
            budget_s: within which the last of them wants its answer; None: no limit.
        """
        budget_ms = None if budget_s is None else 1000 * budget_s
        return self.batches.choose((height, width, steps), waiting, budget_ms)

    def warm(self, sizes: list[tuple[int, int]] | None = None) -> None:
        """Run one step of each size (height, width), so that the first client meets a model that is ready.

        Raises:
            PipelineError, RuntimeError: the model does not work on this device.
        """
        for height, width in sizes or [_WARM_SIZE]:
            picture = np.zeros((height, width, 3), np.uint8)
            for _ in range(2):  # the first one also allocates and compiles: its time says nothing
                state = self.pipe.start()
                for _ in range(2):
                    request = StepRequest(picture, state, 4, find_cuts=False)
                    self.step([request])
                    if request.error is not None:
                        raise request.error
                self._pixel_s.setdefault(4, self._frame_s.pop((height, width, 4)) / (height * width))

    def cost_s(self, height: int, width: int, steps: int) -> float:
        """Return the expected seconds of the engine per frame of this size: measured, or scaled from what was."""
        if steps == 0:
            return 0.0
        known = self._frame_s.get((height, width, steps))
        if known is not None:
            return known
        if steps in self._pixel_s:
            return self._pixel_s[steps] * height * width
        return self._pixel_s.get(4, 0.0) * height * width * (0.3 + 0.7 * steps / 4)

    def step(self, requests: list[StepRequest]) -> float:
        """Restore frames of equal size, one of each stream; returns the seconds it took.

        A frame that fails alone fails alone: its error is in its request. Memory that runs out halves the batch, for
        this and all later ones.
        """
        began = time.perf_counter()
        torch.set_num_threads(self._threads)  # the number belongs to the thread that asks
        for request in requests:
            try:
                self._prepare(request)
            except Exception as error:
                request.error = error
        resized = [request for request in requests if request.steps == 0 and request.error is None]
        for request in resized:
            request.state.skip()
        restored = [request for request in requests if request.steps > 0 and request.error is None]
        for start in range(0, len(restored), self.largest_batch):
            self._run(restored[start : start + self.largest_batch])
        return time.perf_counter() - began

    def _prepare(self, request: StepRequest) -> None:
        state = request.state
        height, width = request.rgb_HWC.shape[:2]
        cut = request.cut or (not state.is_first and (state.height, state.width) != (height, width))
        if request.find_cuts:
            detector = CutDetector.from_tensors(state.detector) if state.detector else CutDetector()
            cut = detector.update(request.rgb_HWC) or cut
            state.detector = detector.tensors()
        if cut:
            state.reset()
        request.index, request.reset = state.index, state.is_first
        if request.policy is not None and request.steps > 0:
            choice = choose(request.policy.without_hold, request.rgb_HWC, state)
            request.steps = min(request.steps, choice.level)
            state.policy = choice.memory

    def _run(self, batch: list[StepRequest]) -> None:
        if not batch:
            return
        began = time.perf_counter()
        try:
            frames_B3HW = torch.cat([frame_to_tensor(request.rgb_HWC, self.pipe.device) for request in batch])
            flows = [self._flow_of(request) for request in batch]
            states, steps = [request.state for request in batch], [request.steps for request in batch]
            output_B3HW = step_with_flow(self.pipe, frames_B3HW, states, steps, flows)
        except Exception as error:
            self._run_again(batch, error)
            return
        for request, output_3HW in zip(batch, output_B3HW, strict=True):
            request.output_3HW = output_3HW
        self.sizes[len(batch)] = self.sizes.get(len(batch), 0) + 1
        self.steps += len(batch)
        self._learn(batch, time.perf_counter() - began)

    def _flow_of(self, request: StepRequest) -> Tensor | None:
        """Return the flow (2,4h,4w) that was looked for before the step; where a scene begins none is wanted."""
        if request.search is None or request.state.is_first:
            return None
        return request.search.flow(self.pipe.device)

    def _run_again(self, batch: list[StepRequest], error: Exception) -> None:
        """No state has changed: try smaller, so that one bad frame or too large a batch does not cost the others."""
        out_of_memory = failure_class(error) is FailureClass.OUT_OF_MEMORY
        if len(batch) > 1:
            half = (len(batch) + 1) // 2
            if out_of_memory:
                self.batches.largest = half
                logger.warning("memory ran out with %d streams in a batch; now at most %d", len(batch), half)
            self._run(batch[:half])
            self._run(batch[half:])
        elif out_of_memory and self.pipe.halve_tiles():
            self._run(batch)
        else:
            batch[0].error = error

    def _learn(self, batch: list[StepRequest], batch_s: float) -> None:
        steps = {request.steps for request in batch}
        if len(steps) > 1:
            return
        height, width = batch[0].rgb_HWC.shape[:2]
        key, frame_s = (height, width, batch[0].steps), batch_s / len(batch)
        if not any(request.reset for request in batch):  # without a previous output a frame costs less
            self.batches.note(key, len(batch), 1000 * batch_s)
        known = self._frame_s.get(key)
        self._frame_s[key] = frame_s if known is None else known + _SMOOTHING * (frame_s - known)
        if len(self._frame_s) > 256:  # clients choose the sizes
            self._frame_s.pop(next(iter(self._frame_s)))
