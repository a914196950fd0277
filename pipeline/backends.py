"""What runs a whole frame on the hardware: torch as it is, OpenVINO, CUDA graphs, or code that torch compiled.

Knows: names of backends and which suits a device, and how a batch of unlike streams becomes groups of like ones. Does
not know: how any of them works inside (`pipeline.openvino_backend`, `pipeline.cuda_backend`).

"eager" is the reference. The others take a frame through all networks as one function (`pipeline.frame_core`), the flow
network among them where that is the estimator; steps with tiles or callbacks fall back to the reference.

Shapes: B streams of the batch, L those with a previous frame, h w input size, H W output size, C latent channels.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from pipeline.errors import BackendError

if TYPE_CHECKING:  # choosing a backend must not import diffusers: a stand-in has no use for it
    from pipeline.frame_core import CoreInputs, CoreKind
    from pipeline.options import Guidance
    from pipeline.schedule import Schedule
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "eager", "openvino", "graph", "compiled"]
BACKENDS: Final[tuple[str, ...]] = get_args(BackendName)
_INT8_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


class Backend(Protocol):
    """Runs `FrameCore`s; belongs to one pipeline."""

    name: str
    dtype: torch.dtype  # in which networks compute
    serves_every_size: bool  # whether what was made for one size of frame serves all others

    def run(self, kind: CoreKind, inputs: CoreInputs) -> Tensor:
        """Return what the core of this kind returns (B,3,H,W); the tensor is the caller's own."""
        ...

    def restore(
        self, kind: CoreKind, frames_B3hw: Tensor, latents_BChw: Tensor, warped_B3HW: Tensor, seen_B3HW: Tensor
    ) -> Tensor:
        """Return what `FrameCore.restore` returns for frames that come in many sizes, such as parts of frames."""
        ...

    def forget(self) -> None:
        """Drop everything that was made for the networks as they were: they were moved or cast."""
        ...

    def close(self) -> None:
        """Leave the networks as they were found; the backend is not used again."""
        ...


def choose_backend(wanted: str, device: str) -> str:
    """Return the backend to use on `device` ("cpu", "cuda:0"); `wanted` may be "auto".

    "auto" is OpenVINO on a CPU if it is installed, CUDA graphs on a CUDA device, and eager elsewhere.

    Raises:
        BackendError: an unknown name, a backend that does not run on this device, or one that is not installed.
    """
    if wanted not in BACKENDS:
        raise BackendError(
            f"There is no backend {wanted!r}.", code="backend-unknown", remedy=f"Choose one of {', '.join(BACKENDS)}."
        )
    kind = torch.device(device).type
    if wanted == "auto":
        return {"cpu": "openvino" if _openvino_runs() else "eager", "cuda": "graph"}.get(kind, "eager")
    if wanted == "openvino" and kind != "cpu":
        raise BackendError(
            f"The backend 'openvino' runs on the CPU, not on {device}.",
            code="backend-device",
            remedy="Use --device cpu, or --backend auto.",
        )
    if wanted == "openvino" and not _openvino_runs():
        raise BackendError(
            "The backend 'openvino' needs OpenVINO, which is not installed or does not run here.",
            code="backend-missing",
            remedy="Install it by `pip install 'upriver[openvino]'`, or use --backend eager.",
        )
    if wanted == "graph" and kind != "cuda":
        raise BackendError(
            f"The backend 'graph' captures CUDA graphs; {device} is no CUDA device.",
            code="backend-device",
            remedy="Use --backend auto.",
        )
    return wanted


def require_dtype(backend: str, dtype: torch.dtype) -> None:
    """Refuse torch.int8 where nothing computes in it as it should.

    Args:
        backend: as `choose_backend` returned it.

    Raises:
        BackendError: another backend than OpenVINO, or a processor that adds products of 8 bits up in 16 bits, where
            they overflow.
    """
    if dtype != torch.int8:
        return
    if backend != "openvino":
        raise BackendError(
            f"The backend {backend!r} does not compute in int8.",
            code="backend-int8",
            remedy="Use --backend openvino on a CPU, without --memory-gb; or --dtype auto.",
        )
    if not _INT8_FLAGS & processor_flags():
        raise BackendError(
            f"This processor has none of {', '.join(sorted(_INT8_FLAGS))}: int8 would overflow.",
            code="processor-int8",
            remedy="Use --dtype auto.",
        )


@cache
def processor_flags() -> frozenset[str]:
    """Return what the processor says that it can do; empty where it says nothing."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            told = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(told.partition(":")[2].split())


@cache
def import_openvino() -> Any:
    """Return the package, imported without the part that reports its use to its makers.

    Without it OpenVINO takes a stub of its own. Nobody who restores an archive has agreed to be reported.
    """
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))  # importing it now raises ImportError
    import openvino

    return openvino


def openvino_version() -> str:
    """Return the version of OpenVINO with its build."""
    return str(import_openvino().__version__)


def _openvino_runs() -> bool:
    """Whether OpenVINO is installed, and its libraries are such as this machine can load."""
    if importlib.util.find_spec("openvino") is None:
        return False
    try:
        import_openvino()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("OpenVINO is installed but cannot be used: %s", error)
        return False
    return True


def make_backend(name: str, pipe: StreamDiffVSRPipeline, dtype: torch.dtype) -> Backend | None:
    """Return the backend of this name for `pipe`; None for "eager".

    Args:
        name: as `choose_backend` returned it.
        dtype: in which OpenVINO computes; the others take that of the networks.

    Raises:
        BackendError: see `require_dtype`.
    """
    require_dtype(name, dtype)
    match name:
        case "openvino":
            from pipeline.openvino_backend import OpenVINOBackend

            return OpenVINOBackend(pipe, dtype)
        case "graph" | "compiled":
            from pipeline.cuda_backend import CapturingBackend

            return CapturingBackend(pipe, compiles=name == "compiled")
    return None


def run_groups(
    run: Callable[[CoreKind, CoreInputs], Tensor],
    guidance: Guidance,
    frames_B3hw: Tensor,
    latents_BChw: Tensor,
    schedules: Sequence[Schedule],
    previous: Sequence[Tensor],
    motion_L: Tensor | None,
    later: Sequence[int],
    flow_network: nn.Module | None = None,
) -> Tensor:
    """Return the outputs (B,3,H,W) of a batch of streams, those alike together.

    Args:
        previous: previous outputs (3,H,W) of the L streams that have one and use it.
        motion_L: their flow (L,2,H,W); with `flow_network` their previous input frames (L,3,h,w); None where nothing is
            warped.
        later: their numbers, in the same order.
        flow_network: estimates their flow inside the function; None: it is given.
    """
    from pipeline.frame_core import CoreInputs, CoreKind

    groups: dict[CoreKind, list[int]] = {}
    for row, schedule in enumerate(schedules):
        guided = row in later
        groups.setdefault(CoreKind(guided, schedule, guidance, flow_network if guided else None), []).append(row)
    outputs: list[tuple[list[int], Tensor]] = []
    for kind, rows in groups.items():
        inputs = CoreInputs(take_rows(frames_B3hw, rows), take_rows(latents_BChw, rows))
        if kind.guided:
            at = [later.index(row) for row in rows]
            motion = None if motion_L is None else take_rows(motion_L, at)
            pictures = previous[at[0]].unsqueeze(0) if len(at) == 1 else torch.stack([previous[n] for n in at])
            inputs = CoreInputs(inputs.frames_B3hw, inputs.latents_BChw, pictures, motion)
        outputs.append((rows, run(kind, inputs)))
    if len(outputs) == 1:
        return outputs[0][1]
    first = outputs[0][1]
    result_B3HW = first.new_empty((len(schedules), *first.shape[1:]))
    for rows, output in outputs:
        for row, one in zip(rows, output, strict=True):
            result_B3HW[row] = one
    return result_B3HW


def take_rows(x: Tensor, rows: list[int]) -> Tensor:
    """Return `x[rows]`, without a copy, and without making a GPU wait for a list of numbers."""
    if rows == list(range(len(x))):
        return x
    return torch.stack([x.select(0, row) for row in rows])
