"""The simulated job against what can be known without simulating: closed forms, bounds, and a real pool that sleeps."""

from __future__ import annotations

import os
import random
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from infra.cluster import connected, quiet_data
from jobs.simulation import Course, World, bundled, predict_makespan, simulate


def archive(rows: int, seed: int = 0) -> list[float]:
    luck = random.Random(seed)
    return [luck.lognormvariate(3, 1) for _ in range(rows)]


def total(course: Course) -> float:
    return course.gpus * course.makespan_s


def test_one_gpu_takes_the_sum_and_many_the_longest_row() -> None:
    costs = [5.0, 1.0, 30.0, 7.5]
    assert simulate(costs, World(gpus=1, load_s=4, row_s=0.5)).makespan_s == pytest.approx(4 + 43.5 + 4 * 0.5)
    assert simulate(costs, World(gpus=9, load_s=4, row_s=0.5)).makespan_s == pytest.approx(4 + 30.5)
    assert simulate(costs, World(gpus=1, slow_share=1, slow_factor=2)).makespan_s == pytest.approx(87)
    assert simulate([], World(gpus=3, load_s=9)).makespan_s == 0


@pytest.mark.parametrize("gpus", [2, 3, 10, 64])
@pytest.mark.parametrize("rows", [5, 100, 1000])
def test_the_longest_first_is_within_the_bounds_of_list_scheduling(gpus: int, rows: int) -> None:
    """R. L. Graham, 1969: a list schedule ends before the mean load plus the longest row."""
    costs = archive(rows)
    course = simulate(costs, World(gpus=gpus))
    assert course.bound_s <= course.makespan_s <= sum(costs) / gpus + max(costs)
    assert course.efficiency == pytest.approx(sum(costs) / total(course))
    assert sum(costs) + course.idle_s == pytest.approx(total(course))


@pytest.mark.parametrize("gpus", [2, 3, 10])
def test_the_worst_case_of_longest_first_is_met_exactly(gpus: int) -> None:
    """Graham's tight case: two each of 2m-1 down to m+1, and three of m, take 4m-1, though 3m would be possible."""
    costs = [float(cost) for cost in range(gpus + 1, 2 * gpus) for _ in range(2)] + [float(gpus)] * 3
    assert simulate(costs, World(gpus=gpus)).makespan_s == 4 * gpus - 1


def test_all_time_is_accounted_for_and_equal_seeds_are_equal() -> None:
    world = World(
        gpus=32, load_s=20, row_s=0.5, segment_s=10, node_mtbf_h=1, repair_s=120, slow_share=0.25, slow_factor=1.5
    )
    costs = archive(20_000)
    course = simulate(costs, world)
    assert course == simulate(costs, world) != simulate(costs, World(gpus=32, segment_s=10, node_mtbf_h=1, seed=1))
    assert course.failures > 3 and course.makespan_s > course.bound_s
    spent = total(course) - course.load_s - course.idle_s - course.down_s
    # Slow nodes spend more than the nominal time on the same work; none spends less.
    assert sum(costs) + course.lost_s < spent < 1.5 * (sum(costs) + 20_000 * 0.5) + course.lost_s


def test_the_time_of_equal_machines_is_work_and_losses_exactly() -> None:
    costs = archive(3000)
    course = simulate(costs, World(gpus=16, gpus_per_node=4, segment_s=10, node_mtbf_h=0.2, repair_s=60, load_s=5))
    assert course.failures > 5 and course.lost_s > 0
    assert sum(costs) + course.lost_s + course.load_s + course.idle_s + course.down_s == pytest.approx(total(course))


def test_segments_bound_what_a_failure_costs() -> None:
    costs = [600.0] * 200
    world = {"gpus": 8, "gpus_per_node": 1, "node_mtbf_h": 1.0, "repair_s": 0.0, "seed": 3}
    whole, segments = simulate(costs, World(**world)), simulate(costs, World(**world, segment_s=10.0))  # type: ignore[arg-type]
    assert segments.lost_s <= 10 * segments.failures < whole.lost_s
    assert segments.lost_s / segments.failures == pytest.approx(5, rel=0.25)  # half a segment on average
    assert segments.makespan_s < whole.makespan_s


def test_a_failure_costs_what_it_must_and_the_other_node_takes_over() -> None:
    quiet = simulate([100.0, 100.0], World(gpus=2, gpus_per_node=1))
    assert quiet.makespan_s == 100
    # Mean life 2 minutes: some seed kills one node within the first 100 seconds, and its row goes on elsewhere.
    for seed in range(50):
        course = simulate(
            [100.0, 100.0],
            World(gpus=2, gpus_per_node=1, segment_s=1, node_mtbf_h=1 / 30, repair_s=10_000, seed=seed),
        )
        if course.failures == 1:
            assert 100 < course.makespan_s <= 201
            return
    pytest.fail("no seed with one failure")


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match="GPUs"):
        simulate([1.0], World(gpus=0))
    with pytest.raises(ValueError, match="does not end"):
        simulate([1e6], World(gpus=1, node_mtbf_h=1))


def test_bundles_hold_the_same_work() -> None:
    costs = archive(5000)
    bundles = bundled(costs, 300)
    assert sum(bundles) == pytest.approx(sum(costs)) and min(bundles[:-1]) >= 300
    fine, coarse = (simulate(rows, World(gpus=4)).makespan_s for rows in (costs, bundles))
    assert coarse == pytest.approx(fine, abs=max(bundles))


def test_a_hundred_thousand_rows_on_a_thousand_gpus_are_simulated_in_seconds() -> None:
    course = simulate(archive(100_000), World(gpus=1000, segment_s=10, node_mtbf_h=100, load_s=30))
    assert course.failures > 0 and 0.9 < course.efficiency < 1


def test_prediction_for_a_pool() -> None:
    assert predict_makespan([4, 3, 2, 1], 2, load_s=1) == 6


@pytest.mark.slow
@pytest.mark.parametrize("actors", [2, 4])
def test_a_real_pool_that_sleeps_takes_what_was_predicted(actors: int) -> None:
    """Ray Data, one row a task, longest first: within 15 % of what follows from the rows' own times and the gaps."""
    import ray.data

    costs = sorted((min(2.0, cost / 25) for cost in archive(24, seed=4)), reverse=True)

    class Sleeper:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            began = time.time()
            time.sleep(float(batch["cost"][0]))
            return {"began": np.array([began]), "ended": np.array([time.time()]), "pid": np.array([os.getpid()])}

    with connected(num_cpus=2, quiet=False), quiet_data(target_max_block_size=1):
        data = ray.data.from_items([{"cost": cost} for cost in costs], override_num_blocks=len(costs)).map_batches(
            Sleeper,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=0,
        )
        rows = data.take_all()
    by_actor = [sorted((row["began"], row["ended"]) for row in rows if row["pid"] == pid) for pid in pids(rows)]
    assert len(by_actor) == actors
    gaps = [after[0] - before[1] for mine in by_actor for before, after in pairwise(mine)]
    starts = sorted(mine[0][0] for mine in by_actor)
    took = max(row["ended"] for row in rows) - starts[0]
    predicted = predict_makespan(
        [row["ended"] - row["began"] for row in rows],
        actors,
        load_s=statistics.mean(starts) - starts[0],
        row_s=statistics.mean(gaps),
    )
    print(
        f"{actors} actors: predicted {predicted:.2f} s, took {took:.2f} s, {statistics.mean(gaps):.3f} s between rows"
    )
    assert took == pytest.approx(predicted, rel=0.15)


def pids(rows: list[dict[str, Any]]) -> set[int]:
    return {row["pid"] for row in rows}
