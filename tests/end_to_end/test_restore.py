"""`upriver restore` from file to file, in this process, on a real Ray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from jobs.manifest import read_manifest
from pipeline.video import VideoReader, probe

pytestmark = pytest.mark.usefixtures("ray_running")


@dataclass
class Run:
    code: int
    told: dict[str, Any]
    err: str


@pytest.fixture
def restore(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(source: Path, destination: Path | str, *options: str) -> Run:
        capsys.readouterr()
        code = main(["restore", str(source), str(destination), "--json", *options])
        captured = capsys.readouterr()
        return Run(code, json.loads(captured.out), captured.err)

    return run


def stamps(path: Path) -> list[float]:
    with VideoReader(path) as reader:
        return [float(frame.pts * frame.time_base) for frame in reader]


def pictures(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack([frame.rgb_HWC for frame in reader])


def test_a_video_is_restored_once_and_then_left_alone(restore: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    source, result = videos["h264_vfr_mp4"], tmp_path / "new" / "out.mp4"
    run = restore(source, result)
    assert run.code == 0, run.err
    (video,) = run.told["videos"]
    assert video["status"] == "restored" and video["frames"] == 16 and video["size"] == "96x64 -> 384x256"
    assert video["seconds"]["model"] <= video["seconds"]["total"]
    info = probe(result)
    assert (info.width, info.height) == (384, 256)
    assert stamps(result) == pytest.approx(stamps(source), abs=1e-4)
    assert [stream.kind for stream in info.streams] == ["video", "audio"]
    assert sorted(os.listdir(result.parent)) == ["out.mp4", "out.mp4.manifest.json", "out.mp4.sha256"]

    manifest = json.loads((result.parent / "out.mp4.manifest.json").read_text())
    assert manifest["output"]["frames"] == 16 and manifest["output"]["size_bytes"] == result.stat().st_size
    assert manifest["source"]["size_bytes"] == source.stat().st_size and len(manifest["model"]["sha256"]) == 64
    assert manifest["options"]["steps"] == 1 and manifest["versions"]["torch"]
    assert sum(part["frames"] for part in manifest["parts"]) == 16 and manifest["duration_s"] > 0.5
    digest = hashlib.sha256(result.read_bytes()).hexdigest()
    assert (result.parent / "out.mp4.sha256").read_text() == f"{digest}  out.mp4\n"
    assert manifest["output"]["sha256"] == digest

    before = result.stat().st_mtime_ns
    again = restore(source, result)
    assert again.code == 0 and again.told["videos"][0]["status"] == "skipped"
    assert again.told["ray_start_s"] == 0 and result.stat().st_mtime_ns == before
    other = restore(source, result, "--seed", "5")
    assert other.code == 6 and other.told["error"]["code"] == "destination-exists"
    assert result.stat().st_mtime_ns == before
    replaced = restore(source, result, "--seed", "5", "--overwrite")
    assert replaced.code == 0 and result.stat().st_mtime_ns != before
    assert sorted(os.listdir(result.parent)) == ["out.mp4", "out.mp4.manifest.json", "out.mp4.sha256"]


def test_the_job_gives_what_the_pipeline_gives(
    restore: Any, videos: dict[str, Path], tmp_path: Path, model: Path
) -> None:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    run = restore(videos["ffv1_mkv"], tmp_path / "out.mkv", "--codec", "ffv1", "--pix-fmt", "yuv444p", "--no-cuts")
    assert run.code == 0, run.err
    pipe = StreamDiffVSRPipeline.from_pretrained(model)
    with VideoReader(videos["ffv1_mkv"]) as reader:
        expected = np.stack(list(pipe((frame.rgb_HWC for frame in reader), steps=1)))
    difference = np.abs(pictures(tmp_path / "out.mkv").astype(int) - expected.astype(int))
    assert difference.mean() < 1.0 and difference.max() <= 8  # RGB to YUV and back


@pytest.mark.slow
def test_the_state_is_forgotten_at_a_cut(restore: Any, tmp_path: Path) -> None:
    import av

    from tests.video_files import picture

    film = tmp_path / "film.mkv"
    checks_HWC = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(film), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        for index in range(12):
            rgb_HWC = picture(index) if index < 6 else np.roll(checks_HWC, index, axis=1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), format="rgb24")))
        output.mux(stream.encode(None))
    lossless = ("--codec", "ffv1", "--pix-fmt", "yuv444p")
    assert restore(film, tmp_path / "cuts.mkv", *lossless).code == 0
    assert restore(film, tmp_path / "no_cuts.mkv", *lossless, "--no-cuts").code == 0
    found = json.loads((tmp_path / "cuts.mkv.manifest.json").read_text())["cuts"]
    assert found == [6]
    with_cut, without = pictures(tmp_path / "cuts.mkv"), pictures(tmp_path / "no_cuts.mkv")
    assert (with_cut[:6] == without[:6]).all()
    assert (with_cut[6] != without[6]).any()


def test_another_size_is_made_after_the_model(restore: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    # The height is the one that is seen: this clip is shown upright.
    assert restore(videos["rotated_mp4"], tmp_path / "out.mp4", "--height", "240").code == 0
    info = probe(tmp_path / "out.mp4")
    assert info.rotation_deg % 180 == 90 and (info.width, info.height) == (240, 160)


def test_a_folder_of_pictures_becomes_a_folder_of_pictures(
    restore: Any, videos: dict[str, Path], tmp_path: Path
) -> None:
    assert restore(videos["png_folder"], tmp_path / "frames").code == 0
    assert len(os.listdir(tmp_path / "frames")) == 5
    assert restore(videos["png_folder"], tmp_path / "frames").told["videos"][0]["status"] == "skipped"


def test_compare_writes_a_picture_and_a_video(restore: Any, videos: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    source = videos["h264_vfr_mp4"]
    run = restore(source, tmp_path / "a.mp4", "--compare", "--truth", str(source))
    assert run.code == 0, run.err
    assert set(os.listdir(tmp_path)) == {
        "a.mp4", "a.mp4.manifest.json", "a.mp4.sha256", "a.compare.mp4", "a.compare.png",
    }  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / "a.compare.png"))
    assert picture.shape == (256, 4 * 384, 3)
    nearest, bicubic, truth = picture[100:, :384], picture[100:, 384:768], picture[100:, 3 * 384 :]
    assert 0 < np.abs(nearest.astype(int) - bicubic).mean() < 20
    assert np.abs(bicubic.astype(int) - truth).mean() < 10  # the source itself, enlarged, stands for the original here
    assert (probe(tmp_path / "a.compare.mp4").width, len(stamps(tmp_path / "a.compare.mp4"))) == (4 * 384, 16)


def test_a_damaged_source_is_restored_as_far_as_it_goes(
    restore: Any, bad_files: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("truncated", "holed"):
        shutil.copy(bad_files[name], source / f"{name}.mp4")
    run = restore(source, tmp_path / "out")
    assert run.code == 3, run.err
    for video in run.told["videos"]:
        assert video["status"] == "damaged" and video["notes"] and 0 < video["frames"] <= 48
        assert len(stamps(Path(video["destination"]))) == video["frames"]
    again = restore(source, tmp_path / "out")
    assert [video["status"] for video in again.told["videos"]] == ["skipped", "skipped"]


def test_one_broken_file_stops_nothing(
    restore: Any, videos: dict[str, Path], bad_files: dict[str, Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    shutil.copy(videos["h264_vfr_mp4"], source / "deep" / "good.mp4")
    shutil.copy(videos["mjpeg_avi"], source / "old.avi")
    shutil.copy(bad_files["text"], source / "letter.mp4")
    shutil.copy(bad_files["audio_only"], source / "song.mp4")
    shutil.copy(bad_files["truncated"], source / "cut.mp4")
    out.mkdir()
    (out / "cut.mp4").write_text("somebody's own file")

    run = restore(source, out)
    assert run.code == 4, run.err
    ended = {video["name"]: video["status"] for video in run.told["videos"]}
    assert ended == {
        "deep/good.mp4": "restored", "old.avi": "restored",
        "letter.mp4": "failed", "song.mp4": "failed", "cut.mp4": "failed",
    }  # fmt: skip
    assert (out / "cut.mp4").read_text() == "somebody's own file"
    records = [json.loads(line) for line in Path(run.told["ledger"]).read_text().splitlines()]
    assert {record["name"]: record["failure_class"] for record in records} == {
        "letter.mp4": "source-unreadable", "song.mp4": "source-unreadable", "cut.mp4": "storage",
    }  # fmt: skip
    assert probe(out / "old.mkv").codec == "h264"
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"cut.mp4"}
    area = Path(run.told["ledger"]).parent.relative_to(out).as_posix()
    assert left == {
        "deep/good.mp4", "deep/good.mp4.manifest.json", "deep/good.mp4.sha256",
        "old.mkv", "old.mkv.manifest.json", "old.mkv.sha256",
        f"{area}/ledger.jsonl", f"{area}/job.json", f"{area}/progress.json",
    }  # fmt: skip

    again = restore(source, out, "--overwrite")
    assert {video["name"]: video["status"] for video in again.told["videos"]} == {
        "deep/good.mp4": "skipped", "old.avi": "skipped",
        "letter.mp4": "failed", "song.mp4": "failed", "cut.mp4": "damaged",
    }  # fmt: skip
    assert again.code == 4
    given_up = {video["name"]: video["notes"][0] for video in again.told["videos"] if video["status"] == "failed"}
    assert all("--retry-failed" in note for note in given_up.values()) and again.told["ledger"] is None
    retried = restore(source, out, "--retry-failed")
    assert retried.code == 4 and retried.told["ledger"] == run.told["ledger"]
    for broken in ("letter.mp4", "song.mp4"):
        (source / broken).unlink()
    assert restore(source, out).code == 0


def test_a_folder_without_anything_decodable(restore: Any, bad_files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("text", "audio_only"):
        shutil.copy(bad_files[name], tmp_path / "in" / f"{name}.mp4")
    run = restore(tmp_path / "in", tmp_path / "out")
    assert run.code == 5
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"ledger.jsonl", "job.json", "progress.json"}


def test_copies_of_one_file_are_all_restored(videos: dict[str, Path], tmp_path: Path) -> None:
    """Copies have one size and one time of change, in a bucket one etag: they must not be taken for one video."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "safe").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "safe/a.mp4"):
        shutil.copy2(videos["h264_vfr_mp4"], source / name)
    assert len({(path.stat().st_size, path.stat().st_mtime_ns) for path in source.rglob("*.mp4")}) == 1
    assert main(["restore", str(source), str(out), "--model", "stand-in:0"]) == 0
    manifests = [read_manifest(str(out / name)) for name in ("a.mp4", "b.mp4", "safe/a.mp4")]
    assert all(manifests) and len({one.run_id for one in manifests if one}) == 3
