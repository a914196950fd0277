"""The ladder of a live stream."""

from __future__ import annotations

from itertools import pairwise

from actors.quality import QualityLadder


def run(ladder: QualityLadder, latency_of: dict[int, float], seconds: float, start: float = 0.0) -> list[int]:
    """Answer a frame every 100 ms; the latency depends on the level."""
    return [ladder.observe(latency_of[ladder.level], start + number / 10) for number in range(round(seconds * 10))]


def test_without_a_budget_nothing_moves() -> None:
    ladder = QualityLadder(None)
    assert run(ladder, {4: 99.0}, 5) == [4] * 50


def test_down_at_once_until_it_fits() -> None:
    ladder = QualityLadder(0.1)
    assert run(ladder, {4: 0.4, 2: 0.2, 1: 0.09}, 0.5) == [2, 1, 1, 1, 1]


def test_no_further_down_than_allowed() -> None:
    ladder = QualityLadder(0.1, least=2)
    assert run(ladder, {4: 0.4, 2: 0.4}, 1)[-1] == 2


def test_up_again_when_the_load_goes() -> None:
    ladder = QualityLadder(0.2)
    run(ladder, {4: 0.5, 2: 0.3, 1: 0.1, 0: 0.01}, 1)
    assert ladder.level == 1
    levels = run(ladder, {1: 0.03, 2: 0.04, 4: 0.05}, 20, start=1.0)
    assert levels[-1] == 4 and levels[0] == 1 and 2 in levels


def test_a_level_that_does_not_hold_is_tried_less_and_less_often() -> None:
    """The answers of level 1 promise that 2 would fit, but it does not: the stream must not swing all the time."""
    ladder = QualityLadder(0.1, least=1)
    levels = run(ladder, {4: 0.3, 2: 0.15, 1: 0.02}, 120)
    rises = sum(b > a for a, b in pairwise(levels))
    late_rises = sum(b > a for a, b in pairwise(levels[600:]))
    assert 2 <= rises <= 8 and late_rises <= 2


def test_a_frame_that_waited_too_long_counts_as_late() -> None:
    ladder = QualityLadder(0.1)
    assert ladder.too_late(0.0) == 2
