"""How many streams to step together: the batch of most frames a second within a latency, from what batches cost.

`BatchCurve` and what chooses by it are plain arithmetic; `LearnedBatches` keeps a curve for each kind of step from the
steps that are made anyway. Knows no engine and no streams. Only frames of equal size share a batch (see
`actors.stepper`, `actors.step_batch`), so that nothing is padded: mixed sizes cost smaller batches, and no pixel is
computed for nothing. A curve holds for one size and one number of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from actors.errors import ActorsError

# A larger batch must be better by this share of throughput: less is noise, and a small batch answers sooner.
_WORTH: Final = 0.03
# Steps of a batch size before its time counts, and how many of the last ones make it: the first ones of a size allocate
# memory and choose, record or compile their code.
_TRIALS: Final = 8
_RECENT: Final = 5
_LOOK_AGAIN: Final = 128  # choices after which one is given to the size that was measured longest ago
_KINDS: Final = 256  # clients choose the sizes of their frames


class CurveUnusable(ActorsError):
    """A curve of batch sizes and times says nothing."""


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """A batch size and what it means for the streams that wait.

    Attributes:
        batch: streams that are stepped together.
        batch_ms: time of one such step.
        frames_per_s: of all streams together.
        latest_ms: from the first step's beginning to the last stream's answer, all of them waiting.
        in_time: whether that is within the budget.
    """

    batch: int
    batch_ms: float
    frames_per_s: float
    latest_ms: float
    in_time: bool


class BatchCurve:
    """What a step costs by how many streams share it.

    Args:
        ms: milliseconds by batch size, as measured; between two sizes the time is taken to lie on a line, and beyond
            the largest nothing is known.

    Raises:
        CurveUnusable: no measurement, none of a batch of 1, or a size or time that is not positive.
    """

    def __init__(self, ms: Mapping[int, float]) -> None:
        if 1 not in ms or min(ms) < 1 or not all(0 < value < float("inf") for value in ms.values()):
            raise CurveUnusable(
                f"The curve {dict(ms)} needs a batch of 1, and sizes and milliseconds above 0.",
                code="batch-curve",
                remedy="Measure again, a batch of 1 among the others.",
            )
        self._points = sorted(ms.items())

    @property
    def largest(self) -> int:
        """The largest batch that was measured."""
        return self._points[-1][0]

    def ms(self, batch: int) -> float:
        """Return the time of a step of 1 to `largest` streams."""
        if batch == self._points[0][0]:
            return self._points[0][1]
        for (low, low_ms), (high, high_ms) in pairwise(self._points):
            if low < batch <= high:
                return low_ms + (high_ms - low_ms) * (batch - low) / (high - low)
        raise CurveUnusable(
            f"A batch of {batch} was not measured; the largest is {self.largest}.",
            code="batch-curve",
            remedy="Measure larger batches, or choose a smaller one.",
        )


def choose_batch(curve: BatchCurve, waiting: int, budget_ms: float | None = None) -> BatchChoice:
    """Return the batch of most frames a second with which all that wait are answered within the budget.

    Where none answers all in time, the one that is through soonest. Among batches that are about as good, the smallest:
    its first answers are sooner, and it needs less memory.

    Args:
        waiting: streams that have a frame, 1 or more, all of one size.
        budget_ms: the latency that they want, in general the time between two frames; None: no limit.

    Raises:
        CurveUnusable: nobody waits.
    """
    if waiting < 1:
        raise CurveUnusable(
            f"{waiting} streams wait; a batch needs one.", code="batch-empty", remedy="Choose when one waits."
        )
    choices = [_choice(curve, batch, waiting, budget_ms) for batch in range(1, min(waiting, curve.largest) + 1)]
    in_time = [choice for choice in choices if choice.in_time]
    if not in_time:
        soonest = min(choice.latest_ms for choice in choices)
        return next(choice for choice in choices if choice.latest_ms <= soonest * (1 + _WORTH))
    most = max(choice.frames_per_s for choice in in_time)
    return next(choice for choice in in_time if choice.frames_per_s >= most * (1 - _WORTH))


def most_streams(curve: BatchCurve, fps: float) -> BatchChoice | None:
    """Return the choice for as many streams of this frame rate as are answered before their next frames come.

    It is what a replica can carry, and its `batch` what `largest_batch` should be; None where not even one stream is.
    """
    interval_ms = 1000 / fps
    found, waiting = None, 1
    while (choice := choose_batch(curve, waiting, interval_ms)).in_time:
        found, waiting = choice, waiting + 1
    return found


def _choice(curve: BatchCurve, batch: int, waiting: int, budget_ms: float | None) -> BatchChoice:
    whole, rest = divmod(waiting, batch)
    ms = curve.ms(batch)
    latest_ms = whole * ms + (curve.ms(rest) if rest else 0.0)
    return BatchChoice(batch, ms, 1000 * waiting / latest_ms, latest_ms, budget_ms is None or latest_ms <= budget_ms)


@dataclass(slots=True)
class _Measured:
    recent_ms: tuple[float, ...] = ()
    count: int = 0
    at_choice: int = 0

    @property
    def is_known(self) -> bool:
        return self.count >= _TRIALS


@dataclass(slots=True)
class _Kind:
    sizes: dict[int, _Measured] = field(default_factory=dict)
    choices: int = 0


class LearnedBatches:
    """Chooses batches by what batches have cost, and finds that out on the way: nothing is run for a measurement alone.

    While a size is unknown it is tried whenever so many wait: all that wait at once first, then the powers of two
    below. Afterwards the curve decides, and now and then the size that was measured longest ago gets one step, because
    what shares the device changes.

    A choice may be made in another thread than the one that notes: what is kept is replaced, not changed.

    Args:
        largest: no batch is larger; may be lowered later, when memory runs out.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._kinds: dict[Hashable, _Kind] = {}

    def note(self, kind: Hashable, batch: int, ms: float) -> None:
        """Take in what a step of `batch` streams cost.

        Args:
            kind: what else its time depends on, such as the size of its frames.
        """
        known = self._kind(kind)
        before = known.sizes.get(batch, _Measured())
        recent = (*before.recent_ms, ms)[-_RECENT:]
        known.sizes[batch] = _Measured(recent, before.count + 1, known.choices)

    def choose(self, kind: Hashable, waiting: int, budget_ms: float | None = None) -> int:
        """Return how many of the `waiting` streams (1 or more) to step together now.

        Args:
            budget_ms: within which all of them want their answers; None: no limit.
        """
        at_once = min(waiting, self.largest)
        if at_once <= 1:
            return 1
        known = self._kind(kind)
        known.choices += 1
        tried = sorted({at_once, *(2**n for n in range(at_once.bit_length()))}, reverse=True)
        for size in tried:
            if not known.sizes.get(size, _Measured()).is_known:
                return size
        if known.choices % _LOOK_AGAIN == 0:
            return min(tried, key=lambda size: known.sizes[size].at_choice)
        return choose_batch(self._curve(known), waiting, budget_ms).batch

    def curve(self, kind: Hashable) -> BatchCurve | None:
        """Return what is known of steps of this kind; None if that does not reach for a choice."""
        known = self._kinds.get(kind)
        return None if known is None or not known.sizes.get(1, _Measured()).is_known else self._curve(known)

    def _curve(self, known: _Kind) -> BatchCurve:
        sizes = dict(known.sizes)
        return BatchCurve(
            {
                size: statistics.median(one.recent_ms)
                for size, one in sizes.items()
                if one.is_known and size <= self.largest
            }
        )

    def _kind(self, kind: Hashable) -> _Kind:
        if kind not in self._kinds:
            if len(self._kinds) >= _KINDS:
                self._kinds.pop(next(iter(self._kinds)), None)
            self._kinds[kind] = _Kind()
        return self._kinds[kind]
