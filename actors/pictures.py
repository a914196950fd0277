"""Pictures at another size, and side by side: what happens to a picture after the model.

Pictures are HWC RGB arrays, uint8 or uint16 at full scale (10-bit v is v*65535/1023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8] | NDArray[np.uint16]


def resize(rgb_HWC: Picture, width: int, height: int, method: Literal["fine", "nearest", "cubic"] = "fine") -> Picture:
    """Return the picture at another size; `fine` averages areas when shrinking and uses Lanczos when enlarging."""
    if rgb_HWC.shape[:2] == (height, width):
        return rgb_HWC
    import cv2

    shrinks = height <= rgb_HWC.shape[0] and width <= rgb_HWC.shape[1]
    fine = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    how = {"fine": fine, "nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}[method]
    return cv2.resize(rgb_HWC, (width, height), interpolation=how)  # type: ignore[return-value]


def side_by_side(panels: Sequence[tuple[str, Picture]]) -> NDArray[np.uint8]:
    """Return pictures of one height next to each other, each with its name in the corner, as uint8."""
    from PIL import Image, ImageDraw, ImageFont

    eight_bit = [p if p.dtype == np.uint8 else (p.astype(np.uint32) * 255 // 65535).astype(np.uint8) for _, p in panels]
    canvas = Image.fromarray(np.concatenate(eight_bit, axis=1))
    draw = ImageDraw.Draw(canvas)
    size = max(12, canvas.height // 24)
    font = ImageFont.load_default(size=size)
    left = 0
    for (name, _), picture in zip(panels, eight_bit, strict=True):
        box = draw.textbbox((left + size // 2, size // 3), name, font=font)
        draw.rectangle((box[0] - size // 4, box[1] - size // 4, box[2] + size // 4, box[3] + size // 4), fill=(0, 0, 0))
        draw.text((left + size // 2, size // 3), name, font=font, fill=(255, 255, 255))
        left += picture.shape[1]
    return np.asarray(canvas)
