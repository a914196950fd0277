"""Time and FLOPs by stage, taken inside the real code.

While it runs, the functions that make up a stage are replaced by themselves with a meter around them. On a GPU the
meter is a pair of CUDA events: nothing waits for the device, so that it is as busy as without the meter. Code that was
compiled, captured or handed to another library cannot be looked into: of such a backend, only the flow is a stage of
its own, and the rest is one row, ``model``; where the backend estimates the flow as well, that is in this row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import torch

    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

STAGES: Final = ("decode", "flow", "warp", "unet", "artg", "tpm", "decoder", "other", "encode")
INSIDE: Final = STAGES[1:-1]  # of the model's step
FUSED: Final = "model"


class Meter(Protocol):
    """Whatever can be put around the functions of a stage."""

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its cost counted to `stage`."""
        ...


class StageClock:
    """Adds up milliseconds by stage and frame.

    Args:
        device: on CUDA the stages inside the model are timed by events, read when `milliseconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._frames: list[dict[str, float]] = []
        self._events: list[tuple[int, str, Any, Any]] = []

    def next_frame(self) -> None:
        """Count what comes to another frame."""
        self._frames.append({})

    def add(self, stage: str, seconds: float) -> None:
        """Count time that was taken otherwise to the frame at hand."""
        if self._frames:
            self._add(len(self._frames) - 1, stage, 1000 * seconds)

    def add_to_all(self, stage: str, seconds: float) -> None:
        """Count as much to every frame that has this stage."""
        for frame in self._frames:
            if stage in frame:
                frame[stage] += 1000 * seconds

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a clock around it."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self._is_cuda:
                import torch

                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                try:
                    return function(*args, **kwargs)
                finally:
                    ended.record()
                    if self._frames:
                        self._events.append((len(self._frames) - 1, stage, began, ended))
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(stage, time.perf_counter() - began_s)

        return clocked

    def milliseconds(self, *, skip: int) -> dict[str, float]:
        """Return the median milliseconds of every stage that was seen, without the first `skip` frames."""
        if self._events:
            import torch

            torch.cuda.synchronize()
            for frame, stage, began, ended in self._events:
                self._add(frame, stage, began.elapsed_time(ended))
            self._events.clear()
        frames = self._frames[skip:]
        seen = {stage for frame in frames for stage in frame}
        return {stage: statistics.median(f[stage] for f in frames if stage in f) for stage in seen}

    def _add(self, frame: int, stage: str, milliseconds: float) -> None:
        self._frames[frame][stage] = self._frames[frame].get(stage, 0.0) + milliseconds


class _MeteredFlow:
    """A flow estimator with a meter around it."""

    def __init__(self, flow: Any, meter: Meter) -> None:
        self.name = flow.name
        self._flow = flow
        self._call = meter.around("flow", flow)

    def __call__(self, current_B3hw: Any, previous_B3hw: Any) -> Any:
        return self._call(current_B3hw, previous_B3hw)

    def to(self, device: Any) -> _MeteredFlow:
        self._flow.to(device)
        return self


@contextmanager
def metered(pipe: StreamDiffVSRPipeline, meter: Meter, *, fused: bool = False) -> Iterator[None]:
    """Put `meter` around the stages of `pipe`'s steps; afterwards everything is as before.

    Args:
        fused: a backend runs the whole step: only the flow is metered, unless that is a part of it.
    """
    from pipeline import reference_step as engine

    places: list[tuple[Any, str, str]] = [
        (engine, "flow_warp", "warp"),
        (engine, "embed_condition", "artg"),
        (engine, "artg_residuals", "artg"),
        (pipe.unet, "forward", "unet"),
        (pipe.vae, "encode_temporal", "tpm"),
        (pipe.vae, "decode", "decoder"),
    ]
    if fused:
        places = []
    before = [getattr(owner, name) for owner, name, _ in places]
    flow = pipe.flow
    in_the_frame = fused and pipe.flow_runs_in_the_frame
    for (owner, name, stage), function in zip(places, before, strict=True):
        setattr(owner, name, meter.around(stage, function))
    pipe.flow = flow if in_the_frame else _MeteredFlow(flow, meter)
    try:
        yield
    finally:
        pipe.flow = flow
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def with_rest(stages_ms: Mapping[str, float], step_ms: float, *, fused: bool) -> dict[str, float]:
    """Return the stages in their order, with what no stage explains: ``other``, or ``model`` for a fused backend."""
    rest = max(0.0, step_ms - sum(stages_ms.get(name, 0.0) for name in INSIDE))
    if fused:
        known = dict(stages_ms) | {FUSED: rest}
        return {name: known[name] for name in ("decode", "flow", FUSED, "encode") if name in known}
    return {name: stages_ms.get(name, 0.0) for name in STAGES} | {"other": rest}


class _FlopMeter:
    """Adds up floating-point operations by stage; a multiplication with its addition counts as two."""

    def __init__(self) -> None:
        self.by_stage: dict[str, int] = {}

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        from torch.utils.flop_counter import FlopCounterMode

        def counted(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                outcome = function(*args, **kwargs)
            self.by_stage[stage] = self.by_stage.get(stage, 0) + counter.get_total_flops()
            return outcome

        return counted


def flops_by_stage(
    pipe: StreamDiffVSRPipeline, height: int, width: int, *, batch: int = 1, steps: int | None = None
) -> dict[str, int]:
    """Return the FLOPs of one step for frames with a past, by stage; nothing is computed.

    Convolutions, matrix products and attention are counted, as `torch.utils.flop_counter` does; what is done to every
    pixel once (activations, the warp, normalisation) is not. Of the flow estimators, RAFT alone is known.

    Args:
        height, width: input size in pixels.
        steps: denoising steps; None: the model's default.
    """
    import torch

    from pipeline.flow import SCALE
    from pipeline.memory import without_data
    from pipeline.state import StreamState

    twin = without_data(pipe)
    meter = _FlopMeter()
    with torch.device("meta"), metered(twin, meter):
        states = []
        for _ in range(batch):
            state = StreamState(model_sha256=twin.model_sha256)
            state.advance(
                torch.empty(3, height * SCALE, width * SCALE, dtype=twin.unet.dtype), torch.empty(3, height, width)
            )
            states.append(state)
        noise = torch.empty(batch, twin.vae.config.latent_channels, height, width)
        twin.step(torch.empty(batch, 3, height, width), states, noise, steps=steps)
    return {stage: count for stage, count in meter.by_stage.items() if count}
