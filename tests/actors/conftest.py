"""What the tests of films in shots and in parts share: a small model, and two actors that have it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from actors.upscaler import EngineOptions, Upscaler
from infra.own_code import code_fingerprint
from tests.random_model import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="module")
def actors(model: Path) -> list[Upscaler]:
    """Two actors."""
    engine = EngineOptions(
        model=str(model), device="cpu", dtype="fp32", flow="auto", threads=1, max_pixels=10**7,
        version=code_fingerprint(),
    )  # fmt: skip
    return [Upscaler(dataclasses.asdict(engine)) for _ in range(2)]
