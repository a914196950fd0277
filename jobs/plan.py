"""What a restore job will do to each video: every picture is decoded once, its shots found, its frames counted.

A plan depends on source, model and options alone, so that it can be made on any machine and kept. The rows made of it
are causal tasks: a shot needs nothing from those before it. Nothing is written here, and nothing is restored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from actors.errors import Failure, FailureClass, describe_failure
from actors.records import Row, RowOptions
from infra.cluster import quiet_data
from infra.settings import Settings
from infra.storage import video_source
from jobs.records import Shot, VideoPlan
from jobs.sources import Item

# Grows with every change that makes other shots or segments of the same source: older work is then not gone on with.
PLAN_VERSION = 2
# Videos planned in one run of Ray Data, each as a block of its own: what the driver holds at a time.
_WAVE = 1000


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Everything but source and model that a video's plan depends on.

    Attributes:
        row: how it is to be restored.
        seed: of the noise. numerics: what else changes pixels: number format and motion estimator.
        segment_seconds: length of a segment.
        deinterlace, cuts: as in the settings. max_pixels: largest frame accepted.
    """

    row: RowOptions
    seed: int
    numerics: str
    segment_seconds: float
    deinterlace: Literal["auto", "on", "off", "pulldown"]
    cuts: bool
    max_pixels: int

    def for_item(self, item: Item) -> PlanOptions:
        """Return the options with those that `item` has of its own."""
        own = dict(item.overrides)
        changed: dict[str, Any] = {name: own.pop(name) for name in ("seed", "deinterlace", "cuts") if name in own}
        if "scale" in own and "height" not in own:
            own["height"] = None  # a scale of its own beats the job's height
        return replace(self, row=RowOptions(**{**self.row, **own}), **changed)  # type: ignore[typeddict-item]  # checked


def plan_options(settings: Settings) -> PlanOptions:
    """Return what the settings say of plans."""
    return PlanOptions(
        row=RowOptions(
            steps=settings.steps,
            scale=settings.scale,
            height=settings.height,
            codec=settings.codec,
            crf=settings.crf,
            preset=settings.preset,
            pix_fmt=settings.pix_fmt,
        ),
        seed=settings.seed,
        numerics=f"{settings.dtype}/{settings.flow}",
        segment_seconds=settings.segment_seconds,
        deinterlace=settings.deinterlace,
        cuts=settings.cuts,
        max_pixels=settings.max_pixels,
    )


def run_id(item: Item, options: PlanOptions, model_sha256: str) -> str:
    """Return the name of one video's run: equal for equal source, model, options and segments, different otherwise.

    It is known before the source is decoded. `options` are the job's; those of the item are looked up here.
    """
    own = options.for_item(item)
    identity = {
        "plan": PLAN_VERSION,
        "source": item.version,
        "model": model_sha256,
        "seed": own.seed,
        "numerics": own.numerics,
        "options": dict(own.row),
        "segment_seconds": own.segment_seconds,
        "deinterlace": own.deinterlace,
        "cuts": own.cuts,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def plan_video(item: Item, options: PlanOptions, model_sha256: str) -> VideoPlan:
    """Decode a source once, in constant memory, and say what will be done to it.

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
    starts: list[tuple[int, int]] = []  # number and time stamp of each shot's first frame
    frames = 0
    first_pts = last_pts = 0
    with VideoReader(source, deinterlace=own.deinterlace, limits=limits, threads=1, info=info) as reader:
        for frame in reader:
            is_cut = detector is not None and detector.update(frame.rgb_HWC)
            if is_cut or not starts:
                starts.append((frames, frame.pts))
            if frames == 0:
                first_pts = frame.pts
            last_pts = frame.pts
            frames += 1
        deinterlaces, presented = reader.deinterlaces, reader.info
    if not frames:
        raise UnreadableVideo(
            f"{item.name}: no picture in it can be decoded.", remedy="Recover it or use another copy."
        )
    out_width, out_height = output_size(info, own.row["scale"], own.row["height"])
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
        frames=frames,
        duration_s=float((last_pts - first_pts) * info.time_base + 1 / presented.average_rate),
        average_rate=str(presented.average_rate),
        time_base=str(info.time_base),
        codec=info.codec,
        deinterlace=own.deinterlace if deinterlaces else "off",
        segment_frames=segment_frames(own.segment_seconds, presented.average_rate),
        shots=_shots(starts, frames),
        seed=own.seed,
        priority=item.priority,
        options=own.row,
        damage=list(reader.damage),
        warnings=lost,
    )


def segment_frames(seconds: float, rate: Fraction) -> int:
    """Return how many frames a segment of `seconds` has at the average rate; at least one."""
    return max(1, round(Fraction(seconds) * rate))


def rows_of(plan: VideoPlan, segments: str, states: str) -> list[Row]:
    """Return one row per shot; `segments` and `states` are the places of this video in the work area."""
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
            deinterlace=plan.deinterlace,
            segment_frames=plan.segment_frames,
            width=plan.width,
            height=plan.height,
            seed=plan.seed,
            cost=float(shot.frames * plan.width * plan.height),
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


def _shots(starts: list[tuple[int, int]], frames: int) -> list[Shot]:
    ends = [*starts[1:], (frames, -1)]
    return [
        Shot(number=number, first_index=index, frames=end - index, start_pts=pts, stop_pts=stop_pts)
        for number, ((index, pts), (end, stop_pts)) in enumerate(zip(starts, ends, strict=True))
    ]
