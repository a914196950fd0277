"""`upriver verify`: what a person or a program sees of the comparison that `jobs.verify` makes."""

from __future__ import annotations

import json

from jobs.errors import ExitCode, UsageError
from jobs.verify import VerifyReport, verify


def verify_command(src: str, dst: str, *, scale: int | None, height: int | None, as_json: bool) -> int:
    """Compare, print the differences, and return 0 or, if one of them is not wanted, 8.

    Raises:
        UsageError: both `scale` and `height` are given. VideoError: one of the files cannot be read at all.
    """
    if scale is not None and height is not None:
        raise UsageError(
            "--scale and --height exclude each other.", code="option-conflict", remedy="Give only one of them."
        )
    report = verify(src, dst, scale=scale, height=height)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    return int(ExitCode.DONE if report.ok else ExitCode.DIFFERENT)


def _print(report: VerifyReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True)
    if report.differences:
        table = Table(box=None, pad_edge=False)
        for heading in ("difference", "source", "result", "wanted", "note"):
            table.add_column(heading, overflow="fold")
        for each in sorted(report.differences, key=lambda difference: difference.wanted):
            table.add_row(
                Text(each.what), Text(each.source), Text(each.result), "yes" if each.wanted else "no", Text(each.note)
            )
        console.print(table)
    unwanted = len(report.unwanted)
    verdict = "verified" if report.ok else f"{unwanted} unwanted difference{'s' if unwanted > 1 else ''}"
    console.print(
        f"{report.result}: {verdict}; {report.frames_result} of {report.frames_source} frames, "
        f"time stamps within {1000 * report.largest_time_error_s:.3f} ms, "
        f"{report.identical_streams} other streams identical"
    )
