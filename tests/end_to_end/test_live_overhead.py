"""What the live service adds to the model, by the command that measures it; hardly anything else may run beside."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WINDOW_MB = 16 * (320 * 180 * 3 + 64) / 1e6


def measure(*arguments: str) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.live", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(told.stdout[told.stdout.index("{\n") :])
    print(json.dumps(found))
    return found


def test_latency() -> None:
    found = measure("latency")
    assert found["jpeg"]["best"]["p50"] <= 40
    assert found["raw"]["best"]["p50"] <= 15


@pytest.mark.parametrize("ingress", ["haproxy", "python"])
@pytest.mark.parametrize("transport", [[], ["--grpc"]], ids=["websocket", "grpc"])
def test_a_client_that_ignores_its_credit_moves_little_memory(ingress: str, transport: list[str]) -> None:
    found = measure("flood", "--ingress", ingress, *transport)
    for number in (1, 2, 3):
        told = found[f"round {number}"]
        assert told["refusal"] == "window-exceeded"
        limit_mb = WINDOW_MB + 64 * 1.048576
        if ingress == "python" and not transport:
            # Serve's own proxy queues whatever comes until the refusal reaches it: how much is a matter of speed.
            limit_mb += 2 * told["sent_mb"]
        assert max(told["moved_mb"].values()) <= limit_mb, told
