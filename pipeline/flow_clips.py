"""Training pairs for the flow network: simulated cameras whose flow is known exactly, and real clips without any.

Simulated pairs are rendered at input size from sharp pictures, so they cost a hundredth of what a clip at output size
would. What the network sees went through the degradations of `degrade.py`; what it is judged by did not.

Knows: pictures, clips, cameras. Does not know: the network, its losses.

Shapes: N pairs, T frames, s crop side at input size. Frames are in [0, 1]; flow is in input pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.dataset import TrainingData
from pipeline.degrade import Degradation, draw_degradation, through_h264, through_jpeg
from pipeline.motion import draw_camera, flow_of, render

FRAMES = 3  # of a clip: its two pairs share the work of rendering, and the second follows another P frame
SPEEDS = (0.0, 0.5, 2.0, 6.0, 14.0)  # largest motion of a simulated camera in input pixels a frame
_REDUCTIONS = (2, 3, 4)  # of real clips


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of frames, current and previous, each (N,3,s,s): as the network sees them, and as they were.

    `flow_N2ss` is from current to previous, or None where nobody knows it.
    """

    current: Tensor
    previous: Tensor
    clean_current: Tensor
    clean_previous: Tensor
    flow_N2ss: Tensor | None


def simulated(
    data: TrainingData, rng: np.random.Generator, *, side: int, severity: float, held_out: bool = False
) -> Pairs:
    """Draw a clip of one to three layers, each with a picture and a camera of its own, and exact flow.

    `held_out`: from the pictures that no training sees.
    """
    pictures = (data.held_out if held_out else data.pictures) or data.pictures
    clip, flow = _layer(rng, data.crop_around(rng, side, pictures), side)[:2]
    for _ in range(int(rng.choice([0, 1, 2], p=[0.35, 0.35, 0.3]))):
        front = data.crop_around(rng, side, pictures)
        layer, layer_flow, mask = _layer(rng, front, side, blobs(rng, front.shape[1:]))
        clip = torch.lerp(clip, layer, mask)
        flow = torch.where(mask[1:, :1] > 0.5, layer_flow, flow)
    if rng.random() < 0.3:  # exposure changes between frames
        gain = torch.from_numpy(rng.normal(1, 0.06, (FRAMES, 1, 1, 1))).float()
        shift = torch.from_numpy(rng.normal(0, 0.02, (FRAMES, 1, 1, 1))).float()
        clip = clip * gain + shift
    return _pairs(clip.clamp(0, 1), flow, rng, severity)


def real(data: TrainingData, rng: np.random.Generator, *, side: int, severity: float) -> Pairs:
    """Draw consecutive frames of a real clip, reduced two to four times; their flow is not known."""
    frames_NHW3 = data.clips[rng.integers(len(data.clips))].frames_NHW3
    count, height, width = frames_NHW3.shape[:3]
    fitting = [factor for factor in _REDUCTIONS if side * factor <= min(height, width)] or [1]
    factor = int(rng.choice(fitting))
    stride = int(rng.integers(1, 3)) if count > 2 * FRAMES else 1
    first = int(rng.integers(max(1, count - stride * (FRAMES - 1))))
    order = np.minimum(np.arange(FRAMES) * stride + first, count - 1)
    long = side * factor
    top, left = int(rng.integers(height - long + 1)), int(rng.integers(width - long + 1))
    clip = torch.from_numpy(frames_NHW3[order, top : top + long, left : left + long]).permute(0, 3, 1, 2).float() / 255
    if factor > 1:
        clip = F.interpolate(clip, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    if rng.random() < 0.5:
        clip = clip.flip(3)
    return _pairs(clip.contiguous(), None, rng, severity)


def _layer(
    rng: np.random.Generator, picture_3HW: Tensor, side: int, mask_1HW: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the frames, the flow and the mask of a picture seen by a camera of its own."""
    centre = (picture_3HW.shape[2] / 2, picture_3HW.shape[1] / 2)
    camera = draw_camera(rng, FRAMES, centre, float(rng.choice(SPEEDS)), float(rng.choice([0.002, 0.03])))
    mask = torch.ones(FRAMES, 1, side, side)
    if mask_1HW is not None:
        mask = render(mask_1HW, camera, side)
    return render(picture_3HW, camera, side), flow_of(camera, side), mask


def blobs(rng: np.random.Generator, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Return a soft mask (1,H,W) of random shapes that cover a tenth to a half of the picture."""
    cells = int(rng.integers(3, 12))
    coarse = torch.from_numpy(rng.normal(size=(1, 1, cells, cells))).float()
    height = F.interpolate(coarse, size=tuple(size), mode="bicubic")[0]
    level = torch.quantile(height[:, ::4, ::4].flatten(), float(rng.uniform(0.5, 0.9)))
    return ((height - level) * 12 + 0.5).clamp(0, 1)


def _pairs(clean: Tensor, flow: Tensor | None, rng: np.random.Generator, severity: float) -> Pairs:
    seen = _degraded(clean, draw_degradation(rng, severity), rng)
    return Pairs(seen[1:], seen[:-1], clean[1:], clean[:-1], flow)


def _degraded(clip: Tensor, how: Degradation, rng: np.random.Generator) -> Tensor:
    """Apply what of a degradation happens at input size: noise, 8 bits, compression."""
    if how.noise_std:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        clip = clip + how.noise_std * torch.randn(clip.shape, generator=generator)
    clip = (clip.clamp(0, 1) * 255).round() / 255
    if how.jpeg_quality is not None:
        clip = through_jpeg(clip, how.jpeg_quality)
    return through_h264(clip, how.h264_crf) if how.h264_crf is not None else clip
