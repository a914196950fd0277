"""What a plan will cost: GPU hours, wall time, storage, and what each figure rests on.

The model's time is proportional to the source's pixels, so that one figure is enough: seconds per frame of a megapixel.
It comes from what was typed, else from manifests of earlier runs at the destination, else from a stored measurement.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import InfraError
from infra.settings import Settings
from infra.storage import storage_for
from jobs.manifest import MANIFEST_SUFFIX
from jobs.records import VideoPlan
from jobs.room import Room
from jobs.simulation import predict_makespan

# Seconds per frame and megapixel of the source by device: benchmarks/speed-2026-11-23-2-core-cpu.md.
_STORED = {"cpu": (30.7, "a measurement with the built-in model on two CPU cores, four steps")}
_STORED_STEPS = 4
_MANIFESTS = 200  # read at most
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one worker per frame and megapixel of the source, and where that is known from."""

    seconds_per_megapixel: float | None
    rests_on: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A job as a whole. Times are None where no figure of the hardware is known.

    Attributes:
        videos: to be restored. finished: before, which are not counted in what follows.
        frames_finished: of the frames, those in segments of an earlier run.
        hours: of film. gpu_hours: of all workers together; hours of a core's worth of workers where there is no GPU.
        wall_hours: with `actors` workers, longest shot first, if nothing fails.
        tasks: shots that are whole, and parts of those that are split. warm_up_frames: of all parts; restored besides
            `frames`, and counted in the times.
        result_bytes, work_bytes: of all results, and what segments and states take at most beside them.
        scratch_bytes: in a node's temporary folder, where the destination is in an object store.
    """

    videos: int
    failures: int
    finished: int
    shots: int
    tasks: int
    frames: int
    warm_up_frames: int
    frames_finished: int
    hours: float
    actors: int
    on_gpu: bool
    gpu_hours: float | None
    wall_hours: float | None
    result_bytes: int
    work_bytes: int
    scratch_bytes: int
    free_bytes: int | None
    rests_on: str

    @property
    def fits(self) -> bool:
        """Whether there is room for it at the destination, as far as is known."""
        return self.free_bytes is None or self.result_bytes + self.work_bytes <= self.free_bytes


def known_cost(root: str, settings: Settings, model_sha256: str, given: float | None = None) -> Cost:
    """Return the figure to count with.

    Args:
        root: the job's destination, searched for manifests of earlier runs with the same model and steps.
        given: seconds per frame and megapixel, as typed.
    """
    if given is not None:
        return Cost(given, "the figure that was given")
    measured = list(_measured(root, settings, model_sha256))
    if measured:
        return Cost(statistics.median(measured), f"{len(measured)} finished videos at the destination")
    device = settings.device.partition(":")[0]
    if device == "auto":
        device = _auto_device()
    if device not in _STORED:
        return Cost(
            None, f"nothing: no figure for {device} is known; give --seconds-per-megapixel, see `upriver bench`"
        )
    seconds, source = _STORED[device]
    scaled = seconds * (settings.fixed_steps or _STORED_STEPS) / _STORED_STEPS  # with `auto`, what it takes at most
    return Cost(scaled, source)


def estimate(
    plans: Sequence[VideoPlan],
    failures: int,
    cost: Cost,
    *,
    actors: int,
    free_bytes: int | None,
    room: Room,
    on_gpu: bool = False,
    finished: int = 0,
    frames_finished: int = 0,
) -> Estimate:
    """Add up plans, and put beside them what is known: the room they take, and what was finished before.

    What is finished of a video that is not is spread over its shots alike: close enough for an estimate.
    """
    seconds = None
    if cost.seconds_per_megapixel is not None:
        left = 1 - frames_finished / max(1, sum(plan.frames for plan in plans))
        seconds = [one * left for one in row_seconds(plans, cost.seconds_per_megapixel)]
    return Estimate(
        videos=len(plans),
        failures=failures,
        finished=finished,
        shots=sum(shots_in(plan) for plan in plans),
        tasks=sum(len(plan.shots) for plan in plans),
        frames=sum(plan.frames for plan in plans),
        warm_up_frames=sum(shot.warm_up for plan in plans for shot in plan.shots),
        frames_finished=frames_finished,
        hours=sum(plan.duration_s for plan in plans) / _HOUR,
        actors=actors,
        on_gpu=on_gpu,
        gpu_hours=None if seconds is None else sum(seconds) / _HOUR,
        wall_hours=None if seconds is None else predict_makespan(seconds, actors) / _HOUR,
        result_bytes=room.results,
        work_bytes=room.work,
        scratch_bytes=room.scratch,
        free_bytes=free_bytes,
        rests_on=cost.rests_on,
    )


def row_seconds(plans: Iterable[VideoPlan], seconds_per_megapixel: float) -> Iterable[float]:
    """Return the expected seconds of each row, its warm-up included."""
    for plan in plans:
        for shot in plan.shots:
            yield (shot.warm_up + shot.frames) * plan.width * plan.height / 1e6 * seconds_per_megapixel


def shots_in(plan: VideoPlan) -> int:
    """Return how many shots a video has, each once however many parts it is restored in."""
    return sum(not shot.continues for shot in plan.shots)


def _measured(root: str, settings: Settings, model_sha256: str) -> Iterable[float]:
    """Seconds per frame and megapixel of the source, one of each manifest that fits."""
    storage = storage_for(root)
    read = 0
    try:
        for info in storage.list(root):
            if not info.place.endswith(MANIFEST_SUFFIX):
                continue
            read += 1
            if read > _MANIFESTS:
                return
            found = _of_manifest(json.loads(storage.read(info.place)), settings, model_sha256)
            if found is not None:
                yield found
    except (InfraError, ValueError):
        return


def _of_manifest(manifest: Any, settings: Settings, model_sha256: str) -> float | None:
    try:
        options, output = manifest["options"], manifest["output"]
        fits = manifest["model"]["sha256"] == model_sha256 and options["steps"] == settings.steps
        if not fits or options["height"] is not None:
            return None  # the source's size is known from a whole scale alone
        megapixels = output["width"] * output["height"] / options["scale"] ** 2 / 1e6
        seconds = float(manifest["seconds"]["model"]) / output["frames"] / megapixels
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return seconds if seconds > 0 else None


def _auto_device() -> str:
    from actors.hardware import choose_device

    return str(choose_device("auto")).partition(":")[0]
