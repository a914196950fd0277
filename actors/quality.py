"""The ladder of a live stream: how many denoising steps its next frame gets, from how late its last answers were.

Levels are step counts: 4, 2, 1, and 0 for a plain resize. Going down is immediate, because a late answer is worth
nothing; going up takes a calm time, which doubles whenever the level above turns out to be too much again. Knows no
clock and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

LEVELS: Final = (4, 2, 1, 0)
# A level is tried again when, by what it should cost, its answers would still come within this share of the budget.
_ROOM: Final = 0.75
_CALM_S: Final = 2.0
_LONGEST_CALM_S: Final = 60.0
# A level left within this time after it was reached was reached too early.
_TOO_EARLY_S: Final = 5.0
_FIXED_SHARE: Final = 0.3  # of a frame's latency that no smaller number of steps takes away


@dataclass(slots=True)
class QualityLadder:
    """The level of one stream.

    Args:
        budget_s: latency that the stream wants; None keeps it on its best level.
        best, least: the levels between which it moves.
    """

    budget_s: float | None
    best: int = 4
    least: int = 0
    level: int = field(init=False)
    _calm_s: float = field(init=False, default=_CALM_S)
    _since: float | None = field(init=False, default=None)
    _reached: float | None = field(init=False, default=None)  # when it went up, until that has held
    _worst_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.level = self.best

    def observe(self, latency_s: float, now: float) -> int:
        """Take the latency of an answer; return the level of the next frame.

        Args:
            latency_s: from the arrival of the frame to its answer.
            now: any clock in seconds that only goes forward.
        """
        if self.budget_s is None:
            return self.level
        if latency_s > self.budget_s:
            self._down(now)
            return self.level
        if self._reached is not None and now - self._reached >= _TOO_EARLY_S:  # it has held
            self._calm_s, self._reached = max(_CALM_S, self._calm_s / 2), None
        if self._since is None:
            self._since, self._worst_s = now, 0.0
        self._worst_s = max(self._worst_s, latency_s)
        if self.level != self.best and now - self._since >= self._calm_s:
            self._consider_up(now)
        return self.level

    def too_late(self, now: float) -> int:
        """Take notice of a frame that waited beyond its budget before anything was done; return the next level."""
        if self.budget_s is not None:
            self._down(now)
        return self.level

    def _allowed(self) -> list[int]:
        return [level for level in LEVELS if self.least <= level <= self.best]

    def _down(self, now: float) -> None:
        self._since = None
        if self._reached is not None:
            self._calm_s, self._reached = min(2 * self._calm_s, _LONGEST_CALM_S), None
        below = [level for level in self._allowed() if level < self.level]
        if below:
            self.level = below[0]

    def _consider_up(self, now: float) -> None:
        above = [level for level in self._allowed() if level > self.level][-1]
        dearer = _FIXED_SHARE + (1 - _FIXED_SHARE) * above / max(self.level, 0.5)
        assert self.budget_s is not None
        if self._worst_s * dearer <= _ROOM * self.budget_s:
            self.level = above
            self._reached = now
        self._since = None
