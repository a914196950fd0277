"""A clip that is made, not read: what a model's arithmetic is tried on where there is no video at hand.

Rectangles of all sizes, plain and striped, black and white among their colours, that move to the left. It is the same
on every machine, and any model can be tried on it. Knows: pictures. Does not know: networks.

Shapes: h w input size, H W = 4h 4w output size, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.noise import frame_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE: Final = 64  # of the clip's frames in pixels
_SHAPES: Final = 160  # in a scene
_SCALE: Final = 4


class ClipFrame(NamedTuple):
    """One frame as a step takes it: frame (1,3,h,w) in [-1, 1], latents (1,C,h,w), flow (1,2,H,W) in output pixels."""

    frame_13hw: Tensor
    latents_1Chw: Tensor
    flow_12HW: Tensor


def scene(number: int, side: int = SIDE) -> NDArray[np.float32]:
    """Return the first frame (side,side,3) of a scene in [0, 1].

    Black and white are among its colours, so that values get as large as pictures can make them.
    """
    generator = np.random.default_rng(number)
    large = _SCALE * side
    picture_HW3 = np.full((large, large, 3), 0.5, np.float32)
    for _ in range(_SHAPES):
        height, width = np.maximum(generator.exponential(large / 10, 2).astype(int), 2)
        top, left = generator.integers(0, large, 2)
        colour = generator.random(3) if generator.random() < 0.7 else np.full(3, generator.integers(0, 2))
        part_hw3 = picture_HW3[top : top + height, left : left + width]
        y_hw, x_hw = np.mgrid[: part_hw3.shape[0], : part_hw3.shape[1]]
        down, across = generator.uniform(0.1, 1.5, 2)
        stripes_hw = 0.25 * generator.random() * np.sin(down * y_hw + across * x_hw)
        part_hw3[:] = np.clip(colour + stripes_hw[..., None], 0, 1)
    return picture_HW3.reshape(side, _SCALE, side, _SCALE, 3).mean((1, 3))


def made_up_clip(number: int, frames: int, channels: int, side: int = SIDE) -> Iterator[ClipFrame]:
    """Yield the frames of a scene, which moves to the left by one input pixel a frame.

    Args:
        number: of the scene. channels: of the latents.
    """
    first_13hw = torch.from_numpy(scene(number, side)).permute(2, 0, 1)[None] * 2 - 1
    flow_12HW = torch.zeros(1, 2, _SCALE * side, _SCALE * side)
    flow_12HW[:, 0] = _SCALE
    for index in range(frames):
        latents = frame_noise((channels, side, side), seed=number, index=index, device=torch.device("cpu"))
        yield ClipFrame(torch.roll(first_13hw, -index, dims=3), latents[None], flow_12HW)
