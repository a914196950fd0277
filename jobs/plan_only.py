"""`upriver restore --plan-only`: what would be done, and what it would cost. Nothing is written to the destination.

What is finished is left out, and what is known is not planned again: the figures are those of the same command without
`--plan-only`, given now.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.errors import Failure
from actors.hardware import usable_cores
from infra.cluster import Cluster, connected, joins_a_cluster
from infra.preflight import in_words
from infra.settings import Settings
from infra.storage import storage_for
from jobs.errors import ExitCode
from jobs.estimate import Cost, Estimate, estimate, known_cost, row_seconds, shots_in
from jobs.forecast import duration
from jobs.nodes import check_nodes
from jobs.plan import Planned, plan_all
from jobs.plan_file import read_plan_file, write_plan_file
from jobs.pool import pool_size
from jobs.records import VideoPlan
from jobs.restore import RestoreJob, Survey
from jobs.room import result_bytes, room_needed
from jobs.sources import Item

_HOUR = 3600.0


def plan_only_command(
    job: RestoreJob, *, plan_file: str | None, seconds_per_megapixel: float | None, keep: bool, as_json: bool
) -> int:
    """Plan what `job` would restore, print it, and return the exit status.

    Args:
        plan_file: where plans are taken from, as far as they hold, and written to.
        seconds_per_megapixel: of one worker, per frame of a million source pixels; None: what is known.

    Raises:
        JobsError, InfraError, PipelineError: nothing can be planned; the message says why.
    """
    survey = job.survey()
    made = read_plan_file(plan_file, may_be_absent=True) if plan_file is not None else None
    there = survey.area.videos()

    def known(item: Item, run: str) -> VideoPlan | None:
        plan = survey.area.plan(run) if run in there else None
        return plan or (made.find(item, run) if made is not None else None)

    several = len(survey.pending) > 1 or joins_a_cluster()
    with connected(num_cpus=usable_cores()) if several else nullcontext(_this_machine(job.settings)) as cluster:
        if several:
            check_nodes(cluster, None, survey.pending)
        planned = list(plan_all(survey.pending, job.options, survey.model.sha256, known))
    plans = sorted((one.plan for one in planned if one.plan is not None), key=lambda plan: (-plan.priority, plan.name))
    failures = [*_failures(planned), *((item.name, failure) for item, failure in survey.refused)]
    cost = known_cost(job.selection.root, job.settings, survey.model.sha256, seconds_per_megapixel)
    total = _estimate(job, survey, plans, len(failures), cost, cluster, keep=keep)
    document = {
        "estimate": asdict(total),
        "seconds_per_megapixel": cost.seconds_per_megapixel,
        "videos": [plan.model_dump() for plan in plans],
        "failures": [{"name": name, **failure} for name, failure in failures],
    }
    if plan_file is not None:
        write_plan_file(plan_file, document)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print(plans, failures, total, cost)
    if not plans and failures:
        return int(ExitCode.NO_INPUT)
    return int(ExitCode.FAILURES if failures else ExitCode.DONE)


def _failures(planned: Sequence[Planned]) -> list[tuple[str, Failure]]:
    return [(one.item.name, one.failure) for one in planned if one.failure is not None]


def _this_machine(settings: Settings) -> Cluster:
    """What Ray would find here, without starting it."""
    gpus = 0
    if settings.device.partition(":")[0] in ("auto", "cuda"):
        import torch

        gpus = torch.cuda.device_count()
    return Cluster(address="local", local=True, nodes=1, cpus=max(2, usable_cores()), gpus=gpus, start_s=0.0)


def _estimate(
    job: RestoreJob,
    survey: Survey,
    plans: Sequence[VideoPlan],
    failures: int,
    cost: Cost,
    cluster: Cluster,
    *,
    keep: bool,
) -> Estimate:
    size = pool_size(job.settings, cluster, sum(len(plan.shots) for plan in plans))
    storage = storage_for(job.selection.root)
    done = {plan.run_id: sum(survey.area.finished_frames(plan).values()) for plan in plans}
    room = room_needed(
        plans,
        rows=size.actors * job.settings.slots,
        assemblies=2 * cluster.nodes,
        finished=done,
        keep=keep,
        remote=not storage.is_local,
    )
    return estimate(
        plans,
        failures,
        cost,
        actors=size.actors,
        free_bytes=storage.free_bytes(job.selection.root),
        room=room,
        on_gpu=size.gpus_each > 0,
        finished=len(survey.finished),
        frames_finished=sum(done.values()),
    )


def _print(plans: Sequence[VideoPlan], failures: Sequence[tuple[str, Failure]], total: Estimate, cost: Cost) -> None:
    table = Table(box=None, pad_edge=False)
    has_parts = total.tasks > total.shots
    for column in ("video", "size", "frames", "shots", *["parts"] * has_parts, "film", "one worker", "result"):
        is_text = column in ("video", "size")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "video", overflow="fold")
    for plan in plans:
        seconds = None
        if cost.seconds_per_megapixel is not None:
            seconds = sum(row_seconds([plan], cost.seconds_per_megapixel))
        table.add_row(
            Text(plan.name),
            f"{plan.width}x{plan.height} -> {plan.out_width}x{plan.out_height}",
            f"{plan.frames:,}",
            f"{shots_in(plan):,}",
            *[f"{len(plan.shots):,}"] * has_parts,
            duration(plan.duration_s),
            "?" if seconds is None else duration(seconds),
            in_words(result_bytes(plan)),
        )
    if plans:
        Console(width=max(Console().width, 120)).print(table)
        print()
    for plan in plans:
        for note in [*(f"damage: {text}" for text in plan.damage), *plan.warnings]:
            print(f"{plan.name}: {note}")
    for name, failure in failures:
        print(f"{name}: {failure['message']} {failure['remedy']}", file=sys.stderr)
    for line in _totals(total):
        print(line)
    if not total.fits:
        print("That does not fit: the command would refuse to begin.", file=sys.stderr)


def _parts(total: Estimate) -> str:
    if total.tasks == total.shots:
        return ""
    share = total.warm_up_frames / total.frames
    return f", in {total.tasks:,} parts with {total.warm_up_frames:,} frames of warm-up besides ({share:.2%} more)"


def _totals(total: Estimate) -> list[str]:
    """What the whole job is and takes, a line for each figure."""
    videos = f"{total.videos:,}"
    if total.finished:
        videos += f", and {total.finished:,} that are finished"
    if total.failures:
        videos += f", and {total.failures:,} that cannot be restored"
    frames = f"{total.frames:,}"
    if total.frames_finished:
        frames += f", of which {total.frames_finished:,} are done"
    lines = [
        f"videos    {videos}",
        f"shots     {total.shots:,}{_parts(total)}",
        f"frames    {frames}",
        f"film      {duration(total.hours * _HOUR)} ({total.hours:,.2f} hours)",
    ]
    workers = f"{total.actors:,} worker{'' if total.actors == 1 else 's'}"
    if total.gpu_hours is None or total.wall_hours is None:
        lines.append(f"time      not known: it rests on {total.rests_on}")
    else:
        unit = "GPU hours" if total.on_gpu else "worker hours"
        lines += [
            f"time      about {duration(total.wall_hours * _HOUR)} with {workers}, if nothing fails",
            f"work      {total.gpu_hours:,.2f} {unit}; this rests on {total.rests_on}",
        ]
    free = "" if total.free_bytes is None else f"; {in_words(total.free_bytes)} are free"
    work = in_words(total.work_bytes)
    lines.append(f"storage   about {in_words(total.result_bytes)} of results, at most {work} beside them{free}")
    if total.scratch_bytes:
        lines.append(f"          and {in_words(total.scratch_bytes)} in the temporary folder of each node")
    return lines
