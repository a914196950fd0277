"""Dashboard and alerts ask for what there is; every alert fires when it should, and not before."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.metrics import APPLICATION_FAMILIES, FAMILIES
from tests.dashboards import ALERTS, SUFFIX, Query, alerts, dashboard, grouping, panel_queries, selectors
from tests.prometheus_server import program

# What each family's series are labelled with when they are shown.
SHOWN = {
    **{family.shown_name: {*family.labels, "replica"} for family in FAMILIES},
    **{family.shown_name: set(family.labels) for family in APPLICATION_FAMILIES},
    "process_resident_memory_bytes": {"replica"},
    "process_cpu_seconds_total": {"replica"},
}
HISTOGRAMS = {family.shown_name for family in FAMILIES if family.kind == "histogram"}
QUERIES = [*panel_queries(), *(Query(rule["alert"], rule["expr"]) for rule in alerts())]


def problems(query: Query) -> list[str]:
    """What in a query does not fit the metrics."""
    found, labels = [], set()
    for name, selected in selectors(query.expression):
        base = SUFFIX.sub("", name) if SUFFIX.sub("", name) in HISTOGRAMS else name
        if base not in SHOWN:
            found.append(f"no metric {name}")
            continue
        if (name == base) == (base in HISTOGRAMS):
            found.append(f"{name} is a histogram: it has _bucket, _sum and _count")
        own = SHOWN[base] | ({"le"} if name.endswith("_bucket") else set())
        labels |= own
        found += [f"{name} has no label {label}" for label in selected - own]
    return found + [f"nothing has the label {label}" for label in grouping(query.expression) - labels]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_queries_read_metrics_that_exist(query: Query) -> None:
    assert selectors(query.expression) and problems(query) == []


def test_wrong_queries_are_noticed() -> None:
    assert problems(Query("", "upriver_live_nothing"))
    assert problems(Query("", 'upriver_live_ready{tenant="a"}'))
    assert problems(Query("", "rate(upriver_live_frame_latency_seconds[1m])"))
    assert problems(Query("", "sum by (tenant) (upriver_live_ready)"))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {SUFFIX.sub("", name) for query in panel_queries() for name, _ in selectors(query.expression)}
    shown |= {name for query in panel_queries() for name, _ in selectors(query.expression)}
    variables = {name for one in dashboard()["templating"]["list"] for name, _ in selectors(str(one.get("query", "")))}
    assert set(SHOWN) - shown - variables == set()


def test_panels_are_in_rows_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Overview", "Latency", "Quality", "Sessions", "Capacity", "Hand-offs", "Errors"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_every_panel_says_its_source_by_a_variable() -> None:
    text = json.dumps(dashboard())
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"${datasource}", "upriver-live"}
    names = {one["name"] for one in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(query.expression for query in panel_queries())))
    assert used - names == {"__rate_interval", "__range"}


def test_every_alert_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs/live/observability.md").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= set(rule["annotations"])
        assert f"`{rule['alert']}`" in page, rule["alert"]
    assert {rule["alert"] for rule in alerts()} == set(FIRES), "each is tried below"


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(ALERTS)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"{len(alerts())} rules found" in done.stdout, done.stdout + done.stderr


_STREAM = 'tenant="a", model="m", policy="newest", replica="r"'
# By alert: series that make it fire, its labels, and series that do not. Values are promtool's: start+step x count.
FIRES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]] = {
    "UpriverNoReadyReplica": (
        {'upriver_live_ready{replica="r"}': "1+0x5 0+0x60"},
        {},
        {'upriver_live_ready{replica="r"}': "0+0x60", 'upriver_live_ready{replica="s"}': "1+0x60"},
    ),
    "UpriverLatencyHigh": (
        {
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="0.5"}}': "0+90x60",
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="+Inf"}}': "0+100x60",
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="1"}}': "0+100x60",
        },
        {"model": "m", "policy": "newest"},
        {
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="0.5"}}': "0+99x60",
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="+Inf"}}': "0+100x60",
            f'upriver_live_frame_latency_seconds_bucket{{{_STREAM}, le="1"}}': "0+100x60",
        },
    ),
    "UpriverFramesDropped": (
        {
            f'upriver_live_frames_dropped_total{{{_STREAM}, reason="late"}}': "0+20x60",
            f"upriver_live_frames_received_total{{{_STREAM}}}": "0+100x60",
        },
        {"model": "m", "reason": "late"},
        {
            f'upriver_live_frames_dropped_total{{{_STREAM}, reason="newer"}}': "0+20x60",
            f"upriver_live_frames_received_total{{{_STREAM}}}": "0+100x60",
        },
    ),
    "UpriverStreamsRefused": (
        {'upriver_live_refusals_total{kind="AdmissionRefused", code="sessions-full", replica="r"}': "0+2x60"},
        {"code": "sessions-full"},
        {'upriver_live_refusals_total{kind="AdmissionRefused", code="draining", replica="r"}': "0+2x60"},
    ),
    "UpriverServiceFailures": (
        {'upriver_live_refusals_total{kind="ServiceFailure", code="error", replica="r"}': "0+0x20 1+0x40"},
        {"code": "error"},
        {'upriver_live_refusals_total{kind="BadMessage", code="error", replica="r"}': "0+0x20 1+0x40"},
    ),
    "UpriverCredentialsRefused": (
        {'upriver_live_refusals_total{kind="Unauthorized", code="key-unknown", replica="r"}': "0+60x60"},
        {"code": "key-unknown"},
        {'upriver_live_refusals_total{kind="Unauthorized", code="key-unknown", replica="r"}': "0+1x60"},
    ),
    "UpriverStatesNearlyFull": (
        {"upriver_live_held_state_bytes": "95+0x60", "upriver_live_held_state_limit_bytes": "100+0x60"},
        {},
        {"upriver_live_held_state_bytes": "50+0x60", "upriver_live_held_state_limit_bytes": "100+0x60"},
    ),
    "UpriverStatesNotSaved": (
        {'upriver_live_state_saves_total{outcome="failed", replica="r"}': "0+1x60"},
        {"replica": "r"},
        {'upriver_live_state_saves_total{outcome="saved", replica="r"}': "0+1x60"},
    ),
    "UpriverStatesLost": (
        {'upriver_live_hand_offs_total{outcome="lost", replica="r"}': "0+0x20 1+0x40"},
        {},
        {'upriver_live_hand_offs_total{outcome="resumed", replica="r"}': "0+0x20 1+0x40"},
    ),
    "UpriverQualityLowForLong": (
        {
            f'upriver_live_frames_answered_total{{{_STREAM}, level="1"}}': "0+60x60",
            f'upriver_live_frames_answered_total{{{_STREAM}, level="4"}}': "0+40x60",
        },
        {"model": "m", "policy": "newest"},
        {
            f'upriver_live_frames_answered_total{{{_STREAM}, level="1"}}': "0+40x60",
            f'upriver_live_frames_answered_total{{{_STREAM}, level="4"}}': "0+60x60",
        },
    ),
    "UpriverEngineSaturated": (
        {'upriver_live_engine_busy_seconds_total{replica="r"}': "0+59x60"},
        {"replica": "r"},
        {'upriver_live_engine_busy_seconds_total{replica="r"}': "0+50x60"},
    ),
    "UpriverReplicaSilent": (
        {'upriver_live_figures_age_seconds{replica="r"}': "18+0x60"},
        {"replica": "r"},
        {'upriver_live_figures_age_seconds{replica="r"}': "5+0x60"},
    ),
}  # fmt: skip


def rule_tests() -> dict[str, Any]:
    """All of them in the format of promtool; one minute a step."""
    tests = []
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in alerts()}
    for alert, (loud, labels, quiet) in FIRES.items():
        shown = {"alertname": alert, "alertstate": "firing", "severity": severities[alert], **labels}
        text = ", ".join(f'{name}="{value}"' for name, value in shown.items())
        for series, samples in ((loud, [{"labels": f"ALERTS{{{text}}}", "value": 1}]), (quiet, [])):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'ALERTS{{alertname="{alert}", alertstate="firing"}}',
                            "eval_time": "28m",
                            "exp_samples": samples,
                        }
                    ],
                }
            )
    return {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    file = tmp_path / "rules.test.yaml"
    file.write_text(yaml.safe_dump(rule_tests()))
    done = subprocess.run([program("promtool"), "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
