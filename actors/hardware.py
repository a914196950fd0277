"""Which device a model runs on and in which number format, from what was asked for and what the machine can do.

Imports torch only when asked: command lines must start fast.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from actors.errors import ActorsError

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str) -> str:
    """Return `cpu`, `cuda`, `cuda:N` or `mps`; `auto` prefers a CUDA device, then Apple's, then the CPU.

    Raises:
        ActorsError: the device asked for is not there.
    """
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ActorsError(
                f"The device {wanted} is not there: torch sees {torch.cuda.device_count()} CUDA devices.",
                code="device-missing",
                remedy="Use --device auto, or install a CUDA build of torch and its driver.",
            )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ActorsError("The device mps is not there.", code="device-missing", remedy="Use --device auto.")
    return wanted


def choose_formats(wanted: str, device: str, backend: str = "eager") -> tuple[torch.dtype, ...]:
    """Return the number formats to try, fastest first: a model takes the first that it bears.

    `auto` is bf16 where the hardware multiplies in it, then fp16 where that is as fast, then fp32; anything else is
    what was asked for, whatever the model bears (`pipeline.number_format`).

    AVX512-BF16 counts for OpenVINO alone: some processors with it run torch's own bf16 at three quarters of the speed
    of fp32, others at four times.

    Args:
        backend: that is used, as `pipeline.backends.choose_backend` returns it.
    """
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
    if wanted != "auto":
        return (named[wanted],)
    if device.startswith("cuda"):
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        return (torch.bfloat16, torch.float16, torch.float32) if ampere else (torch.float32,)
    return (torch.bfloat16, torch.float32) if device == "cpu" and cpu_computes_bf16(backend) else (torch.float32,)


def cpu_computes_bf16(backend: str = "eager") -> bool:
    """Return whether the processor multiplies in bf16: matrices (AMX, Arm's), for OpenVINO vectors (AVX-512) too."""
    from pipeline.backends import processor_flags

    wanted = {"amx_bf16", "bf16"} | ({"avx512_bf16"} if backend == "openvino" else set())
    return bool(processor_flags() & wanted)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
