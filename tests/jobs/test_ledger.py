from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.errors import Failure, FailureClass
from jobs.ledger import ATTEMPTS, Ledger, may_try_again, wait_s


def failure(kind: str = "source-unreadable", code: str = "c") -> Failure:
    return Failure(failure_class=kind, code=code, message="m", remedy="r")


def test_the_ledger_is_one_record_a_line(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "work" / "ledger.jsonl"))
    ledger.add("a.mp4", failure(), final=True)
    ledger.add("b.mp4", failure(), final=False, attempt=2, seconds=1.5, shot=3)
    records = [json.loads(line) for line in Path(ledger.place).read_text().splitlines()]
    assert [record["name"] for record in records] == ["a.mp4", "b.mp4"]
    assert records[1]["attempt"] == 2 and records[1]["failure_class"] == "source-unreadable" and records[1]["time"]
    assert Ledger(ledger.place).records == ledger.records and ledger.added == 2


def test_a_line_cut_short_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    place = tmp_path / "ledger.jsonl"
    Ledger(str(place)).add("a.mp4", failure(), final=True)
    with place.open("a") as file:
        file.write('{"time": "2026')
    Ledger(str(place)).add("b.mp4", failure(), final=True)
    assert [record.name for record in Ledger(str(place)).records] == ["a.mp4", "b.mp4"]


def test_in_an_object_store(s3_bucket: str) -> None:
    ledger = Ledger(f"{s3_bucket}/ledger.jsonl")
    for name in ("a.mp4", "b.mp4"):
        ledger.add(name, failure(), final=True)
    assert [record.name for record in Ledger(ledger.place).records] == ["a.mp4", "b.mp4"]


def test_attempts_are_remembered_and_counted_anew_after_the_last(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.jsonl"))
    ledger.add("a.mp4", failure("lost-actor"), final=False, run_id="r", shot=0, attempt=2)
    ledger.add("a.mp4", failure("lost-actor"), final=False, run_id="r", shot=None, attempt=1)
    assert Ledger(ledger.place).attempts("r") == {0: 2, None: 1}
    ledger.add("a.mp4", failure("lost-actor"), final=True, run_id="r", shot=0, attempt=3)
    assert ledger.attempts("r") == {0: 0, None: 1} and ledger.attempts("other") == {}


def test_only_what_lies_with_the_video_is_quarantined(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.jsonl"))
    ledger.add("a.mp4", failure("decode"), final=False, run_id="a")
    assert ledger.quarantined("a") is None
    ledger.add("a.mp4", failure("decode"), final=True, run_id="a")
    ledger.add("b.mp4", failure("storage"), final=True, run_id="b")
    found = ledger.quarantined("a")
    assert found is not None and found.failure_class == "decode"
    assert ledger.quarantined("b") is None


def test_every_class_has_its_limit() -> None:
    assert set(ATTEMPTS) == set(FailureClass)
    assert may_try_again(failure("lost-actor"), 2) and not may_try_again(failure("lost-actor"), 3)
    assert not may_try_again(failure("source-unreadable"), 1)
    assert not may_try_again(failure("storage", "destination-exists"), 1)


@pytest.mark.parametrize(("attempt", "expected"), [(1, 2.0), (2, 4.0), (3, 8.0), (20, 60.0)])
def test_the_pause_doubles_up_to_a_limit(attempt: int, expected: float) -> None:
    assert wait_s(failure("storage"), attempt) == expected
    assert wait_s(failure("lost-actor"), attempt) == 0
