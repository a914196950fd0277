from __future__ import annotations

import random

import pytest

from jobs.forecast import duration, forecast


def history(rates: list[float], step_s: float = 10.0, start_s: float = 0.0) -> list[tuple[float, int]]:
    """Frames done when each stretch of `step_s` has its own rate, after `start_s` without a frame."""
    points, done = [(0.0, 0), (start_s, 0)], 0.0
    for number, rate in enumerate(rates, 1):
        done += rate * step_s
        points.append((start_s + number * step_s, round(done)))
    return points


def test_an_even_pace_is_continued() -> None:
    told = forecast(history([5.0] * 20), 1000)
    assert told.fps == pytest.approx(5.0, rel=0.01)
    assert told.left_s == pytest.approx(200, rel=0.01) and told.low_s is not None and told.high_s is not None
    assert 180 < told.low_s < 200 < told.high_s < 220


def test_the_time_before_the_first_frame_does_not_count() -> None:
    told = forecast(history([5.0] * 20, start_s=300), 1000)
    assert told.fps == pytest.approx(5.0, rel=0.02)


def test_the_pace_of_late_counts_and_the_range_widens() -> None:
    even, slowing = forecast(history([5.0] * 40), 1000), forecast(history([6.0] * 20 + [4.0] * 20), 1000)
    assert slowing.fps == pytest.approx(4.0, rel=0.01)
    assert None not in (even.low_s, even.high_s, slowing.low_s, slowing.high_s)
    assert slowing.high_s - slowing.low_s > 2 * (even.high_s - even.low_s)  # type: ignore[operator]


@pytest.mark.parametrize(
    "early",
    [[], [(0.0, 0)], [(0.0, 0), (50.0, 0)], [(0.0, 0), (9.0, 20)], history([5.0, 5.0]), history([30.0, 0.1, 0.1, 0.1])],
    ids=["nothing", "start", "no frame", "one report", "two reports", "all over the place"],
)
def test_early_it_says_nothing(early: list[tuple[float, int]]) -> None:
    assert forecast(early, 1000).left_s is None


def test_nothing_left_takes_no_time() -> None:
    assert forecast(history([5.0] * 9), 0).left_s == 0


def test_the_range_holds_the_truth_nine_times_in_ten() -> None:
    chance = random.Random(7)
    held = 0
    for _ in range(200):
        rates = [chance.uniform(3, 7) for _ in range(120)]
        points = history(rates)
        told = forecast(points[:42], points[-1][1] - points[41][1])
        assert told.low_s is not None and told.high_s is not None
        held += told.low_s <= points[-1][0] - points[41][0] <= told.high_s
    assert held >= 180


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (95.4, "95 s"), (600, "10 min"), (11_400, "3 h 10 min"), (187_200, "2 d 4 h")],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
