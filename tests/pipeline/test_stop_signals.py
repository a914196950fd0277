"""SIGTERM and SIGINT end a run between two iterations; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from pipeline.stop_signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_noted_and_nothing_more(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None and signal.getsignal(number) != before
        for _ in range(2):  # a launcher may hand on what its children got too
            os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


def test_a_thread_is_left_alone() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("flow", 0),
        pytest.param("autoencoder", 0, marks=pytest.mark.slow),
        pytest.param("autoencoder", 2, marks=pytest.mark.slow),
    ],
)
def test_training_saves_what_it_learnt(repository: Path, tmp_path: Path, kind: str, workers: int) -> None:
    """The signal goes to the whole group, as from a terminal, a batch queue or torchrun."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    batch = "64" if workers else "1"
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch", batch, "--crop", "32"]
    # Iterations of some seconds with workers: so that the signal comes in the middle of one
    options = ["--set", "holdout=0", "--set", "validate_every=100000"]
    if kind != "flow":
        options += ["--set", "save_every=100000", "--set", "perceptual=0", "--set", f"workers={workers}"]
    command = [sys.executable, "-m", "jobs.cli", "train", kind, *flags, *options, "--iterations", "50000"]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        while not (line := process.stderr.readline()).lstrip().startswith("1 "):
            assert line, "it ended before its first iteration"
        os.killpg(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "Stopped by SIGTERM and saved at iteration" in told and "Traceback" not in told
    iteration = int(told.partition("at iteration ")[2].partition(";")[0])
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as state:
        assert int(state.metadata()["iteration"]) == iteration > 0
