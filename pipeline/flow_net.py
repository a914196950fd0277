"""A small optical-flow network of our own: coarse to fine, at input size, in plain torch operations.

Every level warps the previous frame's features by the flow so far, solves for a correction in the least-squares sense
(Lucas and Kanade, IJCAI 1981), and lets a few convolutions judge that correction by what they see: features, a local
correlation, the flow. So the arithmetic that is known is not learned, and what is learned is where to trust it. The
pyramid with warping and local correlation is that of PWC-Net (Sun et al., arXiv 1709.02371), a twentieth of its size.

Nothing depends on values, sizes come from shapes alone: the network can be traced, exported, compiled and captured.

Knows: frames, flow. Does not know: weights' files (`flow.py`), training (`flow_training.py`).

Shapes: B batch, h w input size, C channels, K correlation offsets; l level, of size h/2^l. Frames are in [-1, 1]. Flow
is in pixels of its own level, channel 0 = dx, 1 = dy, from the current frame to the previous one.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS: Final = (16, 24, 32, 48)  # features at 1/2, 1/4, 1/8, 1/16
MULTIPLE: Final = 2 ** len(WIDTHS)  # sides that the network itself takes
_REACH: Final = (0, 2, 2, 3)  # pixels of its level that a level's correlation looks at, to each side; 0 = none
_HIDDEN: Final = ((32, 32, 24), (48, 40, 32), (48, 40, 32), (56, 40, 32))
_FINE: Final = 32
_LIMIT: Final = 2.0  # pixels of its level: the largest correction that least squares may propose


def warp(image_BChw: Tensor, flow_B2hw: Tensor) -> Tensor:
    """Fetch, for every pixel, the value at the place that the flow points to; bilinear, the border repeated."""
    height, width = image_BChw.shape[-2:]
    x_w = torch.arange(width, device=flow_B2hw.device, dtype=flow_B2hw.dtype)
    y_h1 = torch.arange(height, device=flow_B2hw.device, dtype=flow_B2hw.dtype).unsqueeze(1)
    grid_x = (x_w + flow_B2hw[:, 0] + 0.5) * (2.0 / width) - 1.0
    grid_y = (y_h1 + flow_B2hw[:, 1] + 0.5) * (2.0 / height) - 1.0
    grid_Bhw2 = torch.stack((grid_x, grid_y), dim=3)
    return F.grid_sample(image_BChw, grid_Bhw2, mode="bilinear", padding_mode="border", align_corners=False)


def correlate(current_BChw: Tensor, previous_BChw: Tensor, reach: int) -> Tensor:
    """Return the mean product of both at every offset of up to `reach` pixels (B,K,h,w), K = (2 reach + 1)^2."""
    height, width = current_BChw.shape[-2:]
    padded = F.pad(previous_BChw, (reach, reach, reach, reach))
    offsets = range(2 * reach + 1)
    return torch.stack(
        [
            (current_BChw * padded[:, :, dy : dy + height, dx : dx + width]).mean(dim=1)
            for dy in offsets
            for dx in offsets
        ],
        dim=1,
    )


def least_squares(current_BChw: Tensor, warped_BChw: Tensor, damping: Tensor) -> Tensor:
    """Return the displacement (B,2,h,w) that takes `warped` to `current` best in every window of 5x5 pixels.

    Lucas and Kanade's normal equations over all channels, damped: `damping` is added to the diagonal, so that flat
    windows give zero. The length is bounded softly by `_LIMIT`, beyond which a linear estimate means nothing.
    """
    left_right = F.pad(warped_BChw, (1, 1, 0, 0), mode="replicate")
    up_down = F.pad(warped_BChw, (0, 0, 1, 1), mode="replicate")
    gx = 0.5 * (left_right[..., 2:] - left_right[..., :-2])
    gy = 0.5 * (up_down[..., 2:, :] - up_down[..., :-2, :])
    difference = current_BChw - warped_BChw
    products = torch.stack([gx * gx, gx * gy, gy * gy, gx * difference, gy * difference], dim=1).mean(dim=2)
    sums_B5hw = F.avg_pool2d(products, 5, stride=1, padding=2, count_include_pad=False)
    xx, xy, yy, xd, yd = sums_B5hw.unbind(dim=1)
    xx, yy = xx + damping, yy + damping
    determinant = xx * yy - xy * xy
    step_B2hw = torch.stack([yy * xd - xy * yd, xx * yd - xy * xd], dim=1) / determinant.unsqueeze(1)
    return _LIMIT * torch.tanh(step_B2hw / _LIMIT)


def enlarge(flow_B2hw: Tensor) -> Tensor:
    """Return the flow of the next finer level: twice the size, vectors twice as long."""
    height, width = flow_B2hw.shape[-2:]
    return 2.0 * F.interpolate(flow_B2hw, size=(2 * height, 2 * width), mode="bilinear", align_corners=False)


def _convolutions(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, width in itertools.pairwise(widths):
        layers += [nn.Conv2d(below, width, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _silent(below: int, width: int) -> nn.Conv2d:
    """Return a convolution that gives zero until it has learned: a new network is Lucas and Kanade's method."""
    layer = nn.Conv2d(below, width, 3, padding=1)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _Level(nn.Module):
    """Corrects the flow of one level by features."""

    def __init__(self, width: int, reach: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.reach = reach
        seen = width + 4 + ((2 * reach + 1) ** 2 if reach else width)
        self.body = _convolutions((seen, *hidden))
        self.head = _silent(hidden[-1], 3)
        self.damping = nn.Parameter(torch.tensor(-5.0))

    def forward(self, current_BChw: Tensor, previous_BChw: Tensor, flow_B2hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the corrected flow and what the last convolution but one saw."""
        warped = warp(previous_BChw, flow_B2hw)
        step = least_squares(current_BChw, warped, self.damping.exp())
        compared = correlate(current_BChw, warped, self.reach) if self.reach else current_BChw - warped
        hidden = self.body(torch.cat([current_BChw, compared, step, flow_B2hw], dim=1))
        head = self.head(hidden)
        return flow_B2hw + torch.sigmoid(head[:, 2:]) * step + head[:, :2], hidden


class FlowNet(nn.Module):
    """The network; about 0.27 million weights.

    It runs in fp32: positions need more than the eight bits of bf16.
    """

    luma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList()
        below = 3
        for width in WIDTHS:
            self.encoders.append(
                nn.Sequential(
                    nn.Conv2d(below, width, 3, stride=2, padding=1),
                    nn.LeakyReLU(0.1),
                    nn.Conv2d(width, width, 3, padding=1),
                )
            )
            below = width
        self.levels = nn.ModuleList(map(_Level, WIDTHS, _REACH, _HIDDEN))
        self.fine_body = _convolutions((_HIDDEN[0][-1] + 4 * 6, _FINE, _FINE))
        self.fine_head = _silent(_FINE, 12)
        self.fine_damping = nn.Parameter(torch.tensor(-7.0))
        self.register_buffer("luma", torch.tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1), persistent=False)

    def forward(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,h,w) in input pixels, for frames of any size."""
        return self.all_levels(current_B3hw, previous_B3hw)[-1]

    def all_levels(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> list[Tensor]:
        """Return the flow of every level, coarsest (1/16) first, input size last; each in pixels of its level."""
        batch, _, height, width = current_B3hw.shape
        frames = torch.cat([current_B3hw, previous_B3hw])
        frames = F.pad(frames, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")
        pyramid = []
        x = frames
        for encoder in self.encoders:
            x = encoder(x if x is frames else F.leaky_relu(x, 0.1))
            pyramid.append(x)
        flow = pyramid[-1].new_zeros((batch, 2, *pyramid[-1].shape[-2:]))
        flows: list[Tensor] = []
        hidden = flow
        for number in reversed(range(len(WIDTHS))):
            if flows:
                flow = enlarge(flow)
            flow, hidden = self.levels[number](pyramid[number][:batch], pyramid[number][batch:], flow)
            flows.append(flow)
        flow = self._finest(frames[:batch], frames[batch:], enlarge(flow), hidden)
        return [*flows, flow[..., :height, :width]]

    def _finest(self, current_B3hw: Tensor, previous_B3hw: Tensor, flow_B2hw: Tensor, hidden_BCh2w2: Tensor) -> Tensor:
        """Correct the flow at full size, with convolutions at half size: four pixels are one with four times as many
        channels. Brightness is taken out of the comparison by the mean of a neighbourhood."""
        current = _without_mean((current_B3hw * self.luma).sum(dim=1, keepdim=True))
        previous = _without_mean((previous_B3hw * self.luma).sum(dim=1, keepdim=True))
        warped = warp(previous, flow_B2hw)
        step = least_squares(current, warped, self.fine_damping.exp())
        seen = F.pixel_unshuffle(torch.cat([current, warped, step, flow_B2hw], dim=1), 2)
        head = F.pixel_shuffle(self.fine_head(self.fine_body(torch.cat([seen, hidden_BCh2w2], dim=1))), 2)
        return flow_B2hw + torch.sigmoid(head[:, 2:]) * step + head[:, :2]


def _without_mean(x_B1hw: Tensor) -> Tensor:
    return x_B1hw - F.avg_pool2d(x_B1hw, 9, stride=1, padding=4, count_include_pad=False)
