"""What the job adds to the model: two workers against one, overhead, memory with many rows, and the forecast.

    python -m benchmarks.scheduling --model stand-in:100 --runs 5          # a model of fixed cost
    python -m benchmarks.scheduling --model tiny --runs 5
    python -m benchmarks.scheduling --rows 10 100 1000                     # memory of driver and object store

Everything runs through `upriver restore` in processes of its own, each worker with one thread, on films made here. Wall
time is the job's own: from its beginning to its last manifest, without the start of Ray. The forecast for two workers
comes from the run with one: its fixed time, and its time per frame through the simulation of `upriver archive-plan`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from jobs.manifest import read_manifest
from jobs.simulation import predict_makespan

WIDTH, HEIGHT = 96, 64


def make_film(path: Path, shots: list[int], width: int = WIDTH, height: int = HEIGHT) -> Path:
    """Write a film of hard cuts: `shots` are lengths in frames, at 25 frames a second."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frames in enumerate(shots):
            chosen = np.random.default_rng(number)
            lowest = 140 * (number % 2)
            cells = chosen.integers(lowest, lowest + 116, (height // 4, width // 4, 3), dtype=np.uint8)
            scene = cells.repeat(4, 0).repeat(4, 1)
            for moment in range(frames):
                picture = np.ascontiguousarray(np.roll(scene, moment, axis=1))
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


class Peak:
    """The most memory that processes below one had, looked at ten times a second; a context manager."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.driver_mb = self.store_mb = 0.0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        driver = psutil.Process(self._pid)
        while not self._over.wait(0.1):
            try:
                self.driver_mb = max(self.driver_mb, driver.memory_info().rss / 1e6)
                for process in driver.children(recursive=True):
                    if process.name() == "raylet":  # the object store is memory that it shares
                        self.store_mb = max(self.store_mb, process.memory_info().shared / 1e6)
            except psutil.Error:
                continue


def restore(source: Path, target: Path, model: str, actors: int, *more: str) -> tuple[dict[str, Any], Peak]:
    """Run `upriver restore`; return what it told and the memory that it took."""
    arguments = ["restore", str(source), str(target), "--model", model, "--actors", str(actors), "--json"]
    options = ["--threads", "1", "--dtype", "fp32", "--preset", "ultrafast", "--overwrite", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments, *options],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with Peak(process.pid) as peak:
        told, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"upriver restore ended with {process.returncode}")
    return json.loads(told), peak


def model_seconds(target: Path) -> float:
    """Seconds inside the model, of all workers together."""
    manifest = read_manifest(str(target))
    assert manifest is not None
    return manifest.seconds["model"]


def scaling(folder: Path, model: str, frames: int, runs: int, steps: str) -> dict[str, Any]:
    """One worker against two, run in turn; and the job's overhead with one."""
    luck = random.Random(0)
    shots = [luck.randint(4, 12) for _ in range(24)]
    shots = [max(2, round(shot * frames / sum(shots))) for shot in shots]
    source = make_film(folder / "film.mp4", shots)
    walls: dict[int, list[float]] = {1: [], 2: []}
    inside, forecasts = [], []
    for number in range(runs):
        for actors in (1, 2):
            target = folder / f"out-{number}-{actors}.mp4"
            told, _ = restore(source, target, model, actors, "--steps", steps)
            walls[actors].append(told["wall_s"])
            if actors == 1:
                inside.append(model_seconds(target))
        fixed_s, each_s = walls[1][-1] - inside[-1], inside[-1] / sum(shots)
        forecasts.append(fixed_s + predict_makespan([shot * each_s for shot in shots], 2))
        print(f"run {number + 1}: {walls[1][-1]:.1f} s, {walls[2][-1]:.1f} s", file=sys.stderr)
    ratios = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    return {
        "model": model,
        "frames": sum(shots),
        "shots": len(shots),
        "one_s": statistics.median(walls[1]),
        "two_s": statistics.median(walls[2]),
        "speedup": statistics.median(ratios),
        "speedups": [round(ratio, 3) for ratio in ratios],
        "overhead": statistics.median(one / model_s - 1 for one, model_s in zip(walls[1], inside, strict=True)),
        "forecast_error": statistics.median(said / was - 1 for said, was in zip(forecasts, walls[2], strict=True)),
    }


def many_rows(folder: Path, counts: list[int]) -> list[dict[str, Any]]:
    """Memory of driver and object store for films of so many shots of five frames."""
    table = []
    for count in counts:
        source = make_film(folder / f"film-{count}.mp4", [5] * count, 48, 32)
        told, peak = restore(source, folder / f"rows-{count}.mp4", "stand-in:0", 2)
        manifest = read_manifest(str(folder / f"rows-{count}.mp4"))
        assert manifest is not None
        table.append({
            "rows": len(manifest.cuts) + 1,
            "wall_s": told["wall_s"],
            "driver_mb": round(peak.driver_mb),
            "object_store_mb": round(peak.store_mb),
        })  # fmt: skip
        print(table[-1], file=sys.stderr)
    return table


def main() -> None:
    """Measure what was asked for and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's name; stand-in:MS for one that waits so many milliseconds a step")
    parser.add_argument("--frames", type=int, default=1200, help="length of the film")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", default="1")
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told: dict[str, Any] = {"cores": os.cpu_count()}
        if chosen.model:
            told["scaling"] = scaling(folder, chosen.model, chosen.frames, chosen.runs, chosen.steps)
        if chosen.rows:
            told["rows"] = many_rows(folder, chosen.rows)
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
