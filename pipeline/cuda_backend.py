"""Frames by CUDA graphs, with or without code that torch compiled: the function of `pipeline.frame_core`, recorded.

A recorded frame is started by one call instead of some thousand, and no part of it waits for the processor. Recording
is done for each size, schedule and number of slots for streams, because a graph has fixed places in memory; the latest
few are kept. Slots come in powers of two and some may be empty: a recording for every number of streams would cost more
time and memory than empty slots do, and where it would not, `actors.batch_policy` finds smaller batches better.

The first frames of a kind run without: a recording costs the time of some frames, and the first frames of shots are
rare. A frame that cannot be recorded, or whose recording gives other pictures than the networks themselves, runs as
without this backend, with one warning.

Knows: buffers, recording, what is kept. Does not know: streams, flow, noise.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipeline.autoencoder import TemporalBlock
from pipeline.frame_core import CoreInputs, CoreKind, FrameCore
from pipeline.model_source import cache_folder

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

logger = logging.getLogger(__name__)

Work = Callable[[], Tensor]
Record = Callable[[Work], tuple[Work, Tensor]]
"""Takes work on fixed buffers; returns what repeats it, and the tensor that holds its result each time."""

_KEPT: Final = 6
_RECORDED_FROM: Final = 3  # frame of its kind and size from which on a recording pays
_WARM_UP: Final = 3  # runs before a recording: cuDNN chooses its kernels, and memory is allocated
_LEAST_PSNR_DB: Final = 45.0  # of a recording to the networks themselves, for a picture of range 2
_REGIONS: Final = (ResnetBlock2D, BasicTransformerBlock, TemporalBlock)


@dataclass(slots=True)
class _Recording:
    buffers: tuple[Tensor, ...]
    repeat: Work
    result: Tensor


class CapturingBackend:
    """See `pipeline.backends.Backend`.

    Args:
        pipe: on a CUDA device; with `compiles`, on any.
        compiles: let torch compile the blocks of which the networks consist. That takes a minute or more for the first
            frame of a size; what was compiled is kept on disk (`TORCHINDUCTOR_CACHE_DIR`).
        record: how work is recorded; None: as a CUDA graph, on devices without them not at all.
        recorded_from: which frame of a kind and size is the first that is recorded.
    """

    serves_every_size = False

    def __init__(
        self,
        pipe: StreamDiffVSRPipeline,
        *,
        compiles: bool = False,
        record: Record | None = None,
        recorded_from: int = _RECORDED_FROM,
    ) -> None:
        self.name = "compiled" if compiles else "graph"
        self.dtype = pipe.unet.dtype
        self._pipe = pipe
        self._record = record
        if record is None and pipe.device.type == "cuda":
            # One pool for all: no recording reads what another left behind, so they may take turns in one place.
            self._record = partial(cuda_graph, pool=torch.cuda.graph_pool_handle())
        self._recorded_from = recorded_from
        self._seen: dict[tuple[object, ...], int] = {}
        self._cores: dict[CoreKind, FrameCore] = {}
        self._recordings: OrderedDict[tuple[object, ...], _Recording | None] = OrderedDict()
        self._lock = threading.Lock()  # the buffers of a recording serve one caller at a time
        self._compiles = compiles
        self._compiled = _compile_regions(pipe) if compiles else []

    def run(self, kind: CoreKind, inputs: CoreInputs) -> Tensor:
        """Return the outputs (B,3,H,W) in the dtype of the networks."""
        with self._lock:
            core = self._core(kind)
            if self._record is None:
                return core(*inputs.tensors)
            rows = len(inputs.frames_B3hw)
            slots = 1 << (rows - 1).bit_length()
            key = (kind, slots, *((x.shape[1:], x.dtype) for x in inputs.tensors))
            if key not in self._recordings:
                self._seen[key] = self._seen.get(key, 0) + 1
                if self._seen[key] < self._recorded_from:
                    return core(*inputs.tensors)
                self._make_room()
                self._recordings[key] = self._make(core, tuple(_with_slots(x, slots) for x in inputs.tensors))
            self._recordings.move_to_end(key)
            recording = self._recordings[key]
            if recording is None:
                return core(*inputs.tensors)
            for buffer, x in zip(recording.buffers, inputs.tensors, strict=True):
                buffer[:rows].copy_(x, non_blocking=True)  # what is in the other slots is restored for nobody
            recording.repeat()
            return recording.result[:rows].clone()

    def restore(
        self, kind: CoreKind, frames_B3hw: Tensor, latents_BChw: Tensor, warped_B3HW: Tensor, seen_B3HW: Tensor
    ) -> Tensor:
        """Return the outputs of parts of frames (B,3,H,W); they are of too many sizes to be recorded."""
        with self._lock:
            return self._core(kind).restore(frames_B3hw, latents_BChw, warped_B3HW, seen_B3HW)

    def _core(self, kind: CoreKind) -> FrameCore:
        if kind not in self._cores:
            network = kind.flow_network
            if self._compiles and network is not None and network not in self._compiled:
                network.compile(dynamic=False)
                self._compiled.append(network)
            self._cores[kind] = FrameCore(self._pipe, kind).eval()
        return self._cores[kind]

    def forget(self) -> None:
        """Record anew at the next step."""
        self.dtype = self._pipe.unet.dtype
        with self._lock:
            self._cores.clear()
            self._recordings.clear()
            self._seen.clear()

    def close(self) -> None:
        """Take compiled code away from the networks, which go on without it."""
        self.forget()
        for block in self._compiled:
            block._compiled_call_impl = None
        self._compiled = []

    def _make_room(self) -> None:
        while len(self._recordings) >= _KEPT:
            del self._seen[self._recordings.popitem(last=False)[0]]

    def _make(self, core: FrameCore, buffers: tuple[Tensor, ...]) -> _Recording | None:
        assert self._record is not None
        try:
            expected = core(*buffers)
            repeat, result = self._record(lambda: core(*buffers))
            repeat()
            if (reached := psnr_db(result, expected)) < _LEAST_PSNR_DB:
                raise RuntimeError(f"the recording differs from the networks: {reached:.1f} dB")
        except RuntimeError as error:  # torch's errors of CUDA and of compilation are RuntimeErrors
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("frames of this size are not recorded, and take longer: %s", str(error).splitlines()[0])
            return None
        return _Recording(buffers, repeat, result)


def cuda_graph(work: Work, *, pool: Any = None) -> tuple[Work, Tensor]:
    """Record `work` as a CUDA graph.

    Args:
        pool: of memory, shared with other graphs; None takes one of its own.

    Raises:
        RuntimeError: something in it cannot be recorded: it waits for the device, or takes memory elsewhere.
    """
    beside: Any = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.empty_cache()  # what the warm-up took would stay beside the graph's own memory
    graph = torch.cuda.CUDAGraph()
    # Only this thread must do nothing that cannot be recorded: others bring frames to the device and take results away.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()

    def repeat() -> Tensor:
        graph.replay()
        return result

    return repeat, result


def _with_slots(x: Tensor, slots: int) -> Tensor:
    """Return a copy of `x` with this many rows, the last one repeated, in the ordinary order in memory."""
    rows = torch.cat([x, x[-1:].expand(slots - len(x), *x.shape[1:])])
    return rows.contiguous(memory_format=torch.contiguous_format)


def psnr_db(x: Tensor, reference: Tensor) -> float:
    """Return the PSNR of pictures in [-1, 1] (range 2); infinite where they are equal, -inf where `x` is not finite."""
    error = float((x.to(torch.float32) - reference.to(torch.float32)).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def _compile_regions(pipe: StreamDiffVSRPipeline) -> list[nn.Module]:
    """Let torch compile the repeated blocks of the networks; blocks of one shape share what was compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 256)  # one form for each width and size of a block
    blocks = [
        module
        for network in (pipe.unet, pipe.controlnet, pipe.vae)
        for module in network.modules()
        if isinstance(module, _REGIONS)
    ]
    for block in blocks:
        block.compile(dynamic=False)
    return blocks
