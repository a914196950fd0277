"""Produce the rows that docs/gpu.md lists as missing, one after the other, as far as the time goes.

    python -m benchmarks.gpu_rows --list                  # what there is, and what is done
    python -m benchmarks.gpu_rows --minutes 9             # go on with the first that is not done
    python -m benchmarks.gpu_rows --only 4,6 --minutes 5

The commands are those of the table in docs/gpu.md, so that there is one list. A row that fails or takes too long stops
no other; what is done is noted in out/gpu_rows.json, so that the same command goes on where it stopped. What a row
prints goes to out/gpu_rows/NUMBER.log.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
HEADING = "### Rows that are missing"
MOST_MINUTES = 6.0  # a row that takes longer is stopped, so that the others get their turn


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `argv` starts with the interpreter that runs this."""

    number: int
    what: str
    command: str

    @property
    def argv(self) -> list[str]:
        """What is run."""
        first, *others = shlex.split(self.command)
        return {"upriver": [sys.executable, "-m", "jobs.cli"], "python": [sys.executable]}.get(first, [first]) + others

    def lacks(self) -> str | None:
        """What must be there first, and is not; None: nothing."""
        for word in self.argv:
            if word == "CHECKPOINT":
                return "a checkpoint in the published layout, instead of CHECKPOINT"
            if word.startswith("../") and not (ROOT / word).exists():
                return word
        return None


def rows(page: Path = PAGE) -> list[Row]:
    """Return the rows of the table, numbered from 1; of several commands in one the last, which needs the least."""
    text = page.read_text().partition(HEADING)[2]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    found = []
    for number, line in enumerate(lines, 1):
        what, _, commands = (cell.strip() for cell in line.strip("|").split("|"))
        found.append(Row(number, what, re.findall(r"`([^`]+)`", commands)[-1]))
    return found


def run(row: Row, limit_s: float, log: Path) -> str:
    """Run one and return how it went: "done", or why not."""
    lacking = row.lacks()
    if lacking:
        return f"not run: {lacking} is missing"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as told:
        try:
            done = subprocess.run(row.argv, cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
    return "done" if done.returncode == 0 else f"exit status {done.returncode}, see {log.name}"


def main(argv: Sequence[str] | None = None, *, page: Path = PAGE, out: Path = ROOT / "out") -> int:
    """Run what is asked for; returns 0 if nothing that was tried has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no row is begun, and the last ends")
    parser.add_argument("--only", default="", help="numbers of rows, with commas; also those that are done")
    args = parser.parse_args(argv)
    state = out / "gpu_rows.json"
    known: dict[str, str] = json.loads(state.read_text()) if state.exists() else {}
    only = {int(word) for word in args.only.split(",") if word}
    over = time.monotonic() + 60 * args.minutes
    failed = False
    for row in rows(page):
        if only and row.number not in only:
            continue
        before = known.get(row.command, "open")
        if args.list or (before == "done" and not only):
            print(f"{row.number:2}  {before:12}  {row.what}\n    {row.command}")
            continue
        left_s = min(over - time.monotonic(), 60 * MOST_MINUTES)
        if left_s <= 0:
            print(f"{row.number:2}  no time     {row.what}")
            continue
        began = time.monotonic()
        known[row.command] = run(row, left_s, out / "gpu_rows" / f"{row.number}.log")
        failed |= known[row.command] != "done"
        print(f"{row.number:2}  {known[row.command]}, {time.monotonic() - began:.0f} s  {row.what}", flush=True)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(known, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
