from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.errors import StorageError
from jobs.manifest import (
    Manifest,
    ModelRecord,
    OutputRecord,
    SourceRecord,
    component_versions,
    finished_already,
    manifest_place,
    timestamp,
    write_manifest,
)


def manifest(run: str, size: int) -> Manifest:
    return Manifest(
        run_id=run,
        source=SourceRecord(path="a.mp4", size_bytes=1, version="1", sha256=None),
        output=OutputRecord(path="b.mp4", size_bytes=size, sha256="0", frames=1, width=64, height=64),
        model=ModelRecord(name="tiny", sha256="1", device="cpu", dtype="float32", flow="dis"),
        seed=0,
        options={},
        damage=[],
        warnings=[],
        cuts=[],
        seconds={},
        versions=component_versions(),
        finished_at=timestamp(),
    )


def test_only_the_same_run_and_a_whole_file_count_as_finished(tmp_path: Path) -> None:
    place = str(tmp_path / "b.mp4")
    assert not finished_already(place, "r1", overwrite=False)
    Path(place).write_bytes(b"film")
    with pytest.raises(StorageError, match="not written by a finished run"):
        finished_already(place, "r1", overwrite=False)
    write_manifest(place, manifest("r1", 4))
    assert finished_already(place, "r1", overwrite=False)
    assert finished_already(place, "r1", overwrite=True)
    with pytest.raises(StorageError, match="another source, model or set of options"):
        finished_already(place, "r2", overwrite=False)
    assert not finished_already(place, "r2", overwrite=True)
    Path(place).write_bytes(b"cut")
    with pytest.raises(StorageError):
        finished_already(place, "r1", overwrite=False)


def test_a_manifest_without_its_video_means_unfinished(tmp_path: Path) -> None:
    place = str(tmp_path / "b.mp4")
    write_manifest(place, manifest("r1", 4))
    assert not finished_already(place, "r1", overwrite=False)


def test_a_foreign_file_with_the_manifests_name_is_no_manifest(tmp_path: Path) -> None:
    place = str(tmp_path / "b.mp4")
    Path(place).write_bytes(b"film")
    Path(manifest_place(place)).write_text('{"anything": 1}')
    with pytest.raises(StorageError):
        finished_already(place, "r1", overwrite=False)


def test_the_versions_name_what_changes_results() -> None:
    assert {"upriver", "torch", "diffusers", "av"} <= set(component_versions())


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    place = str(tmp_path / "b.mp4")
    Path(place).write_bytes(b"film")
    old = manifest("r1", 4).model_dump(exclude={"name", "duration_s", "parts"}) | {"manifest_version": 1}
    Path(manifest_place(place)).write_text(json.dumps(old))
    assert finished_already(place, "r1", overwrite=False)


def test_a_manifest_is_not_put_where_another_is(tmp_path: Path) -> None:
    place = str(tmp_path / "b.mp4")
    write_manifest(place, manifest("r1", 4), if_absent=True)
    with pytest.raises(StorageError):
        write_manifest(place, manifest("r2", 4), if_absent=True)
    assert '"r1"' in Path(manifest_place(place)).read_text()
