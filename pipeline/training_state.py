"""What a training run is resumed from, as safetensors: weights, averages, the optimiser's moments. Nothing is pickled.

Knows: files and tensors. Does not know: what is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.file_modes import follow_umask


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), metadata


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write beside the target, then rename: an interrupted save leaves the previous one intact."""
    temporary = path.with_name(path.name + ".part")
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, temporary, metadata)
    follow_umask([temporary])
    temporary.replace(path)


def optimiser_tensors(prefix: str, optimiser: Any) -> dict[str, Tensor]:
    """Flatten an optimiser's moments: state is safetensors too, nothing is ever pickled."""
    state = optimiser.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimiser(optimiser: Any, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser back what `optimiser_tensors` made of it."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    full = optimiser.state_dict()
    optimiser.load_state_dict({"state": state, "param_groups": full["param_groups"]})
