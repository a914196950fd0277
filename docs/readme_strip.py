"""Cuts the readme's picture out of what `upriver restore --compare --truth` wrote: `make picture`.

The comparison has four panels side by side: input, bicubic, Upriver, original. The same detail is taken from each.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

PANELS = 4
# Left, top, right, bottom in a panel of 640x480: a walking woman, foliage, and the sign of a shop.
DETAIL = (290, 190, 610, 440)
GAP = 6


def strip(comparison: Image.Image) -> Image.Image:
    """Return the detail of each panel, side by side with a white gap.

    Raises ValueError if the picture is not four panels of at least the detail's size.
    """
    width, left = comparison.width // PANELS, DETAIL[0]
    if comparison.width % PANELS or width < DETAIL[2] or comparison.height < DETAIL[3]:
        raise ValueError(f"expected four panels of at least {DETAIL[2]}x{DETAIL[3]}, got {comparison.size} in all")
    detail_width, detail_height = DETAIL[2] - left, DETAIL[3] - DETAIL[1]
    result = Image.new("RGB", (PANELS * detail_width + (PANELS - 1) * GAP, detail_height), "white")
    for panel in range(PANELS):
        x = panel * width
        detail = comparison.crop((x + left, DETAIL[1], x + DETAIL[2], DETAIL[3]))
        result.paste(detail, (panel * (detail_width + GAP), 0))
    return result


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: readme_strip.py COMPARISON.png STRIP.png")
    with Image.open(sys.argv[1]) as picture:
        strip(picture.convert("RGB")).save(Path(sys.argv[2]), optimize=True)
