"""From rows to records: the Ray Data pipeline of a restore job, and the traps that it steps around.

* One row is one block and one task, with one task in flight per actor: a row stays on one actor from end to end.
* An actor next to a GPU reserves no CPU, otherwise a pool on a small machine starves everything upstream of it.
* Blocks are flushed at every record. With the default of 128 MB the first record would arrive with the last one, and a
  job without output for half an hour is taken for dead.
* A dead actor is replaced, but its row is not tried again by Ray, which by default would do so for ever: the row's
  records end without a last one, and the caller decides. (If it could not be replaced, the other rows would wait.)
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypedDict

from actors.hardware import usable_cores
from actors.upscaler import EngineOptions, Upscaler
from infra.cluster import Cluster, quiet_data
from infra.settings import Settings
from jobs.errors import ExitCode, Interrupted
from jobs.old_plan import Row


class Record(TypedDict):
    """What an actor says of a row: see `actors.upscaler`. `frames` counts from the row's beginning."""

    row_id: str
    kind: str
    frames: int
    details: str


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many actors, and what each of them takes."""

    actors: int
    gpus_each: float
    cpus_each: float
    threads_each: int


def pool_size(settings: Settings, cluster: Cluster, rows: int) -> PoolSize:
    """Return the pool for `rows` rows: one actor per GPU; without GPUs one per node with all its cores."""
    uses_gpu = cluster.gpus > 0 and settings.device in ("auto", "cuda") and settings.gpus_per_actor != 0
    gpus_each = (settings.gpus_per_actor or 1.0) if uses_gpu else 0.0
    most = int(cluster.gpus / gpus_each) if uses_gpu else cluster.nodes
    actors = max(1, min(settings.actors or most, rows))
    cores = usable_cores() if cluster.local else cluster.cpus
    per_node = -(-actors // cluster.nodes)
    threads = settings.threads or max(1, cores // cluster.nodes // per_node)
    room = cluster.cpus / actors
    cpus_each = 0.0 if uses_gpu else float(min(threads, int(room))) if room >= 1 else room
    return PoolSize(actors, gpus_each, cpus_each, threads)


def run_rows(rows: Sequence[Row], engine: EngineOptions, size: PoolSize) -> Iterator[Record]:
    """Restore `rows` on a pool of actors and yield their records as they come, rows mixed.

    Rows start in the order given. A row whose actor died ends without a `done` or `failed` record.
    """
    import ray.data

    with quiet_data(target_max_block_size=1, max_errored_blocks=-1), warnings.catch_warnings():
        # Ray has no other way yet to bound restarts than the keyword arguments that it announces to remove.
        warnings.simplefilter("ignore", category=DeprecationWarning)
        data = ray.data.from_items([dict(row) for row in rows], override_num_blocks=len(rows)).map_batches(
            Upscaler,
            fn_constructor_args=(dataclasses.asdict(engine),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size.actors, max_tasks_in_flight_per_actor=1),
            num_gpus=size.gpus_each or None,
            num_cpus=size.cpus_each,
            max_restarts=-1,
            max_task_retries=0,
        )
        for row in data.iter_rows():
            yield Record(
                row_id=str(row["row_id"]), kind=str(row["kind"]), frames=int(row["frames"]), details=str(row["details"])
            )


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted` in the main thread; elsewhere signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    codes = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in codes:  # a second signal must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(codes[signal.Signals(number)])

    before: dict[signal.Signals, Any] = {each: signal.signal(each, stop) for each in codes}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
