"""A scene with texture that moves, as pictures and as a video: what `upriver bench` restores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def scene(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """Return picture `index` of the scene, RGB (height,width,3)."""
    import numpy as np

    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = x + 1.5 * index
    waves = np.sin(x / 5) * np.cos(y / 7) + np.sin((x + y) / 3)
    rgb_HWC = np.stack([128 + 50 * waves, 128 + 60 * np.sin(y / 11 + index / 9), 128 + 40 * np.cos(x / 13)], axis=-1)
    return rgb_HWC.clip(0, 255).astype(np.uint8)


def write_clip(path: Path, width: int, height: int, frames: int) -> None:
    """Write the scene as H.264, 25 pictures a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(scene(index, width, height), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
