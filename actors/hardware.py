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


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """Return the number format; `auto` is bf16 where the hardware multiplies in it, otherwise fp32.

    AVX512-BF16 alone does not count: there a bf16 step of the built-in model takes 1.4 times as long as one in fp32.
    """
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted != "auto":
        return named[wanted]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    return torch.bfloat16 if device == "cpu" and cpu_computes_bf16() else torch.float32


def cpu_computes_bf16() -> bool:
    """Return whether the processor multiplies matrices in bf16 (AMX; Arm's BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    flags = set(line.split())
                    return bool(flags & {"amx_bf16", "bf16"})
    except OSError:
        pass
    return False


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
