"""What the job adds to the model, by the command that measures it; hardly anything else may run beside these tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def measure(*arguments: str) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.scheduling", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    print(json.dumps(found))
    return found


def test_two_workers_take_half_as_long_and_as_long_as_was_said() -> None:
    found = measure("--model", "stand-in:200", "--frames", "1000", "--runs", "5")["scaling"]
    assert found["speedup"] >= 1.85
    assert found["overhead"] <= 0.10
    assert abs(found["forecast_error"]) <= 0.15


def test_two_workers_with_a_real_model() -> None:
    # Four steps, which are its default; with one, encoder and driver take a share of two cores that decides the result.
    found = measure("--model", "tiny", "--steps", "4", "--frames", "600", "--runs", "5")["scaling"]
    assert found["speedup"] >= 1.6
    assert abs(found["forecast_error"]) <= 0.15


def test_a_thousand_rows_take_no_more_memory_than_ten() -> None:
    few, many = measure("--rows", "10", "1200")["rows"]  # some cuts between shots of five frames are not found
    assert few["rows"] <= 10 and many["rows"] >= 950
    assert many["driver_mb"] <= few["driver_mb"] * 1.1 + 20
    assert many["object_store_mb"] <= few["object_store_mb"] + 20
