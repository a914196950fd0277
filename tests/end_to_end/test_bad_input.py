"""Bad input: one clear line, the right exit status, no traceback, nothing lost and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every path under `folder` with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `upriver restore`, check that it refuses in one line and changes nothing; returns the line."""

    def run(code: int, *arguments: str | Path, **expected: str) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(["restore", *map(str, arguments)]) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1 and told.err.startswith("upriver: ") and "Traceback" not in told.err
        assert len(told.err.split()) >= 7  # says what is wrong and what to do
        assert snapshot(tmp_path) == before
        return told.err

    return run


@pytest.fixture
def good(tmp_path: Path, videos: dict[str, Path]) -> Path:
    """A source that could be restored."""
    return Path(shutil.copy(videos["mjpeg_avi"], tmp_path / "good.avi"))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("empty", "0 bytes"),
        ("text", "cannot be opened as video"),
        ("audio_only", "no video stream"),
        ("corrupt_header", "cannot be opened as video"),
        ("no_index", ""),
        ("nothing_decodes", "can be decoded"),
        ("tiny", "8x8"),
        ("huge", "20000x20000"),
        ("playlist", "cannot be opened as video"),
        ("concat", "cannot be opened as video"),
    ],
)
def test_sources_that_hold_nothing_to_restore(
    refuse: Callable[..., str], bad_files: dict[str, Path], tmp_path: Path, name: str, named: str
) -> None:
    source = Path(shutil.copy(bad_files[name], tmp_path / bad_files[name].name))
    line = refuse(5, source, tmp_path / "out.mp4")
    assert source.name in line and named in line


def test_a_missing_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "none.mp4 does not exist" in refuse(5, tmp_path / "none.mp4", tmp_path / "out.mp4")


def test_a_folder_without_videos(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("no film here")
    assert "no video under it" in refuse(5, tmp_path / "in", tmp_path / "out")


def test_the_source_as_destination(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert "the same" in refuse(2, good, good)
    os.symlink(good, tmp_path / "alias.avi")
    assert "the same" in refuse(2, good, tmp_path / "alias.avi", "--overwrite")


def test_a_hard_link_to_the_source_as_destination(
    refuse: Callable[..., str], videos: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copy(videos["h264_vfr_mp4"], tmp_path / "a.mp4"))
    os.link(source, tmp_path / "b.mp4")
    assert "the same" in refuse(2, source, tmp_path / "b.mp4", "--overwrite")


def test_a_destination_that_exists(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("somebody's own file")
    assert "exists already" in refuse(6, good, tmp_path / "out.mp4")


def test_a_destination_that_cannot_be_written(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "Cannot write" in refuse(6, good, tmp_path / "file" / "out.mp4")


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whose permissions count")
def test_a_destination_without_permission(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "permission denied" in refuse(6, good, tmp_path / "locked" / "out.mp4")


def test_a_container_that_is_not_written(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert ".gif" in refuse(2, good, tmp_path / "out.gif")


def test_storage_that_is_not_served(refuse: Callable[..., str], good: Path) -> None:
    assert "gs://" in refuse(6, good, "gs://bucket/out.mp4")


def test_an_unknown_model(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert "no_such_model" in refuse(7, good, tmp_path / "out.mp4", "--model", "no_such_model")


def test_a_pickled_checkpoint(refuse: Callable[..., str], good: Path, tmp_path: Path, model: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x04cos\nsystem\n")
    assert "pickle" in refuse(7, good, tmp_path / "out.mp4", "--model", tmp_path / "weights.ckpt")
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "pickle" in refuse(7, good, tmp_path / "out.mp4", "--model", folder)


def test_a_checkpoint_of_another_shape(refuse: Callable[..., str], good: Path, tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 32]}))
    line = refuse(7, good, tmp_path / "out.mp4", "--model", folder)
    assert "shape" in line and "config.json asks for" in line and str(folder / "unet") in line


def test_a_checkpoint_that_is_cut_short(refuse: Callable[..., str], good: Path, tmp_path: Path, model: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refuse(7, good, tmp_path / "out.mp4", "--model", folder)


def test_an_unreadable_configuration(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    (tmp_path / "u.toml").write_text("steps = many")
    assert "u.toml" in refuse(2, good, tmp_path / "out.mp4", "--config", tmp_path / "u.toml")


def test_a_device_that_is_not_there(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert "cuda:63" in refuse(2, good, tmp_path / "out.mp4", "--device", "cuda:63")


def test_encoder_options_that_do_not_go_together(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    assert "prores" in refuse(2, good, tmp_path / "out.mp4", "--codec", "prores")
    assert "crf 60" in refuse(2, good, tmp_path / "out.mp4", "--codec", "h264", "--crf", "60")
    assert "av1" in refuse(2, good, tmp_path / "out.mkv", "--codec", "av1", "--pix-fmt", "yuv444p")


def test_a_ray_address_that_nobody_serves(
    refuse: Callable[..., str], good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "127.0.0.1:1" in refuse(2, good, tmp_path / "out.mp4")


@pytest.mark.slow
def test_a_flow_estimator_that_is_not_installed(refuse: Callable[..., str], good: Path, tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        assert "raft" in refuse(7, good, tmp_path / "out.mp4", "--flow", "raft")
    else:
        assert main(["doctor", "--flow", "raft"]) in (0, 7)
