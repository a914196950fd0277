"""The queries of the dashboard and of the alerts, as tests read them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "infra" / "dashboards"
DASHBOARD, ALERTS = FOLDER / "live.json", FOLDER / "alerts.yaml"
SUFFIX = re.compile(r"_(?:bucket|sum|count)$")
# A selector: the name of a metric, and what stands in its braces.
SELECTOR = re.compile(r"\b((?:upriver|process)_\w+)(?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    place: str
    expression: str

    def filled(self, interval: str = "10s") -> str:
        """The expression with Grafana's variables replaced: everything, over this time."""
        text = re.sub(r"\$(?:__rate_interval|__range|__interval)\b", interval, self.expression)
        return re.sub(r"\$\w+", ".*", text)


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def panel_queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def alerts() -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics that an expression reads, and the labels that it selects by."""
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))) for name, braces in SELECTOR.findall(expression)]


def grouping(expression: str) -> set[str]:
    """The labels that an expression groups by."""
    groups = re.findall(r"\b(?:by|on|group_left|group_right|ignoring)\s*\(([^)]*)\)", expression)
    return {label for group in groups for label in re.split(r"[,\s]+", group) if label}
