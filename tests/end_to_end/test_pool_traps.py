"""The traps of Ray Data that `jobs/pool.py` steps around, each walked into on a real Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import jobs.pool
from actors.records import Row
from actors.upscaler import EngineOptions
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.pool import JOB_CONTEXT, PoolSize, Record, run_rows
from jobs.sources import Item
from tests.films import make_film

SHOTS = (5, 4, 6)


def engine(model: str) -> EngineOptions:
    from infra.own_code import code_fingerprint

    return EngineOptions(model, "cpu", "fp32", "auto", 1, 10**6, code_fingerprint())


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    from infra.settings import Settings

    film = make_film(tmp_path / "film.mp4", SHOTS)
    info = storage_for(str(film)).stat(str(film))
    assert info is not None
    item = Item(str(film), str(tmp_path / "out.mp4"), "film.mp4", info.size_bytes, info.version)
    plan = plan_video(item, plan_options(Settings(preset="ultrafast", segment_seconds=0.08)), "model")
    found = rows_of(plan, str(tmp_path / "segments"), str(tmp_path / "states"))
    assert [row["frames"] for row in found] == list(SHOTS)
    return found


def ended(records: list[Record]) -> dict[str, str]:
    """The last word on each row."""
    return {record["row_id"]: record["kind"] for record in records}


@pytest.mark.usefixtures("ray_running")
@pytest.mark.slow
def test_a_row_that_kills_its_actor_ends_and_is_not_tried_for_ever(rows: list[Row]) -> None:
    """By default Ray restarts the actor and the row without end; here both go on with the other rows."""
    poison, deaths, records = rows[0]["row_id"], 0, []
    for record in run_rows(rows, engine("stand-in:400"), PoolSize(1, 0.0, 1.0, 1)):
        records.append(record)
        if record["row_id"] == poison and record["kind"] == "started":
            os.kill(json.loads(record["details"])["pid"], signal.SIGKILL)
            deaths += 1
    assert deaths == 1
    last = ended(records)
    assert last.pop(poison) in ("started", "segment", "progress")
    assert last == {row["row_id"]: "done" for row in rows[1:]}


@pytest.mark.usefixtures("ray_running")
def test_a_row_that_is_taken_up_again_tells_first_what_was_finished_before(rows: list[Row]) -> None:
    """A generator that told only the rest would lose rows without a word."""
    size, options = PoolSize(1, 0.0, 1.0, 1), engine("stand-in:400")
    longest = max(rows, key=lambda row: row["frames"])
    for record in run_rows([longest], options, size):
        if record["kind"] == "started":
            pid = json.loads(record["details"])["pid"]
        if record["kind"] == "segment":
            with suppress(ProcessLookupError):  # dead already, and this record was on its way
                os.kill(pid, signal.SIGKILL)
    again = list(run_rows([longest], options, size))
    segments = [json.loads(record["details"]) for record in again if record["kind"] == "segment"]
    assert [segment["number"] for segment in segments] == [0, 1, 2]  # of two frames each
    assert segments[0]["replayed"] and not segments[2]["replayed"]
    assert again[-1]["kind"] == "done" and again[-1]["frames"] == longest["frames"]


@pytest.mark.usefixtures("ray_running")
@pytest.mark.parametrize("guarded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_silent_row_does_not_end_the_job(rows: list[Row], monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """Ray Data takes a job without a record for dead; two seconds instead of half an hour show that it would."""
    if guarded:
        monkeypatch.setattr(jobs.pool, "JOB_CONTEXT", {**JOB_CONTEXT, "execution_no_progress_timeout_s": 2})
    run: Callable[[], list[Record]] = lambda: list(  # noqa: E731
        run_rows([{**rows[1], "frames": 4}], engine("stand-in:1500"), PoolSize(1, 0.0, 1.0, 1))
    )
    if not guarded:
        assert run()[-1]["kind"] == "done"
        return
    with pytest.raises(Exception, match="progress"):
        run()


PROGRAM = """
import sys
import ray
import jobs.planning
import jobs.restore_run
from jobs.cli import main
told = []
class Planning(jobs.planning.Planning):
    def __init__(self, planned, *, ahead):
        told.append(ahead)
        super().__init__(planned, ahead=ahead)
jobs.restore_run.Planning = Planning
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
code = main(sys.argv[1:])
assert told == [True], told
sys.exit(code)
"""


@pytest.mark.slow
def test_actors_beside_gpus_leave_the_processors_to_the_planning(tmp_path: Path) -> None:
    """Two actors with a GPU and, as is Ray Data's default, a CPU each would take both processors of this Ray."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        make_film(tmp_path / "in" / f"{number}.mp4", SHOTS)
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM,
         "restore", str(tmp_path / "in"), str(tmp_path / "out"), "--model", "stand-in:20"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == 6
