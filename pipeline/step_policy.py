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
from typing import TYPE_CHECKING, Final, Self

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
        settle: frames in a row that must have shown nothing new, and were restored, before one is held: after a start
            or a movement a picture gets better for some frames, because each knows the one before.
        longest_hold: frames that are held in a row at most.
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
        """The same policy that holds no frame."""
        return self.model_copy(update={"static_levels": None})


@dataclass(frozen=True, slots=True)
class Choice:
    """What a frame gets.

    Attributes:
        level: denoising steps; 0: the previous output again.
        memory: what `StreamState.policy` becomes when the frame was answered so, and no sooner.
        peak_levels: largest difference of a block from the last restored frame; None where there is none.
        new_share: share of blocks that are new after the motion of the whole picture.
    """

    level: int
    memory: dict[str, Tensor]
    peak_levels: float | None = None
    new_share: float = 1.0


def choose(policy: StepPolicy, rgb_HWC: NDArray[np.integer], state: StreamState) -> Choice:
    """Return what the next frame of a stream gets; the state is left as it is.

    Args:
        rgb_HWC: uint8, or uint16 at full scale.
        state: before the frame, and after the reset if it begins a scene.
    """
    import torch  # here alone: who only plans needs no torch

    cells_yx = _cells(rgb_HWC)
    remembered = state.policy.get("reference")
    reference_yx = None if remembered is None else remembered.numpy()
    since_full, held, still = (int(count) for count in state.policy.get("counts", (0, 0, 0)))

    def memory(since_full: int, held: int, still: int) -> dict[str, Tensor]:
        reference = torch.from_numpy(cells_yx) if held == 0 or remembered is None else remembered
        return {"reference": reference, "counts": torch.tensor([since_full, held, still], dtype=torch.int64)}

    full = policy.levels[0]
    if state.is_first or reference_yx is None or reference_yx.shape != cells_yx.shape:
        return Choice(full, memory(0, 0, 0))
    peak, median = _peak_and_median(cells_yx, reference_yx)
    is_still = False
    if policy.static_levels is not None:
        is_still = peak <= policy.static_levels + min(policy.noise_gain * median, policy.static_levels)
        if is_still and still >= policy.settle and held < policy.longest_hold:
            return Choice(0, memory(since_full + 1, held + 1, still), peak, 0.0)
    share = _new_share(cells_yx, reference_yx, policy.busy_levels)
    limits = zip(policy.levels, policy.shares, strict=False)
    level = next((level for level, limit in limits if share > limit), policy.levels[-1])
    if since_full + 1 >= policy.full_every:
        level = full
    still = min(still + 1, policy.settle) if is_still else 0
    return Choice(level, memory(0 if level == full else since_full + 1, 0, still), peak, share)


def _cells(rgb_HWC: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the luma (y,x) of cells, in 256ths of an 8-bit level; odd sides repeat their last pixel."""
    wide = np.uint32 if rgb_HWC.dtype == np.uint16 else np.uint16  # 255 times all weights fits in 16 bits
    red, green, blue = (rgb_HWC[..., channel].astype(wide) for channel in range(3))
    luma_HW = red * wide(_WEIGHTS[0]) + green * wide(_WEIGHTS[1]) + blue * wide(_WEIGHTS[2])
    if wide is np.uint32:
        luma_HW >>= np.uint32(8)
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


def _peak_and_median(cells_yx: NDArray[np.int32], reference_yx: NDArray[np.int32]) -> tuple[float, float]:
    """Return the largest difference of a block and the median one, in 8-bit levels."""
    sums = np.sort(_blocks(cells_yx, reference_yx), axis=None)
    scale = _BLOCK * _BLOCK * _LEVEL
    return int(sums[-1]) / scale, int(sums[len(sums) // 2]) / scale


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
