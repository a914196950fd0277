"""The warp samples where it says, in both of its arithmetics, and lets gradients through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline.guidance import Residuals, artg_residuals, embed_condition, flow_warp, reference_residuals


def ramp(height: int = 12, width: int = 600) -> Tensor:
    """A picture (1,2,H,W) whose channels are the x and y coordinates of its pixels."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([x, y]).unsqueeze(0)


def constant_flow(dx: float, dy: float, height: int = 12, width: int = 600) -> Tensor:
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, height, width).contiguous()


def test_zero_flow_is_the_identity_in_the_exact_warp() -> None:
    picture = torch.randn(2, 3, 9, 14)
    warped = flow_warp(picture, torch.zeros(2, 2, 9, 14), "exact")
    torch.testing.assert_close(warped, picture, rtol=0, atol=1e-5)


def test_the_exact_warp_fetches_from_where_the_flow_points() -> None:
    warped = flow_warp(ramp(), constant_flow(3.25, -2.0), "exact")
    x, y = ramp()[0]
    torch.testing.assert_close(warped[0, 0], (x + 3.25).clamp(0, 599), rtol=0, atol=1e-3)
    torch.testing.assert_close(warped[0, 1], (y - 2).clamp(0, 11), rtol=0, atol=1e-3)


def test_the_published_warp_is_half_a_pixel_off() -> None:
    """It samples at x W/(W-1) - 0.5, and the outermost pixels are half zero (the corners three quarters)."""
    warped = flow_warp(ramp(), constant_flow(0, 0))
    x, y = ramp()[0]
    inside = (slice(1, -1), slice(1, -1))
    torch.testing.assert_close(warped[0, 0][inside], (x * 600 / 599 - 0.5)[inside], rtol=0, atol=1e-3)
    torch.testing.assert_close(warped[0, 1][inside], (y * 12 / 11 - 0.5)[inside], rtol=0, atol=1e-3)
    ones = flow_warp(torch.ones(1, 1, 12, 600), constant_flow(0, 0))[0, 0]
    assert float(ones[5, 0]) == pytest.approx(0.5, abs=1e-4)
    assert float(ones[0, 0]) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("mode", ["published", "exact"])
def test_half_precision_pictures_are_fetched_from_exact_places(mode: str) -> None:
    """bfloat16 cannot tell pixel 500 from pixel 501: places are computed in fp32."""
    stripes = (ramp()[:, :1] % 2).to(torch.bfloat16)
    flow = constant_flow(1.0, 0.0)
    warped = flow_warp(stripes, flow, mode)  # type: ignore[arg-type]
    expected = flow_warp(stripes.float(), flow, mode)  # type: ignore[arg-type]
    assert warped.dtype == torch.bfloat16
    torch.testing.assert_close(warped.float(), expected, rtol=0, atol=2**-8)


def test_gradients_reach_picture_and_flow() -> None:
    picture = torch.randn(1, 3, 8, 10, dtype=torch.float32, requires_grad=True)
    flow = (torch.rand(1, 2, 8, 10) + 0.25).requires_grad_()
    flow_warp(picture, flow, "exact").square().sum().backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0
    assert flow.grad is not None and flow.grad.abs().sum() > 0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'bent'"):
        flow_warp(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4), "bent")  # type: ignore[arg-type]


def test_residuals_spread_over_a_batch() -> None:
    residuals = Residuals(down=[torch.ones(2, 1, 2, 2)], mid=torch.full((2, 1, 1, 1), 3.0))
    spread = residuals.spread([0, 3], 4)
    assert spread.down[0].sum(dim=(1, 2, 3)).tolist() == [4, 0, 0, 4]
    assert spread.mid.flatten().tolist() == [3, 0, 0, 3]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_model_without_attention_takes_the_same_path(pipe: StreamDiffVSRPipeline, order: str) -> None:
    """Equal to ControlNetModel.forward, in both channel orders that a configuration may ask for."""
    torch.manual_seed(0)
    x, warped = torch.randn(2, 7, 18, 20), torch.randn(2, 3, 72, 80)
    timestep, prompt = torch.tensor([999, 249]), pipe.prompt_embeds_1TD.expand(2, -1, -1)
    controlnet = pipe.controlnet
    before = controlnet.config.controlnet_conditioning_channel_order
    controlnet.register_to_config(controlnet_conditioning_channel_order=order)
    try:
        with torch.no_grad():
            ours = artg_residuals(controlnet, x, timestep, prompt, embed_condition(controlnet, warped))
            reference = reference_residuals(controlnet, x, timestep, prompt, warped)
    finally:
        controlnet.register_to_config(controlnet_conditioning_channel_order=before)
    assert torch.equal(ours.mid, reference.mid)
    assert all(torch.equal(a, b) for a, b in zip(ours.down, reference.down, strict=True))
