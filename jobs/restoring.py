"""The middle of a restore job: rows go to the actors, records come back, and videos whose rows are done are assembled.

Rows that fail go into the next round, as often as their class of failure allows; a video that is given up stops no
other. Knows how to try, not what a finished or failed video means for the job: that is up to its callers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.assemble import SHA256_SUFFIX, Assembly, Draft, attempt
from actors.errors import Failure, FailureClass, describe_failure
from actors.records import Row
from actors.upscaler import STALLED, EngineOptions
from infra.storage import join, storage_for
from jobs.errors import ExitCode, Interrupted
from jobs.ledger import Ledger, may_try_again, wait_s
from jobs.manifest import manifest_place
from jobs.plan import rows_of
from jobs.pool import PoolSize, Record, RunningRows
from jobs.records import VideoPlan
from jobs.sources import Item
from jobs.tally import Tally
from jobs.workarea import WorkArea

_LOOK_S = 0.2  # how long the loop waits for a record before it looks after everything else


@dataclass(slots=True, eq=False)
class Video:
    """One video on its way.

    Attributes:
        rows: one per shot. open: numbers of the shots that are not finished.
        attempts: failed ones by shot; None is the video as a whole.
        given_up: it failed for the last time.
        finished: frames that were there when it was taken on.
    """

    item: Item
    plan: VideoPlan
    rows: dict[int, Row] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    attempts: dict[int | None, int] = field(default_factory=dict)
    given_up: bool = False
    finished: int = 0


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user wants of every video beside its plan."""

    overwrite: bool
    compare: bool
    truth: str | None
    exact: bool
    max_pixels: int


class Restoring:
    """Restores planned videos and calls back for each that is finished or given up.

    Args:
        size_for: the pool for a number of rows. engine_for: how the actors of a pool are set up.
        on_finished: called with each video and what was assembled of it; what it raises counts as a failed attempt.
        on_given_up: called with each video that failed for the last time; what it raises ends the job.
        is_cancelled: asked now and then. show: called with a video's name whenever frames were done.
        assemblies: how many run at a time.
    """

    def __init__(
        self,
        *,
        area: WorkArea,
        ledger: Ledger,
        tally: Tally,
        choices: Choices,
        size_for: Callable[[int], PoolSize],
        engine_for: Callable[[PoolSize], EngineOptions],
        on_finished: Callable[[Video, Draft], None],
        on_given_up: Callable[[Video, Failure], None],
        is_cancelled: Callable[[], bool],
        show: Callable[[str], None],
        assemblies: int = 2,
    ) -> None:
        self._area, self._ledger, self._tally, self._choices = area, ledger, tally, choices
        self._size_for, self._engine_for = size_for, engine_for
        self._on_finished, self._on_given_up = on_finished, on_given_up
        self._is_cancelled, self._show = is_cancelled, show
        self._assemblies = assemblies
        self._videos: dict[str, Video] = {}
        self._to_assemble: list[Video] = []
        self._assembling: dict[Any, tuple[Video, float]] = {}
        self._hosts: dict[str, str] = {}  # where each row was last seen
        self._not_before = 0.0  # the next round, on the monotonic clock

    def add(self, plan: VideoPlan, item: Item) -> Video:
        """Take on a video; what is finished of it in the work area is counted as such."""
        finished = self._area.finished_frames(plan)
        rows = rows_of(plan, self._area.segments(plan.run_id), self._area.states(plan.run_id))
        video = Video(item, plan, {row["shot"]: row for row in rows})
        video.open = {shot.number for shot in plan.shots if finished[shot.number] < shot.frames}
        video.finished = sum(finished.values())
        video.attempts = self._ledger.attempts(plan.run_id)
        self._videos[plan.run_id] = video
        self._tally.plan(plan.name, plan.frames, finished)
        if not video.open:
            self._to_assemble.append(video)
        return video

    def run(self) -> None:
        """Restore all videos that were added.

        Raises:
            Interrupted: somebody cancelled the job.
            Exception: what `on_given_up` raised.
        """
        try:
            while True:
                rows = self._open_rows()
                if rows:
                    self._round(rows)
                while self._assembling or self._to_assemble:
                    self._look_after(pause_s=_LOOK_S)
                if not self._open_rows():
                    return
                while time.monotonic() < self._not_before:
                    self._look_after(pause_s=_LOOK_S)
        finally:
            self._stop_assemblies()

    def _open_rows(self) -> list[Row]:
        """Rows to restore, those of the highest priority first, then the longest: the last to end should be short."""
        videos = [video for video in self._videos.values() if not video.given_up]
        rows = [(video, video.rows[shot]) for video in videos for shot in sorted(video.open)]
        rows.sort(key=lambda pair: (-pair[0].plan.priority, -pair[1]["cost"]))
        return [row for _, row in rows]

    def _round(self, rows: Sequence[Row]) -> None:
        """Try each row once."""
        size = self._size_for(len(rows))
        self._tally.actors = size.actors
        left = {row["row_id"]: row for row in rows}
        with RunningRows(rows, self._engine_for(size), size) as running:
            looked = time.monotonic()
            while not running.finished:
                record = running.take(_LOOK_S)
                if record is not None:
                    self._take(record, left)
                if time.monotonic() - looked >= _LOOK_S:
                    self._look_after()
                    looked = time.monotonic()
        for row in left.values():
            self._lost(row)

    def _take(self, record: Record, left: dict[str, Row]) -> None:
        row = left.get(record["row_id"])
        if row is None:
            return
        video, shot, kind = self._videos[row["video_id"]], row["shot"], record["kind"]
        details = json.loads(record["details"])
        if kind == "started":
            self._hosts[record["row_id"]] = str(details["host"])
        if kind in ("progress", "segment", "done"):
            restored = not details.get("replayed", False)
            self._tally.advance(video.plan.name, shot, record["frames"], restored=restored)
            self._show(video.plan.name)
        if kind == "done":
            del left[record["row_id"]]
            video.open.discard(shot)
            if not video.open and not video.given_up:
                self._to_assemble.append(video)
        elif kind == "failed":
            del left[record["row_id"]]
            seconds, host = float(details.pop("seconds")), str(details.pop("host"))
            failure: Failure = details
            self._failed(video, shot, failure, seconds=seconds, host=host)

    def _lost(self, row: Row) -> None:
        """A row ended without saying how: its process did."""
        video = self._videos[row["video_id"]]
        stalled = join(self._area.video(row["video_id"]), STALLED, f"{row['shot']:05d}")
        where = f"{row['name']}, shot {row['shot']}"
        if storage_for(stalled).stat(stalled) is not None:
            storage_for(stalled).delete(stalled)
            failure = Failure(
                failure_class=FailureClass.TIMEOUT,
                code="row-stalled",
                message=f"The worker that restored {where} stood still and was ended.",
                remedy="If its frames are very large, allow more time in the setting stall_seconds.",
            )
        else:
            failure = Failure(
                failure_class=FailureClass.LOST_ACTOR,
                code="actor-lost",
                message=f"The worker that restored {where} died.",
                remedy="It may have lacked memory: try fewer --actors, --dtype bf16, or a smaller source.",
            )
        self._failed(video, row["shot"], failure, host=self._hosts.get(row["row_id"]))

    def _failed(
        self, video: Video, shot: int | None, failure: Failure, *, seconds: float = 0.0, host: str | None = None
    ) -> None:
        number = video.attempts.get(shot, 0) + 1
        video.attempts[shot] = number
        again = may_try_again(failure, number)
        self._ledger.add(
            video.plan.name,
            failure,
            final=not again,
            run_id=video.plan.run_id,
            shot=shot,
            attempt=number,
            seconds=seconds,
            host=host,
        )
        if again:
            self._not_before = max(self._not_before, time.monotonic() + wait_s(failure, number))
            if shot is None and not video.open:
                self._to_assemble.append(video)
        elif not video.given_up:
            video.given_up = True
            self._tally.fail(video.plan.name)
            self._on_given_up(video, failure)

    def _look_after(self, pause_s: float = 0.0) -> None:
        """Start and end assemblies; stop when somebody asked for it."""
        import ray

        if self._is_cancelled():
            raise Interrupted(ExitCode.TERMINATED, cancelled=True)
        if time.monotonic() >= self._not_before:
            while self._to_assemble and len(self._assembling) < self._assemblies:
                video = self._to_assemble.pop(0)
                # Beside actors that reserve every processor there would never be one for it: hence none is asked for.
                # By default Ray would put all such tasks on this node, with all their unfinished files.
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(attempt)
                self._assembling[task.remote(self._assembly(video))] = (video, time.monotonic())
        if self._assembling:
            ready, _ = ray.wait(list(self._assembling), timeout=pause_s)
            for reference in ready:
                video, began = self._assembling.pop(reference)
                self._assembled(video, reference, began)
        elif pause_s:
            time.sleep(pause_s)

    def _assembled(self, video: Video, reference: Any, began: float) -> None:
        import ray

        host: str | None = None
        seconds, shots = time.monotonic() - began, []
        failure: Failure
        try:
            told = ray.get(reference)
            if "draft" in told:
                self._on_finished(video, Draft(**told["draft"]))
                self._tally.finish(video.plan.name)
                return
            failure, shots = told["failure"], told["shots"]
            host, seconds = told["host"], told["seconds"]
        except ray.exceptions.RayError:
            failure = Failure(
                failure_class=FailureClass.LOST_ACTOR,
                code="assembly-lost",
                message=f"The process that assembled {video.plan.name} died.",
                remedy="It may have lacked memory or disk space.",
            )
        except Exception as error:
            failure = describe_failure(error)
        video.open |= set(shots)
        self._failed(video, None, failure, seconds=seconds, host=host)

    def _assembly(self, video: Video) -> Assembly:
        plan, choices = video.plan, self._choices
        stale = (manifest_place(plan.destination), f"{plan.destination}{SHA256_SUFFIX}") if choices.overwrite else ()
        return Assembly(
            run_id=plan.run_id,
            name=plan.name,
            source=plan.source,
            source_version=plan.source_version,
            destination=plan.destination,
            place=self._area.video(plan.run_id),
            segments=self._area.segments(plan.run_id),
            shots=tuple(shot.frames for shot in plan.shots),
            segment_frames=plan.segment_frames,
            width=plan.out_width,
            height=plan.out_height,
            deinterlace=plan.deinterlace,
            options=plan.options,
            max_pixels=choices.max_pixels,
            damaged=bool(plan.damage),
            overwrite=choices.overwrite,
            stale=stale,
            compare=choices.compare,
            truth=choices.truth,
            exact=choices.exact,
        )

    def _stop_assemblies(self) -> None:
        if self._assembling:
            import ray

            for reference in self._assembling:
                ray.cancel(reference, force=True)
            self._assembling.clear()
