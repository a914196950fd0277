from __future__ import annotations

import pytest

from infra.cluster import Cluster, native_stderr_dropped
from infra.settings import Settings
from jobs.pool import PoolSize, pool_size


def cluster(*, nodes: int = 1, cpus: int = 8, gpus: int = 0) -> Cluster:
    return Cluster(address="h:1", local=False, nodes=nodes, cpus=cpus, gpus=gpus, start_s=0.0)


@pytest.mark.parametrize(
    ("settings", "where", "rows", "expected"),
    [
        # a laptop: one worker with all cores
        ({}, cluster(), 5, PoolSize(1, 0.0, 8.0, 8)),
        # one worker per GPU; beside a GPU no CPU is reserved, or the pool would starve what feeds it
        ({}, cluster(gpus=2), 5, PoolSize(2, 1.0, 0.0, 4)),
        # no more workers than rows
        ({}, cluster(gpus=2), 1, PoolSize(1, 1.0, 0.0, 8)),
        # half a GPU each
        ({"gpus_per_actor": 0.5}, cluster(gpus=2), 9, PoolSize(4, 0.5, 0.0, 2)),
        # told to leave the GPUs alone
        ({"device": "cpu"}, cluster(gpus=2), 5, PoolSize(1, 0.0, 8.0, 8)),
        ({"gpus_per_actor": 0}, cluster(gpus=2), 5, PoolSize(1, 0.0, 8.0, 8)),
        # one per node
        ({}, cluster(nodes=3, cpus=12), 9, PoolSize(3, 0.0, 4.0, 4)),
        # more workers than cores must still fit side by side, or some would never start
        ({"actors": 4}, cluster(cpus=2), 9, PoolSize(4, 0.0, 0.5, 1)),
        ({"threads": 2}, cluster(), 9, PoolSize(1, 0.0, 2.0, 2)),
        # no more workers than it takes to give every row a slot
        ({"actors": 4, "min_actors": 1}, cluster(gpus=8), 9, PoolSize(4, 1.0, 0.0, 2, least=1)),
        ({"actors": 2, "min_actors": 3}, cluster(), 9, PoolSize(2, 0.0, 4.0, 4, least=2)),
        # a cluster whose nodes with GPUs come when they are asked for
        ({"actors": 4, "gpus_per_actor": 1}, cluster(), 9, PoolSize(4, 1.0, 0.0, 2)),
        ({"slots": 4, "gpus_per_actor": 1}, cluster(gpus=8), 9, PoolSize(3, 1.0, 0.0, 2)),
    ],
)
def test_the_pool_follows_the_machine(
    settings: dict[str, object], where: Cluster, rows: int, expected: PoolSize
) -> None:
    assert pool_size(Settings(**settings), where, rows) == expected  # type: ignore[arg-type]


def test_native_stderr_is_dropped_and_pythons_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    import os
    import sys

    with native_stderr_dropped():
        os.write(2, b"from native code\n")
        print("from Python", file=sys.stderr)
    os.write(2, b"afterwards\n")
    told = capfd.readouterr().err
    assert "from native code" not in told and "afterwards" in told


def test_ray_data_is_told_what_it_must_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these defaults has cost somebody a job; what they do is in the module's docstring."""
    import ray.data

    from actors.upscaler import EngineOptions
    from jobs.pool import run_rows

    told: dict[str, object] = {}

    class Asked(Exception):
        pass

    class Items:
        def map_batches(self, work: object, **arguments: object) -> None:
            context = ray.data.DataContext.get_current()
            told.update(arguments)
            told["guard"] = context.execution_no_progress_timeout_s
            told["block"] = context.target_max_block_size
            told["errors"] = context.max_errored_blocks
            raise Asked

    monkeypatch.setattr(ray.data, "from_items", lambda items, override_num_blocks: Items())
    engine = EngineOptions("m", "cuda", "fp32", "auto", 1, 1, "0", slots=3)
    with pytest.raises(Asked):
        list(run_rows([{"row_id": "a"}], engine, PoolSize(2, 1.0, 0.0, 1)))  # type: ignore[typeddict-item]
    strategy = told["compute"]
    assert isinstance(strategy, ray.data.ActorPoolStrategy) and strategy.max_tasks_in_flight_per_actor == 3
    assert (told["num_gpus"], told["num_cpus"]) == (1.0, 0.0)  # an actor beside a GPU starves nobody
    assert told["max_task_retries"] == 0  # a row whose actor dies is not tried for ever by Ray
    assert told["max_concurrency"] == 3 and told["batch_size"] == 1
    assert told["guard"] == -1  # half an hour without a record is no reason to end a job
    assert told["block"] == 1 and told["errors"] == -1
