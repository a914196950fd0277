"""Dolby Vision is not written: plan, job and manifest say what is lost of it; HDR10 is carried."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.manifest import read_manifest
from pipeline.picture_encoder import uncarried
from pipeline.video import probe
from tests.dolby_vision import with_record, with_rpu
from tests.video_files import make_video_files


@pytest.fixture(scope="module")
def hdr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video_files(tmp_path_factory.mktemp("hdr"))["hevc_10bit_hdr_mkv"]


@pytest.mark.parametrize(
    ("name", "profile", "compatibility", "expected"),
    [
        ("a.mp4", 8, 1, "profile 8.1: its metadata is not carried, the result is the HDR10 picture"),
        ("b.mkv", 8, 4, "profile 8.4: its metadata is not carried, the result is the HLG picture"),
        ("c.mp4", 5, 0, "profile 5: its metadata is not carried, and the colours are wrong"),
        ("d.mkv", 5, 0, "profile 5: its metadata is not carried, and the colours are wrong"),
        ("e.mp4", 7, 6, "the HDR10 picture without it; its enhancement layer is left out"),
        ("f.mkv", None, None, "Dolby Vision: its metadata is not carried"),
        ("g.ts", None, None, "Dolby Vision: its metadata is not carried"),
    ],
)
def test_a_record_or_units_in_the_stream_are_enough(
    hdr: Path, tmp_path: Path, name: str, profile: int | None, compatibility: int | None, expected: str
) -> None:
    if profile is None or compatibility is None:
        info = probe(with_rpu(hdr, tmp_path / name))
        assert info.dolby_vision is None
    else:
        info = probe(with_record(hdr, tmp_path / name, profile, compatibility))
        assert info.dolby_vision == (profile, compatibility)
    (warning,) = uncarried(info, "hevc", "mp4")
    assert expected in warning and info.mastering and info.content_light


def test_other_films_are_not_taken_for_it(hdr: Path) -> None:
    assert probe(hdr).dolby_vision is None and not uncarried(probe(hdr), "hevc", "mp4")


@pytest.mark.usefixtures("ray_running")
def test_plan_job_and_manifest_say_what_is_lost(hdr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dst = with_record(hdr, tmp_path / "in.mp4", 8, 1), tmp_path / "out.mp4"
    told = "Dolby Vision profile 8.1: its metadata is not carried"
    command = ["restore", str(source), str(dst), "--scale", "2"]
    assert main([*command, "--plan-only"]) == 0
    assert f"in.mp4: {told}" in capsys.readouterr().out.replace("\n", " ")
    assert main(command) == 0
    assert told in " ".join(capsys.readouterr().err.split())
    manifest = read_manifest(str(dst))
    assert manifest is not None and sum(told in warning for warning in manifest.warnings) == 1
    result, before = probe(dst), probe(source)
    assert (result.mastering, result.content_light) == (before.mastering, before.content_light)
    assert result.colour.transfer == 16 and result.dolby_vision is None
