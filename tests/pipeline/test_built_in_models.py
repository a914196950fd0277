"""What comes with the package: small files that load everywhere and restore a real clip better than bicubic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline.frames import frame_to_tensor
from pipeline.metrics import laplacian_variance, psnr
from pipeline.model_source import built_in_models, resolve
from pipeline.restorer import SIZES, Restorer
from pipeline.video import VideoReader

FRAMES = 4
PART = (slice(40, 88), slice(40, 104))  # rows and columns of the input: somebody walks there


def read(path: Path, factor: int) -> Tensor:
    """Return a part of the first frames (T,3,h,w) in [0, 1]."""
    rows, columns = (slice(factor * one.start, factor * one.stop) for one in PART)
    with VideoReader(path) as reader:
        pictures = [frame.rgb_HWC for frame, _ in zip(reader, range(FRAMES), strict=False)]
    return torch.cat([frame_to_tensor(one, torch.device("cpu"))[..., rows, columns] for one in pictures]) / 2 + 0.5


def test_all_are_known() -> None:
    assert built_in_models() == ["small", "tiny"]


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_files_are_small_and_of_their_size(name: str) -> None:
    assert sum(path.stat().st_size for path in Path(resolve(name)).rglob("*") if path.is_file()) < 20e6
    assert Restorer.load(Path(resolve(name))).size == SIZES[name]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["small", "tiny"])
def test_they_restore_a_real_clip(repository: Path, name: str, steps: int) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(name)
    assert pipe.dtype == torch.float32
    low_T3hw = read(repository / "tests/data/walk_lr.mp4", 1)
    truth_T3HW = read(repository / "tests/data/walk_hr.mp4", 4)
    state = pipe.start()
    outputs = [pipe.step(frame[None] * 2 - 1, [state], steps=steps) for frame in low_T3hw]
    restored_T3HW = (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)
    bicubic_T3HW = F.interpolate(low_T3hw, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert psnr(restored_T3HW, truth_T3HW).mean() > psnr(bicubic_T3HW, truth_T3HW).mean() - 1
    sharp = [float(laplacian_variance(x).mean()) for x in (restored_T3HW, bicubic_T3HW, truth_T3HW)]
    assert 10 * sharp[1] < sharp[0] < 1.2 * sharp[2], sharp
