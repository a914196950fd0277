"""The recorded numbers, and the checkpoint that they belong to."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import StreamDiffVSRPipeline

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkpoint: loading it writes the prompt embedding beside it."""
    return Path(shutil.copytree(HERE / "ckpt_a", tmp_path_factory.mktemp("parity") / "ckpt_a"))


@pytest.fixture(scope="session")
def pipe(checkpoint: Path) -> StreamDiffVSRPipeline:
    """The engine with the recorded checkpoint; flow comes from the recording."""
    return StreamDiffVSRPipeline.from_pretrained(checkpoint, flow="given")


@pytest.fixture(scope="session")
def clip() -> dict[str, torch.Tensor]:
    """The six-frame recording as tensors."""
    return _read("case_a6.npz")


@pytest.fixture(scope="session")
def still() -> dict[str, torch.Tensor]:
    """The one-frame recording as tensors."""
    return _read("case_a1.npz")


def _read(name: str) -> dict[str, torch.Tensor]:
    with np.load(HERE / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind != "U"}
