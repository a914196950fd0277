"""`upriver restore`: select sources, plan them, have them restored and assembled, tell how it went.

What becomes visible at the destination is whole: first the video, then its checksum, last its manifest. Until then
everything lies in a work area. A job that is stopped, killed or fails leaves it, and the same command goes on from it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from actors.assemble import is_published, read_draft
from actors.delivery import Extras, missing, refuse_foreign
from actors.errors import Failure, describe_failure
from actors.records import Delivered
from infra.cluster import joins_a_cluster
from infra.settings import LoadedSettings, Settings, ladder_heights, load_settings
from infra.storage import join, storage_for, video_source, whole_path
from jobs.delivering import Finished
from jobs.errors import NoInputError, UsageError
from jobs.manifest import finished_already, read_manifest
from jobs.model import ResolvedModel, resolve_model
from jobs.plan import PlanOptions, plan_options, run_id
from jobs.plan_file import PlanFile, read_plan_file
from jobs.pool import stopping_on_signals
from jobs.progress import Outcome, print_summary
from jobs.restore_run import Report, RestoreRun
from jobs.restoring import Choices
from jobs.sources import Item, Selection, select
from jobs.workarea import WorkArea

_LOOKS_AT_ONCE = 16  # destinations that are looked at together


def restore_command(
    src: str,
    dst: str,
    *,
    flags: Mapping[str, object],
    config: Path | None,
    compare: bool,
    truth: Path | None,
    overwrite: bool,
    as_json: bool,
    keep: bool = False,
    retry_failed: bool = False,
    limit: int | None = None,
    shuffle: int | None = None,
    priority: Sequence[str] = (),
    plan_only: bool = False,
    plan_file: str | None = None,
    seconds_per_megapixel: float | None = None,
) -> int:
    """Run `upriver restore` and return its exit status; prints the summary, or JSON; with `plan_only` the plan.

    Raises:
        JobsError, InfraError, ActorsError, PipelineError: nothing could be restored; the message says why.
    """
    loaded = load_settings(flags, config)
    _refuse_contradictions(loaded, compare, truth)
    job = RestoreJob(
        src,
        dst,
        loaded.values,
        compare=compare,
        truth=truth,
        overwrite=overwrite,
        keep=keep,
        retry_failed=retry_failed,
        limit=limit,
        shuffle=shuffle,
        priority=priority,
        quiet=as_json,
        plan_file=plan_file,
    )
    if plan_only:
        from jobs.plan_only import plan_only_command

        return plan_only_command(
            job, plan_file=plan_file, seconds_per_megapixel=seconds_per_megapixel, keep=keep, as_json=as_json
        )
    report = job.run()
    if as_json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        print_summary(report.outcomes)
        if report.ledger:
            print(f"Failed attempts: {report.ledger}", file=sys.stderr)
    return int(report.exit_code())


def _refuse_contradictions(loaded: LoadedSettings, compare: bool, truth: Path | None) -> None:
    if truth is not None and not compare:
        raise UsageError("--truth has no effect without --compare.", code="option-unused", remedy="Add --compare.")
    if truth is not None and not truth.exists():
        raise NoInputError(f"{truth} does not exist.", code="source-missing", remedy="Check the path of --truth.")
    if loaded.origins["warm_up_frames"] == "flag" and loaded.values.split_seconds is None:
        raise UsageError(
            "--warm-up-frames has no effect without --split-seconds.",
            code="option-unused",
            remedy="Add --split-seconds.",
        )
    if loaded.origins["height"] == "flag" and loaded.origins["scale"] == "flag":
        raise UsageError(
            "--scale and --height exclude each other.", code="option-conflict", remedy="Give only one of them."
        )


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "exit_code": int(report.exit_code()),
        "ray_start_s": round(report.ray_start_s, 3),
        "prepare_s": round(report.prepare_s, 3),
        "wall_s": round(report.wall_s, 3),
        "ledger": report.ledger,
        "warnings": report.warnings,
        "videos": [dataclasses.asdict(outcome) for outcome in report.outcomes],
    }


@dataclass(slots=True)
class Survey:
    """What a job finds before it plans anything.

    Attributes:
        pending: to be restored. finished: by an earlier run. refused: before anything is tried.
        undelivered: finished, but without the extras that are wanted now.
    """

    model: ResolvedModel
    area: WorkArea
    pending: list[Item] = field(default_factory=list)
    finished: list[Item] = field(default_factory=list)
    refused: list[tuple[Item, Failure]] = field(default_factory=list)
    undelivered: list[Finished] = field(default_factory=list)


class RestoreJob:
    """One run of `upriver restore`: everything between the parsed command line and the report.

    Args:
        compare, truth: also write a side-by-side picture and video, with this original as a further panel.
        overwrite: replace what is at the destination.
        keep: leave the work area after success.
        retry_failed: try videos again that an earlier run gave up.
        quiet: without a progress bar.
        plan_file: a file with plans that were made before.

    Attributes:
        settings: as they are in effect. options, selection: what plans depend on, and of what they are.
    """

    def __init__(
        self,
        src: str,
        dst: str,
        settings: Settings,
        *,
        compare: bool = False,
        truth: Path | None = None,
        overwrite: bool = False,
        keep: bool = False,
        retry_failed: bool = False,
        limit: int | None = None,
        shuffle: int | None = None,
        priority: Sequence[str] = (),
        quiet: bool = False,
        plan_file: str | None = None,
    ) -> None:
        if joins_a_cluster():  # whose workers run in folders of their own
            src, dst = whole_path(src), whole_path(dst)
        self._src, self._dst = src, dst
        self.settings = settings.in_effect()
        self.options = plan_options(self.settings)
        self._keep, self._retry_failed, self._quiet = keep, retry_failed, quiet
        self._plan_file = plan_file
        self._choices = Choices(
            overwrite=overwrite,
            compare=compare,
            truth=None if truth is None else str(truth.resolve()),
            exact=settings.exact,
            max_pixels=settings.max_pixels,
            extras=Extras(framemd5=settings.framemd5, hls=ladder_heights(settings.hls)),
        )
        self.selection: Selection = select(src, dst, limit=limit, shuffle=shuffle, priority=priority)
        self._report = Report()
        if self._choices.extras:
            _refuse_pictures(self.selection)
        if self.settings.step_policy and not self._chooses_steps():
            self._warn("step_policy has no effect: no video has steps auto. Give --steps auto, or leave it away.")

    def run(self) -> Report:
        """Restore all that is not finished yet.

        Raises:
            JobsError, InfraError, PipelineError: the job as a whole is impossible, or its only video is.
            Interrupted: a signal came or somebody cancelled; finished videos stay, and so does the work area.
        """
        began = time.perf_counter()
        survey = self.survey()
        note = "finished before; nothing to do"
        self._report.outcomes += [
            Outcome(item.name, item.destination, "skipped", notes=[note]) for item in survey.finished
        ]
        made = None if self._plan_file is None else self._usable_plans(survey)
        self._report.prepare_s = time.perf_counter() - began
        if survey.pending or survey.refused or survey.undelivered:
            root = self.selection.root
            storage_for(root).check_writable(join(root, "probe") if self.selection.is_folder else root)
            with stopping_on_signals():
                run = RestoreRun(
                    src=self._src,
                    dst=self._dst,
                    settings=self.settings,
                    options=self.options,
                    choices=self._choices,
                    selection=self.selection,
                    model=survey.model,
                    area=survey.area,
                    report=self._report,
                    keep=self._keep,
                    retry_failed=self._retry_failed,
                    quiet=self._quiet,
                    made=made,
                )
                run.run(survey.pending, survey.refused, survey.undelivered)
        ended = self._report.done_at or time.perf_counter()
        self._report.wall_s = ended - began - self._report.ray_start_s
        self._report.outcomes.sort(key=lambda outcome: outcome.name)
        return self._report

    def survey(self) -> Survey:
        """Look at what is there: nothing is planned, and nothing is written.

        Raises:
            JobsError, InfraError, PipelineError: as from `run`.
        """
        if not self.selection.is_folder:
            # What makes a single file impossible is found before Ray starts or a model is fetched.
            _check_single(self.selection.items[0], self.options)
        model = resolve_model(self.settings.model)
        area = WorkArea(self.selection.root, is_folder=self.selection.is_folder, job_id=self._job_id(model))
        survey = Survey(model, area)
        self._look(survey)
        return survey

    def _usable_plans(self, survey: Survey) -> PlanFile:
        assert self._plan_file is not None
        made = read_plan_file(self._plan_file)
        runs = ((item, run_id(item, self.options, survey.model.sha256)) for item in survey.pending)
        stale = sum(made.find(item, run) is None for item, run in runs)
        if stale:
            told = f"{made.place}: {stale} of {len(survey.pending)} videos have no plan there that still holds"
            self._warn(f"{told}; they are planned now.")
        return made

    def _chooses_steps(self) -> bool:
        return any(self.options.for_item(item).row["steps"] == "auto" for item in self.selection.items)

    def _warn(self, told: str) -> None:
        self._report.warnings.append(told)
        print(f"upriver: {told}", file=sys.stderr)

    def _job_id(self, model: ResolvedModel) -> str:
        nothing = Item(source="", destination="", name="", size_bytes=0, version="")
        return run_id(nothing, self.options, model.sha256)

    def _look(self, survey: Survey) -> None:
        """Sort all items by what is to be done with them."""
        items = self.selection.items
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            found = list(pool.map(lambda item: self._standing(item, survey.area, survey.model), items))
        for item, standing in zip(items, found, strict=True):
            if standing == "pending":
                survey.pending.append(item)
            elif standing == "finished":
                survey.finished.append(item)
            elif isinstance(standing, Finished):
                survey.undelivered.append(standing)
            elif self.selection.is_folder:
                survey.refused.append((item, describe_failure(standing)))
            else:
                raise standing

    def _standing(
        self, item: Item, area: WorkArea, model: ResolvedModel
    ) -> Literal["pending", "finished"] | Finished | Exception:
        run = run_id(item, self.options, model.sha256)
        extras, overwrite = self._choices.extras, self._choices.overwrite
        try:
            if finished_already(item.destination, run, overwrite=overwrite):
                manifest = read_manifest(item.destination) if extras else None
                if manifest is None or not missing(manifest.extras, extras, item.destination):
                    return "finished"
                return Finished(item, run, manifest)
            if extras and not overwrite:
                draft = read_draft(area.video(run), run)
                refuse_foreign(draft.extras if draft else Delivered(), extras, item.destination)
        except Exception as error:
            try:
                draft = read_draft(area.video(run), run)
                # Published by this very job, which died before it could write the manifest.
                return "pending" if draft is not None and is_published(draft, item.destination) else error
            except Exception:
                return error
        return "pending"


def _refuse_pictures(selection: Selection) -> None:
    for item in selection.items:
        if not PurePosixPath(item.destination).suffix:
            raise UsageError(
                f"{item.destination} becomes a folder of pictures, of which there are neither --framemd5 nor --hls.",
                code="extras-of-pictures",
                remedy="Leave them out, or write a video, such as .mkv.",
            )


def _check_single(item: Item, options: PlanOptions) -> None:
    from actors.output import check_output
    from pipeline.video import Limits, probe

    own = options.for_item(item)
    info = probe(video_source(item.source), limits=Limits(max_pixels=own.max_pixels))
    check_output(info, item.destination, own.row)
