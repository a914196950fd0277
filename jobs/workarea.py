"""The place for everything unfinished: `DST.upriver/<job>/` beside a file, `DST/.upriver/<job>/` inside a folder.

What lies in it is described in `jobs/records.py`. It is local or in an object store, as the destination is. A job that
is stopped leaves it, and the same command goes on from it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from actors.shot_store import RECORD_SUFFIX
from infra.job_records import JOB, PROGRESS, JobRecord, Progress
from infra.storage import join, storage_for
from jobs.errors import JobsError
from jobs.records import LEDGER, PLAN, SEGMENTS, STATES, VIDEOS, VideoPlan

# A driver that has said nothing for so long is dead or cut off; it writes every few seconds.
SILENT_S = 30.0


class JobRunning(JobsError):
    """Another driver works on the same job."""


class WorkArea:
    """One job's work area.

    Args:
        root: the file, folder or prefix that the job writes.
        is_folder: whether it is a folder or prefix.

    Attributes:
        place: of the area. ledger: place of the ledger. job_id: of the job.
    """

    def __init__(self, root: str, *, is_folder: bool, job_id: str) -> None:
        self._top = join(root, ".upriver") if is_folder else f"{root.rstrip('/')}.upriver"
        self._is_folder = is_folder
        self.job_id = job_id
        self.place = join(self._top, job_id)
        self.ledger = join(self.place, LEDGER)
        self._storage = storage_for(root)
        self._made: list[Path] = []

    def open(self) -> None:
        """Make the area, or take over what another run of the same command left.

        Raises:
            JobRunning: that run is still going on.
            StorageError: the area cannot be used.
        """
        self._refuse_second_driver()
        if self._storage.is_local:
            self._made = [folder for folder in Path(self.place).parents if not folder.exists()]
        self._storage.make_folder(self.place)

    def video(self, run_id: str) -> str:
        """Return the place of one video."""
        return join(self.place, VIDEOS, run_id)

    def segments(self, run_id: str) -> str:
        """Return the place of a video's segments and their records."""
        return join(self.video(run_id), SEGMENTS)

    def states(self, run_id: str) -> str:
        """Return the place of a video's stream states."""
        return join(self.video(run_id), STATES)

    def videos(self) -> set[str]:
        """Return the run ids of all videos that have something here; some stores name those that had for a while."""
        return {place.rstrip("/").rpartition("/")[2] for place in self._storage.folders(join(self.place, VIDEOS))}

    def plan(self, run_id: str) -> VideoPlan | None:
        """Return the plan of a video, if one was kept."""
        content = self._content(join(self.video(run_id), PLAN))
        try:
            return None if content is None else VideoPlan.model_validate_json(content)
        except ValidationError:  # another version's
            return None

    def keep_plan(self, plan: VideoPlan) -> None:
        """Keep the plan of a video."""
        self._storage.write(join(self.video(plan.run_id), PLAN), plan.model_dump_json(indent=1).encode() + b"\n")

    def recorded(self, run_id: str) -> Iterator[str]:
        """Yield the names of the records of a video's segments."""
        for info in self._storage.list(self.segments(run_id)):
            name = info.place.rpartition("/")[2]
            if name.endswith(RECORD_SUFFIX) and not name.startswith("."):
                yield name

    def finished_frames(self, plan: VideoPlan) -> dict[int, int]:
        """Return by shot how many of its frames are in segments from its beginning on, by the records' names alone."""
        names = set(self.recorded(plan.run_id))
        found = {}
        for shot in plan.shots:
            done = 0
            while done < shot.frames and f"{shot.number:05d}-{done // plan.segment_frames:06d}{RECORD_SUFFIX}" in names:
                done = min(done + plan.segment_frames, shot.frames)
            found[shot.number] = done
        return found

    def sweep(self, run_id: str, destination: str) -> None:
        """Remove what killed processes left half-written of a video. Only while none of its rows is being restored."""
        place = self.video(run_id)
        if not self._storage.is_local:
            for prefix in (f"{place}/", destination):
                self._storage.abort_uploads(prefix)
            return
        for folder, folders, names in os.walk(place.removeprefix("file://")):
            for name in [each for each in (*folders, *names) if each.startswith(".")]:
                self._storage.delete(os.path.join(folder, name))
            folders[:] = [each for each in folders if not each.startswith(".")]

    def remove_video(self, run_id: str) -> None:
        """Remove everything of one video."""
        self._storage.delete(self.video(run_id))

    def read_job(self) -> JobRecord | None:
        """Return what the last run of this job said of itself."""
        content = self._content(join(self.place, JOB))
        try:
            return None if content is None else JobRecord.model_validate_json(content)
        except ValidationError:
            return None

    def write_job(self, record: JobRecord) -> None:
        """Say what the job is and how it stands."""
        self._storage.write(join(self.place, JOB), record.model_dump_json(indent=1).encode() + b"\n")

    def write_progress(self, progress: Progress) -> None:
        """Say how far the job is."""
        self._storage.write(join(self.place, PROGRESS), progress.model_dump_json().encode() + b"\n")

    def close(self, *, keep: bool) -> None:
        """Remove the area; in a folder what the job said of itself stays, for `upriver report`.

        Args:
            keep: leave everything.
        """
        if keep:
            return
        if self._is_folder:
            if not self.videos():
                self._storage.delete(join(self.place, VIDEOS))
            return
        self.remove()

    def remove(self) -> None:
        """Remove the area and the folders that were made for it, as far as nothing else is in them."""
        self._storage.delete(self.place)
        if self._storage.is_local:
            for folder in dict.fromkeys([Path(self._top), *self._made]):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def _refuse_second_driver(self) -> None:
        job, content = self.read_job(), self._content(join(self.place, PROGRESS))
        if job is None or content is None or job.state not in ("planning", "running"):
            return
        if job.host == socket.gethostname() and (job.pid == os.getpid() or not _is_alive(job.pid)):
            return
        told = datetime.fromisoformat(str(json.loads(content)["updated_at"]))
        if (datetime.now(UTC) - told.replace(tzinfo=told.tzinfo or UTC)).total_seconds() < SILENT_S:
            raise JobRunning(
                f"The same job runs on {job.host} (process {job.pid}), by its records in {self.place}.",
                code="job-running",
                remedy=f"Wait for it, stop it with `upriver cancel`, or try again in {SILENT_S:.0f} s if it is dead.",
            )

    def _content(self, place: str) -> bytes | None:
        return self._storage.read(place) if self._storage.stat(place) is not None else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
