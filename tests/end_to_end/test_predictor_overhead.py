"""What the predictor adds to the model, by the command that measures it; hardly anything else may run beside."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_request_adds_few_milliseconds() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.predictor", "overhead"], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(told.stdout)
    print(json.dumps(found))
    for way in ("grpc pixels alone", "grpc pixels sequence", "grpc jpeg alone", "grpc jpeg sequence"):
        assert found[way]["p50"] <= 15, way
    for way in ("rest pixels alone", "rest pixels sequence"):  # kserve's own endpoint takes hundreds
        assert found[way]["p50"] <= 30, way
