"""What a plan is said to cost, and what that rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.settings import Settings
from jobs.archive_plan import planned
from jobs.cli import main
from jobs.estimate import Cost, estimate, known_cost
from jobs.plan import plan_options, plan_video
from jobs.records import VideoPlan
from jobs.room import Room
from jobs.sources import Item
from tests.video_files import make_bad_files, make_video_files

ROOM = Room(results=4, work=2, scratch=1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole video and a text that is called one."""
    folder = tmp_path_factory.mktemp("estimate")
    good, bad = make_video_files(folder / "good"), make_bad_files(folder / "bad")
    (folder / "in").mkdir()
    good["full_range_mp4"].rename(folder / "in" / "a.mp4")
    bad["text"].rename(folder / "in" / "b.mp4")
    return folder / "in"


@pytest.fixture(scope="module")
def plan(videos: Path) -> VideoPlan:
    item = Item(str(videos / "a.mp4"), "out.mp4", "a.mp4", 1, "v")
    return plan_video(item, plan_options(Settings()), "model")


def test_time_is_pixels_by_the_figure_and_workers_share_it(plan: VideoPlan) -> None:
    one_s = plan.frames * plan.width * plan.height / 1e6 * 50.0
    for actors, wall_s in [(1, 4 * one_s), (2, 2 * one_s), (9, one_s)]:
        total = estimate([plan] * 4, 1, Cost(50.0, "a test"), actors=actors, free_bytes=None, room=ROOM)
        assert total.gpu_hours == pytest.approx(4 * one_s / 3600)
        assert total.wall_hours == pytest.approx(wall_s / 3600)
    assert (total.videos, total.failures, total.shots, total.frames) == (4, 1, 4, 4 * plan.frames)
    assert (total.result_bytes, total.work_bytes, total.scratch_bytes) == (4, 2, 1) and total.fits
    unknown = estimate([plan], 0, Cost(None, "nothing"), actors=1, free_bytes=5, room=ROOM)
    assert unknown.gpu_hours is unknown.wall_hours is None and unknown.free_bytes == 5 and not unknown.fits
    begun = estimate(
        [plan], 0, Cost(50.0, "a test"), actors=1, free_bytes=None, room=ROOM, frames_finished=plan.frames // 2
    )
    assert begun.gpu_hours == pytest.approx(one_s / 3600 / 2, rel=0.1)


def test_a_figure_comes_from_the_flag_then_from_manifests_then_from_what_is_stored(tmp_path: Path) -> None:
    settings = Settings(device="cpu")
    stored = known_cost(str(tmp_path), settings, "m")
    assert stored.seconds_per_megapixel == pytest.approx(30.7) and "two CPU cores" in stored.rests_on
    one_step = known_cost(str(tmp_path), Settings(device="cpu", steps=1), "m").seconds_per_megapixel
    assert one_step == pytest.approx(30.7 / 4)
    cuda = known_cost(str(tmp_path), Settings(device="cuda"), "m")
    assert cuda.seconds_per_megapixel is None and "--seconds-per-megapixel" in cuda.rests_on
    for name, model, seconds in [("a", "m", 8.0), ("b", "m", 4.0), ("c", "m", 6.0), ("d", "other", 99.0)]:
        manifest = {
            "model": {"sha256": model}, "options": {"steps": None, "height": None, "scale": 2},
            "output": {"frames": 10, "width": 400, "height": 200}, "seconds": {"model": seconds},
        }  # fmt: skip
        (tmp_path / f"{name}.mp4.manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "e.mp4.manifest.json").write_text("{}")
    measured = known_cost(str(tmp_path), settings, "m")
    assert measured.seconds_per_megapixel == pytest.approx(6.0 / 10 / 0.02) and "3 finished videos" in measured.rests_on
    assert known_cost(str(tmp_path), settings, "m", 1.5).seconds_per_megapixel == 1.5


def test_plan_only_prints_the_plan_and_writes_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["restore", str(videos / "a.mp4"), str(tmp_path / "out.mkv"), "--plan-only", "--device", "cpu"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "96x64 -> 384x256" in text and "two CPU cores" in text
    assert main([*command, "--json", "--actors", "3", "--seconds-per-megapixel", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["estimate"]["actors"] == 1, "one shot keeps one worker busy"
    assert document["seconds_per_megapixel"] == 2
    assert VideoPlan.model_validate(document["videos"][0]).frames == document["estimate"]["frames"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_split_is_counted_with_its_warm_up(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["restore", str(videos / "a.mp4"), str(tmp_path / "out.mkv"), "--plan-only", "--no-cuts"]
    command += ["--segment-seconds", "0.2", "--seconds-per-megapixel", "2"]
    split = [*command, "--split-seconds", "0.2", "--warm-up-frames", "3"]
    assert main([*command, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["estimate"]
    assert main([*split, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    parts, estimated = document["videos"][0]["shots"], document["estimate"]
    assert estimated["shots"] == whole["shots"] == whole["tasks"] == 1 and whole["warm_up_frames"] == 0
    assert estimated["tasks"] == len(parts) > 2 and estimated["warm_up_frames"] == 3 * (len(parts) - 1)
    more = estimated["warm_up_frames"] / whole["frames"]
    assert estimated["gpu_hours"] == pytest.approx(whole["gpu_hours"] * (1 + more))
    (tmp_path / "plan.json").write_text(json.dumps(document))
    archive, _ = planned(str(tmp_path / "plan.json"))
    assert archive.rows.sum() == pytest.approx((1 + more) * whole["frames"] * 96 * 64 / 1e6)
    assert main(split) == 0
    text = capsys.readouterr().out
    assert f"in {len(parts)} parts with {3 * (len(parts) - 1)} frames of warm-up besides ({more:.2%} more)" in text
    assert main(command) == 0
    assert "parts" not in capsys.readouterr().out


def test_plan_only_names_what_cannot_be_planned(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", str(videos), str(tmp_path / "out"), "--plan-only", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [failure["name"] for failure in document["failures"]] == ["b.mp4"]
    assert document["failures"][0]["code"] == "video-unreadable" and document["estimate"]["videos"] == 1
    assert main(["restore", str(videos), str(tmp_path / "out"), "--plan-only", "--limit", "1", "--json"]) == 0
    assert [video["name"] for video in json.loads(capsys.readouterr().out)["videos"]] == ["a.mp4"]
