"""Memory is flat in the number of frames: ten times as many frames need no more of it."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import StreamDiffVSRPipeline
from tests.moving_texture import make_clip

PROGRAM = """
import resource, sys
from pipeline import StreamDiffVSRPipeline
from tests.moving_texture import make_clip

folder, count = sys.argv[1], int(sys.argv[2])
pipe = StreamDiffVSRPipeline.from_pretrained(folder)
clip = make_clip(10, 120, 160)
state = pipe.start()
total = 0
for restored in pipe((clip[k % 10] for k in range(count)), state, steps=1):
    total += 1
assert total == count == state.index and restored.shape == (480, 640, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def peak_bytes(folder: Path, frames: int, repository: Path) -> int:
    """Return the peak resident memory of a process that restores `frames` frames of 160x120."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_memory_is_flat(model_folder: Path, repository: Path) -> None:
    short, long = (peak_bytes(model_folder, frames, repository) for frames in (60, 600))
    assert long <= 1.03 * short, f"{short / 2**20:.1f} MiB for 60 frames, {long / 2**20:.1f} MiB for 600"


def live_bytes() -> int:
    """Return the size of all tensors that are alive, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_tensor_outlives_its_frame(pipe: StreamDiffVSRPipeline) -> None:
    """What is alive after two frames is alive after twelve, and not a byte more."""
    frames = enumerate(pipe(make_clip(12, 16, 24), pipe.start(), steps=1))
    after_two, after_twelve = (live_bytes() for k, _ in frames if k in (1, 11))
    assert after_twelve == after_two > 0
