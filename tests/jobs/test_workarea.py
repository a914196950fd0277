from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.workarea import WorkArea


def test_beside_a_file_nothing_is_left_whatever_happens(tmp_path: Path) -> None:
    root = tmp_path / "new" / "film.mp4"
    with pytest.raises(RuntimeError), WorkArea(root, is_folder=False, job_id="r") as area:
        assert area.folder == tmp_path / "new" / "film.mp4.upriver" / "r"
        area.file_for(str(root), 0).write_bytes(b"half")
        area.ledger_path.write_text("{}\n")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_in_a_folder_the_ledger_stays(tmp_path: Path) -> None:
    with WorkArea(tmp_path / "out", is_folder=True, job_id="r") as area:
        area.file_for("x.mkv", 7).write_bytes(b"half")
        area.ledger_path.write_text("{}\n")
    assert area.ledger_kept == tmp_path / "out" / ".upriver" / "r" / "ledger.jsonl"
    assert os.listdir(area.folder) == ["ledger.jsonl"]


def test_an_area_left_by_a_killed_run_is_emptied(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".upriver" / "r" / "000000.mkv"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with WorkArea(tmp_path / "out", is_folder=True, job_id="r") as area:
        assert os.listdir(area.folder) == []
    assert os.listdir(tmp_path / "out") == []
