"""Losses of the three training stages (paper, sections 3.2 to 3.4 and appendix C).

Knows: pictures and features as tensors. Does not know: models, data, optimisers.

Shapes: B batch, H W size in pixels. Pictures in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.guidance import flow_warp


class PatchDiscriminator(nn.Module):
    """PatchGAN: one realism logit per patch (B,1,H/8,W/8); spectral normalisation bounds its slope.

    The paper cites the PatchGAN without its size; widths (32, 64, 96) suit crops of 96 to 192 pixels.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        below = 3
        for width in widths:
            layers += [spectral_norm(nn.Conv2d(below, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            below = width
        layers += [spectral_norm(nn.Conv2d(below, below, 3, padding=1)), nn.LeakyReLU(0.2)]
        layers.append(spectral_norm(nn.Conv2d(below, 1, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Return logits; positive means real."""
        logits: Tensor = self.layers(x_B3HW)
        return logits


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of the generator, ``softplus(-D(x))`` (paper, appendix C.1)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Counterpart of `generator_loss`; the paper does not state it, the non-saturating pair is the usual reading."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def gradient_loss(a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical first differences: keeps edges where L1 alone would blur."""
    horizontal = (a_B3HW.diff(dim=3) - b_B3HW.diff(dim=3)).abs().mean()
    return horizontal + (a_B3HW.diff(dim=2) - b_B3HW.diff(dim=2)).abs().mean()


def latent_regulariser(latent_BChw: Tensor) -> Tensor:
    """Keep every latent channel near zero mean and unit deviation, which the noise schedule assumes."""
    mean, deviation = latent_BChw.mean(dim=(0, 2, 3)), latent_BChw.std(dim=(0, 2, 3))
    return mean.square().mean() + (deviation - 1).square().mean()


def temporal_loss(
    output_B3HW: Tensor, previous_B3HW: Tensor, target_B3HW: Tensor, target_previous_B3HW: Tensor, flow_B2HW: Tensor
) -> Tensor:
    """L1 between the output's change along the flow and the ground truth's, where the flow explains the ground truth.

    Comparing with the ground truth's own change (not with zero) leaves aliasing and real brightness changes alone.
    Pixels whose ground truth differs by more than 0.2 along the flow are occluded or badly tracked, and are left out.
    """
    warped_target = flow_warp(target_previous_B3HW, flow_B2HW, mode="exact")
    truth = target_B3HW - warped_target
    valid = (truth.abs().amax(dim=1, keepdim=True) < 0.2).to(output_B3HW.dtype)
    change = output_B3HW - flow_warp(previous_B3HW, flow_B2HW, mode="exact")
    return ((change - truth).abs() * valid).sum() / (3 * valid.sum()).clamp(min=1)


def flow_consistency_loss(estimate: Any, output_B3HW: Tensor, previous_B3HW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """Squared difference between the flow of the restored pair and `flow_B2HW` of the ground truth (paper, eq. 4).

    `estimate(current, previous)` must be differentiable (RAFT).
    """
    difference: Tensor = estimate(output_B3HW, previous_B3HW) - flow_B2HW
    return difference.square().mean()


class PerceptualLoss(nn.Module):
    """ST-LPIPS distance on the VGG16 trunk, the training loss. Its AlexNet sibling is the judge and never trains."""

    def __init__(self) -> None:
        super().__init__()
        from pipeline.perceptual import STLPIPS

        self.network = STLPIPS.load("vgg").requires_grad_(False)

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor, side: int | None = None) -> Tensor:
        """Return the mean distance over the batch; `side` looks at one random square of that size, to save time."""
        height, width = a_B3HW.shape[2:]
        if side is not None and side < min(height, width):
            top, left = (int(torch.randint(size - side + 1, ())) for size in (height, width))
            window = (..., slice(top, top + side), slice(left, left + side))
            a_B3HW, b_B3HW = a_B3HW[window], b_B3HW[window]
        distance: Tensor = self.network(a_B3HW, b_B3HW)
        return distance.mean()
