"""How long the live service takes from nothing to its first frame, and where the time goes.

    python -m benchmarks.cold_start                       # `upriver serve` with tiny, five times
    python -m benchmarks.cold_start --model stand-in:0    # all but the model

Each run starts everything anew. `first` is with an empty cache of what is known of models, as in a new pod; the others
find it filled, as where /models is a volume. What a replica does is measured apart, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

REPLICA = """
import time; began = time.perf_counter(); told = {}
def mark(what):
    global began
    told[what] = time.perf_counter() - began; began = time.perf_counter()
import actors.endpoint; mark("import of the application")
import torch; mark("import of torch")
import actors.live_engine, pipeline.engine; mark("import of the engine")
from actors.model_loading import EngineConfig, load_engine
engine = load_engine(MODEL, EngineConfig(), max_pixels=1 << 20); mark("model")
engine.warm(); mark("first step")
engine.warm(); mark("second step")
import json; print(json.dumps(told))
"""


def service(model: str, cache: str) -> dict[str, float]:
    """Return seconds from the command to each of its marks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", "--model", model, "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "UPRIVER_MODEL_CACHE": cache},
    )
    told: dict[str, float] = {}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Starting Ray"):
                told["command: imports"] = time.perf_counter() - began
            elif line.startswith("Loading"):
                told["Ray, Serve's controller and ingress"] = time.perf_counter() - began
                break
        while not answers(f"http://127.0.0.1:{port}/readyz"):
            if process.poll() is not None:
                raise SystemExit("the service has ended")
            time.sleep(0.02)
        told["ready"] = time.perf_counter() - began
    finally:
        process.terminate()
        process.communicate(timeout=120)
    return told


def answers(url: str) -> bool:
    """Whether it is ready."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def replica(model: str, cache: str) -> dict[str, float]:
    """Return the seconds of each thing that a replica does."""
    told = subprocess.run(
        [sys.executable, "-c", REPLICA.replace("MODEL", repr(model), 1)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"UPRIVER_MODEL_CACHE": cache},
    )
    found: dict[str, float] = json.loads(told.stdout)
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each mark."""
    return {what: round(statistics.median(run[what] for run in runs), 2) for what in runs[0]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, Any] = {"model": options.model, "runs": options.runs}
    for what, measure in (("service, from the command on", service), ("replica, each by itself", replica)):
        with tempfile.TemporaryDirectory() as cache:
            first = measure(options.model, cache)
            found[what] = {
                "first": {name: round(value, 2) for name, value in first.items()},
                "then": medians([measure(options.model, cache) for _ in range(options.runs)]),
            }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
