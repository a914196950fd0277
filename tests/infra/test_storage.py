from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.storage import LocalStorage, storage_for


def test_a_scheme_that_is_not_served_is_refused_by_name() -> None:
    with pytest.raises(StorageError, match="gs://") as caught:
        storage_for("gs://bucket/film.mp4?signature=secret")
    assert caught.value.remedy and "secret" not in str(caught.value)
    assert isinstance(storage_for("/films/a.mp4"), LocalStorage)


def test_a_write_is_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    place = str(tmp_path / "sub" / "a.json")
    LocalStorage().write(place, b"first")
    LocalStorage().write(place, b"second")
    assert LocalStorage().read(place) == b"second"
    assert os.listdir(tmp_path / "sub") == ["a.json"]


def test_if_absent_is_decided_at_the_moment_of_writing(tmp_path: Path) -> None:
    place = str(tmp_path / "a.json")
    LocalStorage().write(place, b"first", if_absent=True)
    with pytest.raises(StorageError) as caught:
        LocalStorage().write(place, b"second", if_absent=True)
    assert caught.value.code == "destination-exists"
    assert LocalStorage().read(place) == b"first" and os.listdir(tmp_path) == ["a.json"]


def test_publish_moves_and_refuses_to_replace(tmp_path: Path) -> None:
    made = tmp_path / "work" / "film.mp4"
    made.parent.mkdir()
    made.write_bytes(b"film")
    place = tmp_path / "out" / "film.mp4"
    LocalStorage().publish(made, str(place), if_absent=True)
    assert place.read_bytes() == b"film" and not made.exists()
    made.write_bytes(b"other")
    with pytest.raises(StorageError):
        LocalStorage().publish(made, str(place), if_absent=True)
    assert place.read_bytes() == b"film" and made.exists()
    LocalStorage().publish(made, str(place))
    assert place.read_bytes() == b"other"


def test_publish_without_hard_links_still_refuses_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    made, place = tmp_path / "made", tmp_path / "place"
    made.write_bytes(b"film")
    LocalStorage().publish(made, str(place), if_absent=True)
    assert place.read_bytes() == b"film"
    made.write_bytes(b"other")
    with pytest.raises(StorageError):
        LocalStorage().publish(made, str(place), if_absent=True)
    assert place.read_bytes() == b"film"


def test_publish_replaces_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"x")
    LocalStorage().publish(tmp_path / "new", str(tmp_path / "old"))
    assert os.listdir(tmp_path / "old") == ["new.png"]


def test_the_version_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "frames" / "1.png"
    file.parent.mkdir()
    file.write_bytes(b"a")
    storage = LocalStorage()
    before = storage.stat(str(file)), storage.stat(str(file.parent))
    file.write_bytes(b"ab")
    after = storage.stat(str(file)), storage.stat(str(file.parent))
    assert all(a and b and a.version != b.version for a, b in zip(before, after, strict=True))
    assert storage.stat(str(tmp_path / "none")) is None and storage.stat(str(file / "below")) is None


def test_list_is_sorted_and_deep(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.mp4", "a/b/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    found = [os.path.relpath(info.place, tmp_path) for info in LocalStorage().list(str(tmp_path))]
    assert found == ["b.mp4", "a/c.mp4", "a/b/d.mp4"]


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    LocalStorage().check_writable(str(tmp_path / "new" / "deep" / "film.mp4"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", ["file/film.mp4", "file/deep/film.mp4"])
def test_check_writable_refuses_a_place_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        LocalStorage().check_writable(str(tmp_path / below))
    assert caught.value.code == "storage-unwritable" and str(tmp_path / below) in caught.value.message


def test_a_full_disk_has_a_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        LocalStorage().write(str(tmp_path / "a"), b"1")
    assert caught.value.code == "storage-full"
    assert os.listdir(tmp_path) == []


def test_delete_takes_files_and_trees_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    for name in ("tree", "file", "nothing"):
        LocalStorage().delete(str(tmp_path / name))
    assert os.listdir(tmp_path) == []


def test_folders_are_those_directly_below(tmp_path: Path) -> None:
    for name in ("b/deep/x", "a/x", "file"):
        LocalStorage().write(str(tmp_path / name), b"")
    assert list(LocalStorage().folders(str(tmp_path))) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(LocalStorage().folders(str(tmp_path / "none"))) == []
    assert list(LocalStorage().folders(str(tmp_path / "file"))) == []
