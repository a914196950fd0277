"""What a job's SRC stands for, and that no two results and no source are ever in each other's way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from infra.storage import storage_for
from jobs.errors import NoInputError, UsageError
from jobs.sources import Selection, select
from pipeline.video_errors import UnsupportedOutput


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def results(selection: Selection) -> dict[str, str]:
    """Destination below the root, by name."""
    return {item.name: os.path.relpath(item.destination, selection.root) for item in selection.items}


def test_a_folder_stands_for_all_videos_under_it_and_keeps_its_structure(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source, "b.mp4", "a/c.MKV", "a/d.avi", "a/notes.txt", "a/._c.mkv")
    touch(source, ".upriver/1/000000.mp4", "x.mp4.upriver/1/0.mp4")
    for src in (f"{source}", f"{source}/", f"file://{source}", f"{tmp_path}/./in"):
        chosen = select(src, str(tmp_path / "out"))
        assert chosen.is_folder and chosen.root == str(tmp_path / "out")
        assert results(chosen) == {"b.mp4": "b.mp4", "a/c.MKV": "a/c.MKV", "a/d.avi": "a/d.mkv"}
    assert all(item.size_bytes == 1 and item.version for item in chosen.items)


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/b.mp4")
    monkeypatch.chdir(tmp_path)
    assert results(select(".", "out")) == results(select("./", "./out/")) == {"a/b.mp4": "a/b.mp4"}


def test_two_sources_never_share_a_result(tmp_path: Path) -> None:
    touch(tmp_path / "in", "tape.avi", "tape.mpg", "tape.mkv")
    chosen = select(str(tmp_path / "in"), str(tmp_path / "out"))
    assert sorted(results(chosen).values()) == ["tape.avi.mkv", "tape.mkv", "tape.mpg.mkv"]
    touch(tmp_path / "in", "tape.avi.mkv")
    with pytest.raises(UsageError, match="Two sources"):
        select(str(tmp_path / "in"), str(tmp_path / "out"))


def test_results_below_the_source_are_no_sources(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "restored/a.mp4")
    assert [item.name for item in select(str(tmp_path), str(tmp_path / "restored")).items] == ["a.mp4"]
    assert [item.name for item in select(f"{tmp_path}/**/*.mp4", str(tmp_path / "restored")).items] == ["a.mp4"]


def test_extras_of_results_are_no_sources(tmp_path: Path, s3_bucket: str) -> None:
    names = ("a.mp4", "a_4x.mp4", "a_4x.mp4.framemd5", "a_4x.mp4.hls/1080p.mp4", "deep/b.mkv.hls/audio-1.mp4")
    touch(tmp_path / "in", *names, "holiday.hls/c.ts")
    for name in names:
        storage_for(s3_bucket).write(f"{s3_bucket}/in/{name}", b"x")
    chosen = select(str(tmp_path / "in"), str(tmp_path / "out"))
    assert [item.name for item in chosen.items] == ["a.mp4", "a_4x.mp4", "holiday.hls/c.ts"]
    chosen = select(f"{tmp_path}/in/**/*.mp4", str(tmp_path / "out"))
    assert [item.name for item in chosen.items] == ["a.mp4", "a_4x.mp4"]
    assert [item.name for item in select(f"{s3_bucket}/in", str(tmp_path)).items] == ["a.mp4", "a_4x.mp4"]


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
    for missing in ("none.mp4", "none.csv"):
        with pytest.raises(NoInputError, match="does not exist"):
            select(str(tmp_path / missing), "out.mp4")
    with pytest.raises(NoInputError, match="no video under it"):
        select(str(tmp_path / "texts"), str(tmp_path / "out"))
    with pytest.raises(NoInputError, match="No video matches"):
        select(str(tmp_path / "*.mov"), str(tmp_path / "out"))
    for same in ("a.mp4", "films"):
        with pytest.raises(UsageError, match="the same"):
            select(str(tmp_path / same), str(tmp_path / "x" / ".." / same))
    for src in ("a.mp4", "*.mp4"):
        with pytest.raises(UsageError, match="the same"):
            select(str(tmp_path / src), str(tmp_path))
    for src in ("films", "films/*"):
        with pytest.raises(UsageError, match="is a file"):
            select(str(tmp_path / src), str(tmp_path / "a.mp4"))
    with pytest.raises(UnsupportedOutput, match=r"\.gif"):
        select(str(tmp_path / "a.mp4"), "out.gif")


def test_a_pattern_stands_for_what_matches_and_a_name_with_brackets_for_itself(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.mp4", "in/b.mov", "in/deep/c.mp4", "in/deep/x.txt", "in/d[1].mp4")
    out = str(tmp_path / "out")
    assert results(select(f"{tmp_path}/in/*.mp4", out)) == {"a.mp4": "a.mp4", "d[1].mp4": "d[1].mp4"}
    assert list(results(select(f"{tmp_path}/in/**/[ac].mp4", out))) == ["a.mp4", "deep/c.mp4"]
    assert list(results(select(f"{tmp_path}/i?/*/*", out))) == ["in/deep/c.mp4"]
    assert not select(f"{tmp_path}/in/d[1].mp4", out).is_folder


LIST = [
    {"source": "in/a.mp4", "scale": 2, "cuts": False},
    {"source": "in/b.avi", "destination": "x/B.mov", "codec": "prores", "priority": 5},
    {"source": "gone.mp4", "seed": 7},
]


def write_list(path: Path, rows: list[dict[str, object]]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), path)
    elif path.suffix == ".csv":
        lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
        path.write_text("\ufeff" + "\n".join(",".join(line) for line in lines) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_names_videos_with_options_of_their_own(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "in/a.mp4", "in/b.avi")
    chosen = select(str(write_list(tmp_path / f"tapes{suffix}", LIST)), str(tmp_path / "out"))
    assert chosen.is_folder
    b, a, gone = chosen.items  # the highest priority first, else as listed
    assert (a.name, a.source, a.destination) == ("in/a.mp4", f"{tmp_path}/in/a.mp4", f"{tmp_path}/out/in/a.mp4")
    assert a.overrides == {"scale": 2, "cuts": False} and a.size_bytes == 1
    assert (b.destination, b.priority, b.overrides) == (f"{tmp_path}/out/x/B.mov", 5, {"codec": "prores"})
    assert (gone.size_bytes, gone.version, gone.overrides) == (0, "", {"seed": 7})  # its failure, not the job's


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"scale": "nine"}, "row 2, column 'scale': 'nine'"),
        ({"scale": 9}, "row 2, column 'scale'"),
        ({"codec": "mpeg9"}, "row 2, column 'codec'"),
        ({"cuts": "maybe"}, "row 2, column 'cuts'"),
        ({"priority": "high"}, "row 2, column 'priority'"),
        ({"scael": 2}, "column 'scael'"),
        ({"source": "", "seed": 1}, "row 2, column 'source'"),
        ({"scale": 2, "height": 480}, "row 2, column 'height'"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_wrong_cell_is_named_with_file_row_and_column(
    tmp_path: Path, suffix: str, row: dict[str, object], words: str
) -> None:
    listed = write_list(tmp_path / f"tapes{suffix}", [{"source": "a.mp4"}, {"source": "b.mp4", **row}])
    with pytest.raises(UsageError) as caught:
        select(str(listed), str(tmp_path / "out"))
    assert str(listed) in str(caught.value) and words in str(caught.value)


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    for name, content in [("a.jsonl", b"{oops"), ("a.parquet", b"text"), ("a.csv", b"\xff\xfe\x00"), ("b.jsonl", b"3")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            select(str(tmp_path / name), str(tmp_path / "out"))
    (tmp_path / "empty.csv").write_text("source\n")
    with pytest.raises(NoInputError, match="no rows"):
        select(str(tmp_path / "empty.csv"), str(tmp_path / "out"))


def test_names_in_a_list_stay_apart(tmp_path: Path) -> None:
    rows = [{"source": f"{tmp_path}/x/a.mp4"}, {"source": f"{tmp_path}/y/a.mp4"}]
    chosen = select(str(write_list(tmp_path / "a.jsonl", rows)), str(tmp_path / "out"))
    assert len({item.name for item in chosen.items}) == len({item.destination for item in chosen.items}) == 2
    twice = [{"source": "a.mp4", "destination": f"{scale}.mp4", "scale": scale} for scale in (2, 3)]
    chosen = select(str(write_list(tmp_path / "b.jsonl", twice)), str(tmp_path / "out"))
    assert len({item.name for item in chosen.items}) == 2
    with pytest.raises(UsageError, match="Two sources"):
        select(str(write_list(tmp_path / "c.jsonl", [{"source": "a.avi"}, {"source": "a.mpg"}])), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="the same"):
        select(str(write_list(tmp_path / "d.jsonl", [{"source": "a.mp4", "destination": f"{tmp_path}/a.mp4"}])), "out")


def test_order_and_limit(tmp_path: Path) -> None:
    touch(tmp_path / "in", *(f"{number}.mp4" for number in range(9)), "news/0.mp4", "news/1.mp4")

    def names(**how: object) -> list[str]:
        return [item.name for item in select(str(tmp_path / "in"), str(tmp_path / "out"), **how).items]  # type: ignore[arg-type]

    assert names(limit=2) == ["0.mp4", "1.mp4"]
    shuffled = names(shuffle=1)
    assert shuffled == names(shuffle=1) != names(shuffle=2) and sorted(shuffled) == sorted(names())
    assert names(shuffle=1, limit=3) == shuffled[:3]
    assert names(priority=["7*", "news/*"], limit=4) == ["7.mp4", "news/0.mp4", "news/1.mp4", "0.mp4"]


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        ("t", "out", {"a.mp4": "out/a.mp4", "d/b.avi": "out/d/b.mkv", "r/old.mp4": "out/r/old.mp4"}),
        ("t/", "out/", {"a.mp4": "out/a.mp4", "d/b.avi": "out/d/b.mkv", "r/old.mp4": "out/r/old.mp4"}),
        ("t", "t/r", {"a.mp4": "t/r/a.mp4", "d/b.avi": "t/r/d/b.mkv"}),
        ("t/a.mp4", "out/x.mov", {"a.mp4": "out/x.mov"}),
        ("t/a.mp4", "out/", {"a.mp4": "out/a.mp4"}),
        ("t/a.mp4", "done", {"a.mp4": "done/a.mp4"}),
        ("t/*.mp4", "out", {"a.mp4": "out/a.mp4"}),
        ("t/**/*.[am][vp][i4]", "t/r", {"a.mp4": "t/r/a.mp4", "d/b.avi": "t/r/d/b.mkv"}),
        ("t/**", "out", {"a.mp4": "out/a.mp4", "d/b.avi": "out/d/b.mkv", "r/old.mp4": "out/r/old.mp4"}),
        ("list.csv", "out", {"t/a.mp4": "out/t/a.mp4", "b.avi": "out/b.mkv"}),
    ],
)
def test_object_stores_follow_the_same_rules(s3_bucket: str, src: str, dst: str, expected: dict[str, str]) -> None:
    store = storage_for(s3_bucket)
    for key in ("t/a.mp4", "t/d/b.avi", "t/x.upriver/1/s.mp4", "t/r/old.mp4", "tt.mp4", "done/other.mp4"):
        store.write(f"{s3_bucket}/{key}", b"x")
    store.write(f"{s3_bucket}/list.csv", f"source\nt/a.mp4\n{s3_bucket}/t/d/b.avi\n".encode())
    chosen = select(f"{s3_bucket}/{src}", f"{s3_bucket}/{dst}")
    assert {item.name: item.destination.removeprefix(f"{s3_bucket}/") for item in chosen.items} == expected
    assert all(item.size_bytes == 1 and item.version for item in chosen.items)


def test_what_is_not_there_in_an_object_store(s3_bucket: str, tmp_path: Path) -> None:
    storage_for(s3_bucket).write(f"{s3_bucket}/t/a.mp4", b"x")
    with pytest.raises(NoInputError, match="does not exist"):
        select(f"{s3_bucket}/none", f"{s3_bucket}/out")
    for src, dst in [("t/a.mp4", "t/"), ("t", "t"), ("t/*", "t")]:
        with pytest.raises(UsageError, match="the same"):
            select(f"{s3_bucket}/{src}", f"{s3_bucket}/{dst}")
    (item,) = select(f"{s3_bucket}/t", str(tmp_path / "here")).items
    assert item.destination == str(tmp_path / "here" / "a.mp4")


def test_places_are_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other folders than the command."""
    (tmp_path / "tapes").mkdir()
    (tmp_path / "tapes" / "one.mp4").write_bytes(b"film")
    monkeypatch.chdir(tmp_path)
    for src, dst in (("tapes/", "out/"), ("tapes/*.mp4", "out")):
        found = select(src, dst)
        assert found.root == str(tmp_path / "out")
        assert [(item.source, item.destination) for item in found.items] == [
            (str(tmp_path / "tapes" / "one.mp4"), str(tmp_path / "out" / "one.mp4"))
        ]
    assert select("tapes/one.mp4", "new.mp4").items[0].destination == str(tmp_path / "new.mp4")
