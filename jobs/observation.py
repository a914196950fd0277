"""What can be known of a restore job from outside: its records are read, nothing is ever written.

Works from any machine that can read the destination, while the job runs, after it, and after its driver was killed.
Knows neither how a person wants to see it (`jobs.status`, `jobs.report`) nor the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from actors.records import SegmentRecord
from infra.errors import StorageError
from infra.job_records import JOB, PROGRESS, TOP, JobRecord, Progress, area_places
from infra.storage import join, storage_for
from jobs.errors import JobsError
from jobs.manifest import MANIFEST_SUFFIX, Manifest
from jobs.records import LEDGER, PLAN, SEGMENTS, VIDEOS, LedgerRecord, VideoPlan

_READERS = 16  # small objects of an object store are read at once: each costs a round trip
_RECORD_NAME = re.compile(r"(\d{5})-(\d{6})\b.*\.json")
_Record = TypeVar("_Record", bound=BaseModel)


class NewerRecord(JobsError):
    """A job's record has fields that this version does not know."""


@dataclass(frozen=True, slots=True)
class Area:
    """One job's work area, with its two small records; `progress` is None before the first and without any."""

    place: str
    job: JobRecord
    progress: Progress | None

    @property
    def is_open(self) -> bool:
        """Whether the job says of itself that it has not ended."""
        return self.job.state in ("planning", "running")

    def last_sign(self) -> datetime:
        """When the driver last wrote."""
        ended = [moment(self.job.ended_at)] if self.job.ended_at else []
        updated = [moment(self.progress.updated_at)] if self.progress else []
        return max([moment(self.job.started_at), *updated, *ended])


@dataclass(slots=True)
class Recorded:
    """What segments and manifests prove of a job, whatever its driver last said.

    Attributes:
        finished: run ids of videos whose manifest exists.
        plans: by run id, of videos that have a folder in the work area.
        frames: finished frames by run id.
        last_sign: when the newest segment that was looked at was finished.
    """

    finished: set[str] = field(default_factory=set)
    plans: dict[str, VideoPlan] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    last_sign: datetime | None = None


def moment(stamp: str) -> datetime:
    """Return the point in time that a record's ISO 8601 stamp names; UTC where it names no zone."""
    read = datetime.fromisoformat(stamp)
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def read_areas(dst: str) -> list[Area]:
    """Return the jobs that write `dst`, those that have not ended first, then the latest first.

    Raises:
        StorageError: the destination cannot be reached. NewerRecord: a newer version wrote a job's record.
    """
    areas = []
    for place in area_places(dst):
        job = _read_if_there(join(place, JOB), JobRecord, strict=True)
        if job is not None:
            areas.append(Area(place, job, _read_if_there(join(place, PROGRESS), Progress)))
    areas.sort(key=lambda area: moment(area.job.started_at), reverse=True)
    return sorted(areas, key=lambda area: not area.is_open)


def read_ledger(area: str) -> list[LedgerRecord]:
    """Return every failed attempt of a job; a line that was cut short by a crash is passed over."""
    content = _content(join(area, LEDGER))
    records = []
    for line in (content or b"").splitlines():
        try:
            records.append(LedgerRecord.model_validate_json(line))
        except ValidationError:
            continue
    return records


def final_failures(ledger: Iterable[LedgerRecord]) -> dict[str, LedgerRecord]:
    """Return by video the last attempt after which there was none."""
    return {record.name: record for record in ledger if record.final}


def read_plans(area: str, run_ids: Iterable[str]) -> dict[str, VideoPlan]:
    """Return the plans of these videos, as far as they are there."""
    wanted = list(run_ids)
    found = _read_many([join(area, VIDEOS, run_id, PLAN) for run_id in wanted], VideoPlan)
    return {run_id: plan for run_id, plan in zip(wanted, found, strict=True) if plan is not None}


def manifest_places(dst: str) -> list[str]:
    """Return the places of all manifests below `dst`, or of the one beside it."""
    storage = storage_for(dst)
    beside = f"{dst.rstrip('/')}{MANIFEST_SUFFIX}"
    if storage.stat(beside) is not None:
        return [beside]
    return [
        info.place
        for info in storage.list(f"{dst.rstrip('/')}/")
        if info.place.endswith(MANIFEST_SUFFIX) and f"/{TOP}/" not in info.place
    ]


def read_manifests(places: Iterable[str]) -> dict[str, Manifest]:
    """Return manifests by place; what is none of ours is left out."""
    wanted = list(places)
    found = _read_many(wanted, Manifest)
    return {place: manifest for place, manifest in zip(wanted, found, strict=True) if manifest is not None}


def recorded(dst: str, area: Area) -> Recorded:
    """Return what segments and manifests prove. Lists everything: for jobs whose driver says nothing (any more)."""
    found = Recorded()
    manifests = read_manifests(manifest_places(dst))
    found.finished = {manifest.run_id for manifest in manifests.values()}
    videos = join(area.place, VIDEOS)
    names: dict[str, list[str]] = {}  # of the segment records, by run id
    for info in storage_for(videos).list(f"{videos}/"):
        run_id, _, rest = info.place.removeprefix(f"{videos}/").partition("/")
        folder, _, name = rest.partition("/")
        records = names.setdefault(run_id, [])
        if folder == SEGMENTS and _RECORD_NAME.fullmatch(name):
            records.append(name)
    found.plans = read_plans(area.place, names)
    newest = []
    for run_id, plan in found.plans.items():
        found.frames[run_id] = sum(_frames_of(plan, name) for name in names[run_id])
        if names[run_id] and run_id not in found.finished:
            newest += [join(videos, run_id, SEGMENTS, name) for name in _last_of_each_shot(names[run_id])]
    signs = [moment(record.finished_at) for record in _read_many(newest, SegmentRecord) if record is not None]
    found.last_sign = max(signs, default=None)
    return found


def current_fps(area: str, plan: VideoPlan) -> float | None:
    """Return how fast a video is being restored: by the last segment of each of its shots that is not finished."""
    segments = join(area, VIDEOS, plan.run_id, SEGMENTS)
    names = [info.place.rpartition("/")[2] for info in storage_for(segments).list(f"{segments}/")]
    done: dict[int, int] = {}
    names = [name for name in names if _RECORD_NAME.fullmatch(name)]
    for name in names:
        done[_shot(name)] = done.get(_shot(name), 0) + _frames_of(plan, name)
    open_shots = {shot.number for shot in plan.shots if done.get(shot.number, 0) < shot.frames}
    last = [name for name in _last_of_each_shot(names) if _shot(name) in open_shots]
    records = _read_many([join(segments, name) for name in last], SegmentRecord)
    rates = [
        record.frames / total
        for record in records
        if record is not None and (total := sum(record.seconds.values())) > 0
    ]
    return sum(rates) if rates else None


def _frames_of(plan: VideoPlan, record_name: str) -> int:
    """How many frames the segment has that a record's name stands for: the plan knows, the record need not be read."""
    match = _RECORD_NAME.fullmatch(record_name)
    assert match is not None
    shot, number = int(match[1]), int(match[2])
    if shot >= len(plan.shots):
        return 0
    return max(0, min(plan.segment_frames, plan.shots[shot].frames - number * plan.segment_frames))


def _shot(record_name: str) -> int:
    return int(record_name[:5])


def _last_of_each_shot(names: list[str]) -> list[str]:
    return list({_shot(name): name for name in sorted(names)}.values())


def _read_many(places: list[str], kind: type[_Record]) -> Iterator[_Record | None]:
    if not places:
        return iter(())
    with ThreadPoolExecutor(min(_READERS, len(places))) as pool:
        return iter(list(pool.map(lambda place: _read_if_there(place, kind, certain=True), places)))


def _read_if_there(place: str, kind: type[_Record], *, strict: bool = False, certain: bool = False) -> _Record | None:
    content = _content(place, certain=certain)
    if content is None:
        return None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        if strict:
            raise NewerRecord(
                f"{place} cannot be understood: {error.error_count()} fields are not as this version knows them.",
                code="record-unknown",
                remedy="Use the version of Upriver that runs the job.",
            ) from error
        return None


def _content(place: str, *, certain: bool = False) -> bytes | None:
    """The file's bytes, None without one. `certain`: it was listed a moment ago, so that asking first is a waste."""
    storage = storage_for(place)
    try:
        if not certain and storage.stat(place) is None:
            return None
        return storage.read(place)
    except StorageError:
        if storage.stat(place) is None:  # never there, or gone since: a job that ends tidies up
            return None
        raise
