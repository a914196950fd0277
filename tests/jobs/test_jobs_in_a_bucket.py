"""Status, cancel and report of a job whose destination is a bucket: the same answers as from a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infra.storage import storage_for
from jobs import cancel
from jobs.cli import main
from jobs.report import collect
from tests.video_files import enlarge
from tests.work_area import Job


@pytest.fixture
def job(s3_bucket: str) -> Job:
    made = Job(f"{s3_bucket}/out", {"a.mp4": [20], "b.mp4": [25, 30], "deep/c.mp4": [40]}, source=f"{s3_bucket}/in")
    made.write_job()
    made.write_plan("b.mp4")
    for shot, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        made.write_segment("b.mp4", shot, number)
    made.write_failure("deep/c.mp4")
    made.write_result("a.mp4")
    return made


def contents(place: str) -> list[tuple[str, str]]:
    return [(info.place, info.version) for info in storage_for(place).list(place)]


def test_status_of_a_running_and_of_a_killed_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_progress(done=["a.mp4"], failed=["deep/c.mp4"], running={"b.mp4": 35}, frames_left=20, frames_done=35)
    before = contents(job.dst)
    assert main(["status", job.dst]) == 0
    told = capsys.readouterr().out
    assert "1 finished, 1 running, 1 failed, 0 waiting" in told and re.search(r"b\.mp4 +35 +55 +64 % +5\.00", told)
    storage_for(job.area).delete(f"{job.area}/progress.json")
    for shot, number in ((0, 2), (1, 0)):
        job.write_segment("b.mp4", shot, number, ago_s=95)
    assert main(["status", f"{job.dst}/"]) == 0
    told = capsys.readouterr().out
    assert "may be dead" in told and "1 finished, 1 begun, 1 failed, 0 waiting" in told
    assert [place for place, _ in contents(job.dst)] == [place for place, _ in before if "progress" not in place]


def test_cancel(job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel.time, "sleep", lambda seconds: job.write_job("cancelled"))
    job.write_progress()
    assert main(["cancel", job.dst]) == 0
    assert json.loads(storage_for(job.area).read(f"{job.area}/cancel"))["user"]
    assert "is cancelled" in capsys.readouterr().out


def test_report_with_pictures(job: Job, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.jobs.test_report import make_source

    make_source(tmp_path / "a.mp4")
    enlarge(tmp_path / "a.mp4", tmp_path / "a4.mp4")
    store = storage_for(s3_bucket)
    store.publish(tmp_path / "a.mp4", f"{s3_bucket}/in/a.mp4")
    store.publish(tmp_path / "a4.mp4", job.destination("a.mp4"))
    job.write_result("a.mp4", content=None)
    report = collect(job.dst)
    assert [one.name for one in report.judged] == ["a.mp4"] and report.judged[0].agreement_db > 30
    assert {video.name: video.status for video in report.videos} == {
        "a.mp4": "restored",
        "b.mp4": "running",
        "deep/c.mp4": "failed",
    }
    assert main(["report", job.dst, "-o", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg") == 2


def test_nothing_in_the_bucket(s3_bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"{s3_bucket}/none"]) == 5
    assert main(["cancel", f"{s3_bucket}/none"]) == 5
