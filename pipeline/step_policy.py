"""How many denoising steps the next frame gets, from what it shows: few where little is new, none where nothing moved.

Looks at the frame, at the last *restored* frame of the stream, and at how long ago things happened; never ahead. All
arithmetic on pictures is in whole numbers, so that a decision is the same on every machine. Knows no models, no flow.

A frame with level 0 is held: the stream's previous output is its output, and `StreamState.hold` counts it. What the
next frames are compared with stays the frame that was restored, so that slow change adds up and is seen; and after
`longest_hold` frames one is restored whatever it shows.

Shapes: H W the input frame, y x cells of 2 by 2 pixels, Y X blocks of 4 by 4 cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.state import StreamState

_CELL: Final = 2  # pixels; the mean of a cell has half the noise of a pixel
_BLOCK: Final = 4  # cells
_LEVEL: Final = 256  # of the whole-number luma: one 8-bit level
_WEIGHTS: Final = (77, 150, 29)  # BT.601 in 256ths
_REACH: Final = 12  # cells that the picture may have moved as a whole


class StepPolicy(BaseModel):
    """When a frame gets how many steps. Differences are means over 8 by 8 pixels of input luma, in 8-bit levels.

    Attributes:
        levels: step counts, most first. The first frame of a stream or scene, and every `full_every`-th, gets the most.
        shares: for each of them but the last, the share of the picture (0 to 1) that must be new.
        busy_levels: a block is new that differs by more than this from the last restored frame after the motion of the
            whole picture is taken out, beyond what a pixel of motion of its own could explain.
        static_levels: a frame is held if no block differs by more than this from the last restored one; None: never.
        noise_gain: so many times the median difference of the blocks is granted beside it, for noise that is
            everywhere, up to `static_levels` again.
        settle: restored frames in a row in which a block must have shown nothing new before it is held: after a start
            or a movement a picture gets better for some frames, because each knows the one before.
        longest_hold: frames in a row at most that are held, or restored in a window alone.
        window_share: where all that is not settled lies in a rectangle of at most this share of the picture, it alone
            is restored, and the rest is held; None: always the whole picture.
        full_every: frames after which one that is restored gets the most steps.
        version: of the rules. Other rules get another one: it is part of a run's identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: tuple[int, ...] = Field(default=(4, 2, 1), min_length=1, max_length=8)
    shares: tuple[float, ...] = (0.15, 0.03)
    busy_levels: float = Field(default=6.0, gt=0, le=255)
    static_levels: float | None = Field(default=1.5, gt=0, le=255)
    noise_gain: float = Field(default=1.0, ge=0, le=10)
    settle: int = Field(default=8, ge=0, le=1000)
    longest_hold: int = Field(default=12, ge=1, le=1000)
    window_share: float | None = Field(default=None, gt=0, le=1)
    full_every: int = Field(default=48, ge=1, le=100_000)
    version: int = Field(default=1, ge=1, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.levels) != sorted(set(self.levels), reverse=True) or self.levels[-1] < 1 or self.levels[0] > 50:
            raise ValueError("levels are step counts from 50 to 1, most first, each once")
        if len(self.shares) != len(self.levels) - 1 or list(self.shares) != sorted(self.shares, reverse=True):
            raise ValueError("shares have one entry fewer than levels, largest first")
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ValueError("shares lie between 0 and 1")
        return self

    @classmethod
    def of(cls, values: dict[str, object]) -> StepPolicy:
        """Return the policy with these values instead of its defaults.

        Raises:
            InputError: a name that it does not have, or a value that is not possible.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the policy"
            raise InputError(
                f"The step policy is not possible at {place}: {first['msg']} (given: {first['input']!r}).",
                code="step-policy",
                remedy=f"Its names are {', '.join(cls.model_fields)}; see docs/concepts.md.",
            ) from error

    @property
    def without_hold(self) -> StepPolicy:
        """The same policy that holds nothing: neither frames nor what is outside of a window."""
        return self.model_copy(update={"static_levels": None})


class Bounds(NamedTuple):
    """Input pixels, ends excluded; in the order of `pipeline.tiling.Window`, which brings torch."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What a frame gets.

    Attributes:
        level: denoising steps; 0: the previous output again.
        memory: what `StreamState.policy` becomes when the frame was answered so, and no sooner.
        peak_levels: largest difference of a block from the last restored frame; None where there is none.
        new_share: share of blocks that are new after the motion of the whole picture.
        window: what alone is to be restored; None: the whole frame, or with level 0 nothing.
    """

    level: int
    memory: dict[str, Tensor]
    peak_levels: float | None = None
    new_share: float = 1.0
    window: Bounds | None = None


def choose(policy: StepPolicy, rgb_HWC: NDArray[np.integer], state: StreamState) -> Choice:
    """Return what the next frame of a stream gets; the state is left as it is.

    Args:
        rgb_HWC: uint8, or uint16 at full scale.
        state: before the frame, and after the reset if it begins a scene.
    """
    cells_yx = _cells(rgb_HWC)
    before = _Memory.of(state)
    full = policy.levels[0]
    if state.is_first or before is None or before.reference_yx.shape != cells_yx.shape:
        sums_YX = np.zeros_like(_blocks(cells_yx, cells_yx))
        return Choice(full, _Memory(cells_yx, sums_YX.astype(np.int32), 0, 0).tensors())
    sums_YX = _blocks(cells_yx, before.reference_yx)
    scale = _BLOCK * _BLOCK * _LEVEL
    peak, median = int(sums_YX.max()) / scale, int(np.sort(sums_YX, axis=None)[sums_YX.size // 2]) / scale
    share = _new_share(cells_yx, before.reference_yx, policy.busy_levels)
    limits = zip(policy.levels, policy.shares, strict=False)
    level = next((level for level, limit in limits if share > limit), policy.levels[-1])
    since_full = before.since_full + 1
    if policy.static_levels is None:
        still_YX = np.zeros(sums_YX.shape, bool)
    else:
        still_YX = sums_YX <= (policy.static_levels + min(policy.noise_gain * median, policy.static_levels)) * scale
    ages_YX = np.where(still_YX, np.minimum(before.ages_YX + 1, policy.settle), 0).astype(np.int32)
    if policy.static_levels is not None and before.held < policy.longest_hold:
        restless_YX = ~still_YX | (before.ages_YX < policy.settle)
        if not restless_YX.any():
            held = _Memory(before.reference_yx, before.ages_YX, since_full, before.held + 1)
            return Choice(0, held.tensors(), peak, 0.0)
        rows, columns = _around(np.logical_or.reduce(restless_YX, axis=1)), _around(np.logical_or.reduce(restless_YX))
        area = (rows.stop - rows.start) * (columns.stop - columns.start) / restless_YX.size
        if policy.window_share is not None and area <= policy.window_share and since_full < policy.full_every:
            inside = (_of_cells(rows, cells_yx.shape[0]), _of_cells(columns, cells_yx.shape[1]))
            reference_yx, settled_YX = before.reference_yx.copy(), before.ages_YX.copy()
            reference_yx[inside] = cells_yx[inside]
            settled_YX[rows, columns] = ages_YX[rows, columns]
            bounds = Bounds(*_pixels(inside[0], rgb_HWC.shape[0]), *_pixels(inside[1], rgb_HWC.shape[1]))
            part = _Memory(reference_yx, settled_YX, since_full, before.held + 1)
            return Choice(level, part.tensors(), peak, share, bounds)
    if since_full >= policy.full_every:
        level = full
    whole = _Memory(cells_yx, ages_YX, 0 if level == full else since_full, 0)
    return Choice(level, whole.tensors(), peak, share)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What is remembered of a stream.

    Attributes:
        reference_yx: the input that the previous output belongs to.
        ages_YX: restored frames since a block last showed something new, up to `settle`.
        since_full: frames since the last one with the most steps. held: frames since the last whole one.
    """

    reference_yx: NDArray[np.int32]
    ages_YX: NDArray[np.int32]
    since_full: int
    held: int

    @classmethod
    def of(cls, state: StreamState) -> _Memory | None:
        if not state.policy:
            return None
        since_full, held = (int(count) for count in state.policy["counts"])
        return cls(state.policy["reference"].numpy(), state.policy["ages"].numpy(), since_full, held)

    def tensors(self) -> dict[str, Tensor]:
        import torch  # here alone: who only plans needs no torch

        return {
            "reference": torch.from_numpy(self.reference_yx),
            "ages": torch.from_numpy(self.ages_YX),
            "counts": torch.tensor([self.since_full, self.held], dtype=torch.int64),
        }


def _around(restless: NDArray[np.bool_]) -> slice:
    """Return the shortest range with all that is true."""
    found = np.flatnonzero(restless)
    return slice(int(found[0]), int(found[-1]) + 1)


def _of_cells(blocks: slice, length: int) -> slice:
    """Return the cells of a range of blocks along a side of so many cells."""
    starts = _starts(length)
    return slice(int(starts[blocks.start]), int(starts[blocks.stop - 1]) + _BLOCK)


def _pixels(cells: slice, length: int) -> tuple[int, int]:
    return cells.start * _CELL, min(cells.stop * _CELL, length)


def _cells(rgb_HWC: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the luma (y,x) of cells, in 256ths of an 8-bit level; odd sides repeat their last pixel."""
    deep = rgb_HWC.dtype == np.uint16
    weights = np.array(_WEIGHTS, np.uint32 if deep else np.uint16)  # 255 times all of them fits in 16 bits
    red, green, blue = (rgb_HWC[..., channel].astype(weights.dtype) for channel in range(3))
    luma_HW = red * weights[0] + green * weights[1] + blue * weights[2]
    if deep:
        luma_HW = luma_HW >> np.uint32(8)
    luma_HW = np.pad(luma_HW, [(0, length % _CELL) for length in luma_HW.shape], mode="edge")
    rows_yW = luma_HW[::2].astype(np.int32) + luma_HW[1::2]
    cells_yx: NDArray[np.int32] = (rows_yW[:, ::2] + rows_yW[:, 1::2]) >> 2
    return cells_yx


def _blocks(cells_yx: NDArray[np.int32], reference_yx: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the sums (Y,X) of absolute differences over blocks; the last ones overlap where sides do not divide."""
    difference_yx = np.abs(cells_yx - reference_yx)
    rows, columns = (_starts(length)[:, None] + np.arange(_BLOCK) for length in difference_yx.shape)
    return difference_yx[rows][:, :, columns].sum((1, 3), dtype=np.int64)


def _starts(length: int) -> NDArray[np.int64]:
    starts = np.arange(0, length - _BLOCK + 1, _BLOCK)
    return starts if length % _BLOCK == 0 else np.append(starts, length - _BLOCK)


def _new_share(cells_yx: NDArray[np.int32], reference_yx: NDArray[np.int32], busy_levels: float) -> float:
    """Return the share of blocks that the reference does not have, moved as a whole as fits best."""
    down, across = _shift(cells_yx, reference_yx, 0), _shift(cells_yx, reference_yx, 1)
    (top, bottom), (left, right) = _overlap(down, cells_yx.shape[0]), _overlap(across, cells_yx.shape[1])
    here_yx = cells_yx[top:bottom, left:right]
    sums_YX = _blocks(here_yx, reference_yx[top - down : bottom - down, left - across : right - across])
    # What half a cell of motion each way could explain is not new: the shift knows whole cells only.
    steep_yx = np.zeros_like(here_yx)
    steep_yx[1:] += np.abs(np.diff(here_yx, axis=0))
    steep_yx[:, 1:] += np.abs(np.diff(here_yx, axis=1))
    explained_YX = _blocks(steep_yx, np.zeros_like(steep_yx)) // 2
    new = int((sums_YX - explained_YX > busy_levels * _BLOCK * _BLOCK * _LEVEL).sum())
    total = len(_starts(cells_yx.shape[0])) * len(_starts(cells_yx.shape[1]))
    return (new + total - sums_YX.size) / total  # what came in at the border is new as well


def _shift(cells_yx: NDArray[np.int32], reference_yx: NDArray[np.int32], axis: int) -> int:
    """Return by how many cells along an axis the reference has to be moved to look like the picture."""
    here, there = (np.diff(grid.sum(1 - axis, dtype=np.int64)) for grid in (cells_yx, reference_yx))
    reach = min(_REACH, len(here) // 4)

    def unlike(shift: int) -> float:
        start, stop = _overlap(shift, len(here))
        return int(np.abs(here[start:stop] - there[start - shift : stop - shift]).sum()) / (stop - start)

    return min(range(-reach, reach + 1), key=lambda shift: (unlike(shift), abs(shift)))


def _overlap(shift: int, length: int) -> tuple[int, int]:
    return max(0, shift), length + min(0, shift)
