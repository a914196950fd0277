"""From rows to records: the Ray Data pipeline of a restore job, and the traps that it steps around.

* One row is one block and one task, with as many tasks in flight per actor as it has slots: a row stays on one actor
  from end to end.
* An actor next to a GPU reserves no CPU, otherwise a pool on a small machine starves everything upstream of it.
* Blocks are flushed at every record. With the default of 128 MB the first record would arrive with the last one, and a
  job without output for half an hour is taken for dead.
* Ray Data gives up after half an hour without a record; a worker that stands still is ended by its own watchdog, and
  nothing else may end a job.
* Items are no files: Ray Data's own checkpoints would write down which are finished and restore all of them again. What
  is finished is known from the work area, and is never put into the pool.
* A dead actor is replaced, but its row is not tried again by Ray, which by default would do so for ever: the row's
  records end without a last one, and the caller decides. (If it could not be replaced, the other rows would wait.)
"""

from __future__ import annotations

import dataclasses
import queue
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self, TypedDict

from actors.hardware import usable_cores
from actors.records import Row
from actors.upscaler import EngineOptions, Upscaler
from infra.cluster import Cluster, quiet_data
from infra.settings import Settings
from jobs.errors import ExitCode, Interrupted

# What Ray Data is told in a job; see the module's docstring.
JOB_CONTEXT = {"target_max_block_size": 1, "max_errored_blocks": -1, "execution_no_progress_timeout_s": -1}
# How long a stopped job waits for a record, at which its rows can be stopped in order; then it leaves them to Ray.
_STOP_S = 5.0


class Record(TypedDict):
    """What an actor says of a row: see `actors.upscaler`. `frames` counts from the row's beginning."""

    row_id: str
    kind: str
    frames: int
    details: str


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How many actors, and what each of them takes; with `least`, the pool grows from so many, and shrinks to them."""

    actors: int
    gpus_each: float
    cpus_each: float
    threads_each: int
    least: int | None = None


def pool_size(settings: Settings, cluster: Cluster, rows: int) -> PoolSize:
    """Return the pool for `rows` rows: one actor per GPU; without GPUs one per node with all its cores.

    A cluster that scales from nothing has no GPU yet: `actors` and `gpus_per_actor` then say what to ask it for.
    """
    expected = cluster.gpus > 0 or bool(settings.actors and settings.gpus_per_actor)
    uses_gpu = expected and settings.device in ("auto", "cuda") and settings.gpus_per_actor != 0
    gpus_each = (settings.gpus_per_actor or 1.0) if uses_gpu else 0.0
    most = int(cluster.gpus / gpus_each) if uses_gpu else cluster.nodes
    actors = max(1, min(settings.actors or most, -(-rows // settings.slots)))
    cores = usable_cores() if cluster.local else cluster.cpus
    per_node = -(-actors // cluster.nodes)
    threads = settings.threads or max(1, cores // cluster.nodes // per_node)
    room = cluster.cpus / actors
    cpus_each = 0.0 if uses_gpu else float(min(threads, int(room))) if room >= 1 else room
    least = min(settings.min_actors, actors) if settings.min_actors else None
    return PoolSize(actors, gpus_each, cpus_each, threads, least)


def run_rows(rows: Sequence[Row], engine: EngineOptions, size: PoolSize) -> Generator[Record, None, None]:
    """Restore `rows` on a pool of actors and yield their records as they come, rows mixed.

    Rows start in the order given. A row whose actor died ends without a `done` or `failed` record.
    """
    import ray.data

    with quiet_data(**JOB_CONTEXT), warnings.catch_warnings():
        # Ray has no other way yet to bound restarts than the keyword arguments that it announces to remove.
        warnings.simplefilter("ignore", category=DeprecationWarning)
        data = ray.data.from_items([dict(row) for row in rows], override_num_blocks=len(rows)).map_batches(
            Upscaler,
            fn_constructor_args=(dataclasses.asdict(engine),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=size.least or size.actors,
                max_size=size.actors,
                max_tasks_in_flight_per_actor=engine.slots,
            ),
            num_gpus=size.gpus_each or None,
            num_cpus=size.cpus_each,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=engine.slots,
        )
        for row in data.iter_rows():
            yield Record(
                row_id=str(row["row_id"]), kind=str(row["kind"]), frames=int(row["frames"]), details=str(row["details"])
            )


class RunningRows:
    """Rows that are being restored while the caller does other things; a context manager.

    Leaving it stops the rows that are not done, after their next record. Ray Data runs in a thread of its own, so that
    signals and the end of other tasks are not waited for behind a record that does not come.
    """

    def __init__(self, rows: Sequence[Row], engine: EngineOptions, size: PoolSize) -> None:
        self._rows, self._engine, self._size = rows, engine, size
        self._records: queue.Queue[Record | BaseException | None] = queue.Queue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self.finished = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(_STOP_S)

    def take(self, timeout_s: float) -> Record | None:
        """Return the next record, or None when there is none yet or, with `finished`, when all rows have ended."""
        try:
            found = self._records.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if found is None:
            self.finished = True
        elif isinstance(found, BaseException):
            self.finished = True
            raise found
        return found

    def _run(self) -> None:
        try:
            with closing(run_rows(self._rows, self._engine, self._size)) as records:
                for record in records:
                    if self._stopped.is_set():
                        return
                    self._records.put(record)
        except BaseException as error:
            if not self._stopped.is_set():
                self._records.put(error)
        finally:
            self._records.put(None)


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
