"""A small random model with every part alive, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import StreamDiffVSRPipeline
from tests.random_model import save_random_model


@pytest.fixture(autouse=True)
def denormals_as_they_were() -> Iterator[None]:
    """Training flushes them to zero for the whole process, where Hypothesis then refuses to draw numbers."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in which ARTG and TPM have an effect; with fresh weights both are silent or nearly so."""
    fresh = save_random_model(tmp_path_factory.mktemp("fresh"))
    pipe = StreamDiffVSRPipeline.from_pretrained(fresh)
    torch.manual_seed(1)
    torch.nn.init.normal_(pipe.controlnet.controlnet_cond_embedding.conv_out.weight, std=0.2)
    torch.nn.init.normal_(pipe.controlnet.controlnet_mid_block.weight, std=0.1)
    for parameter in pipe.vae.temporal_parameters():
        parameter.mul_(3)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> StreamDiffVSRPipeline:
    """The engine with that model: no attention, DIS flow, fp32. Tests restore what they change on it."""
    return StreamDiffVSRPipeline.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def parity_folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recorded checkpoint, which has attention, a text encoder and the published configuration files."""
    import shutil

    return Path(shutil.copytree(repository / "tests/parity/ckpt_a", tmp_path_factory.mktemp("parity") / "ckpt_a"))
