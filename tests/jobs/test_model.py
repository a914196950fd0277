"""A model is read and checked once; what is known of it then does not outlive a change of its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.model import resolve_model
from pipeline.errors import CheckpointError
from tests.random_model import save_random_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPRIVER_MODEL_CACHE", str(tmp_path / "cache"))
    return save_random_model(tmp_path / "model")


def test_the_second_look_reads_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(str(model))
    assert first.source == str(model) and len(first.sha256) == 64
    program = "import sys; from jobs.model import resolve_model; print(resolve_model(sys.argv[1]).sha256, *sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    assert told[0] == first.sha256 and "torch" not in told and "diffusers" not in told


def test_a_changed_model_is_looked_at_again(model: Path, tmp_path: Path) -> None:
    first = resolve_model(str(model))
    save_random_model(model, seed=1)
    second = resolve_model(str(model))
    assert second.sha256 != first.sha256
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        resolve_model(str(model))


def test_a_note_that_is_torn_or_cannot_be_kept_is_no_matter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(str(model))
    (note,) = (tmp_path / "cache" / "fingerprints").iterdir()
    note.write_text("ab")
    assert resolve_model(str(model)) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPRIVER_MODEL_CACHE", str(tmp_path / "file" / "cache"))
    assert resolve_model(str(model)) == first
