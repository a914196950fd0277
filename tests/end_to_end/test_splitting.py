"""A film of one long shot, split: on any number of workers and after a kill the same film, whole and at its times."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from tests.end_to_end.test_interruption import kill_writers
from tests.films import frame_hashes, make_film

pytestmark = pytest.mark.usefixtures("ray_running")
SPLIT = ("--split-seconds", "0.8", "--segment-seconds", "0.4", "--warm-up-frames", "6", "--exact")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shot of 65 frames."""
    return make_film(tmp_path_factory.mktemp("film") / "film.mp4", (65,), sound=True)


@pytest.fixture(scope="module")
def on_two(film: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The film restored by two workers."""
    result = tmp_path_factory.mktemp("two") / "out.mp4"
    model_options = ("--model", str(model), "--steps", "1", "--preset", "ultrafast")
    assert main(["restore", str(film), str(result), *SPLIT, *model_options, "--actors", "2"]) == 0
    return result


def manifest_of(result: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"{result}.manifest.json").read_text())
    return content


def segments_of(result: Path) -> list[tuple[str, int, str]]:
    return [(part["name"], part["frames"], part["sha256"]) for part in manifest_of(result)["parts"]]


def test_a_split_film_is_whole_and_its_manifest_tells_splits_from_cuts(
    film: Path, on_two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = frame_hashes(on_two)
    assert len(hashes) == 65 and [line.split()[0] for line in hashes] == [str(40 * index) for index in range(65)]
    manifest = manifest_of(on_two)
    assert manifest["cuts"] == []
    assert manifest["splits"] == [{"first_index": 20, "warm_up": 6}, {"first_index": 40, "warm_up": 6}]
    assert manifest["options"]["split_seconds"] == 0.8 and manifest["options"]["warm_up_frames"] == 6
    assert [(name[:5], frames) for name, frames, _ in segments_of(on_two)] == [
        ("00000", 10), ("00000", 10), ("00001", 10), ("00001", 10), ("00002", 10), ("00002", 10), ("00002", 5),
    ]  # fmt: skip
    assert manifest["seconds"]["warm_up"] > 0
    assert main(["verify", str(film), str(on_two)]) == 0
    assert main(["restore", str(film), str(on_two), *SPLIT, "--json"]) == 0
    told = capsys.readouterr().out
    (again,) = json.loads(told[told.index("{") :])["videos"]
    assert again["status"] == "skipped"


@pytest.mark.slow
def test_one_worker_that_is_killed_makes_the_same_film_as_two(film: Path, on_two: Path, tmp_path: Path) -> None:
    result = tmp_path / "out.mp4"
    stop = threading.Event()
    killer = threading.Thread(target=kill_writers, args=(tmp_path, 1, stop), daemon=True)
    killer.start()
    try:
        assert main(["restore", str(film), str(result), *SPLIT, "--actors", "1", "--keep"]) == 0
    finally:
        stop.set()
        killer.join()
    (ledger,) = tmp_path.rglob("ledger.jsonl")
    (attempt,) = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert attempt["failure_class"] == "lost-actor" and not attempt["final"]
    assert frame_hashes(result) == frame_hashes(on_two)
    assert segments_of(result) == segments_of(on_two)


@pytest.mark.slow
def test_unsplit_the_film_has_other_pictures_and_the_same_segments(film: Path, on_two: Path, tmp_path: Path) -> None:
    """The first part is exactly the unsplit film; what follows is near it, after a fresh start that was warmed up."""
    result = tmp_path / "out.mp4"
    assert main(["restore", str(film), str(result), "--segment-seconds", "0.4", "--exact"]) == 0
    manifest = manifest_of(result)
    assert manifest["splits"] == manifest["cuts"] == [] and "split_seconds" not in manifest["options"]
    assert manifest["run_id"] != manifest_of(on_two)["run_id"]
    whole, split = segments_of(result), segments_of(on_two)
    assert [frames for _, frames, _ in whole] == [frames for _, frames, _ in split]
    assert [sha256 for *_, sha256 in whole][:2] == [sha256 for *_, sha256 in split][:2]
