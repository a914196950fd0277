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
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from actors.assemble import is_published, read_draft
from actors.delivery import Extras, missing, refuse_foreign
from actors.errors import Failure, describe_failure
from actors.records import Delivered
from infra.settings import LoadedSettings, Settings, ladder_heights, load_settings
from infra.storage import join, storage_for, video_source
from jobs.delivering import Finished
from jobs.errors import NoInputError, UsageError
from jobs.manifest import finished_already, read_manifest
from jobs.model import ResolvedModel, resolve_model
from jobs.plan import PlanOptions, plan_options, run_id
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
) -> int:
    """Run `upriver restore` and return its exit status; prints the summary, or JSON.

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
        "videos": [dataclasses.asdict(outcome) for outcome in report.outcomes],
    }


class RestoreJob:
    """One run of `upriver restore`: everything between the parsed command line and the report.

    Args:
        compare, truth: also write a side-by-side picture and video, with this original as a further panel.
        overwrite: replace what is at the destination.
        keep: leave the work area after success.
        retry_failed: try videos again that an earlier run gave up.
        quiet: without a progress bar.
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
    ) -> None:
        self._src, self._dst = src, dst
        self._settings = _exact(settings) if settings.exact else settings
        self._options = _plan_options(self._settings)
        self._keep, self._retry_failed, self._quiet = keep, retry_failed, quiet
        self._choices = Choices(
            overwrite=overwrite,
            compare=compare,
            truth=None if truth is None else str(truth.resolve()),
            exact=settings.exact,
            max_pixels=settings.max_pixels,
            extras=Extras(framemd5=settings.framemd5, hls=ladder_heights(settings.hls)),
        )
        self._selection: Selection = select(src, dst, limit=limit, shuffle=shuffle, priority=priority)
        self._report = Report()
        if self._choices.extras:
            _refuse_pictures(self._selection)

    def run(self) -> Report:
        """Restore all that is not finished yet.

        Raises:
            JobsError, InfraError, PipelineError: the job as a whole is impossible, or its only video is.
            Interrupted: a signal came or somebody cancelled; finished videos stay, and so does the work area.
        """
        began = time.perf_counter()
        if not self._selection.is_folder:
            # What makes a single file impossible is found before Ray starts or a model is fetched.
            _check_single(self._selection.items[0], self._options)
        model = resolve_model(self._settings.model)
        area = WorkArea(self._selection.root, is_folder=self._selection.is_folder, job_id=self._job_id(model))
        pending, refused, finished = self._pending(area, model)
        self._report.prepare_s = time.perf_counter() - began
        if pending or refused or finished:
            root = self._selection.root
            storage_for(root).check_writable(join(root, "probe") if self._selection.is_folder else root)
            with stopping_on_signals():
                run = RestoreRun(
                    src=self._src,
                    dst=self._dst,
                    settings=self._settings,
                    options=self._options,
                    choices=self._choices,
                    selection=self._selection,
                    model=model,
                    area=area,
                    report=self._report,
                    keep=self._keep,
                    retry_failed=self._retry_failed,
                    quiet=self._quiet,
                )
                run.run(pending, refused, finished)
        self._report.wall_s = time.perf_counter() - began - self._report.ray_start_s
        self._report.outcomes.sort(key=lambda outcome: outcome.name)
        return self._report

    def _job_id(self, model: ResolvedModel) -> str:
        nothing = Item(source="", destination="", name="", size_bytes=0, version="")
        return run_id(nothing, self._options, model.sha256)

    def _pending(
        self, area: WorkArea, model: ResolvedModel
    ) -> tuple[list[Item], list[tuple[Item, Failure]], list[Finished]]:
        """Items to restore, those that are refused before anything is tried, and those that lack extras only.

        Finished ones are reported.
        """
        items = self._selection.items
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            found = list(pool.map(lambda item: self._standing(item, area, model), items))
        pending, refused, finished = [], [], []
        for item, standing in zip(items, found, strict=True):
            if standing == "pending":
                pending.append(item)
            elif standing == "finished":
                note = "finished before; nothing to do"
                self._report.outcomes.append(Outcome(item.name, item.destination, "skipped", notes=[note]))
            elif isinstance(standing, Finished):
                finished.append(standing)
            elif self._selection.is_folder:
                refused.append((item, describe_failure(standing)))
            else:
                raise standing
        return pending, refused, finished

    def _standing(
        self, item: Item, area: WorkArea, model: ResolvedModel
    ) -> Literal["pending", "finished"] | Finished | Exception:
        run = run_id(item, self._options, model.sha256)
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


def _exact(settings: Settings) -> Settings:
    """Settings under which every run gives the same bits, whatever else they say."""
    return settings.model_copy(update={"dtype": "fp32", "threads": 1, "slots": 1})


def _plan_options(settings: Settings) -> PlanOptions:
    options = plan_options(settings)
    # A job must not go on from segments that were made in another way.
    return dataclasses.replace(options, numerics=f"{options.numerics}/exact") if settings.exact else options


def _check_single(item: Item, options: PlanOptions) -> None:
    from actors.output import check_output
    from pipeline.video import Limits, probe

    own = options.for_item(item)
    info = probe(video_source(item.source), limits=Limits(max_pixels=own.max_pixels))
    check_output(info, item.destination, own.row)
