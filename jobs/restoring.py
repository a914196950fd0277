"""The middle of a restore job: rows go to the actors, records come back, and videos whose rows are done are assembled.

Rows go to the actors in rounds, of what is planned by then. A round has many rows for each actor and its longest first,
so that at its end the actors wait for the short ones only; plans are taken over meanwhile. Rows that fail go into a
later round, as often as their class of failure allows; a video that is given up stops no other. What is finished is
forgotten: the driver needs memory for a window of the archive. Knows how to try, not what a finished or failed video
means for the job: that is up to its callers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.assemble import SHA256_SUFFIX, Assembly, Draft, attempt
from actors.delivery import NO_EXTRAS, Extras, extra_places
from actors.errors import Failure, FailureClass, describe_failure
from actors.records import Row
from actors.upscaler import STALLED, EngineOptions
from infra.storage import join, storage_for
from jobs.errors import ExitCode, Interrupted
from jobs.ledger import Ledger, may_try_again, wait_s
from jobs.manifest import manifest_place
from jobs.plan import Planned, rows_of
from jobs.planning import Planning
from jobs.pool import PoolSize, Record, RunningRows
from jobs.records import VideoPlan
from jobs.sources import Item
from jobs.tally import Tally
from jobs.workarea import WorkArea

_LOOK_S = 0.2  # how long the loop waits for a record before it looks after everything else
# Open rows beyond which no more plans are taken over, and rows of one round: each holds a few kB of the driver.
MOST_OPEN = 20_000
MOST_IN_ROUND = 4_000
# Rows for each slot at which the first actors start, while planning goes on. With fewer, the round would soon be over
# and many actors idle at its end; with more, they would start later.
_BEGIN_WITH = 4


@dataclass(slots=True, eq=False)
class Video:
    """One video on its way.

    Attributes:
        rows: one per shot. open: numbers of the shots that are not finished.
        attempts: failed ones by shot; None is the video as a whole.
        not_before: by shot when it may be tried again, on the monotonic clock.
        given_up: it failed for the last time.
        finished: frames that were there when it was taken on.
    """

    item: Item
    plan: VideoPlan
    rows: dict[int, Row] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    attempts: dict[int | None, int] = field(default_factory=dict)
    not_before: dict[int | None, float] = field(default_factory=dict)
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
    extras: Extras = NO_EXTRAS


class Restoring:
    """Restores planned videos and calls back for each that is finished or given up.

    Args:
        size_for: the pool for a number of rows. engine_for: how the actors of a pool are set up.
        prepare: called with each plan that is taken over; returns it, or None where there is nothing to restore.
        on_round: called with all videos that are not finished, before rows begin; what it raises ends the job.
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
        prepare: Callable[[Planned], VideoPlan | None],
        on_round: Callable[[Sequence[Video]], None],
        on_finished: Callable[[Video, Draft], None],
        on_given_up: Callable[[Video, Failure], None],
        is_cancelled: Callable[[], bool],
        show: Callable[[str], None],
        assemblies: int = 2,
    ) -> None:
        self._area, self._ledger, self._tally, self._choices = area, ledger, tally, choices
        self._size_for, self._engine_for = size_for, engine_for
        self._prepare, self._on_round = prepare, on_round
        self._on_finished, self._on_given_up = on_finished, on_given_up
        self._is_cancelled, self._show = is_cancelled, show
        self._assemblies = assemblies
        self._videos: dict[str, Video] = {}
        self._to_assemble: list[Video] = []
        self._assembling: dict[Any, tuple[Video, float]] = {}
        self._hosts: dict[str, str] = {}  # where each row was last seen

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

    def run(self, planning: Planning) -> None:
        """Restore all videos that were added, and those that `planning` has.

        Raises:
            Interrupted: somebody cancelled the job.
            Exception: what `prepare` or `on_given_up` raised, or what the planning did.
        """
        try:
            while True:
                self._take_over(planning, self._rows_to_begin(planning))
                rows = self._next_rows()
                if rows:
                    self._round(rows, planning)
                elif self._assembling or self._to_assemble or self._open_rows() or not planning.finished:
                    self._look_after(pause_s=_LOOK_S)
                else:
                    return
        finally:
            self._stop_assemblies()

    def _rows_to_begin(self, planning: Planning) -> int:
        """How many open rows to wait for: enough to keep the actors busy, or, where planning needs their processors,
        as many as may be open."""
        if not planning.ahead:
            return MOST_OPEN
        size = self._size_for(MOST_OPEN)
        return min(MOST_OPEN, _BEGIN_WITH * size.actors * self._engine_for(size).slots)

    def _take_over(self, planning: Planning, wait_for: int = 0) -> None:
        """Take over plans that are there; wait for more until so many rows are open."""
        while not planning.finished and (is_open := sum(len(one.open) for one in self._videos.values())) < MOST_OPEN:
            planned = planning.next(_LOOK_S if is_open < wait_for else 0.0)
            if planned is not None:
                plan = self._prepare(planned)
                if plan is not None:
                    self.add(plan, planned.item)
            elif is_open >= wait_for:
                return
            self._look_after()

    def _open_rows(self) -> list[tuple[Video, Row]]:
        videos = [video for video in self._videos.values() if not video.given_up]
        return [(video, video.rows[shot]) for video in videos for shot in sorted(video.open)]

    def _next_rows(self) -> list[Row]:
        """Rows of the next round, those of the highest priority first, then the longest: the last to end should be
        short."""
        now = time.monotonic()
        rows = [pair for pair in self._open_rows() if pair[0].not_before.get(pair[1]["shot"], 0.0) <= now]
        rows.sort(key=lambda pair: (-pair[0].plan.priority, -pair[1]["cost"]))
        return [row for _, row in rows[:MOST_IN_ROUND]]

    def _round(self, rows: Sequence[Row], planning: Planning) -> None:
        """Try each row once."""
        self._on_round(list(self._videos.values()))
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
                    if planning.ahead:
                        self._take_over(planning)
                    looked = time.monotonic()
        for row in left.values():
            self._lost(row)
        self._videos = {run_id: video for run_id, video in self._videos.items() if not video.given_up}

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
            video.not_before[shot] = time.monotonic() + wait_s(failure, number)
            if shot is None and not video.open:
                self._to_assemble.append(video)
        elif not video.given_up:
            video.given_up = True
            self._tally.fail(video.plan.name)
            self._on_given_up(video, failure)
            video.open.clear()

    def _look_after(self, pause_s: float = 0.0) -> None:
        """Start and end assemblies; stop when somebody asked for it."""
        import ray

        if self._is_cancelled():
            raise Interrupted(ExitCode.TERMINATED, cancelled=True)
        now = time.monotonic()
        for video in [one for one in self._to_assemble if one.not_before.get(None, 0.0) <= now]:
            if len(self._assembling) == self._assemblies:
                break
            self._to_assemble.remove(video)
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
                self._videos.pop(video.plan.run_id, None)
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
        place = plan.destination
        # The manifest last: until then the file that is replaced has one that names what belongs to it.
        beside = (*extra_places(place), f"{place}{SHA256_SUFFIX}", manifest_place(place))
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
            stale=beside if choices.overwrite else (),
            compare=choices.compare,
            truth=choices.truth,
            exact=choices.exact,
            extras=choices.extras,
        )

    def _stop_assemblies(self) -> None:
        if self._assembling:
            import ray

            for reference in self._assembling:
                ray.cancel(reference, force=True)
            self._assembling.clear()
