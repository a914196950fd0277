"""A clip of a camera that stands still: a frame of a real clip as scenery, a piece of another one moving across it.

The truth has no noise. The input is the reduced truth with noise of its own in every frame, rounded to 8 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.heldout import HELDOUT, read
from pipeline.degrade import downscale

SCENERY, OBJECT = "campus", "walk"  # excerpts of both; the second gives what moves
RADIUS = 44.0  # of the object, in output pixels
NOISE_LEVELS = 1.0  # standard deviation of the input's noise, 8-bit levels


def fixed_camera(frames: int, *, speed: float = 3.0, appears: int = 0, leaves: int | None = None) -> Tensor:
    """Return the truth (T,3,H,W) in [0, 1].

    Args:
        speed: of the object, in output pixels a frame.
        appears, leaves: first frame with the object, and first one without it again; None: it stays.
    """
    excerpts = {excerpt.name: excerpt for excerpt in HELDOUT}
    scenery_3HW = read(excerpts[SCENERY], 2).truth_T3HW[0]
    texture_3HW = read(excerpts[OBJECT], 2).truth_T3HW[0]
    height, width = scenery_3HW.shape[1:]
    rows = torch.arange(height).view(-1, 1).float()
    columns = torch.arange(width).view(1, -1).float()
    clip = []
    for k in range(frames):
        if k < appears or (leaves is not None and k >= leaves):
            clip.append(scenery_3HW)
            continue
        x, y = 0.25 * width + speed * (k - appears), 0.55 * height
        distance = ((columns - x).square() / 1.4 + (rows - y).square()).sqrt()
        mask = ((RADIUS - distance) / 1.5 + 0.5).clamp(0, 1)
        moved = F.pad(texture_3HW, (256, 256, 256, 256), mode="reflect")
        offset = round(x - 0.25 * width)
        moved = moved[:, 256 : 256 + height, 256 - offset : 256 - offset + width]
        clip.append(mask * moved + (1 - mask) * scenery_3HW)
    return torch.stack(clip)


def noisy_input(truth_T3HW: Tensor, noise_levels: float = NOISE_LEVELS, seed: int = 0) -> Tensor:
    """Return the input (T,3,h,w) in [0, 1]: reduced by four, with noise, rounded to 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    small_T3hw = downscale(truth_T3HW)
    noise = torch.randn(small_T3hw.shape, generator=generator) * noise_levels / 255
    return ((small_T3hw + noise).clamp(0, 1) * 255).round() / 255
