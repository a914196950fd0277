"""A causal cut detector: says of each picture, from it and those before it, whether a new shot begins with it.

- A picture is reduced to a small grid of its green channel and three colour histograms; nothing else of it is kept.
- It is compared with the last few pictures, not only the last one, so that a single flash between two like pictures is
  no cut, and under shifts of the grid, so that a fast pan is none either. Pictures without structure (black, white)
  neither start a shot nor are compared with: after them the next real picture decides.
- It is plain arithmetic in a fixed order: the same pictures give the same cuts on every machine.

Dissolves and fades are not detected: the picture changes little from frame to frame, and the stream's state follows.
Shape legend: H height, W width, C = 3, Y and X rows and columns of the grid, K pictures kept, B bins.
"""

from __future__ import annotations

from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

_GRID: Final = (18, 32)
_BINS: Final = 16
_KEPT: Final = 3
# Samples per grid cell and side: enough to average noise, few enough that the size of the picture does not matter.
_SAMPLES: Final = 4
# Shifts that are searched, as shares of the grid: a whip pan moves about a third of the width between two pictures.
_MAX_SHIFT: Final = (0.25, 0.4)
# Contrast of the grid (0..1) below which a picture has no structure to compare.
_MIN_CONTRAST: Final = 0.012
# Cells as bright as this are burnt out.
_BURNT: Final = 0.95
_MIN_EXPOSED_CELLS: Final = 32
# One minus the correlation, under the best shift: below the first number pictures are alike, from the second unlike.
_LIKE: Final = 0.15
_UNLIKE: Final = 0.5
# A cut scores above the first number; real ones score 0.25 to 1, motion inside shots below 0.2 (measured on 20 clips).
_THRESHOLD: Final = 0.22
# ... and stands out: flicker, surf or a whip pan that is unlike in every picture is no series of cuts.
_SURPRISE: Final = 3.5
_CERTAIN: Final = 0.6
_CERTAIN_SURPRISE: Final = 1.7
_MEMORY: Final = 0.9


class CutDetector:
    """Finds hard cuts one picture at a time.

    The first picture begins a shot, but is not reported as a cut: there is nothing to forget yet. The detector's whole
    memory is what `tensors` returns, so that a stream can be stopped and taken up elsewhere.
    """

    def __init__(self) -> None:
        self._grids_KYX: list[np.ndarray] = []
        self._colours_KCB: list[np.ndarray] = []
        self._usual = 0.0

    def update(self, rgb_HWC: np.ndarray) -> bool:
        """Take the next picture; True if it is the first of a new shot.

        Args:
            rgb_HWC: uint8 or uint16 in full scale; any size, also other than before (then it is a cut).
        """
        grid_YX, colours_CB = _reduce(rgb_HWC)
        if grid_YX.std() < _MIN_CONTRAST:
            return False
        if not self._grids_KYX:
            self._begin(grid_YX, colours_CB)
            return False
        if grid_YX.shape != self._grids_KYX[-1].shape:
            self._begin(grid_YX, colours_CB)
            return True
        score = min(
            _difference(grid_YX, colours_CB, *kept) for kept in zip(self._grids_KYX, self._colours_KCB, strict=True)
        )
        surprise = _CERTAIN_SURPRISE if score > _CERTAIN else _SURPRISE
        cut = score > _THRESHOLD and score > surprise * self._usual
        if cut:
            self._begin(grid_YX, colours_CB)
        else:
            self._usual = max(_MEMORY * self._usual, score)
            self._remember(grid_YX, colours_CB)
        return cut

    def tensors(self) -> dict[str, Tensor]:
        """The memory as float32 tensors: `grids` (K, Y, X), `colours` (K, 3, B), `usual` (1)."""
        if not self._grids_KYX:
            return {}
        return {
            "grids": torch.from_numpy(np.stack(self._grids_KYX)),
            "colours": torch.from_numpy(np.stack(self._colours_KCB)),
            "usual": torch.tensor([self._usual], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Take up where the detector that gave these tensors stopped; an empty dictionary is a new one."""
        detector = cls()
        if tensors:
            detector._grids_KYX = list(tensors["grids"].cpu().numpy())
            detector._colours_KCB = list(tensors["colours"].cpu().numpy())
            detector._usual = float(tensors["usual"].cpu()[0])
        return detector

    def _begin(self, grid_YX: np.ndarray, colours_CB: np.ndarray) -> None:
        self._grids_KYX, self._colours_KCB, self._usual = [grid_YX], [colours_CB], 0.0

    def _remember(self, grid_YX: np.ndarray, colours_CB: np.ndarray) -> None:
        self._grids_KYX = [*self._grids_KYX, grid_YX][-_KEPT:]
        self._colours_KCB = [*self._colours_KCB, colours_CB][-_KEPT:]


def _reduce(rgb_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The green grid (0..1, float32) and the colour histograms (each sums to 1, float32) of a picture."""
    height, width = rgb_HWC.shape[:2]
    rows, columns = min(_GRID[0], height), min(_GRID[1], width)
    tall, wide = max(1, height // (rows * _SAMPLES)), max(1, width // (columns * _SAMPLES))
    sample_HWC = rgb_HWC[tall // 2 :: tall, wide // 2 :: wide].astype(np.float32) / np.iinfo(rgb_HWC.dtype).max
    # Green alone is most of the luma, and unlike luma it burns out at one known level.
    green_HW = sample_HWC[..., 1]
    down = np.linspace(0, green_HW.shape[0], rows, endpoint=False).astype(int)
    across = np.linspace(0, green_HW.shape[1], columns, endpoint=False).astype(int)
    sums_YX = np.add.reduceat(np.add.reduceat(green_HW, down, axis=0), across, axis=1)
    counts_YX = np.outer(np.diff(np.append(down, green_HW.shape[0])), np.diff(np.append(across, green_HW.shape[1])))
    grid_YX = (sums_YX / counts_YX).astype(np.float32)
    colours_CB = np.stack([_soft_histogram(sample_HWC[..., channel]) for channel in range(3)])
    return grid_YX, colours_CB


def _soft_histogram(values: np.ndarray) -> np.ndarray:
    """Histogram in which a value counts for its two nearest bins, so that a slight drift moves little."""
    at = values.ravel() * (_BINS - 1)
    low = np.minimum(at.astype(int), _BINS - 2)
    share = at - low
    total = np.bincount(low, 1 - share, _BINS) + np.bincount(low + 1, share, _BINS)
    histogram: np.ndarray = (total / total.sum()).astype(np.float32)
    return histogram


def _difference(grid_YX: np.ndarray, colours_CB: np.ndarray, before_YX: np.ndarray, before_CB: np.ndarray) -> float:
    """0 for like pictures to 2 for unlike ones of other colours."""
    unlike = 1.0 - _likeness(grid_YX, before_YX)
    # A flash changes the colours of a like picture: they count only as far as the structure has changed too.
    weight = min(1.0, max(0.0, (unlike - _LIKE) / (_UNLIKE - _LIKE)))
    if weight == 0.0:
        return unlike / 2
    # Earth mover's distance between the cumulated histograms: how far brightness and colour moved, not only whether.
    moved = float(np.abs(np.cumsum(colours_CB - before_CB, axis=1)).mean())
    overlap = float(np.abs(colours_CB - before_CB).sum(axis=1).mean()) / 2
    return unlike / 2 + weight * max(overlap, min(1.0, 4 * moved)) / 2


def _likeness(grid_YX: np.ndarray, before_YX: np.ndarray) -> float:
    """Correlation (-1..1) under the best shift; correlation ignores brightness and contrast, hence flashes."""
    best = _correlation(grid_YX, before_YX)
    # A flash burns parts of the picture out; what is left of it still has the same structure.
    exposed_YX = (grid_YX < _BURNT) & (before_YX < _BURNT)
    share = float(exposed_YX.mean())
    if share < 1.0 and exposed_YX.sum() > _MIN_EXPOSED_CELLS:
        best = max(best, _correlation(grid_YX[exposed_YX], before_YX[exposed_YX]) * share**0.25)
    if best > 1.0 - _UNLIKE:
        return best
    rows, columns = grid_YX.shape
    for down in range(-int(rows * _MAX_SHIFT[0]), int(rows * _MAX_SHIFT[0]) + 1):
        for across in range(-int(columns * _MAX_SHIFT[1]), int(columns * _MAX_SHIFT[1]) + 1):
            here = grid_YX[max(0, down) : rows + min(0, down), max(0, across) : columns + min(0, across)]
            there = before_YX[max(0, -down) : rows + min(0, -down), max(0, -across) : columns + min(0, -across)]
            # A small overlap correlates by chance: its share of the picture scales what it proves.
            best = max(best, _correlation(here, there) * (here.size / grid_YX.size) ** 0.5)
    return best


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 1e-6 else 0.0
