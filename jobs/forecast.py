"""How fast a job is and when it will be done, with an honest range: frames over time are all that is looked at."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_WINDOWS = 8
_LEAST_WINDOWS, _LEAST_SPAN_S = 3, 15.0
_ERRORS = 2.5  # either way, for a rate from a handful of stretches
_LEAST_ERROR = 0.03  # nobody knows the future better than this


@dataclass(frozen=True, slots=True)
class Forecast:
    """`fps` is the rate of late. The seconds left are None where it is too early to say; low <= left <= high."""

    fps: float | None
    left_s: float | None
    low_s: float | None
    high_s: float | None


def forecast(history: Sequence[tuple[float, int]], frames_left: int) -> Forecast:
    """Predict from the frames done at points in time, (seconds since the start, frames), when the rest will be.

    The time before the first frame does not count: workers start and load the model then. The history is cut into
    equal stretches of time. The rate of late is that of the last half of them; how much the stretches differ tells how
    far it can be trusted: two and a half standard errors either way, which held nine times in ten
    on rates that vary at random. It is too early while there are less than three stretches,
    less than 15 seconds, or while the standard error is above a third.
    """
    points = [(float(at), float(frames)) for at, frames in history]
    idle = [number for number, (_, frames) in enumerate(points) if frames <= points[0][1]] if points else []
    points = points[idle[-1] :] if idle else points
    if len(points) < 2 or points[-1][1] <= points[0][1] or points[-1][0] <= points[0][0]:
        return Forecast(None, 0.0 if frames_left == 0 else None, None, None)
    start, end = points[0][0], points[-1][0]
    windows = min(_WINDOWS, len(points) - 1)
    edges = [start + (end - start) * k / windows for k in range(windows + 1)]
    at_edges = [frames_at(points, edge) for edge in edges]
    rates = [(b - a) * windows / (end - start) for a, b in pairwise(at_edges)]
    recent = rates[len(rates) // 2 :]
    fps = sum(recent) / len(recent)
    mean = sum(rates) / len(rates)
    spread = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / max(1, len(rates) - 1))
    error = max(_LEAST_ERROR, spread / mean / math.sqrt(len(recent)))
    if frames_left == 0:
        return Forecast(fps, 0.0, 0.0, 0.0)
    if windows < _LEAST_WINDOWS or end - start < _LEAST_SPAN_S or error > 1 / 3 or fps <= 0:
        return Forecast(fps or None, None, None, None)
    left = frames_left / fps
    return Forecast(fps, left, left / (1 + _ERRORS * error), left / (1 - _ERRORS * error))


def frames_at(points: Sequence[tuple[float, float]], when: float) -> float:
    """Return the frames done at a point in time not before the first point; between two points in proportion."""
    number = bisect_right([at for at, _ in points], when)
    if number >= len(points):
        return points[-1][1]
    (t0, f0), (t1, f1) = points[number - 1], points[number]
    return f0 + (f1 - f0) * (when - t0) / (t1 - t0) if t1 > t0 else f1


def duration(seconds: float) -> str:
    """Return a length of time as a person says it: `48 s`, `12 min`, `3 h 10 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
