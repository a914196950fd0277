"""Simulated camera motion: pictures become clips with exactly known flow.

Knows: affine cameras over flat pictures, and one moving foreground layer. Does not know: data sets, degradations.

Shapes: T frames, S crop side in pixels. Flow follows the engine's convention: channel 0 = dx, 1 = dy, in pixels, from
the current frame to the previous one, so that ``previous(x + flow(x))`` looks like ``current(x)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUPERSAMPLE = 2  # a crop is sampled at twice its size and averaged, so that sub-pixel motion neither blurs nor aliases


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """Affine camera per frame: picture position = matrix @ (frame position - centre) + offset, all in frame pixels.

    Attributes:
        matrices_T22: rotation and zoom of each frame.
        offsets_T2: where the centre of each frame lies in the picture (x, y).
    """

    matrices_T22: np.ndarray
    offsets_T2: np.ndarray


def draw_camera(
    rng: np.random.Generator, frames: int, centre: tuple[float, float], speed: float, warp: float
) -> Camera:
    """Draw a smooth camera path around `centre` (x, y).

    `speed`: largest translation in pixels a frame. `warp`: largest rotation (radians) and relative zoom a frame.
    """
    angle_rate, zoom_rate = rng.uniform(-warp, warp, 2)
    direction = rng.uniform(0, 2 * np.pi)
    velocity = rng.uniform(0, speed) * np.array([np.cos(direction), np.sin(direction)])
    jitter = rng.normal(0, 0.15 * speed / max(frames, 2), (frames, 2)).cumsum(axis=0)
    time = np.arange(frames) - (frames - 1) / 2
    angles, zooms = rng.uniform(-0.05, 0.05) + angle_rate * time, np.exp(zoom_rate * time)
    cos, sin = np.cos(angles) * zooms, np.sin(angles) * zooms
    matrices = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    return Camera(matrices_T22=matrices, offsets_T2=np.array(centre) + velocity * time[:, None] + jitter)


def _grid(side: int, step: float) -> np.ndarray:
    """Return sample positions (side/step, side/step, 2) in frame pixels relative to the frame's centre."""
    axis = (np.arange(int(side / step)) + 0.5) * step - side / 2
    return np.stack(np.meshgrid(axis, axis, indexing="xy"), -1)


def render(picture_3HW: Tensor, camera: Camera, side: int) -> Tensor:
    """Return the frames (T,3,S,S) that `camera` sees of a picture; outside the picture its border is mirrored."""
    height, width = picture_3HW.shape[1:]
    grid = _grid(side, 1 / SUPERSAMPLE)
    positions = np.einsum("tij,abj->tabi", camera.matrices_T22, grid) + camera.offsets_T2[:, None, None]
    normalised = 2 * positions / np.array([width, height]) - 1
    frames = len(positions)
    sampled = F.grid_sample(
        picture_3HW[None].expand(frames, -1, -1, -1),
        torch.from_numpy(normalised).to(picture_3HW.dtype),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    return F.avg_pool2d(sampled, SUPERSAMPLE)


def flow_of(camera: Camera, side: int) -> Tensor:
    """Return the exact flow (T-1,2,S,S) between consecutive frames of a camera, current to previous, in pixels."""
    grid = _grid(side, 1.0)
    flows = []
    for t in range(1, len(camera.matrices_T22)):
        position = grid @ camera.matrices_T22[t].T + camera.offsets_T2[t]
        previous = (position - camera.offsets_T2[t - 1]) @ np.linalg.inv(camera.matrices_T22[t - 1]).T
        flows.append((previous - grid).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(flows)).float() if flows else torch.zeros(0, 2, side, side)


def ellipse_mask(camera: Camera, side: int, radius: float, softness: float = 1.5) -> Tensor:
    """Return soft masks (T,1,S,S) of an ellipse fixed in the picture that `camera` films, around its path's middle."""
    grid = _grid(side, 1.0)
    positions = np.einsum("tij,abj->tabi", camera.matrices_T22, grid) + camera.offsets_T2[:, None, None]
    offset = positions - camera.offsets_T2.mean(axis=0)
    distance = np.sqrt((offset[..., 0] / 1.3) ** 2 + offset[..., 1] ** 2)
    return torch.from_numpy(np.clip((radius - distance) / softness + 0.5, 0, 1)).float()[:, None]
