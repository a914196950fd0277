"""Degradations that turn sharp clips into training and test input: blur, bicubic, noise, JPEG, H.264.

Knows: pictures and clips as tensors. Does not know: data sets, models.

Shapes: T frames of one clip, H W size in pixels, h w = H/4, W/4. Values in [0, 1].
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SCALE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Degradation:
    """What happens to a clip before it is restored; None switches a part off.

    Attributes:
        blur_sigma: Gaussian blur at full resolution, in output pixels, before the 4x reduction.
        noise_std: Gaussian noise at low resolution, in units of [0, 1].
        jpeg_quality: every frame through JPEG with this quality (1..95).
        h264_crf: the clip through H.264 (x264, 4:2:0) with this constant rate factor (0..51).
    """

    blur_sigma: float | None = None
    noise_std: float | None = None
    jpeg_quality: int | None = None
    h264_crf: int | None = None


BICUBIC = Degradation()


def downscale(hr_T3HW: Tensor) -> Tensor:
    """Reduce 4x by antialiased bicubic interpolation, the standard input of the field (paper, section 4.1)."""
    return F.interpolate(hr_T3HW, scale_factor=1 / SCALE, mode="bicubic", antialias=True).clamp(0, 1)


def gaussian_blur(x_T3HW: Tensor, sigma: float) -> Tensor:
    """Blur with a separable Gaussian of `sigma` pixels; edges are replicated."""
    radius = max(1, int(3 * sigma + 0.5))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x_T3HW.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).to(x_T3HW.device)
    padded = F.pad(x_T3HW, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
    return F.conv2d(rows, taps.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)


def to_uint8(x_T3HW: Tensor) -> np.ndarray:
    """Return frames as uint8 (T,H,W,3), rounded."""
    return (x_T3HW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(frames_THW3: np.ndarray) -> Tensor:
    """Return frames as float (T,3,H,W) in [0, 1]."""
    return torch.from_numpy(frames_THW3).permute(0, 3, 1, 2).float() / 255


def through_jpeg(x_T3HW: Tensor, quality: int) -> Tensor:
    """Encode and decode every frame as JPEG (4:2:0) with `quality` in 1..95."""
    decoded = []
    for picture in to_uint8(x_T3HW):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer).convert("RGB")))
    return from_uint8(np.stack(decoded))


def through_h264(x_T3HW: Tensor, crf: int, *, preset: Literal["veryfast", "medium"] = "veryfast") -> Tensor:
    """Encode and decode the clip as one H.264 group of pictures with `crf` in 0..51; odd sizes are padded inside."""
    frames = to_uint8(x_T3HW)
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
        stream.options = {"crf": str(crf), "preset": preset, "threads": "1"}
        for picture in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r", format="matroska") as container:
        decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    return from_uint8(np.stack(decoded))


def degrade(hr_T3HW: Tensor, how: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """Return the low-resolution clip (T,3,H/4,W/4) in [0, 1], quantised to 8 bits as real input is.

    Order as in a camera: optical blur, sampling, sensor noise, compression.
    """
    x = gaussian_blur(hr_T3HW, how.blur_sigma) if how.blur_sigma else hr_T3HW
    lr = downscale(x)
    if how.noise_std:
        lr = lr + how.noise_std * torch.randn(lr.shape, generator=generator)
    lr = (lr.clamp(0, 1) * 255).round() / 255
    if how.jpeg_quality is not None:
        lr = through_jpeg(lr, how.jpeg_quality)
    if how.h264_crf is not None:
        lr = through_h264(lr, how.h264_crf)
    return lr


def draw_degradation(rng: np.random.Generator, severity: float = 1.0) -> Degradation:
    """Draw a degradation for training: 45 % pure bicubic, 30 % H.264, 10 % JPEG, 15 % blur and noise.

    `severity` in [0, 1] scales how far from pure bicubic the draws may be; 0 always returns `BICUBIC`.
    """
    kind = rng.random()
    if severity <= 0 or kind < 0.45:
        return BICUBIC
    if kind < 0.75:
        return Degradation(h264_crf=int(rng.integers(18, 19 + int(14 * severity))))
    if kind < 0.85:
        return Degradation(jpeg_quality=int(rng.integers(95 - int(55 * severity), 96)))
    return Degradation(
        blur_sigma=float(rng.uniform(0.3, 0.3 + 1.5 * severity)),
        noise_std=float(rng.uniform(0, 0.02 * severity)),
        h264_crf=int(rng.integers(18, 28)) if rng.random() < 0.4 else None,
    )
