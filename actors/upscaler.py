"""The actor that restores: one model, one row at a time, decoding and encoding overlapped with it.

A row is one causal task. The actor reads its frames, steps the model, writes a video file into the job's work area,
and yields small records: pixels never leave the process. It moves nothing to its final place; that is up to the driver.

Called again with the same row (an actor died, a task was tried again) it starts that row over, and every record says
how far the row is, not how much was added: so records may be repeated or spliced without harm.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import ActorsError, describe_failure
from actors.hardware import choose_device, choose_dtype
from actors.restoration import Restoration

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

logger = logging.getLogger(__name__)

Batch = dict[str, NDArray[Any]]
RECORD_INTERVAL_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an actor sets up its model; the same for all its rows."""

    model: str
    device: str
    dtype: str
    flow: str
    threads: int
    max_pixels: int
    version: str  # of Upriver where the job was started


class Upscaler:
    """Restores rows (see `jobs.plan.Row`); one instance lives in each worker of the pool.

    The model is loaded by the first row: so a model that cannot be loaded is a failure with a message like any other.
    """

    def __init__(self, engine: dict[str, Any]) -> None:
        self._options = EngineOptions(**engine)
        self._pipe: StreamDiffVSRPipeline | None = None
        self._load_s = 0.0

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Restore the one row of `batch`; yields `started`, `progress`, and in the end `done` or `failed` records.

        Each record has `row_id`, `kind`, `frames` (restored so far) and `details` (JSON).
        """
        row = {name: column[0].item() if hasattr(column[0], "item") else column[0] for name, column in batch.items()}
        began = time.perf_counter()
        try:
            yield _record(row, "started", 0, {})
            for frames, details in self._restore(row):
                yield _record(row, "progress" if details is None else "done", frames, details or {})
        except Exception as error:
            logger.exception("row %s failed", row["row_id"])  # to the worker's log, for those who debug a cluster
            details = {**describe_failure(error), "seconds": time.perf_counter() - began}
            yield _record(row, "failed", 0, details)

    def _load(self) -> StreamDiffVSRPipeline:
        if self._pipe is None:
            began = time.perf_counter()  # importing torch and diffusers is most of it
            import torch

            from pipeline.stream_diffvsr import StreamDiffVSRPipeline

            # Ray gives a worker one OpenMP thread unless it reserves more; what to use is decided by the job.
            torch.set_num_threads(self._options.threads)
            device = choose_device(self._options.device)
            self._pipe = StreamDiffVSRPipeline.from_pretrained(
                self._options.model,
                torch_dtype=choose_dtype(self._options.dtype, device),
                device=device,
                flow=None if self._options.flow == "auto" else self._options.flow,  # type: ignore[arg-type]  # checked
                max_pixels=self._options.max_pixels,
            )
            self._load_s = time.perf_counter() - began
        return self._pipe

    def _require_same_world(self, row: dict[str, Any]) -> None:
        """Raise ActorsError where this worker runs another Upriver than the driver, or does not see its files."""
        here = installed_version("upriver")
        if here != self._options.version:
            raise ActorsError(
                f"The worker on {platform.node()} has Upriver {here}, the job was started by {self._options.version}.",
                code="worker-version",
                remedy="Install one version on every node.",
            )
        for place in (Path(row["source"]), Path(row["work_file"]).parent):
            if not place.exists():
                raise ActorsError(
                    f"The worker on {platform.node()} does not see {place}.",
                    code="worker-sees-no-file",
                    remedy="Use a path on storage that all nodes share.",
                )

    def _restore(self, row: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yield (frames so far, None) now and then, and at the end (frames, details)."""
        began = time.perf_counter()
        self._require_same_world(row)
        pipe = self._load()
        task = Restoration(
            pipe, row, json.loads(row["options"]), threads=self._options.threads, max_pixels=self._options.max_pixels
        )
        with task:
            told = time.perf_counter()
            for frames in task.run():
                if time.perf_counter() - told >= RECORD_INTERVAL_S:
                    told = time.perf_counter()
                    yield frames, None
        work_file = Path(row["work_file"])
        seconds = {"total": time.perf_counter() - began, "load": self._load_s, **task.seconds}
        self._load_s = 0.0  # belongs to the first row alone
        yield (
            task.frames_done,
            {
                "width": task.width,
                "height": task.height,
                "cuts": task.cuts,
                "damage": task.damage,
                "warnings": task.warnings,
                "comparison": task.comparison_files,
                "source_sha256": file_sha256(Path(row["source"])),
                "output_sha256": file_sha256(work_file),
                "output_bytes": size_bytes(work_file),
                "device": str(pipe.device),
                "dtype": str(pipe.dtype).removeprefix("torch."),
                "flow": pipe.flow.name,
                "seconds": seconds,
            },
        )


def file_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file's content in hexadecimal; None for a folder."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files of a folder together."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _record(row: dict[str, Any], kind: str, frames: int, details: dict[str, Any]) -> Batch:
    return {
        "row_id": np.array([row["row_id"]], dtype=object),
        "kind": np.array([kind], dtype=object),
        "frames": np.array([frames]),
        "details": np.array([json.dumps(details)], dtype=object),
    }
