"""Simulated camera motion: the stated flow must really carry one frame onto the next."""

import numpy as np
import pytest
import torch

from pipeline.guidance import flow_warp
from pipeline.motion import Camera, draw_camera, ellipse_mask, flow_of, render


def smooth_picture(side: int = 256) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side) / 9.0, torch.arange(side) / 7.0, indexing="ij")
    return torch.stack([torch.sin(x), torch.cos(y), torch.sin(x + y)]) * 0.4 + 0.5


def test_translation_has_the_opposite_flow() -> None:
    """The camera moves right by 3 pixels a frame: a pixel's place in the previous frame lies 3 pixels to its right."""
    camera = Camera(matrices_T22=np.stack([np.eye(2)] * 2), offsets_T2=np.array([[100.0, 100.0], [103.0, 100.0]]))
    flow = flow_of(camera, 32)
    assert torch.allclose(flow[0, 0], torch.full((32, 32), 3.0)) and torch.allclose(flow[0, 1], torch.zeros(32, 32))


@pytest.mark.parametrize("seed", range(4))
def test_flow_warps_the_previous_frame_onto_the_current(seed: int) -> None:
    camera = draw_camera(np.random.default_rng(seed), 3, (128, 128), speed=6.0, warp=0.02)
    frames, flow = render(smooth_picture(), camera, 64), flow_of(camera, 64)
    inner = (..., slice(12, -12), slice(12, -12))
    for t in (1, 2):
        warped = flow_warp(frames[t - 1 : t], flow[t - 1 : t], mode="exact")
        error = float((warped - frames[t : t + 1])[inner].abs().mean())
        still = float((frames[t - 1] - frames[t])[inner].abs().mean())
        assert error < 0.004
        assert error < still / 5 or still < 0.01


def test_mask_follows_its_camera() -> None:
    camera = Camera(matrices_T22=np.stack([np.eye(2)] * 3), offsets_T2=np.array([[90.0, 100], [100, 100], [110, 100]]))
    mask = ellipse_mask(camera, 64, radius=10)
    columns = (mask * torch.arange(64.0)).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    assert torch.allclose(columns.diff(), torch.tensor([-10.0, -10.0]), atol=0.05)
