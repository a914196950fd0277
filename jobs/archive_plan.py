"""`upriver archive-plan`: how long an archive takes on how many GPUs, and what failures and slow nodes cost.

The archive is a plan that `upriver restore --plan-only --json` printed, or one made up by a stated distribution.
Without `--simulate` the bound alone is told: the work divided by the GPUs. Nothing is read but the plan.
"""

from __future__ import annotations

import json
import math
import random
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from infra.storage import storage_for
from jobs.errors import ExitCode, UsageError
from jobs.forecast import duration
from jobs.simulation import Course, World, bundled, simulate

# The made-up archive: sizes with their shares; lengths of videos and shots, log-normal by median and sigma.
SIZES = ((640, 480, 0.5), (720, 576, 0.3), (1280, 720, 0.15), (1920, 1080, 0.05))
RATE = 25.0
VIDEO_MEDIAN_S, VIDEO_SIGMA = 1800.0, 0.8
SHOT_MEDIAN_S, SHOT_SIGMA = 4.0, 0.9
DISTRIBUTION = (
    "made up: 50 % 640x480, 30 % 720x576, 15 % 1280x720, 5 % 1920x1080, 25 frames/s; videos log-normal, median 30 min, "
    "sigma 0.8; shots log-normal, median 4 s, sigma 0.9"
)
# Shots of millions are joined so that a GPU gets at least so many rows; the end of the schedule blurs by as little.
_ROWS_PER_GPU = 500


@dataclass(frozen=True, slots=True)
class Archive:
    """Rows of an archive: megapixel-frames of each shot, and what they are."""

    rows: np.ndarray
    hours: float
    frames: int
    description: str


def made_up(hours: float, seed: int) -> Archive:
    """Return an archive of `hours` by the distribution above."""
    luck = random.Random(seed)
    rows = array("d")
    left, frames = hours * 3600, 0
    while left > 0:
        video_s = min(left, luck.lognormvariate(math.log(VIDEO_MEDIAN_S), VIDEO_SIGMA))
        left -= video_s
        ((width, height, _),) = luck.choices(SIZES, weights=[share for *_, share in SIZES])
        for shot_s in _shots(video_s, luck):
            count = max(1, round(shot_s * RATE))
            frames += count
            rows.append(count * width * height / 1e6)
    return Archive(np.frombuffer(rows), hours, frames, DISTRIBUTION)


def _shots(video_s: float, luck: random.Random) -> Iterator[float]:
    while video_s > 0:
        shot_s = min(video_s, luck.lognormvariate(math.log(SHOT_MEDIAN_S), SHOT_SIGMA))
        yield shot_s
        video_s -= shot_s


def planned(place: str) -> tuple[Archive, float | None]:
    """Return the archive of a printed plan, and the seconds per megapixel that the plan was counted with.

    Raises:
        UsageError: it is no such plan. StorageError: it cannot be read.
    """
    try:
        document = json.loads(storage_for(place).read(place))
        rows = [
            (shot["frames"] + shot.get("warm_up", 0)) * video["width"] * video["height"] / 1e6
            for video in document["videos"]
            for shot in video["shots"]
        ]
        seconds = document["seconds_per_megapixel"]
        hours = sum(video["duration_s"] for video in document["videos"]) / 3600
        frames = sum(video["frames"] for video in document["videos"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{place} is no plan: {error}.",
            code="plan-invalid",
            remedy="Give what `upriver restore --plan-only --json` printed.",
        ) from error
    return Archive(np.array(rows), hours, frames, place), seconds


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def archive_plan(
    plan: Annotated[
        Path | None,
        typer.Argument(help="What `upriver restore --plan-only --json` printed; without it, a made-up archive."),
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="Length of the made-up archive.")] = 10_000,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to compare.")] = "1,8,64,256,1000",
    seconds_per_megapixel: Annotated[
        float | None,
        typer.Option(min=0, help="Time of a GPU per frame of a million source pixels.", show_default=False),
    ] = None,
    play: Annotated[bool, typer.Option("--simulate", help="Play the job through, with failures.")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that fail together.")] = 8,
    node_mtbf_hours: Annotated[float, typer.Option(min=0, help="Mean life of a node; 0: for ever.")] = 500,
    repair_seconds: Annotated[float, typer.Option(min=0, help="Until a dead node is replaced.")] = 600,
    slow_share: Annotated[float, typer.Option(min=0, max=1, help="Share of nodes that are slow.")] = 0.02,
    slow_factor: Annotated[float, typer.Option(min=1, help="How many times as long those take.")] = 1.5,
    load_seconds: Annotated[float, typer.Option(min=0, help="To start a worker and load the model.")] = 60,
    segment_seconds: Annotated[float, typer.Option(min=0.1, help="Length of a segment in film time.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the archive and the failures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> int:
    """Predict how long an archive takes on many GPUs, and what failures cost."""
    counts = _counts(gpus)
    archive, known = planned(str(plan)) if plan else (made_up(hours, seed), None)
    seconds = seconds_per_megapixel or known
    if seconds is None:
        raise UsageError(
            "How fast a GPU is, is not known.",
            code="cost-unknown",
            remedy="Give --seconds-per-megapixel: measure it with `upriver bench`.",
        )
    costs = archive.rows * seconds
    work_s, longest_s = float(costs.sum()), float(costs.max(initial=0.0))
    # A segment's work, by the mean size of a frame; a shot that is shorter is a segment by itself.
    per_second = work_s / (archive.hours * 3600) if archive.hours else 0.0
    world = World(
        gpus=1,
        gpus_per_node=gpus_per_node,
        load_s=load_seconds,
        segment_s=segment_seconds * per_second,
        node_mtbf_h=node_mtbf_hours or None,
        repair_s=repair_seconds,
        slow_share=slow_share,
        slow_factor=slow_factor,
        seed=seed,
    )
    quiet = World(gpus=1, load_s=load_seconds)
    courses = [(_play(costs, world, count), _play(costs, quiet, count)) for count in counts] if play else []
    if as_json:
        document = {
            "archive": {
                "hours": archive.hours, "frames": archive.frames, "shots": len(costs), "what": archive.description
            },
            "seconds_per_megapixel": seconds,
            "gpu_hours": work_s / 3600,
            "world": {name: value for name, value in asdict(world).items() if name != "gpus"},
            "courses": [{**asdict(course), "makespan_without_failures_s": calm.makespan_s} for course, calm in courses],
            "bounds": {str(count): max(work_s / count, longest_s) for count in counts},
        }  # fmt: skip
        print(json.dumps(document, indent=2))
    else:
        _print(archive, seconds, costs, counts, courses, world)
    return int(ExitCode.DONE)


def _play(costs: np.ndarray, world: World, gpus: int) -> Course:
    rows = bundled(costs.tolist(), float(costs.sum()) / gpus / _ROWS_PER_GPU)
    try:
        return simulate(rows, replace(world, gpus=gpus))
    except ValueError as error:
        raise UsageError(
            str(error), code="world-impossible", remedy="Longer-lived nodes or shorter segments."
        ) from error


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(
            f"--gpus {text!r} is no list of numbers.", code="usage", remedy="Write numbers with commas, as 1,8,64."
        )
    return counts


def _print(
    archive: Archive,
    seconds: float,
    costs: np.ndarray,
    counts: Sequence[int],
    courses: Sequence[tuple[Course, Course]],
    world: World,
) -> None:
    print(f"Archive: {archive.hours:.0f} hours, {archive.frames} frames, {len(costs)} shots ({archive.description})")
    print(f"Work: {costs.sum() / 3600:.0f} GPU hours at {seconds:g} s per frame and megapixel\n")
    table = Table(box=None, pad_edge=False)
    columns = ["GPUs", "at least"]
    if courses:
        columns += ["without failures", "predicted", "efficiency", "node failures", "work lost", "loading", "idle"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for at, count in enumerate(counts):
        cells = [str(count), duration(max(float(costs.sum()) / count, float(costs.max(initial=0.0))))]
        if courses:
            course, calm = courses[at]
            cells += [
                duration(calm.makespan_s),
                duration(course.makespan_s),
                f"{course.efficiency:.1%}",
                str(course.failures),
                duration(course.lost_s),
                duration(course.load_s),
                duration(course.idle_s),
            ]
        table.add_row(*cells)
    console = Console(width=max(Console().width, 120))
    console.print(table)
    if courses:
        life = "for ever" if world.node_mtbf_h is None else f"{world.node_mtbf_h:g} h on average"
        print(
            f"\nNodes of {world.gpus_per_node} GPUs live {life} and are back after {duration(world.repair_s)}; "
            f"{world.slow_share:.0%} are {world.slow_factor:g} times as slow; loading takes {duration(world.load_s)}; "
            f"a segment is {world.segment_s:.0f} GPU seconds. Seed {world.seed}."
        )
    else:
        print("\nAdd --simulate to play the job through, with failures and slow nodes.", file=sys.stderr)
