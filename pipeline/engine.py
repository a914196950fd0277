"""What restores frames, as the rest of the product sees it: a checkpoint's pipeline, or a stand-in that takes a while.

The stand-in is for measuring everything around the model: it waits for a given time, as long for one stream as for
many, and returns the frame four times as large by repetition. Decoding, encoding, storage, scheduling and recovery are
the same as ever, on machines without a GPU too. Its name is ``stand-in:MS``, MS being milliseconds a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.flow import FlowName
from pipeline.model_source import STAND_IN_SHA256, is_stand_in, stand_in_step_s
from pipeline.state import StreamState

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline
    from pipeline.tiling import TilePlan

    Engine: TypeAlias = "StreamDiffVSRPipeline | StandIn"


def open_engine(
    source: str,
    *,
    torch_dtype: torch.dtype | Sequence[torch.dtype],
    device: str,
    flow: FlowName | None,
    max_pixels: int,
    backend: str = "eager",
) -> Engine:
    """Return the engine with this name, folder or hub id; arguments as in `StreamDiffVSRPipeline.from_pretrained`.

    Raises:
        CheckpointError, FlowError, BackendError: as there.
    """
    if is_stand_in(source):
        return StandIn(source)
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    return StreamDiffVSRPipeline.from_pretrained(
        source, torch_dtype=torch_dtype, device=device, flow=flow, max_pixels=max_pixels, backend=backend
    )


class _NoFlow:
    name = "none"


class StandIn:
    """Takes the place of a model whose step would take a fixed time.

    Args:
        source: ``stand-in:40`` waits for 40 milliseconds a step, however many streams share it.

    Raises:
        CheckpointError: no such name, or more than ten minutes.
    """

    memory_limit_bytes: int | None = None

    def __init__(self, source: str) -> None:
        self._step_s = stand_in_step_s(source)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.numerics = "float32"
        self.flow = _NoFlow()
        self.model_sha256 = STAND_IN_SHA256

    @property
    def tiling(self) -> TilePlan:
        """No tiles."""
        from pipeline.tiling import TilePlan

        return TilePlan()

    def set_aside(self, beside_bytes: int) -> None:
        """Nothing: no memory is needed."""

    def warm_up(self) -> None:
        """Nothing: the first frame takes as long as any other."""

    def halve_tiles(self) -> bool:
        """Return False: there is nothing to halve."""
        return False

    def start(self, seed: int = 0, index: int = 0) -> StreamState:
        """Return the state of a new stream."""
        return StreamState(model_sha256=self.model_sha256, seed=seed, index=index)

    def step(
        self, frames_B3HW: Tensor, states: Sequence[StreamState], *, steps: Sequence[int | None] | int | None = None
    ) -> Tensor:
        """Wait, then return frames (B,3,h,w) as (B,3,4h,4w), fp32; the states advance as with a model.

        Raises:
            InputError: not one state per frame.
        """
        if len(states) != len(frames_B3HW):
            raise InputError(
                f"{len(frames_B3HW)} frames and {len(states)} states.", code="states-count", remedy="Give one each."
            )
        ready = time.perf_counter() + self._step_s
        output_B3HW = frames_B3HW.to(torch.float32).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        time.sleep(max(0.0, ready - time.perf_counter()))
        for state, output_3HW, input_3HW in zip(states, output_B3HW, frames_B3HW, strict=True):
            state.require_model(self.model_sha256)
            state.advance(output_3HW.clone(), input_3HW.clone())
        return output_B3HW
