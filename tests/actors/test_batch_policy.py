"""The batch for a measured curve: none where batching gives nothing, large ones where a step has a fixed cost."""

from __future__ import annotations

import pytest

from actors.batch_policy import BatchCurve, CurveUnusable, choose_batch, most_streams

CPU = BatchCurve({1: 100, 2: 200, 4: 402, 8: 810})  # each frame costs the same
GPU = BatchCurve({1: 12, 2: 14, 4: 18, 8: 26})  # 10 ms fixed, 2 ms a frame
FULL = BatchCurve({1: 12, 2: 14, 4: 26, 8: 56})  # busy from a batch of 2 on


@pytest.mark.parametrize("waiting", [1, 3, 8, 20])
@pytest.mark.parametrize("budget_ms", [None, 50.0, 1000.0])
def test_a_flat_curve_batches_nothing(waiting: int, budget_ms: float | None) -> None:
    assert choose_batch(CPU, waiting, budget_ms).batch == 1


def test_a_fixed_cost_is_shared_by_all_that_wait() -> None:
    assert [choose_batch(GPU, waiting).batch for waiting in (1, 2, 3, 8)] == [1, 2, 3, 8]
    sixteen = choose_batch(GPU, 16)
    assert (sixteen.batch, sixteen.latest_ms) == (8, 52) and sixteen.frames_per_s == pytest.approx(16 / 0.052)


def test_a_batch_that_is_hardly_better_is_not_made_larger() -> None:
    assert choose_batch(FULL, 8).batch == 4, "26 ms for 4 are 6.5 each, 7 with 2 and 8 alike"
    assert choose_batch(FULL, 2).batch == 2


def test_all_that_wait_are_counted_the_rest_of_the_last_batch_too() -> None:
    # Nine streams: 8 + 1 take 38 ms, 5 + 4 take 38 ms as well, 3 + 3 + 3 take 48.
    nine = choose_batch(GPU, 9)
    assert nine.latest_ms == 38 and nine.batch == 5, "of equally good ones the smallest"


def test_the_budget_is_kept_and_where_it_cannot_be_the_soonest_is_taken() -> None:
    assert choose_batch(GPU, 8, 26).in_time
    late = choose_batch(GPU, 8, 25)
    assert not late.in_time and late.batch == 8
    assert choose_batch(CPU, 3, 250).in_time is False


def test_what_a_replica_can_carry() -> None:
    at_30 = most_streams(GPU, 30)
    assert at_30 is not None and at_30.latest_ms <= 1000 / 30
    assert at_30.frames_per_s * (1 / 30) == pytest.approx(8 * (1000 / 30) / 26, rel=0.01) and at_30.batch == 8
    five = most_streams(CPU, 2)
    assert five is not None and five.batch == 1 and five.latest_ms == pytest.approx(500)
    assert most_streams(CPU, 11) is None


@pytest.mark.parametrize("points", [{}, {2: 5.0}, {0: 1.0, 1: 1.0}, {1: 0.0}, {1: float("inf")}, {1: float("nan")}])
def test_a_curve_that_says_nothing_is_refused(points: dict[int, float]) -> None:
    with pytest.raises(CurveUnusable):
        BatchCurve(points)


def test_nothing_is_known_beyond_what_was_measured() -> None:
    with pytest.raises(CurveUnusable, match="largest is 8"):
        GPU.ms(9)
    with pytest.raises(CurveUnusable):
        choose_batch(GPU, 0)
    assert GPU.ms(6) == 22
