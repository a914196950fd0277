from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import cancel
from jobs.cancel import is_cancelled, withdraw_cancel
from jobs.cli import main
from jobs.observation import read_areas
from tests.work_area import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(str(tmp_path / "out"), {"a.mp4": [20]})
    made.write_job()
    made.write_progress()
    return made


def answer(monkeypatch: pytest.MonkeyPatch, what: object) -> None:
    """Let the driver do `what` between two looks."""
    monkeypatch.setattr(cancel.time, "sleep", lambda seconds: what())  # type: ignore[operator]


def test_the_request_says_who_and_when_and_the_answer_is_awaited(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        assert is_cancelled(job.area)
        job.write_job("cancelled")

    answer(monkeypatch, stop)
    assert main(["cancel", job.dst]) == 0
    request = json.loads(Path(job.area, "cancel").read_text())
    assert set(request) == {"requested_at", "user", "host"} and request["requested_at"].endswith("Z")
    told = capsys.readouterr().out
    assert "on tape-robot (process 4711) to stop; waiting" in told
    assert "is cancelled. What is finished stays; the same command continues." in told


def test_without_waiting(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", job.dst, "--no-wait", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["jobs"] == [{"job_id": job.job_id, "state": "asked"}]
    assert is_cancelled(job.area)


def test_a_job_that_finishes_first_has_finished(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    answer(monkeypatch, lambda: shutil.rmtree(Path(job.area).parent))
    assert main(["cancel", job.dst]) == 0
    assert "has finished" in capsys.readouterr().out


def test_a_dead_driver_does_not_answer(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_progress(ago_s=3600)
    job.started_ago_s = 4000
    job.write_job()
    assert main(["cancel", job.dst]) == 4
    told = capsys.readouterr().out
    assert "does not answer: no sign of life for 60 min" in told and "tape-robot may be dead" in told


def test_only_running_jobs_are_asked(job: Job) -> None:
    other = Job(job.dst, {"a.mp4": [20]}, job_id="fedcba9876543210")
    other.write_job("interrupted")
    assert main(["cancel", job.dst, "--no-wait"]) == 0
    assert is_cancelled(job.area) and not is_cancelled(other.area)


def test_a_job_that_has_ended_needs_no_request(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_job("finished")
    assert main(["cancel", job.dst]) == 0
    assert "is not running: finished at" in capsys.readouterr().out and not is_cancelled(job.area)


def test_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", str(tmp_path / "none")]) == 5
    assert "There is no job at" in capsys.readouterr().err


def test_a_request_can_be_withdrawn(job: Job) -> None:
    cancel.request_cancel(job.area)
    withdraw_cancel(job.area)
    withdraw_cancel(job.area)
    assert not is_cancelled(job.area) and read_areas(job.dst)[0].job.job_id == job.job_id
