"""An hour of film, small and slow, so that it takes minutes: the driver's memory, and what a kill costs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

from jobs.manifest import read_manifest
from pipeline.video import probe

SIZE, RATE, SECONDS = (48, 32), 1, 3600
SCENES = 9
SEGMENT_SECONDS = 60
SLACK_FRAMES = 12  # between model, encoder and uploader


def make_hour(path: Path) -> Path:
    width, height = SIZE
    frames = RATE * SECONDS
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "18", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            number = index * SCENES // frames
            cells = np.random.default_rng(number).integers(0, 116, (height // 4, width // 4, 3), dtype=np.uint8)
            scene = (cells + 139 * (number % 2)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            picture = np.ascontiguousarray(np.roll(scene, index // 4, axis=1))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


class Watched:
    """The command in a process of its own, whose memory is looked at against how far it is."""

    def __init__(self, arguments: list[str], area: Path) -> None:
        self._area = area
        self.samples: list[tuple[int, float]] = []  # frames shown, MB of the driver
        self.restored = 0  # by this run
        self.process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.PIPE)

    def frames(self) -> int:
        try:
            (place,) = self._area.glob("*/progress.json")
            told = json.loads(place.read_text())
            self.restored = told["frames_done"]
            return sum(told["running"].values())
        except (ValueError, OSError):
            return 0

    def follow(self, until_frames: int | None = None) -> None:
        """Watch until it ends, or is so far."""
        driver = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                self.samples.append((self.frames(), driver.memory_info().rss / 1e6))
            except psutil.Error:
                return
            if until_frames is not None and self.samples[-1][0] >= until_frames:
                return
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_hour_takes_no_more_memory_than_a_minute_and_a_kill_costs_a_segment(tmp_path: Path) -> None:
    source = make_hour(tmp_path / "hour.mp4")
    total = RATE * SECONDS
    target = tmp_path / "out.mp4"
    area = tmp_path / "out.mp4.upriver"
    arguments = ["restore", str(source), str(target), "--model", "tiny", "--steps", "1", "--json"]
    arguments += ["--segment-seconds", str(SEGMENT_SECONDS), "--preset", "ultrafast", "--dtype", "fp32"]

    first = Watched(arguments, area)
    workers: list[psutil.Process] = []
    try:
        first.follow(until_frames=random.Random(os.getpid()).randrange(total // 4, total // 2))
        workers = psutil.Process(first.process.pid).children(recursive=True)
    finally:
        first.process.kill()
        first.process.wait()
    psutil.wait_procs(workers, timeout=10)
    shown = first.frames()
    records = area.glob("*/videos/*/segments/[0-9]*.json")
    kept = sum(json.loads(record.read_text())["frames"] for record in records)
    assert not target.exists() and 0 < kept <= shown + SLACK_FRAMES

    second = Watched(arguments, area)
    second.follow()
    told: dict[str, Any] = json.loads(second.process.communicate()[0])
    assert second.process.returncode == 0 and told["videos"][0]["frames"] == total
    assert 0 < second.restored <= total - kept  # nothing that was kept was made again
    assert shown - kept <= SEGMENT_SECONDS * RATE + SLACK_FRAMES, (shown, kept)
    assert probe(target).duration_s == pytest.approx(SECONDS, abs=1)
    manifest = read_manifest(str(target))
    assert manifest is not None and len(manifest.cuts) == SCENES - 1

    later = [mb for frames, mb in second.samples if frames > kept]
    early, late = later[len(later) // 10 : len(later) // 4], later[-(len(later) // 4) :]
    growth = max(late) / max(early) - 1
    print(f"shown {shown}, kept {kept}, restored then {second.restored}")
    print(f"driver {max(early):.0f} -> {max(late):.0f} MB ({100 * growth:+.1f} %)")
    assert growth < 0.05, (max(early), max(late))
