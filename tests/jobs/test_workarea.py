from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from jobs.workarea import JobRunning, WorkArea
from tests.work_area import Job


def test_beside_a_file_and_inside_a_folder(tmp_path: Path) -> None:
    beside = WorkArea(str(tmp_path / "film.mp4"), is_folder=False, job_id="j")
    assert beside.place == str(tmp_path / "film.mp4.upriver" / "j")
    inside = WorkArea("s3://bucket/out/", is_folder=True, job_id="j")
    assert inside.segments("r") == "s3://bucket/out/.upriver/j/videos/r/segments"
    assert inside.ledger == "s3://bucket/out/.upriver/j/ledger.jsonl"


def test_the_folders_made_for_it_go_with_it(tmp_path: Path) -> None:
    area = WorkArea(str(tmp_path / "new" / "film.mp4"), is_folder=False, job_id="j")
    area.open()
    (Path(area.place) / "videos" / "r").mkdir(parents=True)
    area.remove()
    assert os.listdir(tmp_path) == []


def test_what_a_stopped_job_left_is_taken_over(tmp_path: Path) -> None:
    job = Job(str(tmp_path), {"a.mp4": [25, 7]})
    job.write_job("interrupted")
    job.write_plan("a.mp4")
    for shot, number in ((0, 0), (0, 2), (1, 0)):
        job.write_segment("a.mp4", shot, number)
    area = WorkArea(str(tmp_path), is_folder=True, job_id=job.job_id)
    area.open()
    plan = area.plan(job.run_id("a.mp4"))
    assert plan is not None and area.videos() == {plan.run_id}
    # what comes after a gap does not count
    assert area.finished_frames(plan) == {0: 10, 1: 7}


def test_the_sweep_takes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
    job = Job(str(tmp_path), {"a.mp4": [10]})
    job.write_segment("a.mp4", 0, 0)
    area = WorkArea(str(tmp_path), is_folder=True, job_id=job.job_id)
    run = job.run_id("a.mp4")
    before = sorted(path for path in Path(area.video(run)).rglob("*"))
    (Path(area.segments(run)) / ".00000-000001.ab.partial.mp4").write_bytes(b"half")
    (Path(area.video(run)) / ".assembly-x").mkdir()
    (Path(area.video(run)) / ".assembly-x" / "result.mp4").write_bytes(b"half")
    area.sweep(run, job.destination("a.mp4"))
    assert sorted(path for path in Path(area.video(run)).rglob("*")) == before


def test_an_area_in_an_object_store(s3_bucket: str) -> None:
    job = Job(s3_bucket, {"a.mp4": [10, 5]})
    area = WorkArea(s3_bucket, is_folder=True, job_id=job.job_id)
    area.open()
    plan = job.plan("a.mp4")
    area.keep_plan(plan)
    job.write_segment("a.mp4", 0, 0)
    assert area.plan(plan.run_id) == plan and area.finished_frames(plan) == {0: 10, 1: 0}
    area.sweep(plan.run_id, plan.destination)
    area.remove_video(plan.run_id)
    assert area.plan(plan.run_id) is None and area.finished_frames(plan) == {0: 0, 1: 0}


@pytest.mark.parametrize(("host", "pid", "ago_s", "refused"), [
    ("elsewhere", 1, 5, True),
    ("elsewhere", 1, 60, False),  # silent for too long: its driver is dead
    (None, 1, 5, True),
    (None, os.getpid(), 5, False),  # an earlier run in this very process
    (None, 4_000_000, 5, False),  # no such process
])  # fmt: skip
def test_two_drivers_never_work_on_one_job(
    tmp_path: Path, host: str | None, pid: int, ago_s: float, refused: bool
) -> None:
    job = Job(str(tmp_path), {"a.mp4": [10]})
    job.write_job("running", host=host or socket.gethostname(), pid=pid)
    job.write_progress(ago_s=ago_s)
    area = WorkArea(str(tmp_path), is_folder=True, job_id=job.job_id)
    if refused:
        with pytest.raises(JobRunning, match="upriver cancel"):
            area.open()
    else:
        area.open()
    job.write_job("interrupted", host=host or socket.gethostname(), pid=pid)
    area.open()
