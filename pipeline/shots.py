"""A causal cut detector: says of each picture, from it and those before it, whether a new shot begins with it.

- A picture is reduced to a small grid of its green channel and three colour histograms; nothing else of it is kept.
- It is compared with the last few pictures, not only the last one, so that a short flash between like pictures is no
  cut. Where the whole looks unlike, its parts are looked for: what a pan or zoom has moved, what something in front
  covers, what a flash lights unevenly is still there in parts, at another place or in another light.
- Pictures without structure (black, white, burnt out by a flash) neither start a shot nor are compared with: after
  them the next real picture decides.
- It is plain arithmetic on whole numbers, so that no order of summation matters: the same pictures give the same cuts
  on every machine.

Dissolves and fades are not detected: the picture changes little from frame to frame, and the stream's state follows.
Shape legend: H height, W width, C = 3, Y and X rows and columns of the grid, K pictures kept, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_GRID: Final = (36, 64)
_BINS: Final = 16
_KEPT: Final = 5
# Samples per grid cell and side: enough to average noise, few enough that the size of the picture does not matter.
_SAMPLES: Final = 4
# Full scale of the grid. Sums over it stay below 2**53, where floats are whole numbers.
_WHITE: Final = 65535
# Contrast of the grid below which a picture has no structure to compare.
_MIN_CONTRAST: Final = 0.012 * _WHITE
# Cells as bright as this are burnt out; a picture with this share of them is one of a flash, unless more follow.
_BURNT: Final = 0.95 * _WHITE
_BURNT_SHARE: Final = 0.8
_MOST_BURNT: Final = 3
_MIN_EXPOSED_CELLS: Final = 128
# One minus the correlation: below the first number pictures are alike, from the second unlike.
_LIKE: Final = 0.15
_UNLIKE: Final = 0.5
# Parts are compared by their detail: the grid less its mean over so many cells to each side, in so many steps.
_DETAIL_REACH: Final = 2
_DETAIL_STEPS: Final = 32
_MIN_DETAIL: Final = 80.0  # variance of a part in steps below which it has none
# Parts are looked for near where they were; from this correlation on one is found.
_PART: Final = (6, 8)
_PART_REACH: Final = 2
_PART_FOUND: Final = 0.75
_MIN_PARTS: Final = 4
# A picture that was moved as a whole, by shares of its sides: a whip pan moves about a third between two pictures. It
# is looked for on a grid of merged cells. Other scenes reach a correlation of 0.8, moved ones 0.95 (see benchmarks).
_MERGED: Final = (2, 2)
_MAX_SHIFT: Final = (0.25, 0.4)
# Other scenes have other colours, too: where the colours stay, less likeness is enough (fine grass, whipped past).
_RECOLOURED: Final = (0.0, 0.2)
_MOVED: Final = (0.75, 0.9)
# Cells that change by less than this share of the contrast have stayed; so many of them are a scene with a title on it.
_STAYED: Final = 0.12
_MIN_CONTRAST_STAYED: Final = 0.005 * _WHITE
_STAYED_WEIGHT: Final = 0.6
# With this share of its parts found again, a picture belongs to the scene.
_SAME: Final = 0.25
# A cut scores above the first number ...
_THRESHOLD: Final = 0.1
# ... and stands out: flicker or surf that is unlike in every picture is no series of cuts.
_SURPRISE: Final = 2.5
_CERTAIN: Final = 0.6
_CERTAIN_SURPRISE: Final = 1.5
_MEMORY: Final = 0.9
# Right after a cut, and at the start, another one must stand out from what would else be the usual: so static is no
# series of cuts, but shots of four pictures are found.
_SHOCK: Final = 0.5
_SHOCK_AT_FIRST: Final = 0.2
_SHOCK_MEMORY: Final = 0.6


class CutDetector:
    """Finds hard cuts one picture at a time.

    The first picture begins a shot, but is not reported as a cut: there is nothing to forget yet. The detector's whole
    memory is what `tensors` returns, so that a stream can be stopped and taken up elsewhere.
    """

    def __init__(self) -> None:
        self._grids_KYX: list[np.ndarray] = []
        self._colours_KCB: list[np.ndarray] = []
        self._usual = self._shock = 0.0
        self._burnt = 0

    def update(self, rgb_HWC: np.ndarray) -> bool:
        """Take the next picture; True if it is the first of a new shot.

        Args:
            rgb_HWC: uint8 or uint16 in full scale; any size, also other than before (then it is a cut).
        """
        grid_YX, colours_CB = _reduce(rgb_HWC)
        if _deviation(grid_YX) < _MIN_CONTRAST:
            return False
        self._burnt = self._burnt + 1 if float((grid_YX > _BURNT).mean()) > _BURNT_SHARE else 0
        if 0 < self._burnt <= _MOST_BURNT:
            return False
        if not self._grids_KYX:
            self._begin(grid_YX, colours_CB, _SHOCK_AT_FIRST)
            return False
        if grid_YX.shape != self._grids_KYX[-1].shape:
            self._begin(grid_YX, colours_CB, _SHOCK_AT_FIRST)
            return True
        score = self._score(grid_YX, colours_CB)
        surprise = _CERTAIN_SURPRISE if score > _CERTAIN else _SURPRISE
        cut = score > max(_THRESHOLD, surprise * self._usual, _SURPRISE * self._shock)
        self._shock *= _SHOCK_MEMORY
        if cut:
            self._begin(grid_YX, colours_CB, _SHOCK * score)
        else:
            self._usual = max(_MEMORY * self._usual, score)
            self._remember(grid_YX, colours_CB)
        return cut

    def tensors(self) -> dict[str, Tensor]:
        """The memory: `grids` (K, Y, X) int32, `colours` (K, 3, B) float32, `usual`, `shock`, `burnt` (1) float64."""
        import torch  # here alone: who only plans needs no torch

        if not self._grids_KYX:
            return {}
        return {
            "grids": torch.from_numpy(np.stack(self._grids_KYX).astype(np.int32)),
            "colours": torch.from_numpy(np.stack(self._colours_KCB)),
            "usual": torch.tensor([self._usual], dtype=torch.float64),
            "shock": torch.tensor([self._shock], dtype=torch.float64),
            "burnt": torch.tensor([self._burnt], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Take up where the detector that gave these tensors stopped; an empty dictionary is a new one.

        The tensors of the detector before this one had a coarser grid, no `shock` and no `burnt`: their grids are
        refined by repetition, which is enough to tell the next scene from the one before.
        """
        detector = cls()
        if not tensors:
            return detector
        grids_KYX = tensors["grids"].cpu().numpy()
        if "burnt" in tensors:
            detector._burnt = int(tensors["burnt"].cpu()[0])
            detector._shock = float(tensors["shock"].cpu()[0])
        else:
            grids_KYX = np.rint(grids_KYX.astype(np.float64) * _WHITE).repeat(2, axis=1).repeat(2, axis=2)
        detector._grids_KYX = list(grids_KYX.astype(np.int64))
        detector._colours_KCB = list(tensors["colours"].cpu().numpy())
        detector._usual = float(tensors["usual"].cpu()[0])
        return detector

    def _begin(self, grid_YX: np.ndarray, colours_CB: np.ndarray, shock: float) -> None:
        self._grids_KYX, self._colours_KCB, self._usual, self._shock = [grid_YX], [colours_CB], 0.0, shock

    def _remember(self, grid_YX: np.ndarray, colours_CB: np.ndarray) -> None:
        self._grids_KYX = [*self._grids_KYX, grid_YX][-_KEPT:]
        self._colours_KCB = [*self._colours_KCB, colours_CB][-_KEPT:]

    def _score(self, grid_YX: np.ndarray, colours_CB: np.ndarray) -> float:
        """How unlike the picture is to the one of the kept pictures that it is most like, 0 to 2."""
        score, detail_YX = 2.0, None
        for before_YX, before_CB in zip(reversed(self._grids_KYX), reversed(self._colours_KCB), strict=True):
            whole = _difference(grid_YX, colours_CB, before_YX, before_CB)
            if whole > _THRESHOLD:
                detail_YX = _detail(grid_YX) if detail_YX is None else detail_YX
                needed = np.interp(_recoloured(colours_CB, before_CB), _RECOLOURED, _MOVED)
                whole *= 1.0 - min(1.0, _found_again(grid_YX, detail_YX, before_YX, float(needed)) / _SAME)
            score = min(score, whole)
            if score <= _THRESHOLD:
                break
        return score


def _reduce(rgb_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The green grid (whole numbers, 0 to 65535) and the colour histograms (each sums to 1, float32) of a picture."""
    height, width = rgb_HWC.shape[:2]
    rows, columns = min(_GRID[0], height), min(_GRID[1], width)
    tall, wide = max(1, height // (rows * _SAMPLES)), max(1, width // (columns * _SAMPLES))
    sample_HWC = rgb_HWC[tall // 2 :: tall, wide // 2 :: wide]
    # Green alone is most of the luma, and unlike luma it burns out at one known level.
    green_HW = sample_HWC[..., 1].astype(np.int64) * (_WHITE // int(np.iinfo(rgb_HWC.dtype).max))
    down = np.linspace(0, green_HW.shape[0], rows, endpoint=False).astype(int)
    across = np.linspace(0, green_HW.shape[1], columns, endpoint=False).astype(int)
    sums_YX = np.add.reduceat(np.add.reduceat(green_HW, down, axis=0), across, axis=1)
    counts_YX = np.outer(np.diff(np.append(down, green_HW.shape[0])), np.diff(np.append(across, green_HW.shape[1])))
    few_HWC = sample_HWC[::2, ::2].astype(np.float32) / np.iinfo(rgb_HWC.dtype).max
    colours_CB = np.stack([_soft_histogram(few_HWC[..., channel]) for channel in range(3)])
    return sums_YX // counts_YX, colours_CB


def _soft_histogram(values: np.ndarray) -> np.ndarray:
    """Histogram in which a value counts for its two nearest bins, so that a slight drift moves little."""
    at = values.ravel() * (_BINS - 1)
    low = np.minimum(at.astype(int), _BINS - 2)
    share = at - low
    total = np.bincount(low, 1 - share, _BINS) + np.bincount(low + 1, share, _BINS)
    histogram: np.ndarray = (total / total.sum()).astype(np.float32)
    return histogram


def _difference(grid_YX: np.ndarray, colours_CB: np.ndarray, before_YX: np.ndarray, before_CB: np.ndarray) -> float:
    """0 for like pictures to 2 for unlike ones of other colours, nothing being moved."""
    likeness = _correlation(grid_YX, before_YX)
    # A flash burns parts of the picture out; what is left of it still has the same structure.
    exposed_YX = (grid_YX < _BURNT) & (before_YX < _BURNT)
    share = float(exposed_YX.mean())
    if share < 1.0 and exposed_YX.sum() > _MIN_EXPOSED_CELLS:
        likeness = max(likeness, _correlation(grid_YX[exposed_YX], before_YX[exposed_YX]) * share**0.25)
    unlike = 1.0 - likeness
    # A flash changes the colours of a like picture: they count only as far as the structure has changed too.
    weight = min(1.0, max(0.0, (unlike - _LIKE) / (_UNLIKE - _LIKE)))
    if weight == 0.0:
        return unlike / 2
    # Earth mover's distance between the cumulated histograms: how far brightness and colour moved, not only whether.
    moved = float(np.abs(np.cumsum(colours_CB - before_CB, axis=1)).mean())
    return unlike / 2 + weight * max(_recoloured(colours_CB, before_CB), min(1.0, 4 * moved)) / 2


def _recoloured(colours_CB: np.ndarray, before_CB: np.ndarray) -> float:
    """Share (0..1) of the picture that has other colours than before."""
    return float(np.abs(colours_CB - before_CB).sum(axis=1).mean()) / 2


def _found_again(grid_YX: np.ndarray, detail_YX: np.ndarray, before_YX: np.ndarray, moved_likeness: float) -> float:
    """Share (0..1) of the picture that is found again in an earlier one; `moved_likeness`: see `_moved`."""
    before_detail_YX = _detail(before_YX)
    changed_YX = np.abs(grid_YX - before_YX)
    stayed = float((changed_YX < _STAYED * max(_deviation(grid_YX), _MIN_CONTRAST_STAYED)).mean())
    found = max(_parts_found_near(detail_YX, before_detail_YX), stayed * _STAYED_WEIGHT)
    return 1.0 if found < _SAME and _moved(grid_YX, before_YX, moved_likeness) else found


def _detail(grid_YX: np.ndarray) -> np.ndarray:
    """The grid less its local mean, in units of its own deviation: independent of even light and of contrast."""
    side = 2 * _DETAIL_REACH + 1
    sums_YX = np.pad(np.pad(grid_YX, _DETAIL_REACH, mode="edge").cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    around_YX = sums_YX[side:, side:] - sums_YX[:-side, side:] - sums_YX[side:, :-side] + sums_YX[:-side, :-side]
    detail_YX = grid_YX * side * side - around_YX
    deviation = max(1.0, float((detail_YX * detail_YX).sum() / detail_YX.size) ** 0.5)
    steps_YX: np.ndarray = np.clip(np.rint(detail_YX * (_DETAIL_STEPS / deviation)), -127, 127).astype(np.int64)
    return steps_YX


def _moved(grid_YX: np.ndarray, before_YX: np.ndarray, likeness: float) -> bool:
    """Whether the picture is the earlier one, moved as a whole: under some shift their correlation is `likeness`."""
    here_YX, there_YX = (_tiles(grid, *_MERGED).sum((2, 3)) for grid in (grid_YX, before_YX))
    rows, columns = here_YX.shape
    most_down, most_across = int(rows * _MAX_SHIFT[0]), int(columns * _MAX_SHIFT[1])
    for down in range(-most_down, most_down + 1):
        for across in range(-most_across, most_across + 1):
            here = here_YX[max(0, down) : rows + min(0, down), max(0, across) : columns + min(0, across)]
            there = there_YX[max(0, -down) : rows + min(0, -down), max(0, -across) : columns + min(0, -across)]
            if _correlation(here, there) > likeness:
                return True
    return False


def _parts_found_near(detail_YX: np.ndarray, other_YX: np.ndarray) -> float:
    """Share of the small parts with detail in both pictures that are nearly where they were."""
    (rows, columns), reach = detail_YX.shape, _PART_REACH
    tall, wide = (min(part, cells) for part, cells in zip(_PART, detail_YX.shape, strict=True))
    cells = tall * wide

    def sums(values_YX: np.ndarray) -> np.ndarray:
        return _tiles(values_YX, tall, wide).sum((2, 3))

    sum_here, least = sums(detail_YX), _MIN_DETAIL * cells * cells
    spread_here = cells * sums(detail_YX * detail_YX) - sum_here**2
    padded_YX = np.pad(other_YX, reach, mode="edge")
    found, votes = np.zeros(sum_here.shape, bool), spread_here > least
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            there_YX = padded_YX[down : down + rows, across : across + columns]
            sum_there = sums(there_YX)
            spread_there = cells * sums(there_YX * there_YX) - sum_there**2
            together = cells * sums(detail_YX * there_YX) - sum_here * sum_there
            both = np.sqrt(np.maximum(spread_here, 1).astype(np.float64) * np.maximum(spread_there, 1))
            found |= (spread_there > least) & (together > _PART_FOUND * both)
            if down == across == reach:
                votes &= spread_there > least
    return float(found[votes].mean()) if votes.sum() >= _MIN_PARTS else 0.0


def _tiles(values_YX: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """(rows of tiles, columns of tiles, tall, wide); cells left over at the right and bottom are dropped."""
    rows, columns = values_YX.shape[0] // tall, values_YX.shape[1] // wide
    return values_YX[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide).swapaxes(1, 2)


def _deviation(grid_YX: np.ndarray) -> float:
    return max(0.0, _spread(grid_YX, grid_YX)) ** 0.5 / grid_YX.size


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """-1 to 1; it ignores brightness and contrast, hence even flashes."""
    norm = (_spread(a, a) * _spread(b, b)) ** 0.5
    return _spread(a, b) / norm if norm > 0 else 0.0


def _spread(a: np.ndarray, b: np.ndarray) -> float:
    """The number of cells squared times the covariance, from exact sums of whole numbers."""
    return float(a.size * int((a * b).sum()) - int(a.sum()) * int(b.sum()))
