"""Frames as arrays and as tensors: 8 or 16 bit HWC on the outside, fp32 in [-1, 1] inside.

Knows: the two integer scales, rounding, and the original's way with sizes that 4 does not divide. Does not know: colour
spaces, files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_BAND_ROWS = 64


def frame_to_tensor(frame_HWC: NDArray[np.integer], device: torch.device | None = None) -> Tensor:
    """Return (1,3,H,W) fp32 in [-1, 1] of an RGB frame (H,W,3), uint8, or uint16 at full scale.

    Args:
        device: where it is wanted. To a GPU the frame's own numbers travel, a quarter of the bytes for 8 bits, while
            the GPU goes on with what it has; None is main memory.

    Raises:
        InputError: another shape or type.
    """
    if frame_HWC.ndim != 3 or frame_HWC.shape[2] != 3 or frame_HWC.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"A frame has shape {frame_HWC.shape} and type {frame_HWC.dtype}; "
            "(height, width, 3) of uint8 or uint16 is needed.",
            code="frame-type",
            remedy="Convert it to RGB; scale other bit depths to 8 or to full-scale 16 bit.",
        )
    if device is not None and device.type == "cuda":
        levels_HWC = frame_HWC if frame_HWC.dtype == np.uint8 else frame_HWC.astype(np.int32)
        held_HWC = torch.from_numpy(np.ascontiguousarray(levels_HWC)).pin_memory()
        values_HWC = held_HWC.to(device, non_blocking=True).to(torch.float32)
    else:
        values_HWC = torch.from_numpy(frame_HWC.astype(np.float32))
    unit_HWC = values_HWC / float(np.iinfo(frame_HWC.dtype).max)
    return (unit_HWC * 2 - 1).permute(2, 0, 1).unsqueeze(0).contiguous()


def tensor_to_frame(output_3HW: Tensor, dtype: np.dtype[np.integer]) -> NDArray[np.integer]:
    """Return (H,W,3) of `dtype` (uint8, or uint16 at full scale) of a picture in nominal [-1, 1].

    Values outside are clamped; halves are rounded to even, as NumPy does.
    """
    if output_3HW.device.type == "cuda":
        return _fetch(output_3HW, dtype)
    bands = output_3HW.split(_BAND_ROWS, dim=1)  # band by band: the steps between stay in the processor's cache
    picture_HWC = np.empty((*output_3HW.shape[1:], 3), dtype)
    for number, band_3HW in enumerate(bands):
        narrow_3HW = _levels(band_3HW, dtype)
        top = number * _BAND_ROWS
        rows = slice(top, top + band_3HW.shape[1])
        if dtype == np.uint8:
            torch.from_numpy(picture_HWC)[rows] = narrow_3HW.cpu().permute(1, 2, 0)  # faster than NumPy's transposition
        else:
            picture_HWC[rows] = narrow_3HW.cpu().numpy().transpose(1, 2, 0)
    return picture_HWC


def _levels(output_3HW: Tensor, dtype: np.dtype[np.integer]) -> Tensor:
    """Return a picture in nominal [-1, 1] as levels: uint8, or int32 for 16 bits."""
    unit_3HW = output_3HW.to(torch.float32, copy=True).div_(2).add_(0.5).clamp_(0, 1)
    levels_3HW = unit_3HW.mul_(float(np.iinfo(dtype).max)).round_()
    return levels_3HW.to(torch.uint8 if dtype == np.uint8 else torch.int32)


def _fetch(output_3HW: Tensor, dtype: np.dtype[np.integer]) -> NDArray[np.integer]:
    """Do what `tensor_to_frame` does for a picture on a GPU: rounded there, and fetched in one go."""
    levels_HWC = _levels(output_3HW, dtype).permute(1, 2, 0).contiguous()
    picture_HWC = torch.empty(levels_HWC.shape, dtype=levels_HWC.dtype, pin_memory=True)
    picture_HWC.copy_(levels_HWC, non_blocking=True)
    torch.cuda.current_stream(output_3HW.device).synchronize()
    return picture_HWC.numpy().astype(dtype, copy=False)


def shrink_to_multiple_of_4(frame_HWC: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return the frame as the original code resizes it: by Lanczos, to both sides rounded down to multiples of 4.

    Only for comparisons with the original: the engine restores every size as it is. Frames whose sides are multiples
    of 4 come back unchanged.

    Raises:
        InputError: a frame of more than 8 bits, which Pillow cannot resize.
    """
    height, width = frame_HWC.shape[:2]
    if height % 4 == 0 and width % 4 == 0:
        return frame_HWC
    if frame_HWC.dtype != np.uint8:
        raise InputError(
            f"The original's resizing is defined for 8 bit, not for {frame_HWC.dtype}.",
            code="frame-shrink",
            remedy="Give 8-bit frames, or leave the frame at its size.",
        )
    from PIL import Image

    picture = Image.fromarray(frame_HWC).resize((width - width % 4, height - height % 4), Image.Resampling.LANCZOS)
    return np.asarray(picture)
