"""How much room a job needs, and that one for which there is too little does not begin: on small file systems."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.storage import storage_for
from jobs.nodes import Scratch
from jobs.records import VideoPlan
from jobs.room import Room, check_room, result_bytes, room_needed
from tests.films import make_film
from tests.random_model import save_random_model
from tests.work_area import OPTIONS, Job

FRAMES = (18, 22)
RESULT_BYTES = 40 * 384 * 256 * 4 // 80  # as it is estimated
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def plan(name: str, shots: list[int], **options: object) -> VideoPlan:
    made = Job("/out", {"a": [30, 5], "b": [20], "c": [8]}).plan(name)
    return made.model_copy(update={"options": {**OPTIONS, **options}})


def test_segments_become_results_and_both_are_there_while_a_video_is_put_together() -> None:
    plans = [plan("a", []), plan("b", []), plan("c", [])]
    a, b, c = map(result_bytes, plans)
    state = 96 * 64 * 204
    room = room_needed(plans, rows=3, assemblies=2)
    # Shots of more than one segment leave a state each: one of a's, and b's.
    assert room == Room(results=a + b + c, work=a + b + 2 * state + 3 * 2 * state, scratch=0)
    assert room_needed(plans, rows=3, assemblies=2, keep=True).work - room.work == c
    begun = room_needed(plans, rows=3, assemblies=2, finished={plans[1].run_id: 20})
    assert (begun.results, begun.work) == (a + c, room.work)
    assert room_needed(plans, rows=3, assemblies=2, remote=True).scratch == 2 * a + 3 * (a * 10 // 35)
    assert room_needed([], rows=0, assemblies=2) == Room(0, 0, 0)


@pytest.mark.parametrize(
    ("codec", "crf", "share"), [(None, 22, 0.5), ("hevc", 12, 2.0), ("av1", 36, 0.5), ("ffv1", 9, 1)]
)
def test_a_result_is_smaller_at_a_lower_quality(codec: str | None, crf: int, share: float) -> None:
    told = result_bytes(plan("a", [], codec=codec, crf=crf)) / result_bytes(plan("a", [], codec=codec))
    assert told == pytest.approx(share, rel=1e-3)


def test_a_node_without_room_for_unfinished_files_is_named(tmp_path: Path) -> None:
    room = Room(results=10, work=0, scratch=1_000_000)
    (warning,) = check_room(room, str(tmp_path / "x"), [Scratch("node-a", "/scratch", 1_100_000)])
    assert "/scratch on the node node-a" in warning
    with pytest.raises(StorageError) as caught:
        check_room(room, str(tmp_path / "x"), [Scratch("node-a", "/s", 10**9), Scratch("node-b", "/s", 999_999)])
    assert caught.value.code == "storage-full" and "node-b" in caught.value.message and "TMPDIR" in caught.value.remedy


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films and a model."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "in").mkdir()
    make_film(folder / "in" / "a.mp4", FRAMES)
    make_film(folder / "in" / "b.mp4", FRAMES)
    save_random_model(folder / "model")
    return folder


@pytest.fixture
def run(tmp_path: Path, sources: Path) -> Run:
    """Run `upriver restore` where `tmp_path / "small"` is a file system of its own, mounted for that process alone."""
    small = tmp_path / "small"
    small.mkdir()

    def restore(size_bytes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "jobs.cli", "restore", *arguments, "--model", str(sources / "model"),
            "--steps", "1", "--preset", "ultrafast", "--segment-seconds", "2", "--json",
        ]  # fmt: skip
        script = (
            f'mount -t tmpfs -o size={size_bytes} tmpfs {small}; "$@"; code=$?; find {small} -type f >&2; exit $code'
        )
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *command],
            env={**os.environ, "RAY_TMPDIR": "/tmp", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return restore


@pytest.mark.slow
def test_a_destination_that_is_too_small_is_refused_before_anything_is_restored(
    run: Run, sources: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    told = run(2 * RESULT_BYTES - 20_000, str(sources / "in" / "a.mp4"), f"{small}/out.mp4")
    assert told.returncode == 6, told.stderr
    error = json.loads(told.stdout)["error"]
    assert error["code"] == "storage-full" and str(small) in error["message"] and "--limit" in error["message"]
    assert told.stderr.splitlines()[1:] == [], "nothing is left there"


@pytest.mark.slow
def test_a_folder_that_will_not_fit_is_refused_as_a_whole(run: Run, sources: Path, tmp_path: Path) -> None:
    told = run(3 * RESULT_BYTES, str(sources / "in"), str(tmp_path / "small"))
    assert told.returncode == 6, told.stderr
    assert json.loads(told.stdout)["error"]["code"] == "storage-full" and "segments" not in told.stderr
    # One of them would.
    assert run(3 * RESULT_BYTES, str(sources / "in"), str(tmp_path / "small"), "--limit", "1").returncode == 0


@pytest.mark.slow
def test_a_destination_that_is_narrow_is_told_and_used(run: Run, sources: Path, tmp_path: Path) -> None:
    told = run(int(2.2 * RESULT_BYTES), str(sources / "in" / "a.mp4"), f"{tmp_path}/small/out.mp4")
    assert told.returncode == 0, told.stderr
    (warning,) = json.loads(told.stdout)["warnings"]
    assert "the estimate may be too low" in warning and f"upriver: {warning}" in told.stderr


@pytest.mark.slow
def test_workers_need_room_for_what_becomes_an_object(run: Run, sources: Path, tmp_path: Path, s3_bucket: str) -> None:
    """Segments grow, and results are put together, in the temporary folder of the node."""
    small = str(tmp_path / "small")
    told = run(2 * RESULT_BYTES, str(sources / "in" / "a.mp4"), f"{s3_bucket}/out.mp4", TMPDIR=small)
    assert told.returncode == 6, told.stderr
    assert f"{small} on the node {platform.node()}" in told.stderr and "TMPDIR" in told.stderr
    assert list(storage_for(s3_bucket).list(s3_bucket)) == []
    assert run(8 * RESULT_BYTES, str(sources / "in" / "a.mp4"), f"{s3_bucket}/out.mp4", TMPDIR=small).returncode == 0
