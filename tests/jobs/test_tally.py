from __future__ import annotations

import threading
from pathlib import Path

from infra.job_records import PROGRESS, Progress
from jobs.cancel import request_cancel
from jobs.tally import Reporter, Tally
from jobs.workarea import WorkArea


def test_what_earlier_runs_did_is_shown_and_not_counted_as_this_runs_work() -> None:
    tally = Tally(2)
    tally.plan("a", 30, {0: 10, 1: 0})
    tally.plan("b", 20, {0: 0})
    tally.advance("a", 0, 10, restored=False)
    tally.advance("a", 0, 13, restored=True)
    told = tally.progress()
    assert (told.frames_total, told.frames_left, told.frames_done) == (50, 37, 3)
    assert told.running == {"a": 13} and told.videos_total == 2


def test_videos_without_a_plan_are_counted_until_they_have_one_or_cannot_have_one() -> None:
    tally = Tally(3)
    assert tally.progress().unplanned == 3
    tally.plan("a", 30, {0: 0})
    tally.fail("b")
    assert tally.progress().unplanned == 1
    tally.plan("c", 5, {})
    tally.fail("c")
    assert tally.progress().unplanned == 0


def test_work_that_was_lost_is_done_again_and_counted_again() -> None:
    tally = Tally(1)
    tally.plan("a", 30, {0: 0})
    tally.advance("a", 0, 14, restored=True)
    tally.advance("a", 0, 10, restored=False)  # its worker died; ten frames are in segments
    tally.advance("a", 0, 30, restored=True)
    told = tally.progress()
    assert told.frames_done == 34 and told.frames_left == 0


def test_videos_that_are_over_are_no_more_running_and_leave_nothing_to_do() -> None:
    tally = Tally(2)
    for name in ("a", "b"):
        tally.plan(name, 10, {0: 0})
        tally.advance(name, 0, 4, restored=True)
    tally.fail("a")
    tally.advance("b", 0, 10, restored=True)
    tally.finish("b")
    told = tally.progress()
    assert (told.done, told.failed, told.running, told.frames_left) == (["b"], ["a"], {}, 0)


def test_the_history_stays_short() -> None:
    tally = Tally(1)
    tally.plan("a", 5000, {})
    for frames in range(2000):
        tally.advance("a", 0, frames, restored=True)
        told = tally.progress()
    assert len(told.history) <= 500
    assert told.history[-1][1] >= 1900 and told.history == sorted(told.history)


def test_the_area_says_how_far_it_is_and_that_somebody_cancelled(tmp_path: Path) -> None:
    area = WorkArea(str(tmp_path / "out.mp4"), is_folder=False, job_id="j")
    area.open()
    tally = Tally(1)
    told = Path(area.place) / PROGRESS
    with Reporter(area, tally, interval_s=0.01) as reporter:
        assert Progress.model_validate_json(told.read_bytes()).videos_total == 1
        assert not reporter.cancelled
        request_cancel(area.place)
        waited = threading.Event()
        while not reporter.cancelled:
            waited.wait(0.01)
        tally.plan("a", 3, {0: 3})
    assert Progress.model_validate_json(told.read_bytes()).frames_total == 3
