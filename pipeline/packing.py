"""Packing of training data into one small folder that travels to another machine.

Photographs become JPEG, videos short H.264 clips with their flow beside them, so that the machine that trains needs
neither OpenCV nor the originals. Knows: files. Does not know: training.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipeline.dataset import PICTURE_SUFFIXES, VIDEO_SUFFIXES, DatasetError, list_files, load_clip

FLOW_STEP = 32  # stored flow is a multiple of 1/32 pixel; int16 reaches +-1023 pixels
QUALITIES = (95, 92, 88, 84, 78)  # of JPEG, tried in turn until the pictures fit
CRF = "14"


def pack(
    roots: list[Path], destination: Path, *, max_mb: float, max_side: int, max_frames: int, max_height: int
) -> int:
    """Write all training data below `roots` into `destination`; return its size in bytes.

    Args:
        max_mb: upper limit of the whole folder; clips are written first, pictures share the rest.
        max_side: longest side of a picture in pixels.
        max_frames, max_height: what is kept of every clip.

    Raises DatasetError when it does not fit even at the lowest picture quality.
    """
    destination.mkdir(parents=True, exist_ok=True)
    used = 0
    for path in list_files(roots, VIDEO_SUFFIXES):
        clip = load_clip(path, max_frames=max_frames, max_height=max_height)
        target = destination / f"{clip.name}.mp4"
        _write_clip(target, clip.frames_NHW3)
        flow_file = target.with_name(target.name + ".flow.npz")
        quantised = np.round(clip.flow_N2hw.astype(np.float32) * FLOW_STEP).astype(np.int16)
        np.savez_compressed(flow_file, flow=quantised, step=FLOW_STEP)
        used += target.stat().st_size + flow_file.stat().st_size
    limit = int(max_mb * 1e6)
    pictures = list_files(roots, PICTURE_SUFFIXES)
    for quality in QUALITIES:
        size = sum(_write_picture(path, destination / f"{path.stem}.jpg", max_side, quality) for path in pictures)
        if used + size <= limit:
            return used + size
    raise DatasetError(
        f"clips take {used / 1e6:.1f} MB, pictures {size / 1e6:.1f} MB at the lowest quality; the limit is {max_mb} MB",
        code="packing-size",
        remedy="Lower --max-side, --max-frames or --max-height, or raise --max-mb.",
    )


def read_flow(path: Path) -> np.ndarray:
    """Return stored flow (N-1,2,h,w) as float16 in full-resolution pixels."""
    with np.load(path, allow_pickle=False) as stored:
        return (stored["flow"].astype(np.float32) / int(stored["step"])).astype(np.float16)


def _write_picture(source: Path, target: Path, max_side: int, quality: int) -> int:
    picture = Image.open(source).convert("RGB")
    ratio = min(1.0, max_side / max(picture.size))
    if ratio < 1:
        picture = picture.resize(
            (round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS
        )
    picture.save(target, "JPEG", quality=quality, subsampling=0)
    return target.stat().st_size


def _write_clip(target: Path, frames_NHW3: np.ndarray) -> None:
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = frames_NHW3.shape[1], frames_NHW3.shape[2], "yuv420p"
        stream.options = {"crf": CRF, "preset": "slow"}
        for picture in frames_NHW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
