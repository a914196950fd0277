"""How far the jobs of a destination are, as values: believed where the driver reports, counted where it is silent.

While a driver reports, its report and a few records are read, however large the job; when it has fallen silent,
segments and manifests are counted. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.errors import NoInputError
from jobs.forecast import Forecast, forecast
from jobs.manifest import Manifest
from jobs.observation import (
    Area,
    current_fps,
    final_failures,
    manifest_places,
    moment,
    read_areas,
    read_ledger,
    read_manifests,
    read_plans,
    recorded,
)
from jobs.records import LedgerRecord

SILENT_AFTER_S = 60.0
_SPEEDS_READ = 20  # of videos that are being restored
_MANIFESTS_READ = 500


@dataclass(slots=True)
class Running:
    """A video that is being restored, or that was when its driver fell silent."""

    name: str
    frames: int
    total: int | None
    fps: float | None


@dataclass(slots=True)
class Failed:
    """A video that will not be tried again in this run, and why."""

    name: str
    failure_class: str
    message: str
    remedy: str
    attempts: int


@dataclass(slots=True)
class JobStatus:
    """How far one job is.

    Attributes:
        state: as the job says, or "silent": it has not ended, and nothing was heard of it for a minute.
        counted_from: "progress": the driver's own report; "records": segments, manifests and ledger were counted.
        finished, waiting, skipped: numbers of videos; skipped ones were finished by an earlier run.
        frames_done, frames_total: of the videos that are not skipped, as far as they are planned; None: unknown.
        unplanned: number of videos that are not planned yet; the time left counts them as being as long as the others.
        left_s, low_s, high_s: time left and its range; None where it is too early to say.
        silent_s: since the last sign of life.
    """

    job_id: str
    area: str
    source: str
    destination: str
    state: str
    counted_from: str
    host: str
    pid: int
    model: str
    actors: int | None
    exit_code: int | None
    started_at: str
    ended_at: str | None
    elapsed_s: float
    silent_s: float
    videos_total: int
    finished: int
    waiting: int
    skipped: int
    running: list[Running]
    failed: list[Failed]
    frames_done: int | None
    frames_total: int | None
    fps: float | None
    left_s: float | None
    low_s: float | None
    high_s: float | None
    unplanned: int = 0

    @property
    def is_open(self) -> bool:
        """Whether the job may still go on by itself."""
        return self.state in ("planning", "running")


@dataclass(slots=True)
class Status:
    """All that is known of a destination. `results` counts finished videos; `finished` tells a few of them."""

    destination: str
    jobs: list[JobStatus]
    results: int
    finished: dict[str, Manifest]


def read_status(dst: str, now: datetime | None = None) -> Status:
    """Return how far the jobs that write `dst` are.

    Raises:
        NoInputError: there is neither a job nor a result. StorageError: the destination cannot be reached.
        NewerRecord: a newer version wrote a job's record.
    """
    at = now or datetime.now(UTC)
    jobs = [_job_status(dst, area, at) for area in read_areas(dst)]
    if jobs and jobs[0].is_open:
        return Status(dst, jobs, jobs[0].finished + jobs[0].skipped, {})
    places = manifest_places(dst)
    if not jobs and not places:
        raise NoInputError(
            f"There is neither a job nor a result at {dst}.",
            code="nothing-there",
            remedy="Give the destination that `upriver restore` was given.",
        )
    return Status(dst, jobs, len(places), {} if jobs else read_manifests(places[:_MANIFESTS_READ]))


def _job_status(dst: str, area: Area, now: datetime) -> JobStatus:
    job, progress = area.job, area.progress
    silent_s = max(0.0, (now - area.last_sign()).total_seconds())
    ledger = read_ledger(area.place)
    failures = final_failures(ledger)
    status = JobStatus(
        job_id=job.job_id,
        area=area.place,
        source=job.source,
        destination=job.destination,
        state=job.state,
        counted_from="progress",
        host=job.host,
        pid=job.pid,
        model=job.model,
        actors=progress.actors if progress else None,
        exit_code=job.exit_code,
        started_at=job.started_at,
        ended_at=job.ended_at,
        elapsed_s=max(0.0, (moment(job.ended_at) if job.ended_at else now).timestamp() - _timestamp(job.started_at)),
        silent_s=silent_s,
        videos_total=len(job.videos),
        finished=0,
        waiting=0,
        skipped=len(job.skipped),
        running=[],
        failed=[],
        frames_done=None,
        frames_total=None,
        fps=None,
        left_s=None,
        low_s=None,
        high_s=None,
    )
    if progress is not None and (not area.is_open or silent_s < SILENT_AFTER_S):
        _from_progress(status, area, ledger, failures)
    elif area.is_open or job.state in ("interrupted", "cancelled", "failed"):
        _from_records(status, dst, area, ledger, failures, now)
    else:
        status.failed = _failed(failures, failures, ledger)
        status.finished = status.videos_total - len(status.failed)
    return status


def _from_progress(
    status: JobStatus, area: Area, ledger: list[LedgerRecord], failures: dict[str, LedgerRecord]
) -> None:
    job, progress = area.job, area.progress
    assert progress is not None
    shown = list(progress.running)[:_SPEEDS_READ]
    plans = read_plans(area.place, [job.videos[name] for name in shown if name in job.videos])
    for name, frames in progress.running.items():
        plan = plans.get(job.videos.get(name, "")) if name in shown else None
        fps = current_fps(area.place, plan) if plan is not None and area.is_open else None
        status.running.append(Running(name, frames, plan.frames if plan else None, fps))
    status.failed = _failed(progress.failed, failures, ledger)
    status.videos_total = max(progress.videos_total, len(job.videos))
    status.finished = len(progress.done)
    status.waiting = max(0, status.videos_total - status.finished - len(status.running) - len(status.failed))
    status.frames_total = progress.frames_total
    status.frames_done = progress.frames_total - progress.frames_left
    status.unplanned = progress.unplanned
    history = [*progress.history, (progress.elapsed_s, progress.frames_done)]
    planned = status.videos_total - progress.unplanned
    guessed = progress.unplanned * progress.frames_total // planned if planned else 0
    _set_forecast(status, forecast(history, progress.frames_left + guessed))
    if not area.is_open:
        status.left_s = status.low_s = status.high_s = None


def _from_records(
    status: JobStatus,
    dst: str,
    area: Area,
    ledger: list[LedgerRecord],
    failures: dict[str, LedgerRecord],
    now: datetime,
) -> None:
    """Count what is there. The rate, if the driver left a history, is that of before it fell silent."""
    job, progress = area.job, area.progress
    status.counted_from = "records"
    found = recorded(dst, area)
    if found.last_sign is not None:
        status.silent_s = min(status.silent_s, max(0.0, (now - found.last_sign).total_seconds()))
    if area.is_open and status.silent_s >= SILENT_AFTER_S:
        status.state = "silent"
    done = {name for name, run_id in job.videos.items() if run_id in found.finished}
    open_videos = {name: run_id for name, run_id in job.videos.items() if name not in done}
    status.failed = _failed([name for name in failures if name in open_videos], failures, ledger)
    failed = {each.name for each in status.failed}
    status.running = [
        Running(name, found.frames[run_id], found.plans[run_id].frames, None)
        for name, run_id in open_videos.items()
        if name not in failed and found.frames.get(run_id)
    ]
    status.finished = len(done)
    status.waiting = max(0, status.videos_total - status.finished - len(failed) - len(status.running))
    if progress is not None:
        # What is finished may have lost its plan since: the driver's sum is the only one of all videos.
        frames_done = progress.frames_total - progress.frames_left
        status.frames_total = progress.frames_total
        status.frames_done = max(frames_done, sum(video.frames for video in status.running))
        left = progress.frames_total - status.frames_done
        _set_forecast(status, forecast(progress.history, left))
    elif found.plans:
        open_plans = [plan for run_id, plan in found.plans.items() if run_id not in found.finished]
        status.frames_total = sum(plan.frames for plan in open_plans)
        status.frames_done = sum(video.frames for video in status.running)


def _set_forecast(status: JobStatus, told: Forecast) -> None:
    status.fps, status.left_s, status.low_s, status.high_s = told.fps, told.left_s, told.low_s, told.high_s


def _failed(names: Iterable[str], failures: Mapping[str, LedgerRecord], ledger: list[LedgerRecord]) -> list[Failed]:
    attempts: dict[str, int] = {}
    for record in ledger:
        attempts[record.name] = max(attempts.get(record.name, 0), record.attempt)
    told = []
    for name in names:
        last = failures.get(name)
        if last is None:
            told.append(Failed(name, "unknown", "The ledger does not say why.", "Restore it again.", 0))
        else:
            told.append(Failed(name, last.failure_class, last.message, last.remedy, attempts[name]))
    return told


def _timestamp(stamp: str) -> float:
    return moment(stamp).timestamp()


def as_plain(told: Status) -> dict[str, Any]:
    """Return plain values for `--json`."""
    return {
        "destination": told.destination,
        "results": told.results,
        "jobs": [asdict(job) for job in told.jobs],
        "finished": [
            {
                "path": manifest.output.path,
                "frames": manifest.output.frames,
                "size_bytes": manifest.output.size_bytes,
                "finished_at": manifest.finished_at,
                "damaged": bool(manifest.damage),
            }
            for manifest in told.finished.values()
        ],
    }
