from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.bench import STAGES
from jobs.cli import main
from tests.random_model import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


def test_every_stage_is_timed_and_they_add_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(model), "--size", "48x32", "--frames", "3", "--threads", "1", "--device", "cpu", "--json"]
    assert main(["bench", *options, "--dtype", "fp32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert tuple(told["stages_ms"]) == STAGES
    assert all(told["stages_ms"][name] > 0 for name in STAGES if name != "other")
    inside = sum(value for name, value in told["stages_ms"].items() if name not in ("decode", "encode"))
    # Medians of parts and the median of their sum differ a little.
    assert inside == pytest.approx(told["step_ms"], rel=0.35)
    assert told["size"] == "48x32 -> 192x128" and told["dtype"] == "float32" and told["flow"] == "dis"
    assert told["model_fps"] == pytest.approx(1000 / told["step_ms"], rel=0.01) and len(told["model_sha256"]) == 64


def test_the_engine_is_as_before_afterwards(model: Path) -> None:
    from pipeline import reference_step as engine

    before = (engine.flow_warp, engine.embed_condition, engine.artg_residuals)
    assert main(["bench", "--model", str(model), "--size", "32x32", "--frames", "2", "--steps", "1"]) == 0
    assert (engine.flow_warp, engine.embed_condition, engine.artg_residuals) == before


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "large"]) == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
