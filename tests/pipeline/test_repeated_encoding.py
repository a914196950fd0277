"""Every encoder gives the same bytes in every process, whatever was in its memory before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ["32x32:3", "48x48:3", "64x64:25", "96x64:3"]
ALL = [*(f"{size}:{frames}" for size in ("64x64", "96x64") for frames in (1, 3, 25)), "48x48:25", "64x128:25"]
LARGE = ["640x480:1", "640x480:3"]


def hashes(codec: str, cases: list[str], run: int) -> str:
    """What one process makes of the cases. glibc fills fresh and freed memory with a value of its own in each run."""
    fill = str(1 + run * 37 % 255)
    done = subprocess.run(
        [sys.executable, "-m", "tests.repeated_encoding", codec, *cases],
        env={**os.environ, "MALLOC_PERTURB_": fill, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, (codec, cases, done.stderr[-500:])
    return done.stdout


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_short_segments_have_the_same_bytes_in_every_process(codec: str) -> None:
    made = {hashes(codec, SHORT, run) for run in (0, 3, 6)}
    assert len(made) == 1, made


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9", "ffv1", "prores"])
def test_twenty_processes_encode_the_same_bytes(codec: str) -> None:
    made = {hashes(codec, ALL, run) for run in range(20)}
    assert len(made) == 1, made
    made = {hashes(codec, LARGE, run) for run in range(4)}
    assert len(made) == 1, made
