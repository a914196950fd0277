"""`upriver report`: everything that is known of a destination, collected for one page.

Reads manifests, the records of the jobs and a few frames; writes the page and nothing else. How the page looks is
`jobs.report_page`'s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import StorageError
from infra.job_records import area_places
from infra.storage import join, storage_for, video_source
from jobs.errors import ExitCode, UsageError
from jobs.manifest import MANIFEST_SUFFIX, Manifest, timestamp
from jobs.observation import (
    Area,
    final_failures,
    manifest_places,
    moment,
    read_areas,
    read_ledger,
    read_manifests,
    read_plans,
)
from jobs.records import LedgerRecord, VideoPlan
from jobs.standing import JobStatus, read_status
from jobs.stills import Pair, Spot, judge, pair

DEFAULT_SAMPLES = 12
_BINS = 60  # of the throughput
_PROBED = 300  # videos whose duration is looked up when no record has it


@dataclass(slots=True)
class VideoRow:
    """One video. `status`: restored, damaged, failed, running or waiting. Unknown figures are None.

    `worker_s` is the time that workers spent on it, `model_s` the part of it in the model; `fps` is frames over
    `worker_s`.
    """

    name: str
    status: str
    frames: int | None = None
    duration_s: float | None = None
    source_bytes: int | None = None
    result_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    worker_s: float | None = None
    model_s: float | None = None
    fps: float | None = None
    device: str = ""
    damage: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    finished_at: str = ""


@dataclass(frozen=True, slots=True)
class FailureRow:
    """Why a video failed, at its last attempt."""

    name: str
    failure_class: str
    message: str
    remedy: str
    attempts: int
    host: str
    time: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A video that was looked at: its lowest stretch decides its score."""

    name: str
    score: float
    agreement_db: float
    steadiness: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Shown:
    """A judged video with its pictures; `label` says why it is shown."""

    label: str
    judged: Judged
    pictures: Pair


@dataclass(slots=True)
class Report:
    """What the page says.

    `wall_s` and `mean_fps` are of the last run, if its records are there, else of everything. `throughput`: (seconds
    since the start, frames a second) over equal stretches of time.
    """

    destination: str
    source: str
    model: str
    made_at: str
    state: str
    started_at: str
    wall_s: float | None
    mean_fps: float | None
    videos: list[VideoRow]
    failures: list[FailureRow]
    throughput: list[tuple[float, float]]
    judged: list[Judged]
    shown: list[Shown]
    not_judged: list[str]

    def count(self, *statuses: str) -> int:
        """Return how many videos have one of these statuses."""
        return sum(video.status in statuses for video in self.videos)

    def total(self, figure: str) -> float:
        """Return the sum of a figure over all videos for which it is known."""
        return sum(getattr(video, figure) or 0 for video in self.videos)


def report_command(dst: str, *, output: Path, samples: int, as_json: bool) -> int:
    """Run `upriver report`: write the page and return 0.

    Raises:
        NoInputError: neither a job nor a result is at `dst`. UsageError: `output` would replace a result.
        StorageError: the destination cannot be read, or the page not written.
    """
    report = write_report(dst, output, samples=samples, quiet=as_json)
    if as_json:
        print(json.dumps(as_plain(report), indent=2))
    else:
        print(f"Wrote {output}: {report.count('restored', 'damaged')} restored, {report.count('failed')} failed.")
    return int(ExitCode.DONE)


def write_report(dst: str, output: Path, *, samples: int = DEFAULT_SAMPLES, quiet: bool = True) -> Report:
    """Collect everything about `dst` and write the page to the local file `output`.

    Args:
        samples: how many restored videos are judged by some of their frames; 0 shows no pictures.
    """
    from jobs.report_page import render

    if str(output) == dst or output.with_name(f"{output.name}{MANIFEST_SUFFIX}").exists():
        raise UsageError(
            f"{output} is a restored video.", code="report-is-result", remedy="Give the page another name."
        )
    report = collect(dst, samples=samples, quiet=quiet)
    storage_for(str(output)).write(str(output), render(report).encode())
    return report


def collect(dst: str, *, samples: int = DEFAULT_SAMPLES, quiet: bool = True) -> Report:
    """Return everything that the page says. Reads every manifest; decodes frames of at most `samples` videos."""
    status = read_status(dst)
    areas = read_areas(dst)
    manifests = read_manifests(manifest_places(dst))
    job = status.jobs[0] if status.jobs else None
    names = {run_id: name for area in reversed(areas) for name, run_id in area.job.videos.items()}
    finished = {_name(place, manifest, dst, names): manifest for place, manifest in manifests.items()}
    plans = _plans_by_name(areas[:1], job)
    videos = [_finished_row(name, manifest) for name, manifest in finished.items()]
    failures = _failures(dst, finished)
    videos += [_failed_row(failure, plans) for failure in failures]
    if job is not None:
        known = {video.name for video in videos}
        running = {video.name: video.frames for video in job.running if video.name not in known}
        videos += [_open_row(name, "running", plans) for name in running]
        skipped = {*areas[0].job.skipped, *known, *running}
        videos += [_open_row(name, "waiting", plans) for name in areas[0].job.videos if name not in skipped]
    videos.sort(key=lambda video: video.name)
    _look_up_durations(videos, finished, dst)
    judged, shown, not_judged = _judge(finished, samples, quiet)
    first = next(iter(manifests.values()), None)
    wall_s = _wall_s(job, manifests.values())
    return Report(
        destination=dst,
        source=job.source if job else "",
        model=job.model if job else (first.model.name if first else ""),
        made_at=timestamp(),
        state=job.state if job else "finished",
        started_at=job.started_at if job else "",
        wall_s=wall_s,
        mean_fps=_mean_fps(areas, manifests.values(), wall_s),
        videos=videos,
        failures=failures,
        throughput=_throughput(areas, list(manifests.values())),
        judged=judged,
        shown=shown,
        not_judged=not_judged,
    )


def as_plain(report: Report) -> dict[str, Any]:
    """Return plain values for `--json`: all rows, no pictures."""
    values = asdict(report)
    values.pop("shown")
    return values


def _name(place: str, manifest: Manifest, dst: str, names: dict[str, str]) -> str:
    if manifest.name:  # older manifests have none
        return manifest.name
    if manifest.run_id in names:
        return names[manifest.run_id]
    result = place.removesuffix(MANIFEST_SUFFIX)
    return result.removeprefix(join(dst, "")) if result != dst.rstrip("/") else result.rpartition("/")[2]


def _plans_by_name(areas: Sequence[Area], job: JobStatus | None) -> dict[str, VideoPlan]:
    """Return the plans of videos that are being restored; the others' would have to be read one by one for little."""
    if job is None or not areas:
        return {}
    ids = areas[0].job.videos
    plans = read_plans(areas[0].place, [ids[video.name] for video in job.running if video.name in ids])
    return {plan.name: plan for plan in plans.values()}


def _finished_row(name: str, manifest: Manifest) -> VideoRow:
    output, seconds = manifest.output, manifest.seconds
    worker_s = seconds["total"] if "total" in seconds else sum(seconds.values())
    return VideoRow(
        name=name,
        status="damaged" if manifest.damage else "restored",
        frames=output.frames,
        duration_s=manifest.duration_s,
        source_bytes=manifest.source.size_bytes,
        result_bytes=output.size_bytes,
        width=output.width,
        height=output.height,
        worker_s=worker_s or None,
        model_s=seconds.get("model"),
        fps=output.frames / worker_s if worker_s else None,
        device=manifest.model.device,
        damage=list(manifest.damage),
        warnings=list(manifest.warnings),
        finished_at=manifest.finished_at,
    )


def _open_row(name: str, status: str, plans: dict[str, VideoPlan]) -> VideoRow:
    plan = plans.get(name)
    if plan is None:
        return VideoRow(name, status)
    return VideoRow(
        name,
        status,
        frames=plan.frames,
        duration_s=plan.duration_s,
        source_bytes=plan.size_bytes,
        width=plan.out_width,
        height=plan.out_height,
        damage=list(plan.damage),
        warnings=list(plan.warnings),
    )


def _failed_row(failure: FailureRow, plans: dict[str, VideoPlan]) -> VideoRow:
    row = _open_row(failure.name, "failed", plans)
    row.warnings.append(f"{failure.failure_class}: see Failures")
    return row


def _failures(dst: str, finished: Iterable[str]) -> list[FailureRow]:
    """Return the videos that failed for good and were not restored since, by any job of the destination."""
    ledger = [record for area in area_places(dst) for record in read_ledger(area)]
    ledger.sort(key=lambda record: moment(record.time))
    last = final_failures(ledger)
    attempts: dict[str, int] = {}
    for record in ledger:
        attempts[record.name] = max(attempts.get(record.name, 0), record.attempt)
    done = set(finished)
    return [_failure(record, attempts[name]) for name, record in sorted(last.items()) if name not in done]


def _failure(record: LedgerRecord, attempts: int) -> FailureRow:
    return FailureRow(
        record.name, record.failure_class, record.message, record.remedy, attempts, record.host, record.time
    )


def _wall_s(job: JobStatus | None, manifests: Iterable[Manifest]) -> float | None:
    if job is not None:
        return job.elapsed_s
    spans = [
        (moment(each.finished_at).timestamp() - each.seconds.get("total", 0.0), moment(each.finished_at).timestamp())
        for each in manifests
    ]
    return max(end for _, end in spans) - min(start for start, _ in spans) if spans else None


def _mean_fps(areas: Sequence[Area], manifests: Iterable[Manifest], wall_s: float | None) -> float | None:
    """Frames of the last run over its time; videos that earlier runs finished do not count."""
    if areas:
        progress = areas[0].progress
        return progress.frames_done / progress.elapsed_s if progress and progress.elapsed_s > 0 else None
    return sum(each.output.frames for each in manifests) / wall_s if wall_s else None


def _look_up_durations(videos: Sequence[VideoRow], finished: dict[str, Manifest], dst: str) -> None:
    """Fill in durations that no record has, from the results' headers, where that is cheap."""
    from pipeline.video import Limits, VideoError, probe

    lacking = [video for video in videos if video.duration_s is None and video.name in finished]
    if len(lacking) > _PROBED:
        return
    limits = Limits(min_side=1, max_side=8 * 8192, max_pixels=16 * 8192 * 4320)
    for video in lacking:
        try:
            video.duration_s = probe(video_source(finished[video.name].output.path), limits=limits).duration_s
        except (VideoError, StorageError):  # moved away since: the manifest's figures stand
            continue


def _judge(finished: dict[str, Manifest], samples: int, quiet: bool) -> tuple[list[Judged], list[Shown], list[str]]:
    """Judge at most `samples` videos and choose what to show; names those whose files cannot be read any more."""
    from pipeline.errors import PipelineError

    spots: dict[str, tuple[Judged, Spot]] = {}
    failed = []
    for name in sample_names(finished, samples):
        if not quiet:
            print(f"judging {name}", file=sys.stderr)
        manifest = finished[name]
        try:
            found = judge(video_source(manifest.source.path), video_source(manifest.output.path))
        except (PipelineError, StorageError, OSError):
            failed.append(name)
            continue
        if not found:
            failed.append(name)
            continue
        lowest = min(found, key=lambda spot: spot.consistency.score)
        told = lowest.consistency
        spots[name] = (Judged(name, told.score, told.agreement_db, told.steadiness, lowest.at_s), lowest)
    ordered = sorted(spots.values(), key=lambda one: one[0].score)
    shown = []
    if ordered:
        shown.append(Shown("Lowest score", ordered[0][0], pair(ordered[0][1])))
    if len(ordered) > 1:
        middle = ordered[len(ordered) // 2]
        shown.append(Shown("Median score", middle[0], pair(middle[1])))
    return [one for one, _ in ordered], shown, failed


def sample_names(finished: dict[str, Manifest], samples: int) -> list[str]:
    """Return the videos to judge: up to half of them damaged ones, the rest evenly over all names."""
    damaged = _evenly(sorted(name for name, manifest in finished.items() if manifest.damage), samples // 2)
    others = sorted(name for name in finished if name not in damaged)
    return sorted([*damaged, *_evenly(others, samples - len(damaged))])


def _evenly(names: Sequence[str], count: int) -> list[str]:
    if count >= len(names):
        return list(names)
    return [names[(2 * k + 1) * len(names) // (2 * count)] for k in range(count)]


def _throughput(areas: Sequence[Area], manifests: Sequence[Manifest]) -> list[tuple[float, float]]:
    """Frames a second over time: by the driver's history, or by when each video was finished and how long it took."""
    history: list[tuple[float, float]] = []
    if areas and areas[0].progress is not None:
        history = [(at, float(frames)) for at, frames in areas[0].progress.history]
    elif manifests:
        history = _history_of(manifests)
    if len(history) < 2 or history[-1][0] <= history[0][0]:
        return []
    from jobs.forecast import frames_at

    start, end = history[0][0], history[-1][0]
    bins = min(_BINS, len(history) - 1)
    width = (end - start) / bins
    edges = [start + width * k for k in range(bins + 1)]
    counts = [frames_at(history, edge) for edge in edges]
    return [(edges[k], (counts[k + 1] - counts[k]) / width) for k in range(bins)]


def _history_of(manifests: Sequence[Manifest]) -> list[tuple[float, float]]:
    """(seconds, frames) as if each video had been restored at an even pace until it was finished."""
    spans = []
    for manifest in manifests:
        end = moment(manifest.finished_at).timestamp()
        spans.append((end - max(0.001, manifest.seconds.get("total", 0.001)), end, manifest.output.frames))
    start, end = min(span[0] for span in spans), max(span[1] for span in spans)
    points = []
    for k in range(_BINS + 1):
        at = start + (end - start) * k / _BINS
        points.append((at - start, sum(n * min(1.0, max(0.0, (at - a) / (b - a))) for a, b, n in spans)))
    return points
