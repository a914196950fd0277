"""What a job leaves when it is stopped, or when its workers die: whole results, and what it goes on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.cli import main
from pipeline.video import probe
from tests.video_files import picture

PATIENCE_S = 240.0


def make_film(path: Path, width: int, height: int, frames: int) -> Path:
    """Write a source whose restoration takes a while."""
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index % 40, width, height), format="rgb24")))
        output.mux(stream.encode(None))
    return path


def wait_for(what: Callable[[], object]) -> object:
    """Return the first true value of `what()`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        threading.Event().wait(0.05)
    raise TimeoutError("the job did not get there")


def unfinished(folder: Path) -> Path | None:
    """Return the file that a worker is writing into, once there is one."""
    return next((path for path in folder.rglob("*.partial*") if path.is_file()), None)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_job_and_leaves_what_it_goes_on_from(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    film = make_film(tmp_path_factory.mktemp("long") / "film.mkv", 160, 120, 400)
    out = tmp_path / "new" / "out.mkv"
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "restore", str(film), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: unfinished(tmp_path) or driver.poll() is not None)
        workers = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, number)
        told, err = driver.communicate(timeout=PATIENCE_S)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == code, err
    assert told == "" and err == "upriver: interrupted; what is finished is kept, and the same command continues\n"
    assert os.listdir(out.parent) == ["out.mkv.upriver"]
    (area,) = (out.parent / "out.mkv.upriver").iterdir()
    job = json.loads((area / "job.json").read_text())
    assert job["state"] == "interrupted" and job["exit_code"] == code and job["ended_at"]
    assert (area / "videos" / job["videos"]["film.mkv"] / "plan.json").is_file()
    psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def kill_writers(folder: Path, times: int, stop: threading.Event) -> None:
    """Kill, `times` times, the worker that writes the long film's segment; pass over what a dead one left."""
    seen: set[str] = set()
    while len(seen) < times and not stop.is_set():
        path = next((path for path in folder.rglob("*.partial*.mp4") if str(path) not in seen), None)
        if path is None:
            stop.wait(0.05)
            continue
        for process in psutil.Process().children(recursive=True):
            try:
                if any(file.path == str(path) for file in process.open_files()):
                    seen.add(str(path))
                    process.kill()
            except psutil.Error:
                continue


@pytest.mark.usefixtures("ray_running")
@pytest.mark.slow  # workers are killed in every run by test_chaos
@pytest.mark.parametrize(("deaths", "code"), [(1, 0), (3, 4)])
def test_a_row_whose_worker_dies_is_tried_again_but_not_for_ever(
    videos: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    deaths: int,
    code: int,
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make_film(source / "long.mkv", 96, 64, 60)
    shutil.copy(videos["h264_vfr_mp4"], source / "short.mp4")
    stop = threading.Event()
    killer = threading.Thread(target=kill_writers, args=(out, deaths, stop), daemon=True)
    killer.start()
    try:
        assert main(["restore", str(source), str(out), "--json"]) == code
    finally:
        stop.set()
        killer.join()
    told = json.loads(capsys.readouterr().out)
    ended = {video["name"]: video["status"] for video in told["videos"]}
    assert ended == {"long.mkv": "restored" if code == 0 else "failed", "short.mp4": "restored"}
    records = [json.loads(line) for line in Path(told["ledger"]).read_text().splitlines()]
    assert [record["attempt"] for record in records] == list(range(1, deaths + 1))
    assert {record["failure_class"] for record in records} == {"lost-actor"}
    assert [record["final"] for record in records] == [deaths == 3 and record is records[-1] for record in records]
    left = sorted(path.name for path in out.iterdir() if path.is_file())
    whole = ["short.mp4", "short.mp4.manifest.json", "short.mp4.sha256"]
    assert left == (["long.mkv", "long.mkv.manifest.json", "long.mkv.sha256", *whole] if code == 0 else whole)
    if code == 0:
        assert probe(out / "long.mkv").width == 384
