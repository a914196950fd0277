"""The actor that restores: one model, one shot at a time or several side by side, and small records of how it goes.

A row is one shot, and a causal task. Pixels never leave the process except as finished segments in the work area.
Called again with the same row (an actor died, a task was tried again), the actor first tells again which segments are
finished and then goes on after them; every record says how far the row is, not how much was added. So records may be
repeated or spliced without harm, and none is missing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from actors.errors import DecodeMismatch, ModelChanged, SourceChanged, describe_failure
from actors.hardware import choose_device, choose_formats
from actors.node import require_code, require_seen
from actors.records import Row
from actors.watchdog import Watchdog
from infra.model_cache import local_model
from infra.storage import join, parent, storage_for

if TYPE_CHECKING:
    from actors.restoration import Restoration
    from actors.step_batch import StepBatch
    from pipeline.engine import Engine

logger = logging.getLogger(__name__)

Batch = dict[str, NDArray[Any]]
RECORD_INTERVAL_S = 0.5
STALLED = "stalled"  # folder beside a video's segments: a file for each shot that stood still


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an actor sets up its model; the same for all its rows.

    Attributes:
        slots: rows that are restored side by side, sharing the batches of the model.
        stall_s: the longest time that a row may stand still, in seconds.
        exact: tiles are those that `memory_gb` asks for and no others, whatever happens.
        memory_gb: what the worker (on a GPU: its allocations there) may need, in 10^9 bytes; None: no limit.
        version: of the code where the job was started, `infra.own_code.code_fingerprint`.
        model_sha256: of the model that the job was planned with; None accepts any.
    """

    model: str
    device: str
    dtype: str
    flow: str
    threads: int
    max_pixels: int
    version: str
    slots: int = 1
    stall_s: float = 1800.0
    memory_gb: float | None = None
    model_sha256: str | None = None
    exact: bool = False
    backend: str = "eager"


class Upscaler:
    """Restores rows (see `actors.records.Row`); one instance lives in each worker of the pool.

    The model is loaded by the first row: so a model that cannot be loaded is a failure with a message like any other.
    Rows may come in several threads at once, as many as there are slots.
    """

    def __init__(self, engine: dict[str, Any]) -> None:
        self._options = EngineOptions(**engine)
        self._pipe: Engine | None = None
        self._batch: StepBatch | None = None
        self._loading = threading.Lock()
        self._load_s = 0.0
        self._watchdog = Watchdog(self._options.stall_s, self._tell_of_stall)
        self._stall_places: dict[str, str] = {}

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Restore the one row of `batch`; yields `started`, `segment`, `progress`, and then `done` or `failed` records.

        Each record has `row_id`, `kind`, `frames` (of the row, finished or under way) and `details` (JSON).
        """
        plain = {name: column[0].item() if hasattr(column[0], "item") else column[0] for name, column in batch.items()}
        row = cast(Row, plain)
        row_id = row["row_id"]
        self._stall_places[row_id] = join(parent(row["segments"]), STALLED, f"{row['shot']:05d}")
        self._watchdog.beat(row_id)
        began = time.perf_counter()
        try:
            yield _record(row, "started", 0, {"host": platform.node(), "pid": os.getpid()})
            yield from self._restore(row)
        except Exception as error:
            logger.exception("row %s failed", row_id)  # to the worker's log, for those who debug a cluster
            details = {**describe_failure(error), "seconds": time.perf_counter() - began, "host": platform.node()}
            yield _record(row, "failed", 0, details)
        finally:
            self._watchdog.finish(row_id)
            self._stall_places.pop(row_id, None)

    def _tell_of_stall(self, row_id: str) -> None:
        place = self._stall_places[row_id]
        storage_for(place).write(place, platform.node().encode())

    def _load(self) -> tuple[Engine, StepBatch]:
        import torch

        with self._loading:
            # Ray gives a worker one OpenMP thread unless it reserves more; what to use is decided by the job. The
            # number belongs to the thread that asks, hence again for every row.
            torch.set_num_threads(self._options.threads)
            if self._pipe is None or self._batch is None:
                from actors.step_batch import StepBatch
                from pipeline.backends import choose_backend
                from pipeline.engine import open_engine

                began = time.perf_counter()
                device = choose_device(self._options.device)
                # a limit is kept by the reference alone: what a backend needs is not in the estimate
                limited = self._options.memory_gb is not None
                backend = choose_backend("eager" if limited else self._options.backend, device)
                pipe = open_engine(
                    local_model(self._options.model),
                    torch_dtype=choose_formats(self._options.dtype, device, backend),
                    device=device,
                    flow=None if self._options.flow == "auto" else self._options.flow,  # type: ignore[arg-type]
                    max_pixels=self._options.max_pixels,
                    backend=backend,
                )
                require_model(pipe.model_sha256, self._options.model_sha256, self._options.model)
                if self._options.memory_gb is not None:
                    pipe.memory_limit_bytes = int(self._options.memory_gb * 1e9)
                self._pipe = pipe
                self._batch = StepBatch(pipe, largest=self._options.slots, fixed_tiles=self._options.exact)
                self._load_s = time.perf_counter() - began
            return self._pipe, self._batch

    def _require_same_world(self, row: Row) -> None:
        """Raise ActorsError where this worker runs another Upriver than the driver, or does not see its files.

        Every node was asked for this when the job began; this is for nodes that came later, and for what changes.
        """
        require_code(self._options.version)
        for place in (row["source"], parent(row["segments"])):
            require_seen(place)
        require_version(row["source"], row["source_version"], row["name"])

    def _restore(self, row: Row) -> Iterator[Batch]:
        # Here, because it brings torch and diffusers: whoever starts a job or assembles a film needs neither.
        from actors.restoration import Restoration

        self._require_same_world(row)
        pipe, batch = self._load()
        for from_start in (False, True):
            began = time.perf_counter()
            task = Restoration(
                pipe,
                row,
                threads=self._options.threads,
                max_pixels=self._options.max_pixels,
                step=batch.step,
                from_start=from_start,
            )
            if pipe.memory_limit_bytes is not None and pipe.device.type == "cpu":
                # The limit is on main memory then, which pictures and encoder share.
                pipe.set_aside(self._options.slots * task.beside_bytes)
            try:
                with batch.row(), task:
                    yield from self._advance(row, task)
                break
            except DecodeMismatch as error:
                # A damaged file, or one without an index, can be entered only at its beginning.
                task.forget()
                if from_start:
                    raise
                logger.warning("%s It is read from its beginning now.", error)
        seconds = {"total": time.perf_counter() - began, "load": self._load_s}
        self._load_s = 0.0  # belongs to the first row alone
        details = {"width": task.width, "height": task.height, "resumed": task.resumed, "seconds": seconds}
        yield _record(row, "done", row["frames"], details)

    def _advance(self, row: Row, task: Restoration) -> Iterator[Batch]:
        told = time.perf_counter()
        for advance in task.run():
            self._watchdog.beat(row["row_id"])
            if advance.record is not None:
                record = advance.record
                told = time.perf_counter()
                details = {"name": record.name, "number": record.number, "replayed": advance.replayed}
                yield _record(row, "segment", advance.frames, details)
            elif time.perf_counter() - told >= RECORD_INTERVAL_S:
                told = time.perf_counter()
                yield _record(row, "progress", advance.frames, {})


def require_model(found: str, planned: str | None, source: str) -> None:
    """Raise ModelChanged unless the model that was loaded is the one that the job was planned with."""
    if planned is not None and found != planned:
        raise ModelChanged(
            f"The worker on {platform.node()} found another model at {source} than the job was planned with.",
            code="model-changed",
            remedy="Run the command again, for a job with the new model, or put the old one back.",
        )


def require_version(source: str, version: str, name: str) -> None:
    """Raise SourceChanged unless the source is the one that was planned."""
    found = storage_for(source).stat(source)
    if found is None or found.version != version:
        raise SourceChanged(
            f"{name} was changed or removed after it was planned.",
            code="source-changed",
            remedy="Run the command again: it plans a changed source anew.",
        )


def _record(row: Row, kind: str, frames: int, details: dict[str, Any]) -> Batch:
    return {
        "row_id": np.array([row["row_id"]], dtype=object),
        "kind": np.array([kind], dtype=object),
        "frames": np.array([frames]),
        "details": np.array([json.dumps(details)], dtype=object),
    }
