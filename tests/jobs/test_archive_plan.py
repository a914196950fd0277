"""`upriver archive-plan`: archives made up and planned, and what is said of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from jobs.archive_plan import RATE, SHOT_MEDIAN_S, SIZES, made_up
from jobs.cli import main

SHOT = {"number": 0, "first_index": 0, "frames": 100, "start_pts": 0, "stop_pts": -1}
VIDEO = {"width": 1000, "height": 500, "duration_s": 8.0, "frames": 200, "shots": [SHOT, SHOT]}


def test_a_made_up_archive_follows_its_distribution() -> None:
    archive = made_up(300, seed=1)
    assert archive.frames / RATE / 3600 == pytest.approx(300, rel=0.01)
    assert (made_up(300, seed=1).rows == archive.rows).all() and made_up(300, seed=2).rows.size != archive.rows.size
    mean_megapixels = sum(width * height * share for width, height, share in SIZES) / 1e6
    assert archive.rows.sum() / archive.frames == pytest.approx(mean_megapixels, rel=0.15)
    smallest = [row / (640 * 480 / 1e6) / RATE for row in made_up(20, seed=3).rows]
    assert statistics.median(smallest) == pytest.approx(SHOT_MEDIAN_S * 1.2, rel=0.3)


def test_a_plan_is_played_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"videos": [VIDEO] * 5, "seconds_per_megapixel": 0.5}))
    command = ["archive-plan", str(plan), "--simulate", "--gpus", "1,2,20", "--json", "--node-mtbf-hours", "0"]
    assert main([*command, "--load-seconds", "10", "--slow-share", "0"]) == 0
    document = json.loads(capsys.readouterr().out)
    row_s = 100 * 0.5 * 0.5
    assert document["gpu_hours"] == pytest.approx(10 * row_s / 3600)
    assert [course["makespan_s"] for course in document["courses"]] == pytest.approx(
        [10 + 10 * row_s, 10 + 5 * row_s, 10 + row_s]
    )
    assert document["bounds"]["20"] == row_s and document["world"]["segment_s"] == pytest.approx(10 * 250 / 40)


def test_the_tables_and_the_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["archive-plan", "--hours", "5", "--gpus", "2,50"]
    assert main([*made, "--seconds-per-megapixel", "1", "--simulate", "--node-mtbf-hours", "1"]) == 0
    text = capsys.readouterr().out
    assert "made up" in text and "efficiency" in text and "node failures" in text
    assert main(made) == 2
    assert "--seconds-per-megapixel" in capsys.readouterr().err
    assert main([*made, "--seconds-per-megapixel", "1", "--gpus", "two"]) == 2
    (tmp_path / "no.json").write_text("[]")
    assert main(["archive-plan", str(tmp_path / "no.json")]) == 2
    assert "no plan" in capsys.readouterr().err
    assert main([*made, "--seconds-per-megapixel", "1", "--simulate", "--node-mtbf-hours", "0.000001"]) == 2
