from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from jobs import standing, status
from jobs.cli import main
from jobs.standing import read_status
from tests.work_area import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Four videos: one finished, one begun, one failed, one waiting."""
    made = Job(str(tmp_path / "out"), {"a.mp4": [20], "b.mp4": [25, 30], "c.mp4": [40], "d.mp4": [100]})
    made.write_result("a.mp4")
    for name in ("b.mp4", "d.mp4"):
        made.write_plan(name)
    for shot, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        made.write_segment("b.mp4", shot, number)
    made.write_failure("c.mp4", attempt=1, final=False)
    made.write_failure("c.mp4", attempt=2)
    made.write_job()
    return made


def steady(frames: int, seconds: float, points: int = 40) -> list[tuple[float, int]]:
    """A history at an even pace, after 20 seconds in which workers started."""
    return [(0.0, 0), *((20 + seconds * k / points, frames * k // points) for k in range(points + 1))]


def snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime) for p in sorted(folder.rglob("*"))}


def running(job: Job, *, ago_s: float = 2.0) -> None:
    """What the driver reports of that moment."""
    job.write_progress(
        ago_s=ago_s,
        done=["a.mp4"],
        failed=["c.mp4"],
        running={"b.mp4": 35},
        frames_total=175,
        frames_left=120,
        frames_done=55,
        history=steady(55, 578),
    )


def test_a_running_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    running(job)
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert "running for 10 min on tape-robot (process 4711), 2 workers" in told
    assert "1 finished, 1 running, 1 failed, 1 waiting, of 4" in told
    assert "55 of 175 (31.4 %), 0.10 fps" in told
    assert re.search(r"about 2\d min \(\d+ min to 2\d min\)", told)
    assert re.search(r"b\.mp4 +35 +55 +64 % +5\.00", told)  # the open shot's last segment: 10 frames in 2 s
    assert re.search(r"c\.mp4 +source-unreadable +2 +c\.mp4 is empty", told) and "again" in told


def test_json_says_the_same(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    running(job)
    assert main(["status", job.dst, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["jobs"]
    assert (told["state"], told["counted_from"]) == ("running", "progress")
    assert (told["finished"], told["waiting"], told["frames_done"], told["frames_total"]) == (1, 1, 55, 175)
    assert told["running"] == [{"name": "b.mp4", "frames": 35, "total": 55, "fps": 5.0}]
    assert [(one["name"], one["attempts"]) for one in told["failed"]] == [("c.mp4", 2)]
    assert told["low_s"] < told["left_s"] < told["high_s"]


def test_looking_writes_nothing(job: Job, tmp_path: Path) -> None:
    running(job, ago_s=300)
    before = snapshot(tmp_path)
    assert main(["status", job.dst]) == 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("reported", [True, False])
def test_a_killed_driver_is_told_from_what_is_there(
    job: Job, capsys: pytest.CaptureFixture[str], reported: bool
) -> None:
    for shot, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        job.write_segment("b.mp4", shot, number, ago_s=95)
    job.write_segment("d.mp4", 0, 0, ago_s=120)
    if reported:
        running(job, ago_s=200)
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert re.search(r"no sign of life for 9\d s: the driver on tape-robot may be dead; the same command", told)
    assert "1 finished, 2 begun, 1 failed, 0 waiting, of 4" in told
    assert re.search(r"b\.mp4 +35 +55 +64 %", told) and re.search(r"d\.mp4 +10 +100 +10 %", told)
    assert ("of work at the last rate" in told) == reported


def test_a_job_whose_reports_stop_but_whose_segments_come_is_alive(job: Job) -> None:
    running(job, ago_s=200)
    (told,) = read_status(job.dst).jobs
    assert told.state == "running" and told.counted_from == "records" and told.silent_s < 30


@pytest.mark.parametrize("state", ["interrupted", "cancelled"])
def test_a_stopped_job_says_how_to_go_on(job: Job, capsys: pytest.CaptureFixture[str], state: str) -> None:
    running(job, ago_s=200)
    job.write_job(state, exit_code=143)
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert f"{state} at" in told and "exit status 143; the same command continues" in told
    assert "time left" not in told


def test_a_job_that_is_still_planning(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.started_ago_s = 5
    job.write_job("planning")
    assert main(["status", job.dst]) == 0
    assert "not known before the first frames are restored" in capsys.readouterr().out


def test_videos_that_are_not_planned_yet_are_thought_to_be_like_the_others(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    running(job)
    (all_planned,) = read_status(job.dst).jobs
    told = {"done": ["a.mp4"], "running": {"b.mp4": 35}, "frames_total": 175, "frames_left": 120, "frames_done": 55}
    job.write_progress(videos_total=8, unplanned=4, history=steady(55, 578), **told)
    (half_planned,) = read_status(job.dst).jobs
    assert all_planned.left_s and half_planned.left_s == pytest.approx(all_planned.left_s * (120 + 175) / 120, rel=0.01)
    assert main(["status", job.dst]) == 0
    shown = capsys.readouterr().out
    assert "55 of those planned 175" in shown and "if the 4 videos not planned yet are like the others" in shown


def test_a_finished_job_that_has_tidied_up(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.rmtree(Path(job.dst, ".upriver"))
    job.write_result("d.mp4", damage=["a picture cannot be decoded"])
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert "finished: 2 videos" in told and re.search(r"d\.mp4 +384x256 +100 .* source damaged", told)


def test_a_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(str(tmp_path / "film.mkv"), {"film.avi": [50]}, is_folder=False)
    job.write_job()
    job.write_plan("film.avi")
    job.write_segment("film.avi", 0, 0)
    job.write_progress(running={"film.avi": 10}, frames_done=10, frames_left=40, history=[(0.0, 0), (30.0, 10)])
    assert main(["status", job.dst]) == 0
    assert re.search(r"film\.avi +10 +50 +20 % +5\.00", capsys.readouterr().out)
    job.write_result("film.avi")
    job.write_job("finished")
    assert main(["status", job.dst]) == 0
    assert "finished at" in capsys.readouterr().out


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "none")]) == 5
    assert "neither a job nor a result" in capsys.readouterr().err


def test_other_jobs_of_the_destination_are_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    older = Job(job.dst, {"a.mp4": [20]}, job_id="fedcba9876543210", started_ago_s=9000)
    older.write_job("cancelled")
    running(job)
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert "other jobs" in told and "fedcba9876543210  cancelled" in told and "running for" in told


def test_names_are_not_taken_for_markup_or_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]x[/red]\x1b[2J.mp4"
    job = Job(str(tmp_path / "out"), {name: [10]})
    job.write_job()
    job.write_progress(running={name: 3})
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert "[red]x[/red]" in told and "\x1b" not in told


def test_a_record_of_a_newer_version(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.put("job.json", json.dumps({"job_id": "1", "state": "dreaming"}))
    assert main(["status", job.dst]) == 1
    assert "Use the version of Upriver that runs the job" in capsys.readouterr().err


def test_a_ledger_cut_short_by_a_crash(job: Job) -> None:
    ledger = Path(job.area, "ledger.jsonl")
    ledger.write_bytes(ledger.read_bytes() + b'{"time": "2026-')
    running(job)
    assert [one.name for one in read_status(job.dst).jobs[0].failed] == ["c.mp4"]


def test_a_fresh_report_of_a_large_job_needs_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(tmp_path / "out"), {f"{k:05d}.mp4": [100_000] for k in range(10_000)})
    job.write_job()
    for name in ("04000.mp4", "04001.mp4"):
        job.write_plan(name)
        job.write_segment(name, 0, 0)
    names = list(job.videos)
    job.write_progress(done=names[:4000], running=dict.fromkeys(names[4000:4100], 10), history=steady(400_000, 5000))
    from infra.storage import LocalStorage

    reads: list[str] = []
    read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, place: reads.append(place) or read(self, place))  # type: ignore[func-returns-value]
    told = read_status(job.dst).jobs[0]
    assert (told.finished, len(told.running), told.waiting) == (4000, 100, 5900)
    assert len(reads) < 40


def test_a_silent_job_of_ten_thousand_videos_is_counted_in_seconds(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "out"), {f"{k:05d}.mp4": [25] for k in range(2_000)})
    job.write_job(host="gone")
    plan = job.plan("00000.mp4").model_dump(mode="json")
    for number, name in enumerate(job.videos):
        folder = Path(job.area, "videos", job.run_id(name))
        (folder / "segments").mkdir(parents=True)
        own = {**plan, "run_id": job.run_id(name), "name": name, "destination": job.destination(name)}
        (folder / "plan.json").write_text(json.dumps(own))
        if number % 2:
            (folder / "segments" / "00000-000000.json").write_text("{}")  # by its name, the record counts
    began = time.perf_counter()
    told = read_status(job.dst).jobs[0]
    assert (told.state, len(told.running), told.waiting) == ("silent", 1000, 1000)
    assert {video.frames for video in told.running} == {10}
    assert time.perf_counter() - began < 20


def test_watching_ends_with_the_job(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running(job)
    looks = []

    def next_look(seconds: float) -> None:
        looks.append(seconds)
        job.write_job("finished", exit_code=4)
        job.write_progress(done=["a.mp4", "b.mp4", "d.mp4"], failed=["c.mp4"], frames_left=0)

    monkeypatch.setattr(status.time, "sleep", next_look)
    assert main(["status", job.dst, "--watch"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(looks) == 1 and lines[0].startswith("running: 1 of 4 videos, 1 failed; frames 55 of 175")
    assert lines[1].startswith("finished: 3 of 4 videos, 1 failed")


def test_age_is_measured_against_now(job: Job) -> None:
    from datetime import UTC, datetime, timedelta

    running(job)
    (told,) = read_status(job.dst, datetime.now(UTC) + timedelta(hours=1)).jobs
    assert told.state == "silent" and told.silent_s > standing.SILENT_AFTER_S
    (told,) = read_status(job.dst, datetime.now(UTC) - timedelta(hours=1)).jobs  # a clock that is behind
    assert told.state == "running" and told.silent_s == 0
