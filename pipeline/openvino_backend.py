"""Frames by OpenVINO on a CPU: the networks of `pipeline.frame_core`, converted once for every size of frame.

Knows: how the networks are traced so that they hold for every size, where the converted forms are kept, and how they
are run. Does not know: batches (on a CPU they gain nothing; streams run one after the other, so that none depends on
its neighbours).

The networks of the pipeline stay in fp32, and so does the state; the number format of the arithmetic is OpenVINO's. The
warp and the steps of the schedule are left to torch: they need fp32 whatever the networks compute in. With int8 most
convolutions compute in 8 bits (`pipeline.quantisation`), and the rest in bf16 where the processor has it, else in fp32.
The flow network, a part of its own, computes in fp32 always.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import diffusers
import torch
from torch import Tensor, nn

from pipeline.backends import import_openvino, openvino_version, processor_flags
from pipeline.checkpoint import weights_sha256
from pipeline.code_hash import pipeline_code_sha256
from pipeline.frame_core import CoreInputs, CoreKind, FrameCore
from pipeline.model_source import cache_folder
from pipeline.notes import Notes
from pipeline.number_format import nearness_db
from pipeline.options import Guidance
from pipeline.quantisation import Range, bearable, mark_int8, measure_blocks, measure_ranges
from pipeline.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

logger = logging.getLogger(__name__)

INT8_PSNR_DB: Final = 48.0  # on the made-up clip; on others it may be less, and 45 are owed there too
_PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# A size that no network level divides: so its layers are traced in the form that asks for sizes instead of knowing them
_TRACED_SIDES: Final = (19, 21)


class OpenVINOBackend:
    """See `pipeline.backends.Backend`.

    Args:
        pipe: on the CPU.
        dtype: of the arithmetic, torch.int8 among them. Weights are rounded to it when they are used, not before.
    """

    name = "openvino"
    serves_every_size = True

    def __init__(self, pipe: StreamDiffVSRPipeline, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._pipe = pipe
        self._parts = _Parts(pipe, dtype)
        self._cores: dict[CoreKind, _OpenVINOCore] = {}
        self._lock = threading.Lock()  # what runs a part serves one caller at a time

    def run(self, kind: CoreKind, inputs: CoreInputs) -> Tensor:
        """Return the outputs (B,3,H,W) as fp32, stream after stream."""
        with self._lock:
            core = self._core(kind)
            rows = range(len(inputs.frames_B3hw))
            return torch.cat([core(*(x[row : row + 1] for x in inputs.tensors)) for row in rows]).to(torch.float32)

    def restore(
        self, kind: CoreKind, frames_B3hw: Tensor, latents_BChw: Tensor, warped_B3HW: Tensor, seen_B3HW: Tensor
    ) -> Tensor:
        """Return the outputs of parts of frames (B,3,H,W), stream after stream."""
        inputs = (frames_B3hw, latents_BChw, warped_B3HW, seen_B3HW)
        with self._lock:
            core = self._core(kind)
            return torch.cat([core.restore(*(x[row : row + 1] for x in inputs)) for row in range(len(frames_B3hw))])

    def _core(self, kind: CoreKind) -> _OpenVINOCore:
        if kind not in self._cores:
            self._cores[kind] = _OpenVINOCore(self._pipe, kind, self._parts)
        return self._cores[kind]

    def forget(self) -> None:
        """Convert anew at the next step."""
        with self._lock:
            self._cores.clear()
            self._parts = _Parts(self._pipe, self.dtype)

    def close(self) -> None:
        """Drop what was compiled."""
        self.forget()


class _OpenVINOCore(FrameCore):
    """The function, its networks run by OpenVINO."""

    def __init__(self, pipe: StreamDiffVSRPipeline, kind: CoreKind, parts: _Parts) -> None:
        super().__init__(pipe, kind)
        self._parts = parts

    def estimate(self, frames_B3hw: Tensor, before_B3hw: Tensor) -> Tensor:
        assert self.flow_network is not None
        return self._parts.run("flow", (frames_B3hw, before_B3hw), self.flow_network)

    def embed(self, warped_B3HW: Tensor) -> Tensor:
        return self._parts.run("embed", (warped_B3HW,))

    def predict(self, x_BChw: Tensor, timestep_B: Tensor, condition_BChw: Tensor | None) -> Tensor:
        if condition_BChw is None:
            return self._parts.run("predict", (x_BChw, timestep_B))
        return self._parts.run("predict_guided", (x_BChw, timestep_B, condition_BChw))

    def decode(self, latents_BChw: Tensor, seen_B3HW: Tensor | None) -> Tensor:
        if seen_B3HW is None:
            return self._parts.run("decode", (latents_BChw,))
        return self._parts.run("decode_temporal", (latents_BChw, seen_B3HW))


class _Int8Plan(NamedTuple):
    beside: str
    ranges: dict[str, Range]  # of the inputs of those convolutions that compute in 8 bits


class _Parts:
    """The networks in OpenVINO's form, each converted and compiled when it is first needed."""

    def __init__(self, pipe: StreamDiffVSRPipeline, dtype: torch.dtype) -> None:
        self._pipe = pipe
        self._is_int8 = dtype == torch.int8
        self._dtype = dtype
        self._requests: dict[tuple[str, int, nn.Module | None], Any] = {}

    @cached_property
    def _plan(self) -> _Int8Plan:
        """Which convolutions compute in 8 bits, and in what the rest does, so that pictures stay near enough."""
        weights = str(self._pipe.unet.dtype)
        notes = Notes("int8", self._pipe.model_sha256, weights, " ".join(sorted(processor_flags())), *_versions())
        with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
            known = notes.get("plan")
            return _Int8Plan(known["beside"], {name: Range(*ends) for name, ends in known["ranges"].items()})
        logger.info("finding out which convolutions this model bears in 8 bits; once for a model and a machine")
        most_error, beside = _squared_error(INT8_PSNR_DB), "f32"
        if cpu_has_bf16() and self._pipe.unet.dtype == torch.float32:
            near = nearness_db(self._pipe, torch.bfloat16, backend="openvino", device="cpu")
            if (error := _squared_error(near)) < most_error / 2:
                most_error, beside = most_error - error, "bf16"
        schedule = make_schedule(self._pipe.scheduler, None, self._pipe.options.schedules)
        # of copies: their weights are rounded and their layers watched
        cores = nn.ModuleList(self._core_in_fp32(is_guided, schedule) for is_guided in (False, True))
        alone, guided = cast(Iterable[FrameCore], copy.deepcopy(cores))
        ranges = measure_ranges(alone, guided)
        blocks = measure_blocks(alone, guided, ranges)
        names = [name for block in bearable(blocks, most_error) for name in block.names]
        count = sum(len(block.names) for block in blocks)
        logger.log(
            logging.INFO if 2 * len(names) >= count else logging.WARNING,
            "%d of %d convolutions compute in 8 bits, as many as this model bears, and the rest in %s: %s of the "
            "speed is won",
            len(names),
            count,
            beside,
            "most" if 2 * len(names) >= count else "little",
        )
        plan = _Int8Plan(beside, {name: ranges[name] for name in names})
        notes.put("plan", plan._asdict())
        return plan

    @property
    def _precision(self) -> str:
        return self._plan.beside if self._is_int8 else _PRECISIONS[self._dtype]

    def run(self, name: str, tensors: tuple[Tensor, ...], flow_network: nn.Module | None = None) -> Tensor:
        """Return what a part makes of its inputs, by as many threads as torch has now.

        Args:
            flow_network: the part's network, where it is none of the pipeline's three.
        """
        key = (name, torch.get_num_threads(), flow_network)
        if key not in self._requests:
            self._requests[key] = self._compile(name, tensors, flow_network)
        inputs = [(x.to(torch.float32) if x.is_floating_point() else x).contiguous().numpy() for x in tensors]
        results = self._requests[key].infer(inputs, share_inputs=True)
        return torch.from_numpy(results[0].copy())  # the request writes to the same place again

    def _compile(self, name: str, tensors: tuple[Tensor, ...], flow_network: nn.Module | None) -> Any:
        # For every size: a form for one size is hardly faster (8 % at 160x120), and a stream of another size would have
        # all others wait for a second.
        compiled = _core().compile_model(
            self._converted(name, tensors, flow_network),
            "CPU",
            {
                # Flow in bf16 errs by up to a pixel of the output.
                "INFERENCE_PRECISION_HINT": "f32" if flow_network is not None else self._precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": False,  # two workers on one machine would share a core, and leave another idle
            },
        )
        return compiled.create_infer_request()

    def _converted(self, name: str, tensors: tuple[Tensor, ...], flow_network: nn.Module | None) -> Any:
        """Return a part in OpenVINO's form: read from the cache, or traced and kept there."""
        place = cache_folder() / "openvino" / self._identity(name, flow_network)
        with contextlib.suppress(RuntimeError, OSError):  # nothing there, or nothing that can be read
            return _core().read_model(place / "model.xml")
        core = self._core_in_fp32(True, Schedule((), ()), flow_network)
        pictures = [x for x in tensors if x.ndim == 4]
        smallest = min(x.shape[2] for x in pictures)  # the latent's height; others are multiples of it
        examples, shapes = [], []
        for x in tensors:
            if x.ndim == 4:
                sides = [side * x.shape[2] // smallest for side in _TRACED_SIDES]
                examples.append(torch.zeros(1, x.shape[1], *sides))
                shapes.append([1, x.shape[1], -1, -1])
            else:
                examples.append(x.clone())
                shapes.append(list(x.shape))
        model = _convert_quietly(_Part(core, name), tuple(examples), shapes)
        if self._is_int8 and flow_network is None:
            marked = mark_int8(model, self._plan.ranges)
            logger.info("%s: %d convolutions compute in 8 bits", name, len(marked))
        _keep(model, place)
        return model

    def _core_in_fp32(self, guided: bool, schedule: Schedule, flow_network: nn.Module | None = None) -> FrameCore:
        # with all guidance, whatever is on now: what is made here is kept for later
        core = FrameCore(self._pipe, CoreKind(guided, schedule, Guidance(), flow_network)).eval()
        return core if self._pipe.unet.dtype == torch.float32 else copy.deepcopy(core).to(torch.float32)

    def _identity(self, name: str, flow_network: nn.Module | None) -> str:
        """Return a hash over all that a converted form depends on."""
        pipe = self._pipe
        weights = pipe.model_sha256 if flow_network is None else weights_sha256(flow_network)
        is_int8 = self._is_int8 and flow_network is None
        marks = ["int8", *sorted(self._plan.ranges)] if is_int8 else []
        parts = (weights, str(pipe.unet.dtype), name, *marks, *_versions())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class _Part(nn.Module):
    """One method of a core as a module; its last input may be missing."""

    def __init__(self, core: FrameCore, name: str) -> None:
        super().__init__()
        self._owner = core
        self._name = name

    def forward(self, *tensors: Tensor) -> Tensor:
        match self._name:
            case "flow":
                return self._owner.estimate(*tensors)
            case "embed":
                return self._owner.embed(*tensors)
            case "predict" | "predict_guided":
                return self._owner.predict(*tensors, *[None] * (3 - len(tensors)))
            case _:
                return self._owner.decode(*tensors, *[None] * (2 - len(tensors)))


@cache
def _core() -> Any:
    return import_openvino().Core()


@cache
def cpu_has_bf16() -> bool:
    """Return whether OpenVINO computes in bf16 on this processor."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _versions() -> tuple[str, ...]:
    return openvino_version(), torch.__version__, diffusers.__version__, pipeline_code_sha256()


def _squared_error(psnr_db: float) -> float:
    return 4 * 10 ** (-psnr_db / 10)


def _convert_quietly(part: nn.Module, examples: tuple[Tensor, ...], shapes: list[list[int]]) -> Any:
    """Trace and convert; what tracing warns of (sizes that became constants) does not hold for the traced size."""
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(part, examples, check_trace=False, strict=False)
        return import_openvino().convert_model(traced, example_input=examples, input=shapes)


def _keep(model: Any, place: Path) -> None:
    """Write the converted form so that a reader sees all of it or nothing; a cache that cannot be written is none."""
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        import_openvino().save_model(model, partial / "model.xml", compress_to_fp16=False)
        partial.rename(place)
    except (OSError, RuntimeError) as error:
        logger.info("the converted model is not kept: %s", error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
