from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.settings import Settings
from jobs.errors import NoInputError, UsageError
from jobs.old_plan import Item, plan_row, probe_item, row_options, run_id, select
from pipeline.video_errors import UnsupportedOutput


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_folder_stands_for_all_videos_under_it_and_keeps_its_structure(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(
        source,
        "b.mp4",
        "a/c.MKV",
        "a/d.avi",
        "a/notes.txt",
        "a/._c.mkv",
        ".upriver/1/000000.mp4",
        "x.mp4.upriver/1/0.mp4",
    )
    chosen = select(str(source), str(tmp_path / "out"))
    assert chosen.is_folder
    named = {item.name: Path(item.destination).relative_to(tmp_path / "out").as_posix() for item in chosen.items}
    assert named == {"b.mp4": "b.mp4", "a/c.MKV": "a/c.MKV", "a/d.avi": "a/d.mkv"}


def test_two_sources_never_share_a_result(tmp_path: Path) -> None:
    touch(tmp_path / "in", "tape.avi", "tape.mpg", "tape.mkv")
    chosen = select(str(tmp_path / "in"), str(tmp_path / "out"))
    assert sorted(Path(item.destination).name for item in chosen.items) == ["tape.avi.mkv", "tape.mkv", "tape.mpg.mkv"]
    touch(tmp_path / "in", "tape.avi.mkv")
    with pytest.raises(UsageError, match="Two sources"):
        select(str(tmp_path / "in"), str(tmp_path / "out"))


def test_results_below_the_source_are_no_sources(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "restored/a.mp4")
    assert [item.name for item in select(str(tmp_path), str(tmp_path / "restored")).items] == ["a.mp4"]


def test_a_file_goes_into_an_existing_folder_or_to_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.avi", "out/other.txt")
    for dst, expected in [
        (str(tmp_path / "b.mp4"), "b.mp4"),
        (str(tmp_path / "out"), "out/a.mkv"),
        (f"{tmp_path}/new/", "new/a.mkv"),
        (str(tmp_path / "frames"), "frames"),
    ]:
        (item,) = select(str(tmp_path / "a.avi"), dst).items
        assert item.destination == str(tmp_path / expected)


def test_a_folder_of_pictures_is_one_source(tmp_path: Path) -> None:
    touch(tmp_path / "shots", "f1.png", "f2.png")
    chosen = select(str(tmp_path / "shots"), str(tmp_path / "film.mp4"))
    assert not chosen.is_folder and len(chosen.items) == 1
    before = chosen.items[0].version
    touch(tmp_path / "shots", "f3.png")
    assert select(str(tmp_path / "shots"), str(tmp_path / "film.mp4")).items[0].version != before


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "texts/readme.txt", "films/a.mp4")
    with pytest.raises(NoInputError, match="does not exist"):
        select(str(tmp_path / "none.mp4"), "out.mp4")
    with pytest.raises(NoInputError, match="no video under it"):
        select(str(tmp_path / "texts"), str(tmp_path / "out"))
    for same in ("a.mp4", "films"):
        with pytest.raises(UsageError, match="the same"):
            select(str(tmp_path / same), str(tmp_path / "x" / ".." / same))
    with pytest.raises(UsageError, match="the same"):
        select(str(tmp_path / "a.mp4"), str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        select(str(tmp_path / "films"), str(tmp_path / "a.mp4"))
    with pytest.raises(UnsupportedOutput, match=r"\.gif"):
        select(str(tmp_path / "a.mp4"), "out.gif")
    with pytest.raises(StorageError, match="gs://"):
        select(str(tmp_path / "a.mp4"), "gs://bucket/out.mp4")


def test_the_run_id_changes_with_whatever_changes_the_result() -> None:
    options = row_options(Settings(), compare=False, truth=None)
    base = run_id("v1", "model", 0, "fp32/auto", options)
    assert base == run_id("v1", "model", 0, "fp32/auto", dict(options))  # type: ignore[arg-type]
    others = {
        run_id("v2", "model", 0, "fp32/auto", options),
        run_id("v1", "other", 0, "fp32/auto", options),
        run_id("v1", "model", 1, "fp32/auto", options),
        run_id("v1", "model", 0, "bf16/auto", options),
        run_id("v1", "model", 0, "fp32/auto", {**options, "steps": 2}),
    }
    assert len(others) == 5 and base not in others


def test_a_row_is_made_of_plain_values(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    item = Item(str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "a.mp4", 1, "v")
    options = row_options(Settings(), compare=True, truth=None)
    probed = probe_item(item, 10**6, options)
    assert probed.failure is not None and probed.failure["code"] == "video-unreadable"
    row = plan_row(item, probed, 3, tmp_path / "w.mp4", 7, options)
    assert row["row_id"] == "000003" and row["frames"] == -1 and row["seed"] == 7
    assert all(isinstance(value, str | int) for value in row.values())
