"""`upriver restore` with what it delivers beside a result: checksums of pictures, fragments, an HLS ladder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.settings import load_settings
from infra.storage import storage_for
from jobs.cli import main
from jobs.manifest import (
    Manifest,
    ModelRecord,
    OutputRecord,
    SourceRecord,
    component_versions,
    timestamp,
    write_manifest,
)
from jobs.model import resolve_model
from jobs.plan import plan_options, run_id
from jobs.sources import select
from pipeline.video import probe
from tests.films import frame_hashes
from tests.hls_playlists import read_master, read_media
from tests.pipeline.test_framemd5 import by_ffmpeg
from tests.video_files import enlarge

pytestmark = pytest.mark.usefixtures("ray_running")

FAST = ("--scale", "2")
BESIDE = {"out.mp4", "out.mp4.sha256", "out.mp4.manifest.json"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*typed: str | Path) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["restore", *map(str, typed), "--json"])
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return code, told

    return command


def manifest_of(result: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(f"{result}.manifest.json").read_text())
    return told


def check_listed(result: Path) -> list[str]:
    """The extras that the manifest names, after a look at each of them."""
    files = manifest_of(result)["extras"]["files"]
    for one in files:
        content = (result.parent / one["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one["size_bytes"], one["sha256"]), one["name"]
    return [one["name"] for one in files]


def finish(source: Path, result: str | Path, folder: Path) -> None:
    """Leave at `result` what a job would have left, without a model: the picture is enlarged by repeating pixels."""
    made = folder / "made.mp4"
    enlarge(source, made)
    content = made.read_bytes()
    made.unlink()
    settings = load_settings().values
    model = resolve_model(settings.model)
    (item,) = select(str(source), str(result)).items
    info = probe(source)
    storage_for(str(result)).write(str(result), content)
    sha256 = hashlib.sha256(content).hexdigest()
    output = OutputRecord(
        path=str(result), size_bytes=len(content), sha256=sha256, frames=16, width=4 * info.width,
        height=4 * info.height,
    )  # fmt: skip
    manifest = Manifest(
        run_id=run_id(item, plan_options(settings), model.sha256),
        name=item.name,
        source=SourceRecord(path=str(source), size_bytes=item.size_bytes, version=item.version, sha256=None),
        output=output,
        model=ModelRecord(name="random", sha256=model.sha256, device="cpu", dtype="fp32", flow="dis"),
        seed=0,
        options={"preset": "ultrafast"},
        damage=[],
        warnings=["of the result"],
        cuts=[],
        seconds={},
        versions=component_versions(),
        finished_at=timestamp(),
    )
    write_manifest(str(result), manifest)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_in_one_go(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    result = tmp_path / "out.mp4"
    code, told = run(videos["h264_vfr_mp4"], result, *FAST, "--fragmented", "--framemd5", "--hls", "128,96,4320")
    assert code == 0
    assert any("no rung of 4320 lines" in note for note in told["videos"][0]["notes"])
    rungs = {f"out.mp4.hls/{name}{end}" for name in ("128p", "96p") for end in (".mp4", ".m3u8")}
    extras = {"out.mp4.framemd5", "out.mp4.hls/master.m3u8", *rungs} | {
        f"out.mp4.hls/audio-1{e}" for e in (".m4a", ".m3u8")
    }
    assert tree(tmp_path) == BESIDE | extras
    assert set(check_listed(result)) == extras
    assert b"moof" in result.read_bytes()
    assert main(["verify", str(videos["h264_vfr_mp4"]), str(result)]) == 0
    ours = (tmp_path / "out.mp4.framemd5").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in ours if not line.startswith("#")]
    theirs = [[cell.strip() for cell in line.split(",")] for line in by_ffmpeg(result) if not line.startswith("#")]
    assert [row[:3] + row[4:] for row in rows] == [row[:3] + row[4:] for row in theirs] and len(rows) == 16
    check = subprocess.run(["sha256sum", "--check", "--strict", "out.mp4.sha256"], cwd=tmp_path, capture_output=True)
    assert check.returncode == 0
    code, told = run(videos["h264_vfr_mp4"], result, *FAST, "--fragmented", "--framemd5", "--hls", "4320,128,96")
    assert code == 0 and told["ray_start_s"] == 0 and told["videos"][0]["status"] == "skipped"


def test_extras_are_made_later_of_the_finished_file(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    source, result = videos["multi_mkv"], tmp_path / "out.mp4"
    finish(source, result, tmp_path)
    beside = {"out.mp4", "out.mp4.manifest.json"}
    before = (result.stat().st_mtime_ns, manifest_of(result))
    code, told = run(source, result)
    assert code == 0 and told["ray_start_s"] == 0 and tree(tmp_path) == beside
    code, told = run(source, result, "--hls", "64")
    assert code == 0 and told["videos"][0]["status"] == "skipped" and "hls" in told["videos"][0]["notes"][0]
    ladder = set(check_listed(result))
    assert len(ladder) == 7 and tree(tmp_path) == beside | ladder
    assert run(source, result, "--framemd5")[0] == 0
    assert set(check_listed(result)) == ladder | {"out.mp4.framemd5"}
    assert tree(tmp_path) == beside | set(check_listed(result))
    # Another ladder takes the place of the first one, and one that lost a file is made again.
    assert run(source, result, "--hls", "48,32")[0] == 0
    other = set(check_listed(result))
    assert tree(tmp_path) == beside | other and "out.mp4.hls/48p.mp4" in other and "out.mp4.hls/64p.mp4" not in other
    (tmp_path / "out.mp4.hls/48p.mp4").unlink()
    assert run(source, result, "--hls", "48,32")[0] == 0 and set(check_listed(result)) == other
    after = (result.stat().st_mtime_ns, manifest_of(result) | {"extras": before[1]["extras"]})
    assert after == before, "the result and what the manifest says of it stay"


def test_extras_are_not_made_of_another_file(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    source, result = videos["anamorphic_mp4"], tmp_path / "out.mp4"
    finish(source, result, tmp_path)
    result.write_bytes(result.read_bytes()[:-1] + b"x")
    code, told = run(source, result, "--hls", "64")
    assert code == 6 and told["error"]["code"] == "result-changed"
    assert tree(tmp_path) == {"out.mp4", "out.mp4.manifest.json"}


def test_extras_of_a_folder_of_results(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    tapes, out = tmp_path / "tapes", tmp_path / "out"
    tapes.mkdir()
    for name in ("a", "b"):
        shutil.copy(videos["captions_mp4"], tapes / f"{name}.mp4")
        finish(tapes / f"{name}.mp4", out / f"{name}.mp4", tmp_path)
    (out / "b.mp4.hls").mkdir()
    (out / "b.mp4.hls" / "mine.txt").write_text("somebody's own")
    code, told = run(tapes, out, "--hls", "64", "--framemd5")
    assert code == 4 and [video["status"] for video in told["videos"]] == ["skipped", "failed"]
    assert told["videos"][1]["failure"]["code"] == "destination-exists"
    there = tree(out)
    rungs = {f"a.mp4.hls/{name}" for name in ("64p.mp4", "64p.m3u8", "master.m3u8")}
    assert {name for name in there if name.startswith("a.mp4.")} == rungs | {"a.mp4.framemd5", "a.mp4.manifest.json"}
    assert {name for name in there if name.startswith("b.mp4.")} == {"b.mp4.hls/mine.txt", "b.mp4.manifest.json"}
    assert not [name for name in there if "/videos/" in name]
    assert main(["status", str(out)]) == 0
    code, told = run(tapes, out, "--hls", "64", "--framemd5", "--overwrite")
    assert code == 0 and [video["status"] for video in told["videos"]] == ["skipped", "skipped"]


@pytest.mark.slow
def test_everything_in_a_bucket(videos: dict[str, Path], tmp_path: Path, s3_bucket: str) -> None:
    """A process and a Ray of its own, whose workers see the store; the second run only makes what is new."""
    place = f"{s3_bucket}/out/film.mp4"
    for extras in (["--hls", "96,64"], ["--hls", "96,64", "--framemd5"]):
        command = [sys.executable, "-m", "jobs.cli", "restore", str(videos["multi_mkv"]), place, *FAST, *extras]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    there = {info.place.removeprefix(f"{s3_bucket}/out/") for info in storage_for(place).list(f"{s3_bucket}/out/")}
    manifest = json.loads(storage_for(place).read(f"{place}.manifest.json"))
    listed = {one["name"] for one in manifest["extras"]["files"]}
    beside = {"film.mp4", "film.mp4.sha256", "film.mp4.manifest.json"}
    assert there == beside | listed and len(listed) == 10 and "film.mp4.framemd5" in listed
    for name in listed:
        storage_for(place).fetch(f"{s3_bucket}/out/{name}", tmp_path / name)
    master = read_master(tmp_path / "film.mp4.hls/master.m3u8")
    for variant in master.variants:
        assert len(frame_hashes(read_media(tmp_path / "film.mp4.hls" / variant["URI"]).file)) == 16


@pytest.mark.slow
def test_what_is_replaced_loses_its_extras(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    source, result = videos["anamorphic_mp4"], tmp_path / "out.mp4"
    ladder = tmp_path / "out.mp4.hls"
    ladder.mkdir()
    (ladder / "mine.txt").write_text("somebody's own")
    code, told = run(source, result, *FAST, "--hls", "64", "--framemd5")
    assert code == 6 and told["error"]["code"] == "destination-exists" and tree(tmp_path) == {"out.mp4.hls/mine.txt"}
    assert run(source, result, *FAST, "--hls", "64", "--framemd5", "--overwrite")[0] == 0
    assert "out.mp4.hls/mine.txt" not in tree(tmp_path) == BESIDE | set(check_listed(result))
    assert run(source, result, *FAST, "--seed", "5", "--overwrite")[0] == 0
    assert tree(tmp_path) == BESIDE and check_listed(result) == []
    ladder.mkdir()
    code, told = run(source, result, *FAST, "--seed", "5", "--hls", "64")
    assert code == 6 and told["error"]["code"] == "destination-exists" and os.listdir(ladder) == []


@pytest.mark.slow
def test_a_folder_whose_results_lie_among_its_sources(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    tapes = tmp_path / "tapes"
    tapes.mkdir()
    shutil.copy(videos["rotated_mp4"], tapes / "a.mp4")
    code, _ = run(tapes / "a.mp4", tapes / "a_2x.mp4", *FAST, "--hls", "64", "--framemd5")
    assert code == 0 and (tapes / "a_2x.mp4.hls" / "64p.mp4").exists()
    code, told = run(tapes, tmp_path / "all", *FAST, "--hls", "96")
    assert code == 0
    assert [video["name"] for video in told["videos"]] == ["a.mp4", "a_2x.mp4"]
    assert main(["status", str(tmp_path / "all")]) == 0
    assert main(["report", str(tmp_path / "all"), "-o", str(tmp_path / "report.html"), "--samples", "0"]) == 0
    code, told = run(tapes, tmp_path / "all", *FAST, "--framemd5")
    assert code == 0 and all("framemd5" in video["notes"][0] for video in told["videos"])


@pytest.mark.slow
def test_forms_of_archives(run: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    source = videos["anamorphic_mp4"]
    for name, codec in (("a.mp4", "h264"), ("b.mov", "prores"), ("c.mkv", "ffv1")):
        assert run(source, tmp_path / name, *FAST, "--codec", codec)[0] == 0
        assert probe(tmp_path / name).codec == codec
        done = subprocess.run(["sha256sum", "--check", "--strict", f"{name}.sha256"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0
    for name in ("a.mp4", "b.mov"):
        data = (tmp_path / name).read_bytes()
        assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data
    code, told = run(source, tmp_path / "d.mkv", *FAST, "--fragmented")
    assert code == 2 and "--fragmented" in told["error"]["message"] and not (tmp_path / "d.mkv").exists()
    code, told = run(source, tmp_path / "pictures", *FAST, "--hls", "64")
    assert code == 2 and told["error"]["code"] == "extras-of-pictures"
    whole, parts = tmp_path / "a.mp4", tmp_path / "e.mov"
    assert run(source, parts, *FAST, "--codec", "h264", "--fragmented")[0] == 0
    assert frame_hashes(parts) == frame_hashes(whole) and b"moof" in parts.read_bytes()
