"""How far a restore job is, as its driver writes it beside the result: for everybody who can read the destination.

    <work area>/job.json         JobRecord: written when the job starts and when it ends
    <work area>/progress.json    Progress: rewritten every few seconds

The work area is `DST.upriver/<job id>/` beside a file, and `DST/.upriver/<job id>/` inside a folder or prefix. What
else lies in it only the jobs themselves need (`jobs.records`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import StorageError
from infra.storage import join, storage_for

TOP = ".upriver"
JOB, PROGRESS = "job.json", "progress.json"
_R = TypeVar("_R", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class JobRecord(_Record):
    """The job as a whole. `videos` maps names to run ids; `skipped` were finished before."""

    job_id: str
    source: str
    destination: str
    state: Literal["planning", "running", "finished", "failed", "interrupted", "cancelled"]
    model: str
    model_sha256: str
    settings: dict[str, object]
    videos: dict[str, str]
    skipped: list[str]
    started_at: str
    ended_at: str | None
    exit_code: int | None
    host: str
    pid: int
    versions: dict[str, str]


class Progress(_Record):
    """How far the job is now.

    Attributes:
        done, failed: names of videos. running: frames done of each video that is being restored.
        frames_done counts frames restored by this run; frames_total, frames_left are of the whole job.
        history: (seconds since start, frames_done), thinned to at most 500 points.
        unplanned: number of videos whose frames are not counted yet, because their plans are still to be made.
    """

    updated_at: str
    elapsed_s: float
    actors: int
    videos_total: int
    done: list[str]
    failed: list[str]
    running: dict[str, int]
    frames_total: int
    frames_left: int
    frames_done: int
    history: list[tuple[float, int]]
    unplanned: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is by its own report. Frames are of the whole job; None before the first were counted."""

    state: str
    started_at: str
    ended_at: str | None
    updated_at: str | None
    videos_total: int
    videos_done: int
    videos_failed: int
    frames_total: int | None
    frames_done: int | None


def area_places(dst: str) -> list[str]:
    """Return the work areas of the jobs that write `dst`, be it a file, a folder or a prefix."""
    storage = storage_for(dst)
    tops = [f"{dst.rstrip('/')}{TOP}", join(dst, TOP)]
    return [place.rstrip("/") for top in tops for place in storage.folders(top)]


def read_standing(src: str, dst: str) -> Standing | None:
    """Return how far the latest job from `src` to `dst` is; None where it has written nothing, or has tidied up.

    Raises:
        StorageError: the destination cannot be reached.
    """
    found: list[tuple[JobRecord, Progress | None]] = []
    for place in area_places(dst):
        job = _read(join(place, JOB), JobRecord)
        if job is not None and job.source == src:
            found.append((job, _read(join(place, PROGRESS), Progress)))
    if not found:
        return None
    job, progress = max(found, key=lambda one: one[0].started_at)
    return Standing(
        state=job.state,
        started_at=job.started_at,
        ended_at=job.ended_at,
        updated_at=progress.updated_at if progress else None,
        videos_total=max(len(job.videos), progress.videos_total if progress else 0),
        videos_done=len(progress.done) if progress else 0,
        videos_failed=len(progress.failed) if progress else 0,
        frames_total=progress.frames_total if progress else None,
        frames_done=progress.frames_total - progress.frames_left if progress else None,
    )


def _read(place: str, kind: type[_R]) -> _R | None:
    """The record, None where there is none, or one of another version."""
    storage = storage_for(place)
    try:
        if storage.stat(place) is None:
            return None
        return kind.model_validate_json(storage.read(place))
    except ValidationError:
        return None
    except StorageError:
        if storage.stat(place) is None:  # gone since: a job that ends tidies up
            return None
        raise
