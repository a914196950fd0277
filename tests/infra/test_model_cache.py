"""Models in an object store become folders of this machine."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.model_cache import SUMS, local_model
from infra.object_store import ObjectStore
from tests.faulty_store import FaultyStore
from tests.object_stores import SeaweedFS, use

STORE = ObjectStore()
FILES = {"model_index.json": b"{}", "unet/config.json": b"[]", "unet/weights": b"0123456789" * 100_000}


def put(place: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        STORE.write(f"{place}/{name}", content)


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def content_of(folder: str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    assert local_model("tiny", tmp_path) == "tiny" and local_model("/models/a", tmp_path) == "/models/a"
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_fetched_once_and_again_when_it_changes(
    seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with FaultyStore(seaweedfs) as counting:
        place = f"{use(counting, monkeypatch)}/models/night"
        put(place, FILES)
        put(f"{place}-2", FILES)
        first = local_model(f"{place}/", tmp_path)
        assert content_of(first) == FILES and Path(first).name.startswith("night-")
        assert local_model(place, tmp_path) == first
        assert sum(name.startswith("GET ") and "/models/night/unet/weights" in name for name in counting.seen) == 1
        put(place, {"unet/weights": b"new"})
        second = local_model(place, tmp_path)
        assert second != first and content_of(second) == {**FILES, "unet/weights": b"new"}
        assert content_of(first) == FILES


def test_sums_are_compared_and_nothing_damaged_is_kept(s3_bucket: str, tmp_path: Path) -> None:
    put(f"{s3_bucket}/good", {**FILES, SUMS: sums(FILES)})
    assert content_of(local_model(f"{s3_bucket}/good", tmp_path / "cache"))[SUMS] == sums(FILES)
    put(f"{s3_bucket}/bad", {**FILES, SUMS: sums({**FILES, "unet/weights": b"other"})})
    with pytest.raises(StorageError, match="unet/weights") as caught:
        local_model(f"{s3_bucket}/bad", tmp_path / "bad")
    assert caught.value.code == "model-damaged"
    assert [path.name for path in (tmp_path / "bad").iterdir() if path.is_dir()] == []


def test_what_is_no_model_is_said(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError) as caught:
        local_model(f"{s3_bucket}/none", tmp_path)
    assert caught.value.code == "storage-missing"
    put(f"{s3_bucket}/films", FILES)
    monkeypatch.setattr("infra.model_cache.MOST_BYTES", 1000)
    with pytest.raises(StorageError) as caught:
        local_model(f"{s3_bucket}/films", tmp_path)
    assert caught.value.code == "model-too-large"


def test_no_room_is_said(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{s3_bucket}/m", FILES)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError) as caught:
        local_model(f"{s3_bucket}/m", tmp_path)
    assert caught.value.code == "storage-full"


def _fetch(place: str, cache: Path, start: object, found: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    found.put(local_model(place, cache))  # type: ignore[attr-defined]


def test_many_processes_fetch_it_once(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with FaultyStore(seaweedfs) as counting:
        place = f"{use(counting, monkeypatch)}/m"
        put(place, FILES)
        (tmp_path / ".m-left.old").mkdir()
        context = multiprocessing.get_context("fork")
        start, found = context.Barrier(3), context.Queue()
        workers = [context.Process(target=_fetch, args=(place, tmp_path, start, found)) for _ in range(3)]
        for worker in workers:
            worker.start()
        folders = {found.get(timeout=60) for _ in workers}
        for worker in workers:
            worker.join()
        assert len(folders) == 1 and content_of(folders.pop()) == FILES
        assert counting.count("GET /archive/" + place.partition("archive/")[2] + "/unet/weights") == 1


@pytest.mark.slow
def test_a_job_loads_a_model_from_a_bucket(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.model import resolve_model
    from pipeline.model_source import resolve

    monkeypatch.setenv("UPRIVER_MODEL_CACHE", str(tmp_path))
    built_in = Path(resolve("tiny"))
    put(f"{s3_bucket}/tiny", {file.relative_to(built_in).as_posix(): file.read_bytes()
                              for file in built_in.rglob("*") if file.is_file()})  # fmt: skip
    found = resolve_model(f"{s3_bucket}/tiny")
    assert found.source == f"{s3_bucket}/tiny" and found.sha256 == resolve_model("tiny").sha256
