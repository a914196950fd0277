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

from pipeline.stop_signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_noted_and_the_second_is_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None and signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signal.getsignal(number) == before, "the next one does what it always does"
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


@pytest.mark.parametrize("kind", ["flow", pytest.param("autoencoder", marks=pytest.mark.slow)])
def test_training_saves_what_it_learnt_and_goes_on(repository: Path, tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch", "1", "--crop", "32"]
    options = ["--set", "holdout=0", "--set", "validate_every=100000"]
    options += [] if kind == "flow" else ["--set", "save_every=100000", "--set", "perceptual=0"]
    command = [sys.executable, "-m", "jobs.cli", "train", kind, *flags, *options, "--iterations", "50000"]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first iteration
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "Stopped by SIGTERM and saved at iteration" in told and "Traceback" not in told
    iteration = int(told.partition("at iteration ")[2].partition(";")[0])
    again = subprocess.run(
        [*command[:-1], str(iteration)], cwd=repository, capture_output=True, text=True, check=True, timeout=120
    )
    assert "Stopped" not in again.stderr  # that many were done, so nothing was left to do
    assert (tmp_path / "run" / ("flow.safetensors" if kind == "flow" else "state.safetensors")).is_file()
