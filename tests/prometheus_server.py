"""A real Prometheus for tests: one server on loopback that scrapes one page, and its rule checker."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.object_stores import free_ports

SCRAPE_MS = 500
START_S = 60.0


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test is skipped where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Ask its HTTP API; returns `data`.

        Raises:
            AssertionError: it refuses, with what it says of the query.
        """
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query, without the values that are not numbers."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return [one for one in result if one["value"][1] not in ("NaN", "+Inf", "-Inf")]

    def wait_for(self, expression: str, patience_s: float = 30.0) -> None:
        """Wait until a query has a result."""
        until = time.monotonic() + patience_s
        while not self.query(expression):
            assert time.monotonic() < until, f"no data for {expression}"
            time.sleep(SCRAPE_MS / 2000)


@contextmanager
def prometheus(folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """Run a server that scrapes `target` (host:port) and evaluates `rules`."""
    (port,) = free_ports(1)
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        f"global: {{scrape_interval: {SCRAPE_MS}ms, scrape_timeout: {SCRAPE_MS}ms, evaluation_interval: 1s}}\n"
        f"rule_files: [{json.dumps(str(rules))}]\n"
        f"scrape_configs: [{{job_name: upriver, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        server = Prometheus(port)
        until = time.monotonic() + START_S
        while True:
            try:
                server.get("status/buildinfo")
                break
            except (OSError, AssertionError):
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < until, "it does not start"
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(30)
