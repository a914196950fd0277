"""`upriver status`: how far a job is, as a person sees it, once or again and again.

What is shown is found out by `jobs.standing`.
"""

from __future__ import annotations

import json
import sys
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infra.errors import StorageError
from infra.storage import join
from jobs.errors import ExitCode
from jobs.forecast import duration
from jobs.standing import JobStatus, Status, as_plain, read_status

_WATCH_S, _WATCH_SILENT_S = 3.0, 30.0
_ROWS = 20  # of each table; --json has all


def status_command(dst: str, *, as_json: bool, watch: bool) -> int:
    """Run `upriver status`: print how far the job is and return 0; with `watch` until it ends, then its exit status.

    Raises:
        NoInputError, StorageError, NewerRecord: as in `read_status`.
    """
    if watch:
        return _watch(dst, as_json=as_json)
    told = read_status(dst)
    if as_json:
        print(json.dumps(as_plain(told), indent=2))
    else:
        _console().print(render(told))
    return int(ExitCode.DONE)


def _watch(dst: str, *, as_json: bool) -> int:
    """Print again and again: one picture on a terminal, one line (or JSON document) a look otherwise."""
    console = _console()
    told = read_status(dst)
    watched = told.jobs[0].job_id if told.jobs else None
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                job = next((job for job in told.jobs if job.job_id == watched), None)
                if as_json:
                    print(json.dumps(as_plain(told)), flush=True)
                elif console.is_terminal:
                    live.update(render(told), refresh=True)
                else:
                    print(_line(told, job), flush=True)
                if job is None or not (job.is_open or job.state == "silent"):
                    return int(ExitCode.DONE if job is None or job.exit_code is None else job.exit_code)
                time.sleep(_WATCH_SILENT_S if job.state == "silent" else _WATCH_S)
                try:
                    told = read_status(dst)
                except StorageError:  # a store may be away for a moment; the second time in a row it is told
                    time.sleep(_WATCH_S)
                    told = read_status(dst)
    except KeyboardInterrupt:  # the watching ends, not the job
        return int(ExitCode.DONE)


def _console() -> Console:
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 140, highlight=False)


def _text(words: str, style: str = "") -> Text:
    """Names and messages are anybody's: no markup, and no control codes for the terminal."""
    return Text(
        "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in words), style
    )


def render(told: Status) -> RenderableType:
    """Return what a person sees: the first job in full, a line for each other."""
    if not told.jobs:
        return _render_results(told)
    parts: list[RenderableType] = [_render_job(told.jobs[0])]
    if len(told.jobs) > 1:
        parts.append(_text("\nother jobs of this destination", style="bold"))
        parts += [
            _text(f"{job.job_id}  {job.state}, started {job.started_at}, {job.finished} of {job.videos_total} videos")
            for job in told.jobs[1:]
        ]
    return Group(*parts)


def _render_job(job: JobStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("job", _text(f"{job.source} -> {job.destination}"))
    workers = f", {_count(job.actors, 'worker')}" if job.actors and job.is_open else ""
    grid.add_row("state", _text(_state(job) + workers))
    begun = "running" if job.is_open else "begun"
    told = f"{job.finished:,} finished, {len(job.running):,} {begun}, {len(job.failed):,} failed"
    told = f"{told}, {job.waiting:,} waiting, of {job.videos_total:,}"
    grid.add_row("videos", told + (f"; {job.skipped:,} before" if job.skipped else ""))
    grid.add_row("frames", _frames(job))
    if job.is_open or job.state == "silent":
        grid.add_row("time left", _text(_left(job)))
        grid.add_row("last sign", _text(_last_sign(job)))
    parts: list[RenderableType] = [grid]
    if job.running:
        table = _table(begun, ("video", ""), ("frames", "right"), ("of", "right"), ("", "right"), ("fps", "right"))
        for video in job.running[:_ROWS]:
            share = f"{100 * video.frames / video.total:.0f} %" if video.total else ""
            total = f"{video.total:,}" if video.total is not None else "?"
            fps = f"{video.fps:.2f}" if video.fps is not None else ""
            table.add_row(_text(video.name), f"{video.frames:,}", total, share, fps)
        parts += [_text(""), table, *_more(len(job.running))]
    if job.failed:
        table = _table("failed", ("video", ""), ("class", ""), ("tried", "right"), ("why, and what to do", ""))
        for one in job.failed[:_ROWS]:
            table.add_row(
                _text(one.name), one.failure_class, str(one.attempts or ""), _text(f"{one.message} {one.remedy}")
            )
        parts += [_text(""), table, *_more(len(job.failed))]
    return Group(*parts)


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify="right" if justify else "left", overflow="fold")
    return table


def _more(rows: int) -> list[Text]:
    return [_text(f"and {rows - _ROWS:,} more; --json has all")] if rows > _ROWS else []


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _state(job: JobStatus) -> str:
    if job.state == "silent":
        return (
            f"no sign of life for {duration(job.silent_s)}: the driver on {job.host} may be dead; "
            "the same command continues"
        )
    if job.is_open:
        return f"{job.state} for {duration(job.elapsed_s)} on {job.host} (process {job.pid})"
    exit_code = f", exit status {job.exit_code}" if job.exit_code is not None else ""
    go_on = "" if job.state == "finished" else "; the same command continues"
    return f"{job.state} at {job.ended_at} after {duration(job.elapsed_s)}{exit_code}{go_on}"


def _frames(job: JobStatus) -> str:
    if job.frames_total is None or job.frames_done is None:
        return "not counted yet" if job.is_open else "not known"
    share = f" ({100 * job.frames_done / job.frames_total:.1f} %)" if job.frames_total else ""
    fps = f", {job.fps:.2f} fps" if job.fps else ""
    of = "of those planned" if job.unplanned or job.state == "planning" or job.counted_from == "records" else "of"
    given_up = ", those of failed videos counted as done" if job.failed and job.counted_from == "progress" else ""
    return f"{job.frames_done:,} {of} {job.frames_total:,}{share}{fps}{given_up}"


def _left(job: JobStatus) -> str:
    if job.state == "silent":
        if job.left_s is None:
            return "not known"
        return f"about {duration(job.left_s)} of work at the last rate"
    if job.state == "planning":
        return "not known before the first frames are restored"
    if job.left_s is None or job.low_s is None or job.high_s is None:
        return "too early to say"
    if job.left_s == 0:
        return "the last videos are being put together"
    guess = f", if the {_count(job.unplanned, 'video')} not planned yet are like the others" if job.unplanned else ""
    return f"about {duration(job.left_s)} ({duration(job.low_s)} to {duration(job.high_s)}){guess}"


def _last_sign(job: JobStatus) -> str:
    return f"{duration(job.silent_s)} ago"


def _line(told: Status, job: JobStatus | None) -> str:
    """One look on one line, for a log."""
    if job is None:
        return f"{told.results:,} finished"
    failed = f", {len(job.failed):,} failed" if job.failed else ""
    fps = f", {job.fps:.2f} fps" if job.fps else ""
    left = f", left: {_left(job)}" if job.is_open else ""
    state = job.state if job.state != "silent" else f"silent for {duration(job.silent_s)}"
    return f"{state}: {job.finished:,} of {job.videos_total:,} videos{failed}; frames {_frames_short(job)}{fps}{left}"


def _frames_short(job: JobStatus) -> str:
    return f"{job.frames_done:,} of {job.frames_total:,}" if job.frames_total is not None else "not counted yet"


def _render_results(told: Status) -> RenderableType:
    """A destination whose job is over and has tidied up."""
    manifests = sorted(told.finished.values(), key=lambda manifest: manifest.finished_at, reverse=True)
    head = _text(f"finished: {_count(told.results, 'video')} at {told.destination}, no job at work")
    if not manifests:
        return head
    table = _table("", ("video", ""), ("size", ""), ("frames", "right"), ("finished", ""), ("", ""))
    table.title = None
    for manifest in manifests[:_ROWS]:
        output = manifest.output
        note = "source damaged" if manifest.damage else ""
        shown = output.path.removeprefix(join(told.destination, ""))
        table.add_row(_text(shown), f"{output.width}x{output.height}", f"{output.frames:,}", manifest.finished_at, note)
    more = [_text(f"and {told.results - _ROWS:,} more")] if told.results > _ROWS else []
    return Group(head, table, *more)
