"""The judge of a clip: every measure moves in its direction, and what the ground truth alone decides is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.assets import fetch
from pipeline.degrade import downscale, from_uint8
from pipeline.judge import ClipJudge
from pipeline.perceptual import STLPIPS
from tests.moving_texture import make_clip


@pytest.fixture(scope="module")
def truth_T3HW() -> Tensor:
    return from_uint8(np.stack(make_clip(10, 64, 96, motion=(2.0, 0.0))))


@pytest.fixture(scope="module")
def judge(truth_T3HW: Tensor) -> ClipJudge:
    fetch(["nets"])
    return ClipJudge(truth_T3HW, STLPIPS.load("alex"), vmaf=False)


def test_the_original_is_perfect(judge: ClipJudge, truth_T3HW: Tensor) -> None:
    scores = judge.score(truth_T3HW)
    assert scores.psnr == math.inf and scores.ssim == pytest.approx(1)
    assert scores.stlpips == scores.tlp == scores.tof == 0 and scores.sharpness == pytest.approx(1)
    assert scores.vmaf_neg is None
    assert judge.motion == pytest.approx(2, rel=0.2)


def test_blur_and_boiling_are_seen(judge: ClipJudge, truth_T3HW: Tensor) -> None:
    blurred = F.interpolate(downscale(truth_T3HW), scale_factor=4, mode="bicubic").clamp(0, 1)
    noise = 0.08 * torch.randn(truth_T3HW.shape, generator=torch.Generator().manual_seed(0))
    original, soft, boiling = judge.score(truth_T3HW), judge.score(blurred), judge.score(truth_T3HW + noise)
    assert soft.stlpips > 0.03 and soft.sharpness < 0.9 and soft.psnr < 40
    assert boiling.sharpness > 1.1 and boiling.tlp > original.tlp
    assert boiling.warp_error > 5 * max(original.warp_error, soft.warp_error)
    assert boiling.tof > soft.tof


def test_single_frames_and_the_frames_looked_at(judge: ClipJudge, truth_T3HW: Tensor) -> None:
    assert judge.looked_at == [0, 1, 4, 5, 8, 9]
    spoiled = truth_T3HW.clone()
    spoiled[9] = spoiled[9].flip(-1)
    scores = judge.score(spoiled)
    assert scores.stlpips_first == 0 and scores.stlpips_tenth is not None and scores.stlpips_tenth > 0.05
    assert scores.stlpips == pytest.approx(scores.stlpips_tenth / 6)
    complete = ClipJudge(truth_T3HW[:4], judge.network, vmaf=False, spacing=2)
    assert complete.looked_at == [0, 1, 2, 3]
    assert complete.score(truth_T3HW[:4]).stlpips_tenth is None
