"""What `upriver bench` prints, and the dated files that it leaves under ``benchmarks/``."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.bench_peak import data_sheet_tflops
from jobs.bench_streams import carried, carried_lines

if TYPE_CHECKING:
    from jobs.bench_measure import BenchResult

COLUMNS: Final = (
    "output", "streams", "stage", "ms", "TFLOP", "TFLOP/s", "of floor", "MiB", "cold ms", "warm ms", "frames/s",
)  # fmt: skip
_WHOLE: Final = "model alone"


def print_results(
    results: Sequence[BenchResult], peaks: Mapping[str, float], *, as_json: bool, table: bool = True
) -> None:
    """Print one table for all results; as JSON the one result itself unless a `table` was asked for."""
    if as_json:
        print(json.dumps(_document(results, peaks) if table else asdict(results[0]), indent=2))
        return
    print("\n".join(_heading(results[0], peaks, sizes=not table)))
    print(aligned([COLUMNS, *rows(results)], left=(0, 2)))
    last = results[-1]
    if table:
        print("\n".join(["", *carried_lines(results)]))
    else:
        print(
            f"{last.model_fps:.2f} frames per second in the model, "
            f"peak memory {last.peak_memory_mib} MiB (estimated for the model: {last.estimated_memory_mib} MiB)"
        )


def aligned(cells: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Return lines of equal columns; those numbered in `left` start at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def rows(results: Sequence[BenchResult]) -> list[tuple[str, ...]]:
    """Return the table's cells: for each result a row per stage, and one for the whole model."""
    found: list[tuple[str, ...]] = []
    for result in results:
        head = (result.size.rpartition(" ")[2], str(result.batch))
        for stage, milliseconds in result.stages_ms.items():
            tflop, fraction = result.stages_tflop.get(stage), result.fraction_of_floor(stage)
            speed = 1000 * tflop / milliseconds if tflop and milliseconds else None
            cells = (stage, _ms(milliseconds), _number(tflop), _number(speed), _percent(fraction))
            found.append((*head, *cells, "", "", "", ""))
            head = ("", "")
        tflop = sum(result.stages_tflop.values())
        found.append((
            *head, _WHOLE, _ms(result.step_ms), _number(tflop), _number(1000 * tflop / result.step_ms),
            _percent(result.of_floor), str(result.peak_memory_mib), f"{result.first_frame_cold_ms:.0f}",
            _ms(result.first_frame_warm_ms), f"{result.model_fps:.2f}",
        ))  # fmt: skip
    return found


def save_results(
    folder: Path, kind: str, results: Sequence[BenchResult], peaks: Mapping[str, float], command: str
) -> Path:
    """Write ``KIND-DATE-HARDWARE.json`` and ``.md`` into `folder`, and return the path of the latter."""
    from jobs.bench import without_folders

    results = [replace(result, model=without_folders(result.model)) for result in results]
    lines = [f"- {line}" for line in _heading(results[0], peaks, sizes=False)]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(results)]
    lines += ["", *(f"- {line}" for line in carried_lines(results)), "", *_READING]
    return save_record(
        folder, kind, results[0].hardware, "Speed", lines, {"command": command} | _document(results, peaks)
    )


def save_record(
    folder: Path, kind: str, hardware: str, title: str, lines: Sequence[str], document: Mapping[str, Any]
) -> Path:
    """Write `document` as JSON, and `lines` with its command and date as Markdown, under a name that is free.

    Args:
        document: must have the key ``command``.

    Returns:
        The path of the Markdown file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    stem, number = f"{kind}-{date}-{slug(hardware)}", 1
    path = folder / f"{stem}.md"
    while path.exists() or path.with_suffix(".json").exists():
        number += 1
        path = folder / f"{stem}-{number}.md"
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    told = [f"# {title} on {hardware}", "", f"- date: {date}; command: `{document['command']}`", *lines]
    path.write_text("\n".join(told) + "\n")
    print(f"written: {path} and {path.with_suffix('.json').name}", file=sys.stderr)
    return path


def slug(hardware: str) -> str:
    """Return a name for files: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3", "AMD EPYC, 2 cores" -> "2-core-cpu"."""
    cores = re.search(r", (\d+) cores$", hardware)
    if cores:
        return f"{cores[1]}-core-cpu"
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower().removeprefix("nvidia ")).strip("-")


_READING: Final = (
    "`ms` is the median of a step, which takes a frame of each stream. The floor is the step's FLOPs at the speed of a",
    "large matrix product, measured in the same run. `cold ms` and `warm ms` are the wait for the first frame: cold,",
    "with loading the model, and in the first row with the start of the device's libraries; warm, in a new stream.",
    "`MiB`: on a GPU what torch allocated at most, otherwise the process.",
)


def _heading(first: BenchResult, peaks: Mapping[str, float], *, sizes: bool) -> list[str]:
    size = f"{first.size}, " if sizes else ""
    told = [
        f"{first.model}, {size}{first.steps} steps, {first.dtype} on {first.device}, flow {first.flow}, "
        f"backend {first.backend}, {first.threads} threads, {first.hardware}, torch {first.torch}, {first.date}",
        "large matrix product: " + ", ".join(f"{name} {_number(tflops)} TFLOP/s" for name, tflops in peaks.items()),
    ]
    sheet = data_sheet_tflops(first.hardware)
    if sheet is not None:
        told[1] += f" (data sheet: dense bfloat16 {sheet:.0f})"
    if first.backend != "eager":
        told.append(
            f"The backend {first.backend} runs a whole step at once: its stages cannot be told apart. "
            "Those of --backend eager can."
        )
    return told


def _document(results: Sequence[BenchResult], peaks: Mapping[str, float]) -> dict[str, Any]:
    return {
        "peak_tflops": {name: round(value, 4) for name, value in peaks.items()},
        "data_sheet_bf16_tflops": data_sheet_tflops(results[0].hardware),
        "live_streams": carried(results),
        "results": [asdict(result) for result in results],
    }


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"
