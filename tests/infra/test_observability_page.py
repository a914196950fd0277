"""docs/live/observability.md lists the metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

from infra.metrics import APPLICATION_FAMILIES, FAMILIES, MOST_SESSIONS, MOST_TENANTS
from infra.telemetry import TelemetryConfig
from infra.tracing import TRACE_EVERY

PAGE = (Path(__file__).parents[2] / "docs/live/observability.md").read_text()


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    match = re.search(r"<!-- metrics -->\n(.*?)<!-- /metrics -->", PAGE, re.S)
    assert match is not None
    rows = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in match[1].splitlines()[2:]]
    assert rows == [
        (f"`{family.shown_name}`", family.kind, ", ".join(f"`{label}`" for label in family.labels), family.help)
        for family in (*FAMILIES, *APPLICATION_FAMILIES)
    ]


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    assert f"The first {MOST_TENANTS} tenants" in PAGE and f"the newest {MOST_SESSIONS} sessions" in PAGE
    assert TRACE_EVERY == 100 and "One frame in a hundred" in PAGE


def test_every_setting_is_named() -> None:
    assert {name for name in TelemetryConfig.model_fields if f"`{name}`" not in PAGE} == set()
