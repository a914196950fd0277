"""What a job does with what its actors say, with a pool that says what the test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs.planning
import jobs.restoring
from actors.errors import Failure
from actors.records import Row
from actors.upscaler import EngineOptions
from jobs.errors import ExitCode, Interrupted
from jobs.ledger import Ledger
from jobs.plan import Planned
from jobs.planning import Planning
from jobs.pool import PoolSize, Record
from jobs.restoring import Choices, Restoring, Video
from jobs.sources import Item
from jobs.tally import Tally
from jobs.workarea import WorkArea
from tests.work_area import Job

ENGINE = EngineOptions(model="m", device="cpu", dtype="fp32", flow="auto", threads=1, max_pixels=1, version="0")
Script = Callable[[Sequence[Row]], list[Record]]


class Pool:
    """Stands for `RunningRows`: notes which rows it was given and says what the script says."""

    script: Script
    rounds: list[list[str]]

    def __init__(self, rows: Sequence[Row], engine: EngineOptions, size: PoolSize) -> None:
        self.rounds.append([row["row_id"] for row in rows])
        self._records = type(self).script(rows)
        self.finished = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self, timeout_s: float) -> Record | None:
        if self._records:
            return self._records.pop(0)
        self.finished = True
        return None


class Bench:
    """A job over videos in a work area."""

    def __init__(self, folder: Path, videos: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.job = Job(str(folder), videos)
        self.area = WorkArea(str(folder), is_folder=True, job_id=self.job.job_id)
        self.area.open()
        self.ledger = Ledger(self.area.ledger)
        self.given_up: list[tuple[str, Failure]] = []
        self.cancelled = False
        self.ahead = False
        self.before_plan: Callable[[str], object] = lambda name: None
        self.rounds: list[list[str]] = []
        Pool.rounds = self.rounds
        monkeypatch.setattr(jobs.restoring, "RunningRows", Pool)
        monkeypatch.setattr(jobs.restoring, "wait_s", lambda failure, attempt: 0.0)

    def run(self, script: Script, **changes: Any) -> None:
        Pool.script = staticmethod(script)
        restoring = Restoring(
            area=self.area, ledger=self.ledger, tally=Tally(2),
            choices=Choices(overwrite=False, compare=False, truth=None, exact=False, max_pixels=10**6),
            size_for=lambda rows: PoolSize(1, 0.0, 1.0, 1), engine_for=lambda size: ENGINE,
            prepare=lambda planned: planned.plan, on_round=lambda videos: None,
            on_finished=lambda video, draft: None, on_given_up=self._give_up,
            is_cancelled=lambda: self.cancelled, show=lambda name: None,
        )  # fmt: skip
        with Planning(self._plans(changes), ahead=self.ahead) as planning:
            restoring.run(planning)

    def _plans(self, changes: dict[str, Any]) -> Iterator[Planned]:
        for name in self.job.videos:
            self.before_plan(name)
            plan = self.job.plan(name, **changes.get(name, {}))
            yield Planned(Item(plan.source, plan.destination, name, 1, "1-1"), plan, None)

    def _give_up(self, video: Video, failure: Failure) -> None:
        self.given_up.append((video.plan.name, failure))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    return lambda **videos: Bench(tmp_path, videos, monkeypatch)


def failed(row: Row, failure_class: str, code: str = "c") -> Record:
    details = {
        "failure_class": failure_class, "code": code, "message": "m.", "remedy": "r.", "seconds": 1.0, "host": "h",
    }  # fmt: skip
    return Record(row_id=row["row_id"], kind="failed", frames=0, details=json.dumps(details))


def fail_all(failure_class: str, code: str = "c") -> Script:
    return lambda rows: [failed(row, failure_class, code) for row in rows]


def test_what_is_finished_is_never_put_into_the_pool(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20, 7, 30], b=[5])
    for number in range(2):
        one.job.write_segment("a", 0, number)
    one.job.write_segment("a", 2, 0)  # shot 2 has begun
    one.run(fail_all("options"))
    a, b = one.job.run_id("a"), one.job.run_id("b")
    # Shot 0 is not there; of the others the longest is first.
    assert one.rounds == [[f"{a}-00002", f"{a}-00001", f"{b}-00000"]]


def test_a_higher_priority_goes_before_length(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20], b=[5])
    one.run(fail_all("options"), b={"priority": 1})
    assert one.rounds == [[f"{one.job.run_id('b')}-00000", f"{one.job.run_id('a')}-00000"]]


@pytest.mark.parametrize(
    ("failure_class", "attempts"),
    [("source-unreadable", 1), ("decode", 2), ("out-of-memory", 3), ("encode", 2), ("storage", 4), ("internal", 2)],
)
def test_each_class_of_failure_has_its_number_of_attempts(
    bench: Callable[..., Bench], failure_class: str, attempts: int
) -> None:
    one = bench(a=[20])
    one.run(fail_all(failure_class))
    assert len(one.rounds) == attempts
    records = Ledger(one.area.ledger).records
    assert [record.attempt for record in records] == list(range(1, attempts + 1))
    assert [record.final for record in records] == [False] * (attempts - 1) + [True]
    assert {(record.name, record.shot, record.host) for record in records} == {("a", 0, "h")}
    assert [name for name, _ in one.given_up] == ["a"]


def test_a_row_whose_worker_dies_each_time_is_given_up_and_stops_no_other(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20, 5], b=[6])

    def script(rows: Sequence[Row]) -> list[Record]:  # the worker of the longest row dies
        return [failed(row, "source-unreadable") for row in rows if row["frames"] == 6]

    one.run(script)
    # After the third death nothing of the video is tried again: neither the row nor its neighbour, which died too.
    assert [len(rows) for rows in one.rounds] == [3, 2, 2]
    assert {record.failure_class for record in one.ledger.records if record.name == "a"} == {"lost-actor"}
    assert sorted(name for name, _ in one.given_up) == ["a", "b"]


def test_a_row_that_stood_still_is_a_timeout(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20])
    marker = Path(one.area.video(one.job.run_id("a"))) / "stalled" / "00000"

    def script(rows: Sequence[Row]) -> list[Record]:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("host")
        return []

    one.run(script)
    assert [record.failure_class for record in one.ledger.records] == ["timeout", "timeout"]
    assert one.given_up[0][1]["code"] == "row-stalled" and not marker.exists()


def test_attempts_of_earlier_runs_count(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20])
    lost = Failure(failure_class="lost-actor", code="actor-lost", message="m", remedy="r")
    for attempt in (1, 2):
        one.ledger.add("a", lost, final=False, run_id=one.job.run_id("a"), shot=0, attempt=attempt)
    one.run(lambda rows: [])
    assert len(one.rounds) == 1 and one.ledger.records[-1].attempt == 3 and one.ledger.records[-1].final


def test_a_cancelled_job_stops(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20])
    one.cancelled = True

    def script(rows: Sequence[Row]) -> list[Record]:
        busy = Record(row_id=rows[0]["row_id"], kind="progress", frames=1, details="{}")
        return [busy] * 10**6

    with pytest.raises(Interrupted) as caught:
        one.run(script)
    assert caught.value.cancelled and caught.value.exit_code is ExitCode.TERMINATED


@pytest.mark.parametrize("ahead", [False, True])
def test_only_a_window_of_the_archive_is_planned_at_a_time(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(jobs.restoring, "MOST_OPEN", 6)
    monkeypatch.setattr(jobs.restoring, "MOST_IN_ROUND", 5)
    monkeypatch.setattr(jobs.planning, "_QUEUED", 1)
    one = bench(**{name: [20, 9] for name in "abcdefghij"})
    one.ahead = ahead
    planned: list[str] = []
    one.before_plan = planned.append
    ahead_of: list[int] = []

    def script(rows: Sequence[Row]) -> list[Record]:
        ahead_of.append(len(planned) - len(one.given_up))
        return [failed(row, "options") for row in rows]

    one.run(script)
    assert sorted(name for name, _ in one.given_up) == list("abcdefghij")
    assert len(one.rounds) >= 4 and max(map(len, one.rounds)) <= 5
    assert max(ahead_of) <= 5  # three videos of two rows, one in the queue, one in the making


def test_rows_begin_while_planning_goes_on(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20] * 5, b=[5], c=[5])
    one.ahead = True
    may_go_on = threading.Event()
    one.before_plan = lambda name: name != "b" or may_go_on.wait(30)

    def script(rows: Sequence[Row]) -> list[Record]:
        may_go_on.set()
        return [failed(row, "options") for row in rows]

    one.run(script)  # would wait for ever if all had to be planned first
    a, b = one.job.run_id("a"), one.job.run_id("b")
    assert one.rounds[0] == [f"{a}-{shot:05d}" for shot in range(5)] and f"{b}-00000" in one.rounds[1]


def test_what_the_planning_raises_ends_the_job(bench: Callable[..., Bench]) -> None:
    one = bench(a=[20], b=[5])
    one.ahead = True

    def fail(name: str) -> None:
        raise OSError("no more planning")

    one.before_plan = fail
    with pytest.raises(OSError, match="no more planning"):
        one.run(fail_all("options"))
