from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.consistency import MOST_DB, consistency
from pipeline.errors import InputError


def scene(frames: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    """A picture with coarse and fine texture that moves to the right by four pixels a frame, at result size."""
    generator = torch.Generator().manual_seed(3)
    size = 4 * height, 4 * width + 32
    coarse = F.interpolate(torch.rand(1, 3, height // 4, width // 4, generator=generator), size=size, mode="bicubic")
    fine = F.interpolate(torch.rand(1, 3, 2 * height, 2 * width, generator=generator), size=size, mode="bicubic")
    wide = (0.8 * coarse + 0.2 * fine)[0]
    return torch.stack([wide[:, :, 4 * (frames - k) : 4 * (frames - k) + 4 * width] for k in range(frames)]).clamp(0, 1)


def shrink(x_T3HW: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x_T3HW, scale_factor=0.25, mode="area")


def noise(shape: torch.Size, amount: float, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * amount


def test_the_truth_agrees_and_its_detail_follows_the_motion() -> None:
    truth = scene()
    told = consistency(shrink(truth), truth)
    assert told.agreement_db == pytest.approx(MOST_DB)
    assert told.steadiness > 0.9 and told.score > MOST_DB - 0.5


def test_a_shift_of_colour_costs_agreement() -> None:
    truth = scene()
    told = consistency(shrink(truth), (truth * 0.9).clamp(0, 1))
    assert told.agreement_db < 30 and told.steadiness > 0.9


def test_boiling_costs_steadiness_though_each_frame_agrees() -> None:
    truth = scene()
    boil = noise(truth.shape, 0.2)
    boil -= F.interpolate(shrink(boil), scale_factor=4, mode="nearest")  # gone when shrunk
    told = consistency(shrink(truth), truth + boil)
    assert told.agreement_db == pytest.approx(MOST_DB) and told.steadiness < 0.3
    assert told.score < told.agreement_db - 5


def test_sharp_and_steady_is_not_worse_than_soft() -> None:
    """The trap of measuring change from frame to frame as such: sharp pictures change more than soft ones."""
    truth = scene()
    soft = F.interpolate(shrink(truth), scale_factor=4, mode="bicubic").clamp(0, 1)
    assert consistency(shrink(truth), truth).score > consistency(shrink(truth), soft).score - 1


def test_worse_is_lower() -> None:
    truth = scene()
    scores = [consistency(shrink(truth), truth + noise(truth.shape, amount)).score for amount in (0, 0.05, 0.2)]
    assert scores[0] > scores[1] > scores[2]


def test_nothing_added_is_steady() -> None:
    small = shrink(scene())
    plain = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert consistency(small, plain).steadiness == pytest.approx(1.0)


def test_pictures_without_common_motion_are_judged_by_agreement_alone() -> None:
    cut = torch.stack([noise(torch.Size((3, 192, 256)), 0.2, seed) + 0.5 for seed in (1, 2)]).clamp(0, 1)
    told = consistency(shrink(cut), cut)
    assert math.isnan(told.steadiness) or told.steadiness < 0.5


def test_other_ratios_than_four() -> None:
    truth = F.interpolate(shrink(scene()), scale_factor=4, mode="bicubic").clamp(0, 1)
    result = F.interpolate(truth, size=(100, 134), mode="area")
    assert consistency(shrink(truth), result).agreement_db > 25


@pytest.mark.parametrize("frames", [1, 2])
def test_frames_must_correspond(frames: int) -> None:
    truth = scene()
    with pytest.raises(InputError):
        consistency(shrink(truth[:frames]), truth[:1] if frames == 1 else truth)
