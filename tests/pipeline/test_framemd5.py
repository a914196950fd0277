"""Checksums: the list is the one that FFmpeg makes, and it changes with a single sample."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest

from pipeline.framemd5 import framemd5, sha256_line
from tests.video_files import FRAMES, make_video_files

_KEPT = ("#tb", "#dimensions", "#media_type", "#codec_id", "#version", "#hash", "#stream")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


def by_ffmpeg(path: Path) -> list[str]:
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-noautorotate", "-copyts", "-i", str(path), "-map", "0:v:0",
        "-fps_mode", "passthrough", "-enc_time_base", "demux", "-f", "framemd5", "-",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


@pytest.mark.parametrize(
    "name", ["h264_vfr_mp4", "hevc_10bit_hdr_mkv", "odd_mp4", "ffv1_mkv", "prores_mov", "mjpeg_avi", "offset_ts"]
)
def test_the_list_is_the_one_that_ffmpeg_writes(files: dict[str, Path], name: str) -> None:
    ours, theirs = list(framemd5(files[name])), by_ffmpeg(files[name])
    kept = [line for line in theirs if line.startswith(_KEPT)]
    assert [line for line in ours if line.startswith(_KEPT)] == kept
    rows = [[cell.strip() for cell in line.split(",")] for line in ours if not line.startswith("#")]
    expected = [[cell.strip() for cell in line.split(",")] for line in theirs if not line.startswith("#")]
    # stream, dts, pts, size and hash; durations are guessed differently where a file does not say them.
    assert [[*row[:3], *row[4:]] for row in rows] == [[*row[:3], *row[4:]] for row in expected]
    assert len(rows) == FRAMES and len({row[5] for row in rows}) == FRAMES
    assert [row[3] for row in rows if name == "ffv1_mkv"] == [row[3] for row in expected if name == "ffv1_mkv"]


def test_the_sidecar_is_what_sha256sum_reads(tmp_path: Path) -> None:
    (tmp_path / "a film.mkv").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    (tmp_path / "a film.mkv.sha256").write_text(sha256_line(digest, "a film.mkv"))
    command = ["sha256sum", "--check", "--strict", "a film.mkv.sha256"]
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    (tmp_path / "a film.mkv").write_bytes(b"Content")
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 1
