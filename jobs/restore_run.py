"""One run of a restore job in its work area: plan what is pending, have it restored, complete it, say how it stands.

Other machines know the job by what is written here; see `jobs/records.py`.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from actors.assemble import Draft, write_checksum
from actors.errors import Failure, FailureClass
from actors.hardware import usable_cores
from actors.records import Delivered
from actors.upscaler import EngineOptions
from infra.cluster import Cluster, connected, joins_a_cluster, quiet_data
from infra.job_records import JobRecord
from infra.own_code import code_fingerprint
from infra.ray_jobs import runs_in_a_job
from infra.settings import Settings
from infra.storage import join, storage_for
from jobs.cancel import withdraw_cancel
from jobs.delivering import Delivering, Finished
from jobs.errors import ExitCode, Interrupted, TaskError, exit_code_of, exit_code_of_failure
from jobs.ledger import Ledger
from jobs.manifest import (
    Manifest,
    ModelRecord,
    OutputRecord,
    SourceRecord,
    Split,
    component_versions,
    timestamp,
    write_manifest,
)
from jobs.model import ResolvedModel
from jobs.nodes import Scratch, check_nodes
from jobs.plan import Planned, PlanOptions, plan_all, run_id
from jobs.plan_file import PlanFile
from jobs.planning import Planning
from jobs.pool import JOB_CONTEXT, PoolSize, pool_size, stopping_on_signals
from jobs.progress import Outcome, ProgressBar
from jobs.records import VideoPlan
from jobs.restoring import Choices, Restoring, Video
from jobs.room import check_room, room_needed
from jobs.sources import Item, Selection
from jobs.tally import Reporter, Tally
from jobs.workarea import WorkArea


@dataclass(slots=True)
class Report:
    """How a restore job ended.

    `wall_s` is the time from the first probe to the last manifest, without the start of Ray, which `ray_start_s` has;
    `prepare_s` is the part of it before that: probing, checking the model, and looking at what is finished.
    `warnings` are about the job as a whole.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    ray_start_s: float = 0.0
    prepare_s: float = 0.0
    wall_s: float = 0.0
    done_at: float | None = None  # last manifest, on the performance counter; Ray takes a second to stop
    ledger: str | None = None
    warnings: list[str] = field(default_factory=list)

    def exit_code(self) -> ExitCode:
        """Return the exit status of a job that ran to its end: see `jobs/errors.py`."""
        failed = [outcome for outcome in self.outcomes if outcome.failure is not None]
        if failed and len(failed) == len(self.outcomes):
            kinds = {exit_code_of_failure(outcome.failure["failure_class"]) for outcome in failed if outcome.failure}
            if kinds == {ExitCode.NO_INPUT}:
                return ExitCode.NO_INPUT
        if failed:
            return ExitCode.FAILURES
        damaged = any(outcome.status == "damaged" for outcome in self.outcomes)
        return ExitCode.DAMAGED if damaged else ExitCode.DONE


@dataclass(slots=True)
class RestoreRun:
    """One run; `report` is filled as it goes. The other fields are what `jobs.restore.RestoreJob` was told."""

    src: str
    dst: str
    settings: Settings
    options: PlanOptions
    choices: Choices
    selection: Selection
    model: ResolvedModel
    area: WorkArea
    report: Report
    keep: bool
    retry_failed: bool
    quiet: bool
    made: PlanFile | None = None
    _ledger: Ledger = field(init=False)
    _tally: Tally = field(init=False)
    _job: JobRecord = field(init=False)
    _planned_before: set[str] | None = None  # run ids whose plans an earlier run has kept
    _scratch: list[Scratch] = field(init=False, default_factory=list)
    _has_room: set[str] = field(init=False, default_factory=set)  # run ids for which room was looked for

    def run(
        self, pending: Sequence[Item], refused: Sequence[tuple[Item, Failure]], finished: Sequence[Finished] = ()
    ) -> None:
        """Restore `pending`; note `refused` as failed; have the extras of `finished` made.

        Raises:
            Interrupted: a signal came or somebody cancelled.
            JobsError, InfraError: the job as a whole is impossible, or its only video is.
        """
        self.area.open()
        with self._recorded([*pending, *(item for item, _ in refused), *(one.item for one in finished)]):
            self._ledger = Ledger(self.area.ledger)
            self._tally = Tally(len(pending) + len(refused) + len(finished), to_deliver=len(finished))
            with Reporter(self.area, self._tally) as reporter:
                for item, failure in refused:
                    self._refuse(item, failure)
                items = self._without_quarantined(pending)
                if items or finished:
                    self._restore(items, finished, reporter)
            if self._ledger.added and self.selection.is_folder:
                self.report.ledger = self._ledger.place

    @contextmanager
    def _recorded(self, items: Sequence[Item]) -> Iterator[None]:
        """Say in the work area what the job is and, at the end, how it ended; keep or remove the area accordingly."""
        before = self.area.read_job()
        self._job = self._job_record(items)
        withdraw_cancel(self.area.place)
        self.area.write_job(self._job)
        for name, old in (before.videos if before else {}).items():
            if self._job.videos.get(name, old) != old:
                self.area.remove_video(old)  # its source was changed: nothing of it can be used any more
        try:
            yield
        except BaseException as error:
            self._ended(error)
            raise
        self._note_end("finished", self.report.exit_code())
        there = set() if self.keep else self.area.videos()
        for run in self._job.videos.values():
            if run in there and not self._has_segments(run):
                self.area.remove_video(run)
        self.area.close(keep=self.keep)

    def _ended(self, error: BaseException) -> None:
        if isinstance(error, Interrupted):
            self._note_end("cancelled" if error.cancelled else "interrupted", error.exit_code)
            return
        self._note_end("failed", exit_code_of(error))
        if not (self.keep or self.selection.is_folder or any(map(self._has_segments, self._job.videos.values()))):
            self.area.remove()  # there is nothing to go on from

    def _has_segments(self, run: str) -> bool:
        return next(iter(self.area.recorded(run)), None) is not None

    def _note_end(self, state: Literal["finished", "failed", "interrupted", "cancelled"], code: ExitCode) -> None:
        ended = {"state": state, "ended_at": timestamp(), "exit_code": int(code)}
        self.area.write_job(self._job.model_copy(update=ended))

    def _job_record(self, items: Sequence[Item]) -> JobRecord:
        return JobRecord(
            job_id=self.area.job_id,
            source=self.src,
            destination=self.dst,
            state="planning",
            model=self.settings.model,
            model_sha256=self.model.sha256,
            settings=self.settings.model_dump(mode="json"),
            videos={item.name: self._run_id(item) for item in items},
            skipped=[outcome.name for outcome in self.report.outcomes if outcome.status == "skipped"],
            started_at=timestamp(),
            ended_at=None,
            exit_code=None,
            host=platform.node(),
            pid=os.getpid(),
            versions=component_versions(),
        )

    def _run_id(self, item: Item) -> str:
        return run_id(item, self.options, self.model.sha256)

    def _without_quarantined(self, pending: Sequence[Item]) -> list[Item]:
        """Leave out what an earlier run gave up; a single video that somebody asks for is always tried."""
        items = []
        for item in pending:
            record = None
            if self.selection.is_folder and not self.retry_failed:
                record = self._ledger.quarantined(self._run_id(item))
            if record is None:
                items.append(item)
                continue
            failure = Failure(
                failure_class=record.failure_class, code=record.code, message=record.message, remedy=record.remedy
            )
            self._tally.fail(item.name)
            again = "It was given up by an earlier run; --retry-failed tries it again."
            note = f"{record.message} {record.remedy} {again}"
            self.report.outcomes.append(Outcome(item.name, item.destination, "failed", notes=[note], failure=failure))
        return items

    def _restore(self, items: Sequence[Item], finished: Sequence[Finished], reporter: Reporter) -> None:
        plans = plan_all(items, self.options, self.model.sha256, self._known_plan)
        with ExitStack() as stack:
            if len(items) == 1 and not joins_a_cluster():
                # Planned here, before anything else is started; what cannot be planned ends the job. A cluster's nodes
                # are asked before the first picture is decoded.
                made = [plan for plan in plans if self._can_be_restored(plan)]
                items, plans = [plan.item for plan in made], iter(made)
            if not items and not finished:
                return
            cluster = self._connect(stack, items)
            if items:
                stack.enter_context(quiet_data(**JOB_CONTEXT))  # for both of the pipelines, which run side by side
                uses_gpus = pool_size(self.settings, cluster, len(items)).gpus_each > 0
                planning = stack.enter_context(Planning(plans, ahead=uses_gpus and len(items) > 1))
                bar = stack.enter_context(ProgressBar(quiet=self.quiet, lines=runs_in_a_job()))
                self._restoring(cluster, reporter, bar).run(planning)
            self._deliver(finished, cluster, reporter)
            self.report.done_at = time.perf_counter()

    def _known_plan(self, item: Item, run: str) -> VideoPlan | None:
        """The plan that an earlier run made."""
        if self._planned_before is None:
            self._planned_before = self.area.videos()
        plan = self.area.plan(run) if run in self._planned_before else None
        if plan is None:
            self._planned_before.discard(run)
            if self.made is not None:
                plan = self.made.find(item, run)
        return plan

    def _can_be_restored(self, made: Planned) -> bool:
        if made.plan is None:
            assert made.failure is not None
            self._refuse(made.item, made.failure)
        return made.plan is not None

    def _prepare(self, made: Planned) -> VideoPlan | None:
        """Keep a plan and tidy its place, before the first of its rows starts."""
        if not self._can_be_restored(made):
            return None
        assert made.plan is not None
        if made.plan.run_id not in (self._planned_before or ()):
            self.area.keep_plan(made.plan)
        self.area.sweep(made.plan.run_id, made.plan.destination)
        return made.plan

    def _begin_round(self, videos: Sequence[Video], cluster: Cluster) -> None:
        if any(video.plan.run_id not in self._has_room for video in videos):
            self._check_room(videos, cluster)
            self._has_room = {video.plan.run_id for video in videos}
        if self._job.state == "planning":
            self._job = self._job.model_copy(update={"state": "running"})
            self.area.write_job(self._job)

    def _connect(self, stack: ExitStack, items: Sequence[Item]) -> Cluster:
        cluster = stack.enter_context(connected(num_cpus=max(2, usable_cores())))
        self.report.ray_start_s = cluster.start_s
        stack.enter_context(stopping_on_signals())  # again: Ray has put its own handler in the place of ours
        files = [self.model.source] if Path(self.model.source).is_absolute() else []
        files += [self.choices.truth] if self.choices.truth else []
        self._scratch = check_nodes(cluster, self.area.place, items, files)
        return cluster

    def _check_room(self, videos: Sequence[Video], cluster: Cluster) -> None:
        """Refuse to begin what will not fit; say where it is narrow."""
        rows = pool_size(self.settings, cluster, sum(len(video.open) for video in videos)).actors * self.settings.slots
        root = self.selection.root
        room = room_needed(
            [video.plan for video in videos],
            rows=rows,
            assemblies=_assemblies(cluster),
            finished={video.plan.run_id: _finished_frames(video) for video in videos},
            keep=self.keep,
            remote=not storage_for(root).is_local,
        )
        for warning in check_room(room, join(root, "probe") if self.selection.is_folder else root, self._scratch):
            if warning in self.report.warnings:
                continue
            self.report.warnings.append(warning)
            print(f"upriver: {warning}", file=sys.stderr)

    def _deliver(self, finished: Sequence[Finished], cluster: Cluster, reporter: Reporter) -> None:
        """Have extras made of what was finished before."""

        def done(result: Finished, delivered: Delivered) -> None:
            item = result.item
            self._tally.finish(item.name)
            notes = [f"finished before; now beside it: {_named(delivered)}", *delivered.warnings]
            self.report.outcomes.append(Outcome(item.name, item.destination, "skipped", notes=notes))

        def given_up(result: Finished, failure: Failure) -> None:
            self._tally.fail(result.item.name)
            self._failed(result.item.name, result.item.destination, failure)

        for result in finished:
            self.area.sweep(result.run_id, result.item.destination)
        Delivering(
            area=self.area,
            ledger=self._ledger,
            extras=self.choices.extras,
            overwrite=self.choices.overwrite,
            on_delivered=done,
            on_given_up=given_up,
            is_cancelled=lambda: reporter.cancelled,
            at_once=_assemblies(cluster),
        ).run(finished)

    def _restoring(self, cluster: Cluster, reporter: Reporter, bar: ProgressBar) -> Restoring:
        settings = self.settings

        def engine_for(size: PoolSize) -> EngineOptions:
            return EngineOptions(
                model=self.model.source,
                device=settings.device,
                dtype=settings.dtype,
                backend=settings.backend,
                flow=settings.flow,
                threads=size.threads_each,
                max_pixels=settings.max_pixels,
                version=code_fingerprint(),
                slots=settings.slots,
                stall_s=settings.stall_seconds,
                memory_gb=settings.memory_gb,
                model_sha256=self.model.sha256,
                exact=settings.exact,
            )

        return Restoring(
            area=self.area,
            ledger=self._ledger,
            tally=self._tally,
            choices=self.choices,
            size_for=lambda rows: pool_size(settings, cluster.now(), rows),
            engine_for=engine_for,
            prepare=self._prepare,
            on_round=lambda videos: self._begin_round(videos, cluster),
            on_finished=self._complete,
            on_given_up=self._give_up,
            is_cancelled=lambda: reporter.cancelled,
            show=lambda name: bar.show(name, self._tally.frames_shown, self._tally.frames_total),
            assemblies=_assemblies(cluster),
        )

    def _refuse(self, item: Item, failure: Failure) -> None:
        """A video that cannot even be planned."""
        self._ledger.add(item.name, failure, final=True, run_id=self._run_id(item))
        self._tally.fail(item.name)
        self._failed(item.name, item.destination, failure)

    def _give_up(self, video: Video, failure: Failure) -> None:
        self._failed(video.plan.name, video.plan.destination, failure)

    def _failed(self, name: str, destination: str, failure: Failure) -> None:
        # No other video would fare better with a model that does not load.
        if not self.selection.is_folder or failure["failure_class"] == FailureClass.MODEL:
            raise TaskError(
                failure["message"],
                code=failure["code"],
                remedy=failure["remedy"],
                failure_class=failure["failure_class"],
            )
        note = f"{failure['message']} {failure['remedy']}"
        self.report.outcomes.append(Outcome(name, destination, "failed", notes=[note], failure=failure))

    def _complete(self, video: Video, draft: Draft) -> None:
        """The result has its place: write its checksum and then its manifest, and tidy up."""
        plan = video.plan
        manifest = self._manifest(plan, draft)
        write_checksum(plan.destination, draft)
        write_manifest(plan.destination, manifest, if_absent=True)
        if not self.keep:
            self.area.remove_video(plan.run_id)
        self.report.outcomes.append(
            Outcome(
                plan.name,
                plan.destination,
                "damaged" if plan.damage else "restored",
                frames=draft.frames,
                seconds=manifest.seconds,
                size=f"{plan.width}x{plan.height} -> {draft.width}x{draft.height}",
                notes=[*plan.damage, *manifest.warnings, *draft.extras.warnings],
            )
        )

    def _manifest(self, plan: VideoPlan, draft: Draft) -> Manifest:
        return Manifest(
            run_id=plan.run_id,
            name=plan.name,
            duration_s=plan.duration_s,
            source=SourceRecord(
                path=plan.source,
                size_bytes=plan.size_bytes,
                version=plan.source_version,
                sha256=draft.source_sha256,
            ),
            output=OutputRecord(
                path=plan.destination,
                size_bytes=draft.size_bytes,
                sha256=draft.sha256,
                frames=draft.frames,
                width=draft.width,
                height=draft.height,
            ),
            model=ModelRecord(
                name=self.settings.model,
                sha256=self.model.sha256,
                device=", ".join(draft.devices),
                dtype=", ".join(draft.dtypes),
                flow=", ".join(draft.flows),
            ),
            seed=plan.seed,
            options={
                **plan.options,
                "deinterlace": plan.deinterlace,
                "segment_frames": plan.segment_frames,
                "exact": self.settings.exact,
                **self._split_options(),
            },
            damage=plan.damage,
            warnings=list(dict.fromkeys([*plan.warnings, *draft.warnings])),
            cuts=[shot.first_index for shot in plan.shots[1:] if not shot.continues],
            splits=[Split(first_index=at.first_index, warm_up=at.warm_up) for at in plan.shots if at.continues],
            parts=draft.parts,
            seconds={name: round(value, 3) for name, value in draft.seconds.items()},
            versions=component_versions(),
            finished_at=timestamp(),
            extras=draft.extras,
        )

    def _split_options(self) -> dict[str, object]:
        if self.settings.split_seconds is None:
            return {}
        return {"split_seconds": self.settings.split_seconds, "warm_up_frames": self.settings.warm_up_frames}


def _named(delivered: Delivered) -> str:
    """Extras in words, by what their names end with."""
    kinds = {one.name.partition("/")[0].rpartition(".")[2] for one in delivered.files}
    return " and ".join(sorted(kinds))


def _assemblies(cluster: Cluster) -> int:
    """How many videos are put together at a time."""
    return 2 * cluster.nodes


def _finished_frames(video: Video) -> int:
    """Frames of shots that are done, or that were there when the video was taken on, whichever is more."""
    is_open = sum(shot.frames for shot in video.plan.shots if shot.number in video.open)
    return max(video.finished, video.plan.frames - is_open)
