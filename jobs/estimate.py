"""What a plan will cost: GPU hours, wall time, storage, and what each figure rests on. `upriver restore --plan-only`.

The model's time is proportional to the source's pixels, so that one figure is enough: seconds per frame of a megapixel.
It comes from what was typed, else from manifests of earlier runs at the destination, else from a stored measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.hardware import usable_cores
from infra.cluster import connected
from infra.errors import InfraError
from infra.preflight import in_words
from infra.settings import Settings, load_settings
from infra.storage import storage_for
from jobs.errors import ExitCode
from jobs.forecast import duration
from jobs.manifest import MANIFEST_SUFFIX
from jobs.model import resolve_model
from jobs.plan import Planned, plan_all, plan_options
from jobs.records import VideoPlan
from jobs.simulation import predict_makespan
from jobs.sources import select

# Seconds per frame and megapixel of the source by device: benchmarks/speed-2026-11-23-2-core-cpu.md.
_STORED = {"cpu": (30.7, "a measurement with the built-in model on two CPU cores, four steps")}
_STORED_STEPS = 4
# Bits per pixel of the result at the default quality; between 0.15 and 0.8 for soft and busy films where it is 0.4.
_BITS_PER_PIXEL = {"h264": 0.4, "hevc": 0.3, "av1": 0.3, "vp9": 0.4, "ffv1": 8.0, "prores": 4.0}
_MANIFESTS = 200  # read at most
_STATE_BYTES_PER_PIXEL = (3 * 16 + 3) * 4  # previous output and input as float32, per pixel of the source
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
        hours: of film. gpu_hours: of all workers together; hours of a core's worth of workers where there is no GPU.
        wall_hours: with `actors` workers, longest shot first, if nothing fails.
        result_bytes, work_bytes: of all results, and what segments and states take at most beside them.
    """

    videos: int
    failures: int
    shots: int
    frames: int
    hours: float
    actors: int
    gpu_hours: float | None
    wall_hours: float | None
    result_bytes: int
    work_bytes: int
    free_bytes: int | None
    rests_on: str


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
    scaled = seconds * (settings.steps or _STORED_STEPS) / _STORED_STEPS
    return Cost(scaled, source)


def estimate(plans: Sequence[VideoPlan], failures: int, cost: Cost, *, actors: int, free_bytes: int | None) -> Estimate:
    """Add up plans."""
    seconds = None if cost.seconds_per_megapixel is None else list(row_seconds(plans, cost.seconds_per_megapixel))
    results = sum(result_bytes(plan) for plan in plans)
    states = max((plan.width * plan.height * _STATE_BYTES_PER_PIXEL for plan in plans), default=0)
    return Estimate(
        videos=len(plans),
        failures=failures,
        shots=sum(len(plan.shots) for plan in plans),
        frames=sum(plan.frames for plan in plans),
        hours=sum(plan.duration_s for plan in plans) / _HOUR,
        actors=actors,
        gpu_hours=None if seconds is None else sum(seconds) / _HOUR,
        wall_hours=None if seconds is None else predict_makespan(seconds, actors) / _HOUR,
        result_bytes=results,
        work_bytes=results + states * actors,
        free_bytes=free_bytes,
        rests_on=cost.rests_on,
    )


def row_seconds(plans: Iterable[VideoPlan], seconds_per_megapixel: float) -> Iterable[float]:
    """Return the expected seconds of each row."""
    for plan in plans:
        for shot in plan.shots:
            yield shot.frames * plan.width * plan.height / 1e6 * seconds_per_megapixel


def result_bytes(plan: VideoPlan) -> int:
    """Return roughly how large a result will be; a codec that is not named is counted as H.264."""
    bits = _BITS_PER_PIXEL[plan.options["codec"] or "h264"]
    return int(plan.frames * plan.out_width * plan.out_height * bits / 8)


def plan_only_command(
    src: str,
    dst: str,
    *,
    flags: Mapping[str, object],
    config: Path | None,
    limit: int | None,
    shuffle: int | None,
    priority: Sequence[str],
    seconds_per_megapixel: float | None,
    as_json: bool,
) -> int:
    """Run `upriver restore --plan-only` and return its exit status; nothing is written.

    Raises:
        JobsError, InfraError, PipelineError: nothing can be planned; the message says why.
    """
    settings = load_settings(flags, config).values
    selection = select(src, dst, limit=limit, shuffle=shuffle, priority=priority)
    model = resolve_model(settings.model)
    planned: list[Planned]
    if len(selection.items) == 1:
        planned = list(plan_all(selection.items, plan_options(settings), model.sha256))
    else:
        with connected(num_cpus=usable_cores()):
            planned = list(plan_all(selection.items, plan_options(settings), model.sha256))
    plans = sorted((one.plan for one in planned if one.plan is not None), key=lambda plan: (-plan.priority, plan.name))
    cost = known_cost(selection.root, settings, model.sha256, seconds_per_megapixel)
    free = storage_for(selection.root).free_bytes(selection.root)
    failed = [one for one in planned if one.failure is not None]
    total = estimate(plans, len(failed), cost, actors=settings.actors or 1, free_bytes=free)
    if as_json:
        failures = [{"name": one.item.name, **(one.failure or {})} for one in failed]
        document = {
            "estimate": asdict(total),
            "seconds_per_megapixel": cost.seconds_per_megapixel,
            "videos": [plan.model_dump() for plan in plans],
            "failures": failures,
        }
        print(json.dumps(document, indent=2))
    else:
        _print(plans, failed, total, cost)
    if not plans:
        return int(ExitCode.NO_INPUT)
    return int(ExitCode.FAILURES if failed else ExitCode.DONE)


def _print(plans: Sequence[VideoPlan], failed: Sequence[Planned], total: Estimate, cost: Cost) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("video", "size", "frames", "shots", "film", "one worker", "result"):
        table.add_column(column, justify="left" if column in ("video", "size") else "right", no_wrap=True)
    for plan in plans:
        seconds = None
        if cost.seconds_per_megapixel is not None:
            seconds = sum(row_seconds([plan], cost.seconds_per_megapixel))
        table.add_row(
            plan.name,
            f"{plan.width}x{plan.height} -> {plan.out_width}x{plan.out_height}",
            str(plan.frames),
            str(len(plan.shots)),
            duration(plan.duration_s),
            "?" if seconds is None else duration(seconds),
            in_words(result_bytes(plan)),
        )
    console = Console(width=max(Console().width, 120))
    console.print(table)
    for plan in plans:
        for note in [*(f"damage: {text}" for text in plan.damage), *plan.warnings]:
            print(f"{plan.name}: {note}")
    for one in failed:
        print(f"{one.item.name}: {one.failure['message'] if one.failure else ''}", file=sys.stderr)
    film = duration(total.hours * _HOUR)
    print(f"\nVideos: {total.videos}; shots: {total.shots}; frames: {total.frames}; film: {film}")
    if total.failures:
        print(f"Videos that cannot be planned: {total.failures}")
    if total.gpu_hours is None or total.wall_hours is None:
        print(f"Expected time: unknown. It rests on {total.rests_on}.")
    else:
        print(
            f"Expected: {duration(total.gpu_hours * _HOUR)} of one worker, {duration(total.wall_hours * _HOUR)} with "
            f"{total.actors}; this rests on {total.rests_on}"
        )
    free = "" if total.free_bytes is None else f", {in_words(total.free_bytes)} are free"
    results, work = in_words(total.result_bytes), in_words(total.work_bytes)
    print(f"Storage: about {results} of results, at most {work} beside them{free}")
    if total.free_bytes is not None and total.result_bytes + total.work_bytes > total.free_bytes:
        print("That does not fit.", file=sys.stderr)


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
