"""What the curve of `upriver bench --batches` means for live streams: how many a device carries, in which batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from actors.batch_policy import BatchCurve, most_streams

if TYPE_CHECKING:
    from jobs.bench_measure import BenchResult

FRAME_RATES: Final = (10, 15, 30, 60)


def carried(results: Sequence[BenchResult]) -> list[dict[str, Any]]:
    """Return for each size and frame rate how many streams are answered before their next frames come.

    Sizes that were not measured with one stream are left out, as nothing can be said of them.

    Returns:
        Rows of ``output``, ``fps``, ``streams`` (0: not even one), ``batch`` (the largest that is wanted) and
        ``latest_ms``, when the last of them has its answer.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for result in results:
        curves[result.size.rpartition(" ")[2]][result.batch] = result.step_ms
    found = []
    for output, ms in curves.items():
        if 1 not in ms:
            continue
        curve = BatchCurve(ms)
        for fps in FRAME_RATES:
            choice = most_streams(curve, fps)
            row: dict[str, Any] = {"output": output, "fps": fps, "streams": 0, "batch": 1, "latest_ms": None}
            if choice is not None:
                row |= {"streams": round(choice.frames_per_s * choice.latest_ms / 1000), "batch": choice.batch}
                row["latest_ms"] = round(choice.latest_ms, 1)
            found.append(row)
    return found


def carried_lines(results: Sequence[BenchResult]) -> Iterator[str]:
    """Yield a line for each size: what one engine carries by the model alone, without codecs and network."""
    rows = carried(results)
    for output in dict.fromkeys(row["output"] for row in rows):
        of_size = [row for row in rows if row["output"] == output]
        parts = [_part(row) for row in of_size if row["streams"]]
        if parts:
            yield (
                f"live streams at {output}, each answered before its next frame, without codecs and network: "
                + ", ".join(parts)
            )
        else:
            slowest = of_size[0]["fps"]
            yield f"live streams at {output}: not even one of {slowest} frames/s is answered before its next frame"


def _part(row: dict[str, Any]) -> str:
    batch = f" in batches of {row['batch']}" if row["batch"] > 1 else ""
    return f"{row['streams']} of {row['fps']} frames/s{batch}"
