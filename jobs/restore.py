"""`upriver restore`: plan the rows, hand them to a pool of actors, put what they finish in its place, tell how it went.

Everything that becomes visible at the destination is moved there here, whole: first the video, then its manifest. Until
then it lies in a work area that is removed at the end, also after a failure or a signal.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from actors.errors import Failure, FailureClass, describe_failure
from actors.hardware import usable_cores
from actors.upscaler import EngineOptions
from infra.cluster import Cluster, connected
from infra.settings import LoadedSettings, Settings, load_settings
from infra.storage import storage_for
from jobs.errors import ExitCode, NoInputError, TaskError, UsageError, exit_code_of_failure
from jobs.manifest import (
    Ledger,
    Manifest,
    ModelRecord,
    OutputRecord,
    SourceRecord,
    component_versions,
    finished_already,
    timestamp,
    write_manifest,
)
from jobs.model import ResolvedModel, resolve_model
from jobs.old_plan import Item, Row, RowOptions, Selection, plan_row, probe_all, probe_item, row_options, run_id, select
from jobs.pool import PoolSize, pool_size, run_rows, stopping_on_signals
from jobs.progress import Outcome, ProgressBar, print_summary
from jobs.workarea import WorkArea

MAX_ATTEMPTS = 3  # of a row whose worker dies


@dataclass(slots=True)
class Report:
    """How a restore job ended.

    `wall_s` is the time from the first probe to the last manifest, without the start of Ray, which `ray_start_s` has;
    `prepare_s` is the part of it before that: probing, and checking the model.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    ray_start_s: float = 0.0
    prepare_s: float = 0.0
    wall_s: float = 0.0
    ledger: Path | None = None

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
) -> int:
    """Run `upriver restore` and return its exit status; prints the summary, or JSON.

    Raises:
        JobsError, InfraError, ActorsError, PipelineError: nothing could be restored; the message says why.
    """
    loaded = load_settings(flags, config)
    _refuse_contradictions(loaded, compare, truth)
    job = RestoreJob(src, dst, loaded.values, compare=compare, truth=truth, overwrite=overwrite, quiet=as_json)
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
        "ledger": None if report.ledger is None else str(report.ledger),
        "videos": [dataclasses.asdict(outcome) for outcome in report.outcomes],
    }


class RestoreJob:
    """One run of `upriver restore`: everything between the parsed command line and the report."""

    def __init__(
        self,
        src: str,
        dst: str,
        settings: Settings,
        *,
        compare: bool = False,
        truth: Path | None = None,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> None:
        self._settings = settings
        self._overwrite = overwrite
        self._quiet = quiet
        self._options: RowOptions = row_options(settings, compare=compare, truth=truth)
        self._numerics = f"{settings.dtype}/{settings.flow}"
        self._selection: Selection = select(src, dst)
        self._report = Report()

    def run(self) -> Report:
        """Restore all that is not finished yet.

        Raises:
            JobsError, InfraError, PipelineError: the job as a whole is impossible, or its only video is.
            Interrupted: a signal came; finished videos stay, everything else is removed.
        """
        began = time.perf_counter()
        single = None if self._selection.is_folder else self._selection.items[0]
        if single is not None:
            # What makes a single file impossible is found before Ray starts or a model is fetched.
            _raise_failure(probe_item(single, self._settings.max_pixels, self._options).failure)
        model = resolve_model(self._settings.model)
        pending = self._without_finished(model)
        self._report.prepare_s = time.perf_counter() - began
        if pending:
            root = str(self._selection.root)
            storage_for(root).check_writable(f"{root}/probe" if self._selection.is_folder else root)
            with connected(num_cpus=max(2, usable_cores())) as cluster:
                self._report.ray_start_s = cluster.start_s
                with (
                    stopping_on_signals(),
                    WorkArea(
                        self._selection.root, is_folder=self._selection.is_folder, job_id=self._job_id(model)
                    ) as area,
                ):
                    self._restore(pending, area, model, cluster)
                self._report.ledger = area.ledger_kept
        self._report.wall_s = time.perf_counter() - began - self._report.ray_start_s
        self._report.outcomes.sort(key=lambda outcome: outcome.name)
        return self._report

    def _job_id(self, model: ResolvedModel) -> str:
        return run_id("", model.sha256, self._settings.seed, self._numerics, self._options)

    def _run_id(self, item: Item, model: ResolvedModel) -> str:
        return run_id(item.version, model.sha256, self._settings.seed, self._numerics, self._options)

    def _without_finished(self, model: ResolvedModel) -> list[Item]:
        pending = []
        for item in self._selection.items:
            try:
                done = finished_already(item.destination, self._run_id(item, model), overwrite=self._overwrite)
            except Exception as error:
                if not self._selection.is_folder:
                    raise
                self._fail(item, describe_failure(error))
                continue
            if done:
                note = "finished before; nothing to do"
                self._report.outcomes.append(Outcome(item.name, item.destination, "skipped", notes=[note]))
            else:
                pending.append(item)
        return pending

    def _restore(self, pending: list[Item], area: WorkArea, model: ResolvedModel, cluster: Cluster) -> None:
        ledger = Ledger(area.ledger_path)
        for outcome in self._report.outcomes:  # refused before there was a place for the ledger
            if outcome.failure is not None:
                ledger.add(outcome.name, outcome.failure)
        rows = self._plan(pending, area, ledger)
        if not rows:
            return
        open_rows = {row["row_id"]: (row, item) for row, item in rows}
        frames_known = [row["frames"] for row, _ in rows]
        total = sum(frames_known) if min(frames_known) >= 0 else None
        size = pool_size(self._settings, cluster, len(rows))
        engine = EngineOptions(
            model=model.source,
            device=self._settings.device,
            dtype=self._settings.dtype,
            flow=self._settings.flow,
            threads=size.threads_each,
            max_pixels=self._settings.max_pixels,
            version=version("upriver"),
        )
        with ProgressBar(total, quiet=self._quiet) as bar:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                self._run_rows(open_rows, engine, size, ledger, model, bar)
                for _, item in open_rows.values():
                    self._lost(item, ledger, attempt)
                if not open_rows:
                    break

    def _run_rows(
        self,
        open_rows: dict[str, tuple[Row, Item]],
        engine: EngineOptions,
        size: PoolSize,
        ledger: Ledger,
        model: ResolvedModel,
        bar: ProgressBar,
    ) -> None:
        """Restore `open_rows` and take out of it each row that ended; what stays in it lost its worker."""
        for record in run_rows([row for row, _ in open_rows.values()], engine, size):
            row, item = open_rows[record["row_id"]]
            bar.show(item.name, record["frames"])
            details = json.loads(record["details"])
            if record["kind"] == "done":
                self._publish(row, item, model, record["frames"], details)
                del open_rows[record["row_id"]]
            elif record["kind"] == "failed":
                seconds = float(details.pop("seconds"))
                failure: Failure = details
                if failure["failure_class"] == FailureClass.MODEL:
                    _raise_failure(failure)  # no other video would fare better
                self._fail(item, failure, ledger, seconds=seconds)
                del open_rows[record["row_id"]]

    def _lost(self, item: Item, ledger: Ledger, attempt: int) -> None:
        lost = Failure(
            failure_class=FailureClass.LOST_ACTOR,
            code="actor-lost",
            message=f"The worker that restored {item.name} died in attempt {attempt} of {MAX_ATTEMPTS}.",
            remedy="It may have lacked memory: try fewer --actors, --dtype bf16, or a smaller source.",
        )
        if attempt < MAX_ATTEMPTS:
            ledger.add(item.name, lost, attempt=attempt)
        else:
            self._fail(item, lost, ledger, attempt=attempt)

    def _plan(self, pending: list[Item], area: WorkArea, ledger: Ledger) -> list[tuple[Row, Item]]:
        """Return rows, the most pixels first: the last rows to end should be short ones."""
        rows = []
        probes = probe_all(pending, self._settings.max_pixels, self._options)
        for number, item in enumerate(pending):
            probed = probes[item.name]
            if probed.failure is not None:
                self._fail(item, probed.failure, ledger)
                continue
            work_file = area.file_for(item.destination, number)
            rows.append((plan_row(item, probed, number, work_file, self._settings.seed, self._options), item))
        return sorted(rows, key=lambda pair: -abs(pair[0]["frames"]) * pair[0]["width"] * pair[0]["height"])

    def _fail(
        self, item: Item, failure: Failure, ledger: Ledger | None = None, *, attempt: int = 1, seconds: float = 0.0
    ) -> None:
        if not self._selection.is_folder:
            _raise_failure(failure)
        if ledger is not None:
            ledger.add(item.name, failure, attempt=attempt, seconds=seconds)
        note = f"{failure['message']} {failure['remedy']}"
        self._report.outcomes.append(Outcome(item.name, item.destination, "failed", notes=[note], failure=failure))

    def _publish(self, row: Row, item: Item, model: ResolvedModel, frames: int, details: dict[str, Any]) -> None:
        storage = storage_for(item.destination)
        for made in details["comparison"]:
            suffix = Path(made).name.removeprefix(Path(row["work_file"]).stem)  # .compare.mp4, .compare.png
            storage.publish(Path(made), str(Path(item.destination).with_suffix(suffix)))
        storage.publish(Path(row["work_file"]), item.destination, if_absent=not self._overwrite)
        seconds: dict[str, float] = details["seconds"]
        manifest = Manifest(
            run_id=self._run_id(item, model),
            source=SourceRecord(
                path=item.source,
                size_bytes=item.size_bytes,
                version=item.version,
                sha256=details["source_sha256"],
            ),
            output=OutputRecord(
                path=item.destination,
                size_bytes=details["output_bytes"],
                sha256=details["output_sha256"],
                frames=frames,
                width=details["width"],
                height=details["height"],
            ),
            model=ModelRecord(
                name=self._settings.model,
                sha256=model.sha256,
                device=details["device"],
                dtype=details["dtype"],
                flow=details["flow"],
            ),
            seed=row["seed"],
            options=dict(self._options),
            damage=details["damage"],
            warnings=details["warnings"],
            cuts=details["cuts"],
            seconds={name: round(value, 3) for name, value in seconds.items()},
            versions=component_versions(),
            finished_at=timestamp(),
        )
        write_manifest(item.destination, manifest)
        self._report.outcomes.append(
            Outcome(
                item.name,
                item.destination,
                "damaged" if details["damage"] else "restored",
                frames=frames,
                seconds=manifest.seconds,
                size=f"{row['width']}x{row['height']} -> {details['width']}x{details['height']}",
                notes=[*details["damage"], *details["warnings"]],
            )
        )


def _raise_failure(failure: Failure | None) -> None:
    if failure is not None:
        raise TaskError(
            failure["message"],
            code=failure["code"],
            remedy=failure["remedy"],
            failure_class=failure["failure_class"],
        )
