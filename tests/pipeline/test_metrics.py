"""The measures against cases whose answer is known beforehand."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import metrics
from pipeline.degrade import from_uint8
from pipeline.errors import InputError
from tests.moving_texture import make_clip


def texture(frames: int = 3, height: int = 96, width: int = 128, motion: tuple[float, float] = (3.0, 1.0)) -> Tensor:
    """A clip (T, 3, H, W) in [0, 1] whose flow to the previous frame is `motion` everywhere."""
    import numpy as np

    return from_uint8(np.stack(make_clip(frames, height, width, motion=motion)))


def constant_flows(count: int, dx: float, dy: float, height: int = 96, width: int = 128) -> Tensor:
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(count, 2, height, width)


def everywhere(count: int, height: int = 96, width: int = 128) -> Tensor:
    return torch.ones(count, height, width, dtype=torch.bool)


def test_psnr_of_known_errors() -> None:
    black = torch.zeros(2, 3, 32, 32)
    off = torch.stack([torch.full((3, 32, 32), 0.1), torch.full((3, 32, 32), 0.01)])
    assert metrics.psnr(black, off).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    noise = 0.5 + 0.05 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert metrics.psnr(noise, torch.full_like(noise, 0.5)).item() == pytest.approx(-20 * math.log10(0.05), abs=0.05)
    assert metrics.psnr(black, black).tolist() == [math.inf, math.inf]


def test_ssim_of_known_pictures() -> None:
    clip = texture(1)
    assert metrics.ssim(clip, clip).item() == pytest.approx(1.0, abs=1e-5)
    # Two flat pictures have no variance, so only the luminance term is left.
    a, b = torch.full((1, 3, 32, 32), 0.4), torch.full((1, 3, 32, 32), 0.6)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)
    # Noise without a common structure: hardly any similarity; a mirrored contrast: negative.
    noise = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert abs(metrics.ssim(noise[0], noise[1]).item()) < 0.1
    assert metrics.ssim(noise[0], 1 - noise[0]).item() < -0.8


def test_ssim_window_is_the_gaussian_of_the_paper() -> None:
    # One bright pixel: its neighbourhood's weights are visible in the mean, so a wrong sigma moves the result.
    a, b = torch.full((1, 3, 11, 11), 0.5), torch.full((1, 3, 11, 11), 0.5)
    b[..., 5, 5] = 1.0
    weights = torch.exp(-0.5 * ((torch.arange(11.0) - 5) / 1.5) ** 2)
    centre = float((weights[5] / weights.sum()) ** 2)
    mean, variance = 0.5 + 0.5 * centre, 0.25 * centre - (0.5 * centre) ** 2
    c1, c2 = 1e-4, 9e-4
    expected = (2 * 0.5 * mean + c1) * c2 / ((0.25 + mean**2 + c1) * (variance + c2))
    assert metrics.ssim(a, b).item() == pytest.approx(expected, rel=1e-3)


def test_laplacian_variance_of_a_chequerboard_and_of_blur() -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    board = ((x + y) % 2).float().expand(1, 3, 32, 32)
    # Every neighbour differs by 255 levels: the Laplacian is +1020 or -1020, half of each.
    assert metrics.laplacian_variance(board).item() == pytest.approx(1020**2, rel=1e-4)
    ramp = (x / 31).expand(1, 3, 32, 32)
    assert metrics.laplacian_variance(ramp).item() == pytest.approx(0, abs=1e-3)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(noise, 3, stride=1)
    assert metrics.laplacian_variance(blurred).item() < 0.3 * metrics.laplacian_variance(noise).item()


def test_flicker_sees_boiling_and_no_wanted_change() -> None:
    still = texture(1).expand(4, -1, -1, -1)
    boiling = still.clone()
    boiling[1::2] += 4 / 255
    assert metrics.flicker(boiling, still) == pytest.approx(4.0, abs=1e-3)
    assert metrics.flicker(still * 0.9, still) == pytest.approx(0.0, abs=1e-4)
    moving = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert math.isnan(metrics.flicker(moving, moving))


def test_dis_finds_a_known_shift() -> None:
    clip = texture(2, motion=(3.0, 1.0))
    flow_2HW = metrics.dis_flow(clip[1], clip[0])
    inner = flow_2HW[:, 16:-16, 16:-16]
    assert inner[0].median().item() == pytest.approx(3.0, abs=0.2)
    assert inner[1].median().item() == pytest.approx(1.0, abs=0.2)


def test_sample_fetches_at_pixel_plus_flow() -> None:
    picture = torch.arange(20.0).view(1, 4, 5)
    same, inside = metrics.sample(picture, torch.zeros(2, 4, 5))
    assert torch.allclose(same, picture, atol=1e-5) and bool(inside.all())
    flow = torch.zeros(2, 4, 5)
    flow[0] = 1
    shifted, inside = metrics.sample(picture, flow)
    assert torch.allclose(shifted[0, :, :4], picture[0, :, 1:], atol=1e-5)
    assert not bool(inside[:, 4].any()) and bool(inside[:, :4].all())


def test_mask_leaves_out_occlusions_boundaries_and_the_outside() -> None:
    flow = torch.zeros(2, 40, 60)
    flow[0] = 2.0
    mask = metrics.reliable(flow, -flow)
    assert bool(mask[:, :58].all()) and not bool(mask[:, 58:].any())
    # Without its counterpart the same flow is an occlusion: |2 + 0|^2 = 4 > 0.01 * 4 + 0.5.
    assert not bool(metrics.reliable(flow, torch.zeros_like(flow)).any())
    # Half of the picture stands, half moves: the seam is a motion boundary.
    step = torch.zeros(2, 40, 60)
    step[0, :, 30:] = 2.0
    seam = metrics.reliable(step, -step)
    assert not bool(seam[:, 29].any()) and bool(seam[:, :25].all())


def test_warping_error_is_small_for_true_motion_and_grows_with_noise() -> None:
    clip = texture(3, motion=(3.0, 1.0))
    flows, masks = constant_flows(2, 3.0, 1.0), everywhere(2)
    masks[:, -1:], masks[:, :, -3:] = False, False
    true = metrics.warping_error(clip, flows, masks)
    assert true.max().item() < 0.05  # whole pixels: only rounding to 8 bits is left
    wrong = metrics.warping_error(clip, constant_flows(2, 0.0, 0.0), masks)
    assert wrong.min().item() > 20 * true.max().item()
    # Two frames with independent noise of variance s^2 differ by 2 s^2 on average.
    sigma = 0.05
    grey = 0.5 + sigma * torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    noisy = metrics.warping_error(grey, constant_flows(2, 0.0, 0.0), everywhere(2))
    assert noisy.tolist() == pytest.approx([2000 * sigma**2] * 2, rel=0.03)


def test_warping_error_ignores_what_the_mask_hides() -> None:
    still = torch.full((2, 3, 96, 128), 0.5)
    still[1, :, :48] = 1.0
    masks = everywhere(1)
    assert metrics.warping_error(still, constant_flows(1, 0, 0), masks).item() == pytest.approx(1000 * 0.25 / 2)
    masks[:, :48] = False
    assert metrics.warping_error(still, constant_flows(1, 0, 0), masks).item() == 0.0


def test_temporal_differences() -> None:
    clip = texture(3, motion=(3.0, 1.0))
    flows = torch.stack([metrics.dis_flow(clip[k + 1], clip[k]) for k in range(2)])
    assert metrics.flow_difference(clip, flows) == 0.0
    frozen = clip[:1].expand(3, -1, -1, -1)
    # No motion instead of (3, 1): mean error (3 + 1) / 2, times 10.
    assert metrics.flow_difference(frozen, flows) == pytest.approx(20.0, rel=0.1)
    assert metrics.temporal_distance_gap(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3])) == pytest.approx(5.0)


def test_vmaf_neg_orders_blur_and_does_not_reward_sharpening() -> None:
    clip = texture(4, 160, 224, motion=(1.0, 0.0))
    same = metrics.vmaf_neg(clip, clip)
    blurred = metrics.vmaf_neg(F.avg_pool2d(clip, 5, stride=1, padding=2, count_include_pad=False), clip)
    assert same > 90 and blurred < same - 20
    # More contrast than the original has: plain VMAF gives this 100, NEG takes it for the error that it is.
    soft = F.avg_pool2d(clip, 3, stride=1, padding=1, count_include_pad=False)
    overdone = (0.5 + 1.4 * (soft - 0.5)).clamp(0, 1)
    assert metrics.vmaf_neg(overdone, clip) < metrics.vmaf_neg(soft, clip) - 5


def test_vmaf_neg_without_the_program_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return usual(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(metrics.VmafUnavailable, match=r"pip install 'upriver\[vmaf\]'"):
        metrics.vmaf_neg(texture(2), texture(2))


def test_clips_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32\) and \(1, 3, 32, 36\)"):
        metrics.psnr(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 36))
    with pytest.raises(InputError, match="T >= 2"):
        metrics.flicker(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


def test_quantise_is_what_a_viewer_gets() -> None:
    assert metrics.quantise(torch.tensor([-0.5, 0.5, 1.2])).tolist() == pytest.approx([0, 128 / 255, 1])
