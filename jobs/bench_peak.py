"""How fast a device multiplies matrices at best: the floor below every stage's time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_CUDA_SIDE: Final = 8192
_CPU_SIDE: Final = 1024
_WARM_UP: Final = 3
_REPEATS: Final = 15

# Dense bf16 TFLOP/s by what the driver calls the device (in lower case), from the makers' data sheets, without
# sparsity. The first that fits counts.
DATA_SHEETS: Final[dict[str, float]] = {
    "h100 pcie": 756.0,
    "h100 nvl": 835.0,
    "h100": 989.0,  # SXM
    "h200 nvl": 835.0,
    "h200": 989.0,
    "a100": 312.0,
    "l40s": 362.0,
    "l4": 121.0,
}


def data_sheet_tflops(hardware: str) -> float | None:
    """Return the dense bf16 TFLOP/s that the maker states for the device of this name; None where unknown."""
    words = hardware.lower()
    for name, tflops in DATA_SHEETS.items():
        if all(word in words.replace("-", " ").split() for word in name.split()):
            return tflops
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Return TFLOP/s of a product of two large square matrices: the fastest of many, after some to warm up.

    Args:
        side: of the matrices; None: 8192 on a GPU, 1024 on a CPU.
    """
    import torch

    side = side or (_CUDA_SIDE if device.type == "cuda" else _CPU_SIDE)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(_WARM_UP):
        torch.mm(left, right)
    times_s = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            torch.mm(left, right)
            ended.record()
            torch.cuda.synchronize()
            times_s.append(began.elapsed_time(ended) / 1000)
        else:
            began_s = time.perf_counter()
            torch.mm(left, right)
            times_s.append(time.perf_counter() - began_s)
    return 2 * side**3 / min(times_s) / 1e12
