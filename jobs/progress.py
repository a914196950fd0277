"""What a person sees of a restore job: a progress bar with frames, rate and time left, and a table at the end.

Everything goes to stderr, so that `--json` has stdout for itself. Without a terminal there is no bar; a job of a
cluster tells a line now and then instead, which whoever submitted it sees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from actors.errors import Failure
from jobs.forecast import duration

_LINE_S = 10.0  # between two lines
Status = Literal["restored", "damaged", "skipped", "failed"]


@dataclass(slots=True)
class Outcome:
    """How one video ended."""

    name: str
    destination: str
    status: Status
    frames: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    size: str = ""
    notes: list[str] = field(default_factory=list)
    failure: Failure | None = None


class _Rate(ProgressColumn):
    """Frames per second since the first frame."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- fps" if speed is None else f"{speed:.1f} fps")


class ProgressBar:
    """A bar over all frames of a job, as far as they are planned; a context manager.

    Args:
        quiet: show nothing.
        lines: tell lines where there is no terminal.
    """

    def __init__(self, *, quiet: bool = False, lines: bool = False) -> None:
        console = Console(stderr=True)
        self._lines = lines and not quiet and not console.is_terminal
        self._first: tuple[float, int] | None = None  # when, and how many frames were done then
        self._told = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.fields[of]} frames"),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
            speed_estimate_period=60.0,
        )
        self._task = self._progress.add_task("starting", total=None, of="?")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str, frames: int, total: int) -> None:
        """Show that `frames` of `total` are done, the last ones of the video `name`."""
        self._progress.update(self._task, description=name, completed=frames, total=total, of=str(total))
        if self._lines:
            self._tell(name, frames, total)

    def _tell(self, name: str, frames: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, frames)
        elif now - self._told < _LINE_S:
            return
        self._told = now
        began, before = self._first
        fps = (frames - before) / (now - began) if now > began else 0.0
        left = f", {fps:.2f} fps, about {duration((total - frames) / fps)} left" if fps > 0 else ""
        share = f" ({100 * frames / total:.0f} %)" if total else ""
        print(f"{frames:,} of {total:,} frames{share}{left}; {name}", file=sys.stderr, flush=True)


def print_summary(outcomes: Sequence[Outcome]) -> None:
    """Print one line per video to stderr: what became of it, how fast, and what to know about it."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    table = Table(box=None, pad_edge=False)
    table.add_column("video", overflow="fold")
    table.add_column("result")
    table.add_column("size", no_wrap=True)
    table.add_column("frames", justify="right")
    table.add_column("fps", justify="right")
    table.add_column("written to, or why not", overflow="fold")
    for outcome in outcomes:
        total_s = outcome.seconds.get("total", 0.0)
        rate = f"{outcome.frames / total_s:.2f}" if total_s > 0 and outcome.frames else ""
        told = [outcome.destination] if outcome.status != "failed" else []
        table.add_row(
            Text(outcome.name),
            outcome.status,
            outcome.size,
            str(outcome.frames) if outcome.frames else "",
            rate,
            Text("\n".join([*told, *outcome.notes])),
        )
    console.print(table)
