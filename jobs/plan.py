"""What a restore job will do to each video: every picture is decoded once, its shots found, its frames counted.

A plan depends on source, model and options alone, so that it can be made on any machine and kept. The rows made of it
are causal tasks: a shot needs nothing from those before it. A long one may be split, and then each part begins as a
stream of its own, some frames early. Nothing is written here, and nothing is restored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from actors.errors import Failure, FailureClass, describe_failure
from actors.records import Row, RowOptions
from infra.cluster import quiet_data
from infra.settings import Settings
from infra.storage import video_source
from jobs.errors import UsageError
from jobs.records import Shot, VideoPlan
from jobs.sources import Item
from pipeline.errors import InputError
from pipeline.step_policy import StepPolicy

# Grows with every change that makes other shots or segments of the same source: older work is then not gone on with.
PLAN_VERSION = 2
# Videos planned in one run of Ray Data, each as a block of its own: what may be planned ahead of what is asked for.
_WAVE = 200


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Everything but source and model that a video's plan depends on.

    Attributes:
        row: how it is to be restored.
        seed: of the noise. numerics: what else changes pixels: number format and motion estimator.
        segment_seconds: length of a segment.
        deinterlace, cuts: as in the settings. max_pixels: largest frame accepted.
        split_seconds, warm_up_frames: longer shots become parts of that length, each after such a warm-up; None: never.
        step_policy: of videos whose steps are "auto".
    """

    row: RowOptions
    seed: int
    numerics: str
    segment_seconds: float
    deinterlace: Literal["auto", "on", "off", "pulldown"]
    cuts: bool
    max_pixels: int
    split_seconds: float | None
    warm_up_frames: int
    step_policy: dict[str, Any]

    def for_item(self, item: Item) -> PlanOptions:
        """Return the options with those that `item` has of its own."""
        own = dict(item.overrides)
        changed: dict[str, Any] = {name: own.pop(name) for name in ("seed", "deinterlace", "cuts") if name in own}
        if "scale" in own and "height" not in own:
            own["height"] = None  # a scale of its own beats the job's height
        row = RowOptions(**{**self.row, **own})  # type: ignore[typeddict-item]  # checked
        return replace(self, row=_with_policy(row, self.step_policy), **changed)


def plan_options(settings: Settings) -> PlanOptions:
    """Return what the settings, as they are in effect, say of plans.

    Raises:
        UsageError: parts of shots would be shorter than a segment.
    """
    if settings.split_seconds is not None and settings.split_seconds < settings.segment_seconds:
        raise UsageError(
            f"Parts of {settings.split_seconds:g} s are shorter than a segment, {settings.segment_seconds:g} s.",
            code="option-conflict",
            remedy="Parts are whole segments: raise --split-seconds, or lower --segment-seconds as well.",
        )
    settings = settings.in_effect()
    row = RowOptions(
        steps=settings.steps,
        scale=settings.scale,
        height=settings.height,
        codec=settings.codec,
        crf=settings.crf,
        preset=settings.preset,
        pix_fmt=settings.pix_fmt,
    )
    if settings.encoder != "software":
        row["encoder"] = settings.encoder
    if settings.fragmented:
        row["fragmented"] = True
    policy = _step_policy(settings)
    return PlanOptions(
        row=_with_policy(row, policy),
        seed=settings.seed,
        numerics=_numerics(settings),
        segment_seconds=settings.segment_seconds,
        deinterlace=settings.deinterlace,
        cuts=settings.cuts,
        max_pixels=settings.max_pixels,
        split_seconds=settings.split_seconds,
        warm_up_frames=settings.warm_up_frames,
        step_policy=policy,
    )


def _step_policy(settings: Settings) -> dict[str, Any]:
    """The whole policy as plain values: what a run is told apart by, and what its manifest says."""
    try:
        return StepPolicy.of(dict(settings.step_policy)).model_dump(mode="json")
    except InputError as error:
        raise UsageError(error.message, code="step-policy", remedy=error.remedy) from error


def _with_policy(row: RowOptions, policy: dict[str, Any]) -> RowOptions:
    """Return the options with the policy where it has an effect, and without it elsewhere."""
    row = RowOptions(**row)
    row.pop("step_policy", None)
    if row["steps"] == "auto":
        row["step_policy"] = policy
    return row


def _numerics(settings: Settings) -> str:
    """What changes pixels beside the options, as far as runs are told apart by it."""
    named = f"{settings.dtype}/{settings.flow}"
    if not settings.exact:
        if settings.backend != "auto":
            named = f"{named}/{settings.backend}"
        return named  # whatever the memory: a job must be able to go on where there is less of it
    tiles = "" if settings.memory_gb is None else f"/{settings.memory_gb:g} GB"
    return f"{named}/exact{tiles}"


def run_id(item: Item, options: PlanOptions, model_sha256: str) -> str:
    """Return the name of one video's run: equal for equal source, model, options and segments, different otherwise.

    It is known before the source is decoded. The source counts with its version and its name below SRC, not with its
    whole place: when the job goes on, it may be reached another way. `options` are the job's; those of the item are
    looked up here.
    """
    own = options.for_item(item)
    identity: dict[str, Any] = {
        "plan": PLAN_VERSION,
        "name": item.name,  # copies of one file have one version, and each of them is to be restored
        "source": item.version,
        "model": model_sha256,
        "seed": own.seed,
        "numerics": own.numerics,
        "options": dict(own.row),
        "segment_seconds": own.segment_seconds,
        "deinterlace": own.deinterlace,
        "cuts": own.cuts,
    }
    if own.split_seconds is not None:  # otherwise as before there were parts: finished work stays finished
        identity["split"] = [own.split_seconds, own.warm_up_frames]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def plan_video(item: Item, options: PlanOptions, model_sha256: str) -> VideoPlan:
    """Decode a source once, in constant memory (but 8 bytes for each frame), and say what will be done to it.

    The cut detector sees what a live stream's sees, so that the shots are those at which a stream would start afresh.

    Raises:
        PipelineError: the source cannot be read, or nothing in it decodes.
        ActorsError, UnsupportedOutput: the options do not go with it.
        StorageError: it cannot be reached.
    """
    from actors.output import check_output, output_size
    from pipeline.shots import CutDetector
    from pipeline.video import Limits, VideoReader, probe
    from pipeline.video_errors import UnreadableVideo

    own = options.for_item(item)
    limits = Limits(max_pixels=own.max_pixels)
    source = video_source(item.source)
    info = probe(source, limits=limits)
    lost = check_output(info, item.destination, own.row)
    detector = CutDetector() if own.cuts else None
    starts: list[int] = []  # number of each shot's first frame
    stamps = array("q")
    with VideoReader(source, deinterlace=own.deinterlace, limits=limits, threads=1, info=info) as reader:
        for frame in reader:
            is_cut = detector is not None and detector.update(frame.rgb_HWC)
            if is_cut or not starts:
                starts.append(len(stamps))
            stamps.append(frame.pts)
        deinterlaces, presented = reader.deinterlaces, reader.info
    if not stamps:
        raise UnreadableVideo(
            f"{item.name}: no picture in it can be decoded.", remedy="Recover it or use another copy."
        )
    out_width, out_height = output_size(info, own.row["scale"], own.row["height"])
    rate, segment = presented.average_rate, segment_frames(own.segment_seconds, presented.average_rate)
    longest = None if own.split_seconds is None else segment_frames(own.split_seconds, rate)
    return VideoPlan(
        run_id=run_id(item, options, model_sha256),
        name=item.name,
        source=item.source,
        source_version=item.version,
        size_bytes=item.size_bytes,
        destination=item.destination,
        width=info.width,
        height=info.height,
        out_width=out_width,
        out_height=out_height,
        frames=len(stamps),
        duration_s=float((stamps[-1] - stamps[0]) * info.time_base + 1 / rate),
        average_rate=str(rate),
        time_base=str(info.time_base),
        codec=info.codec,
        deinterlace=own.deinterlace if deinterlaces else "off",
        segment_frames=segment,
        shots=_tasks(starts, stamps, segment, longest, own.warm_up_frames),
        seed=own.seed,
        priority=item.priority,
        options=own.row,
        damage=list(reader.damage),
        warnings=lost,
    )


def segment_frames(seconds: float, rate: Fraction) -> int:
    """Return how many frames a segment of `seconds` has at the average rate; at least one."""
    return max(1, round(Fraction(seconds) * rate))


def part_lengths(frames: int, longest: int, segment: int) -> list[int]:
    """Return the lengths in frames of the parts of a shot: whole segments, so that these are the unsplit shot's.

    Parts are as equal as segments allow. What is less than a segment stays with the last part, so that none is tiny: it
    may be longer than `longest` by less than a segment. A part has a segment at least.
    """
    segments = max(1, frames // segment)
    parts = -(-segments // max(1, longest // segment))
    ends = [-(-segments * number // parts) * segment for number in range(parts)] + [frames]
    return [end - begin for begin, end in pairwise(ends)]


def rows_of(plan: VideoPlan, segments: str, states: str) -> list[Row]:
    """Return one row per shot or part of one; `segments` and `states` are the places of this video in the work area."""
    return [
        Row(
            row_id=f"{plan.run_id}-{shot.number:05d}",
            video_id=plan.run_id,
            name=plan.name,
            source=plan.source,
            source_version=plan.source_version,
            destination=plan.destination,
            segments=segments,
            states=states,
            shot=shot.number,
            first_index=shot.first_index,
            frames=shot.frames,
            start_pts=shot.start_pts,
            stop_pts=shot.stop_pts,
            warm_up=shot.warm_up,
            warm_up_pts=shot.start_pts if shot.warm_up_pts is None else shot.warm_up_pts,
            deinterlace=plan.deinterlace,
            segment_frames=plan.segment_frames,
            width=plan.width,
            height=plan.height,
            seed=plan.seed,
            cost=float((shot.warm_up + shot.frames) * plan.width * plan.height),
            options=json.dumps(plan.options),
        )
        for shot in plan.shots
    ]


@dataclass(frozen=True, slots=True)
class Planned:
    """An item with its plan, or with the reason why there is none."""

    item: Item
    plan: VideoPlan | None
    failure: Failure | None


def plan_all(
    items: Sequence[Item],
    options: PlanOptions,
    model_sha256: str,
    known: Callable[[Item, str], VideoPlan | None] | None = None,
) -> Iterator[Planned]:
    """Yield each item with its plan as soon as it is there: first the known ones, then those made by Ray Data tasks.

    A task plans one video on one CPU. One that dies (a decoder may) is tried once more, and is then a failure of its
    video alone. Needs a Ray that is connected, unless there is at most one video to plan.

    Args:
        known: gives the plan of an item and its run id where it was made before, else None; only the rest is planned.
    """
    rest = []
    for item in items:
        found = known(item, run_id(item, options, model_sha256)) if known is not None else None
        if found is None:
            rest.append(item)
        else:
            yield Planned(item, found, None)
    if len(rest) == 1:
        yield _planned(rest[0], options, model_sha256)
        return
    for start in range(0, len(rest), _WAVE):
        yield from _plan_wave(rest[start : start + _WAVE], options, model_sha256)


def _planned(item: Item, options: PlanOptions, model_sha256: str) -> Planned:
    try:
        return Planned(item, plan_video(item, options, model_sha256), None)
    except Exception as error:
        return Planned(item, None, describe_failure(error))


def _plan_wave(items: Sequence[Item], options: PlanOptions, model_sha256: str) -> Iterator[Planned]:
    import ray.data

    def plan_row(row: dict[str, Any]) -> dict[str, Any]:
        made = _planned(Item(**json.loads(row["item"])), options, model_sha256)
        plan = "" if made.plan is None else made.plan.model_dump_json()
        return {"at": row["at"], "plan": plan, "failure": json.dumps(made.failure)}

    rows = [{"at": at, "item": json.dumps(asdict(item))} for at, item in enumerate(items)]
    open_items = dict(enumerate(items))
    with quiet_data(target_max_block_size=1, max_errored_blocks=-1), warnings.catch_warnings():
        # Ray has no other way yet to bound retries than the keyword arguments that it announces to remove.
        warnings.simplefilter("ignore", category=DeprecationWarning)
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(plan_row, num_cpus=1, max_retries=1)
        for row in data.iter_rows():
            plan = VideoPlan.model_validate_json(row["plan"]) if row["plan"] else None
            yield Planned(open_items.pop(int(row["at"])), plan, json.loads(row["failure"]))
    for item in open_items.values():
        yield Planned(item, None, _died(item))


def _died(item: Item) -> Failure:
    return Failure(
        failure_class=FailureClass.LOST_ACTOR,
        code="planner-lost",
        message=f"The process that decoded {item.name} to plan it died twice.",
        remedy="The file may be broken in a way that crashes its decoder, or memory ran out: convert it first.",
    )


def _tasks(starts: list[int], stamps: array[int], segment: int, longest: int | None, warm_up: int) -> list[Shot]:
    """The shots that begin at `starts`, or the parts of those that have more than `longest` frames."""
    tasks: list[Shot] = []
    for start, stop in pairwise([*starts, len(stamps)]):
        first = start
        for frames in [stop - start] if longest is None else part_lengths(stop - start, longest, segment):
            end = first + frames
            before = min(warm_up, first - start)
            tasks.append(
                Shot(
                    number=len(tasks),
                    first_index=first,
                    frames=frames,
                    start_pts=stamps[first],
                    stop_pts=stamps[end] if end < len(stamps) else -1,
                    continues=first > start,
                    warm_up=before,
                    warm_up_pts=stamps[first - before] if before else None,
                )
            )
            first = end
    return tasks
