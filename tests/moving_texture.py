"""A clip whose motion is known: smooth texture that moves by a constant number of pixels per frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def make_clip(
    count: int, height: int, width: int, *, motion: tuple[float, float] = (1.5, 0.5), seed: int = 0
) -> list[NDArray[np.uint8]]:
    """Return frames (height,width,3) whose content moves by -`motion` (x, y) pixels per frame.

    So the flow from a frame to the one before it is +`motion` everywhere.
    """
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [(generator.uniform(-0.6, 0.6, 2), generator.uniform(0, 6.28, 3)) for _ in range(12)]
    frames = []
    for k in range(count):
        u, v = x + motion[0] * k, y + motion[1] * k
        planes = [sum(np.sin(f[0] * u + f[1] * v + phase[c]) for f, phase in waves) for c in range(3)]
        frames.append(np.clip(127.5 + 25 * np.stack(planes, axis=2), 0, 255).astype(np.uint8))
    return frames
