"""The batch for a measured curve: none where batching gives nothing, large ones where a step has a fixed cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from actors.batch_policy import BatchCurve, CurveUnusable, LearnedBatches, choose_batch, most_streams

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


def learn(batches: LearnedBatches, cost_ms: Callable[[int], float], waiting: int, rounds: int) -> list[int]:
    """Step `waiting` streams again and again, as a stepper does; returns the batches of the last round."""
    made: list[int] = []
    for _ in range(rounds):
        left, made = waiting, []
        while left:
            made.append(batches.choose("720p", left))
            batches.note("720p", made[-1], cost_ms(made[-1]))
            left -= made[-1]
    return made


@pytest.mark.parametrize(
    ("curve", "waiting", "wanted"),
    [
        (CPU, 8, [1] * 8),  # where batching gives nothing, the first answers come soonest alone
        (GPU, 8, [8]),
        (GPU, 6, [6]),
        (FULL, 8, [4, 4]),
        (GPU, 20, [7, 7, 6]),  # 70 ms, as 8 + 8 + 4
    ],
)
def test_the_best_batch_is_found_by_stepping(curve: BatchCurve, waiting: int, wanted: list[int]) -> None:
    assert learn(LearnedBatches(8), curve.ms, waiting, 80) == wanted


def test_with_slots_that_may_be_empty_a_smaller_batch_can_be_better() -> None:
    def in_slots(batch: int) -> float:
        return FULL.ms(1 << (batch - 1).bit_length())

    assert learn(LearnedBatches(8), in_slots, 5, 80) == [4, 1], "26 + 12 ms are less than 56 with three empty slots"


def test_the_first_steps_of_a_batch_do_not_count() -> None:
    seen: dict[int, int] = {}

    def compiles(batch: int) -> float:
        seen[batch] = seen.get(batch, 0) + 1
        return 5000.0 if seen[batch] <= 3 else GPU.ms(batch)

    assert learn(LearnedBatches(8), compiles, 8, 80) == [8]


def test_what_has_changed_is_noticed() -> None:
    batches = LearnedBatches(8)
    assert learn(batches, GPU.ms, 8, 50) == [8]
    assert learn(batches, FULL.ms, 8, 50) == [4, 4], "8 have become slower than two times 4"
    learn(batches, GPU.ms, 8, 4000)  # 8 is looked at again now and then
    assert batches.choose("720p", 8) == 8


def test_kinds_are_learned_apart_and_are_not_kept_for_ever() -> None:
    batches = LearnedBatches(8)
    learn(batches, CPU.ms, 8, 60)
    assert batches.choose("1080p", 8) == 8, "nothing is known of these"
    for number in range(1000):
        batches.note(number, 1, 1.0)
    assert len(batches._kinds) <= 256 and batches.choose("720p", 8) == 8
    assert batches.curve("720p") is None


def test_where_memory_ran_out_no_larger_batch_is_tried() -> None:
    batches = LearnedBatches(8)
    learn(batches, GPU.ms, 8, 60)
    batches.largest = 4
    assert learn(batches, GPU.ms, 8, 20) == [4, 4]
    curve = batches.curve("720p")
    assert curve is not None and curve.largest == 4


def test_a_budget_holds_for_the_last_one() -> None:
    batches = LearnedBatches(8)
    learn(batches, CPU.ms, 8, 60)
    assert batches.choose("720p", 1, 50.0) == 1
    learn(batches, GPU.ms, 8, 4000)
    assert batches.choose("720p", 8, 30.0) == 8
