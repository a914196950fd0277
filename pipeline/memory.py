"""How much memory a step needs, before it is taken, and which tiles keep it within a limit.

The estimate runs the engine itself on tensors that have sizes but no data (torch's "meta" device) and counts what is
alive at every moment. So it holds for every checkpoint and follows every change of the engine. It does not see what
operators hold inside themselves, nor what an allocator keeps for later: hence `UNSEEN`, and `SLACK` before a limit.

Knows: sizes. Does not know: how large the machine is.

On the CPU an estimate is that of the whole process (resident set); on a GPU that of its allocations
(`torch.cuda.max_memory_allocated`), without the context of CUDA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import MemoryLimitError
from pipeline.flow import SCALE, FlowEstimator, NetFlow, RAFTFlow, ZeroFlow, upscale_flow
from pipeline.state import StreamState
from pipeline.tiling import SMALLEST_TILE, TilePlan

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

RUNTIME_BYTES: Final = 550 << 20  # a process that has loaded torch, diffusers and OpenCV but no model
UNSEEN: Final = 1.1  # what a step takes for every byte that was counted; measured
SLACK: Final = 1.3  # a step that is kept within a limit may take so much more than estimated
WORKER_BYTES: Final = 150 << 20  # what a worker of a cluster and its video decoder add to the process
ENCODER_BYTES_PER_PIXEL: Final = 210  # libx264 with its forty pictures of foresight, 4:2:0; measured
_DIS_BYTES_PER_PIXEL: Final = 120  # pyramids, gradients and patches of OpenCV's estimator
_SIDES: Final = (1024, 768, 512, 384, 256, 192, 128, 96, 64)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of a step in bytes, by what holds it.

    Attributes:
        runtime: interpreter and libraries; 0 on a GPU.
        weights: of all networks.
        step: pictures, states and what the networks compute, at the worst moment.
    """

    runtime: int
    weights: int
    step: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.runtime + self.weights + self.step


def estimate(
    pipe: StreamDiffVSRPipeline, height: int, width: int, *, batch: int = 1, plan: TilePlan | None = None
) -> MemoryEstimate:
    """Return the peak memory of a step with the networks, dtype, device kind and flow estimator of `pipe`.

    Args:
        height, width: input size in pixels.
        batch: streams in a step.
        plan: tiles; None runs whole frames.
    """
    return _Rehearsal(pipe).estimate(height, width, batch, plan or TilePlan())


def beside_the_step(*, restored_pixels: int, written_pixels: int, waiting: int) -> int:
    """Return how many bytes a stream needs outside the model, in main memory, for 8-bit pictures.

    Args:
        restored_pixels: of a picture as the model gives it.
        written_pixels: of a picture as it is encoded.
        waiting: restored pictures between model and encoder, at most.
    """
    return WORKER_BYTES + 3 * restored_pixels * waiting + ENCODER_BYTES_PER_PIXEL * written_pixels


def fits(pipe: StreamDiffVSRPipeline, limit_bytes: int, height: int, width: int, *, batch: int = 1) -> TilePlan:
    """Return the plan with the largest tiles that keeps a step within `limit_bytes`; whole frames if they fit.

    The decoder is cut first, because its tiles are exact; then the flow (RAFT only), then the U-Net.

    Raises:
        MemoryLimitError: even the smallest tiles need more.
    """
    rehearsal = _Rehearsal(pipe)

    def needs(plan: TilePlan) -> int:
        found = rehearsal.estimate(height, width, batch, plan)
        return found.total + round((SLACK - 1) * found.step)

    if needs(TilePlan()) <= limit_bytes:
        return TilePlan()
    longest = max(height, width)
    sides = [side for side in _SIDES if side < longest] or [SMALLEST_TILE]
    least = TilePlan(decoder=sides[-1])
    needed = needs(least)
    if needed > limit_bytes and pipe.flow.name.startswith("raft"):
        least, needed = _largest(sides, lambda side: replace(least, flow=side), needs, limit_bytes)
    if needed > limit_bytes:
        unet_sides = [longest, *sides] if batch > 1 else sides
        least, needed = _largest(unet_sides, lambda side: replace(least, unet=side), needs, limit_bytes)
    if needed > limit_bytes:
        raise MemoryLimitError(
            f"A frame of {width}x{height} needs about {needed / 1e9:.1f} GB even in the smallest tiles "
            f"({batch} at once); the limit leaves {limit_bytes / 1e9:.1f} GB for it.",
            code="memory-limit",
            remedy="Raise the memory limit, restore fewer streams at once, or reduce the video first.",
        )
    return _largest(sides, lambda side: replace(least, decoder=side), needs, limit_bytes)[0]


def _largest(
    sides: Sequence[int], plan_of: Callable[[int], TilePlan], needs: Callable[[TilePlan], int], limit_bytes: int
) -> tuple[TilePlan, int]:
    """Return the first plan that is within the limit, else the last, and what it needs."""
    plan, needed = plan_of(sides[-1]), 0
    for side in sides:
        plan = plan_of(side)
        needed = needs(plan)
        if needed <= limit_bytes:
            break
    return plan, needed


def without_data(pipe: StreamDiffVSRPipeline) -> StreamDiffVSRPipeline:
    """Return a twin of `pipe` whose tensors have sizes but no data (device "meta"): its steps compute nothing."""
    return _Rehearsal(pipe).pipe


def allocated_by(work: Callable[[], object]) -> int:
    """Return the most bytes that tensors of the device "meta" stand for at any moment while `work` runs."""
    with _Counter() as counter:
        work()
    return counter.peak


class Tiler:
    """Chooses the tiles of a pipeline's steps: by a limit, and smaller ones after memory ran out all the same.

    Attributes:
        limit_bytes: None chooses whole frames.
        beside_bytes: what of it others need (`beside_the_step`).
        plan: of the latest step.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.beside_bytes = 0
        self.plan = TilePlan()
        self._most = TilePlan()
        self._shape: tuple[int, int, int] | None = None
        self._plans: dict[tuple[object, ...], TilePlan] = {}

    def plan_for(self, pipe: StreamDiffVSRPipeline, shape: Sequence[int]) -> TilePlan:
        """Return the plan for frames of `shape` (B,3,h,w).

        Raises:
            MemoryLimitError: no tiles are small enough.
        """
        batch, _, height, width = shape
        self._shape = None
        plan = TilePlan()
        if self.limit_bytes is not None:
            limit_bytes = self.limit_bytes - self.beside_bytes
            key = (limit_bytes, batch, height, width, pipe.dtype, pipe.device.type, pipe.flow, pipe.guidance)
            if key not in self._plans:
                self._plans[key] = fits(pipe, limit_bytes, height, width, batch=batch)
            plan = self._plans[key]
        self._shape = (batch, height, width)
        most = self._most
        self.plan = TilePlan(
            decoder=_smaller(plan.decoder, most.decoder),
            unet=_smaller(plan.unet, most.unet),
            flow=_smaller(plan.flow, most.flow),
        )
        return self.plan

    def halve(self, pipe: StreamDiffVSRPipeline) -> bool:
        """Make all further tiles smaller: the decoder's, and the others' where that alone would not bring much.

        Returns:
            False where nothing can become smaller, or no step was within the limit.
        """
        if self._shape is None:
            return False
        batch, height, width = self._shape
        rehearsal = _Rehearsal(pipe)
        before = rehearsal.estimate(height, width, batch, self.plan).step
        plan = self.plan
        for part in ("decoder", "unet", "flow") if pipe.flow.name.startswith("raft") else ("decoder", "unet"):
            side = (getattr(plan, part) or max(height, width)) // 2
            if side >= SMALLEST_TILE:
                plan = replace(plan, **{part: side})
                if rehearsal.estimate(height, width, batch, plan).step < 0.75 * before:
                    break
        changed = plan != self.plan
        self._most = self.plan = plan
        return changed


def _smaller(one: int | None, other: int | None) -> int | None:
    sides = [side for side in (one, other) if side is not None]
    return min(sides) if sides else None


class _Rehearsal:
    """A copy of a pipeline without data, whose steps are counted instead of computed."""

    def __init__(self, pipe: StreamDiffVSRPipeline) -> None:
        self._on_cpu = pipe.device.type == "cpu"
        networks = {}
        for name in ("unet", "controlnet", "vae"):
            original = getattr(pipe, name)
            with torch.device("meta"):
                network = type(original).from_config(original.config)
            # as the pipeline's own `to` does: without diffusers' warning of a cast
            networks[name] = nn.Module.to(network, original.dtype).eval()
            if self._on_cpu:
                network.to(memory_format=torch.channels_last)
        self._flow: Any = _flow_without_data(pipe.flow)
        self.pipe = type(pipe)(
            **networks,
            scheduler=pipe.scheduler,
            prompt_embeds_1TD=pipe.prompt_embeds_1TD.to("meta"),
            options=pipe.options,
            flow=self._flow,
            model_sha256="rehearsal",
            max_pixels=2**62,
        )
        self.pipe.guidance = pipe.guidance
        self.pipe.cache_condition = pipe.cache_condition
        self._weights = sum(_bytes(module) for module in networks.values())
        if isinstance(self._flow, RAFTFlow):
            self._weights += _bytes(self._flow._loaded())
        elif isinstance(self._flow, NetFlow):
            self._weights += _bytes(self._flow.network)

    def estimate(self, height: int, width: int, batch: int, plan: TilePlan) -> MemoryEstimate:
        latent = (batch, self.pipe.vae.config.latent_channels, height, width)
        self.pipe._tiler = _Fixed(plan)
        with _Counter() as counter, torch.device("meta"):
            states = []
            for _ in range(batch):
                state = StreamState(model_sha256="rehearsal")
                state.advance(
                    torch.empty(3, height * SCALE, width * SCALE, dtype=self.pipe.unet.dtype),
                    torch.empty(3, height, width),
                )
                states.append(state)
            self.pipe.step(torch.empty(batch, 3, height, width), states, torch.empty(latent), steps=1)
        return MemoryEstimate(RUNTIME_BYTES if self._on_cpu else 0, self._weights, round(UNSEEN * counter.peak))


class _Fixed(Tiler):
    """Always the same plan."""

    def __init__(self, plan: TilePlan) -> None:
        super().__init__()
        self.plan = plan

    def plan_for(self, pipe: StreamDiffVSRPipeline, shape: Sequence[int]) -> TilePlan:
        return self.plan


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being and are alive, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outcome):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor.untyped_storage())
        return outcome

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._alive -= size


class _DISWithoutData:
    """What DIS holds, as far as it is known."""

    name = "dis"

    def __init__(self, size: str) -> None:
        self.size = size

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        batch, _, height, width = current_B3hw.shape
        factor = SCALE if self.size == "output" else 1
        scratch = current_B3hw.new_empty(height * width * factor**2 * _DIS_BYTES_PER_PIXEL, dtype=torch.uint8)
        del scratch
        flow_B2hw = current_B3hw.new_empty(batch, 2, height * factor, width * factor)
        return flow_B2hw if self.size == "output" else upscale_flow(flow_B2hw)

    def to(self, device: torch.device | str) -> _DISWithoutData:
        return self


def _flow_without_data(flow: FlowEstimator) -> FlowEstimator:
    """Return an estimator that allocates what `flow` would; of an unknown one, its result alone is counted."""
    if isinstance(flow, RAFTFlow | NetFlow):
        return flow.without_data()
    if flow.name == "dis":
        return _DISWithoutData(getattr(flow, "size", "input"))
    return ZeroFlow()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
