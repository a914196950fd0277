"""Degradations: what each is meant to do to a known picture."""

import math

import numpy as np
import pytest
import torch

from pipeline.degrade import BICUBIC, Degradation, degrade, downscale, draw_degradation, gaussian_blur, through_h264


def checker(frames: int = 3, side: int = 96) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = (((x // 12) + (y // 12)) % 2).float() * 0.6 + 0.2
    return picture.expand(frames, 3, side, side).clone()


def test_bicubic_keeps_flat_areas_and_quarters_the_size() -> None:
    flat = torch.full((2, 3, 64, 48), 0.37)
    small = downscale(flat)
    assert small.shape == (2, 3, 16, 12)
    assert torch.allclose(small, torch.full_like(small, 0.37), atol=1e-6)


def test_result_is_quantised_to_eight_bits() -> None:
    levels = degrade(checker() * 0.93, BICUBIC) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_blur_widens_an_impulse_to_its_sigma() -> None:
    impulse = torch.zeros(1, 3, 41, 41)
    impulse[..., 20, 20] = 1
    blurred = gaussian_blur(impulse, 2.0)[0, 0]
    offsets = torch.arange(41) - 20.0
    variance = float((blurred.sum(0) * offsets**2).sum())
    assert math.isclose(float(blurred.sum()), 1, abs_tol=1e-5)
    assert math.isclose(math.sqrt(variance), 2.0, rel_tol=0.03)


def test_noise_has_the_stated_deviation_and_follows_the_generator() -> None:
    flat = torch.full((4, 3, 256, 256), 0.5)
    noisy = degrade(flat, Degradation(noise_std=0.05), torch.Generator().manual_seed(3))
    assert math.isclose(float(noisy.std()), 0.05, rel_tol=0.05)
    assert torch.equal(noisy, degrade(flat, Degradation(noise_std=0.05), torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("side", [96, 100])
def test_stronger_compression_is_further_from_the_input(side: int) -> None:
    clip = checker(side=side)
    clip += 0.1 * torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))
    errors = [float((through_h264(clip, crf) - clip.clamp(0, 1)).abs().mean()) for crf in (10, 28, 45)]
    assert errors[0] < errors[1] < errors[2]
    assert through_h264(clip[..., : side - 3], 20).shape == clip[..., : side - 3].shape


def test_jpeg_quality_matters() -> None:
    hr = checker(1) + 0.1 * torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    clean = degrade(hr, BICUBIC)
    bad, good = (degrade(hr, Degradation(jpeg_quality=q)) for q in (20, 95))
    assert (bad - clean).abs().mean() > 2 * (good - clean).abs().mean()


def test_severity_zero_is_pure_bicubic_and_one_is_a_mixture() -> None:
    rng = np.random.default_rng(0)
    assert all(draw_degradation(rng, 0.0) is BICUBIC for _ in range(20))
    drawn = [draw_degradation(rng, 1.0) for _ in range(400)]
    share = sum(d is BICUBIC for d in drawn) / len(drawn)
    assert 0.35 < share < 0.55
    assert any(d.h264_crf for d in drawn) and any(d.jpeg_quality for d in drawn) and any(d.blur_sigma for d in drawn)
