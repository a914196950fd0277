"""Sharded is serial: a film restored shot by shot on several actors has the very pictures of one done in one go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.films import frame_hashes, make_film, restore_in_one_go

pytestmark = pytest.mark.usefixtures("ray_running")
SHOTS = (9, 5, 12, 7, 4, 10, 8)
LOSSLESS = ("--codec", "ffv1", "--pix-fmt", "yuv444p", "--exact", "--segment-seconds", "0.16")


@pytest.mark.parametrize("interlaced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "actors", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_film_in_shots_is_the_film_in_one_go(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], actors: int, interlaced: bool
) -> None:
    source = make_film(tmp_path / "film.mkv", SHOTS, interlaced=interlaced)
    result = tmp_path / "out.mkv"
    assert main(["restore", str(source), str(result), *LOSSLESS, "--actors", str(actors)]) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "out.mkv.manifest.json").read_text())
    assert len(manifest["cuts"]) >= 5 and set(manifest["cuts"]) <= {sum(SHOTS[:n]) for n in range(1, len(SHOTS))}
    assert len(manifest["parts"]) > len(SHOTS) and (manifest["options"]["deinterlace"] == "auto") is interlaced
    expected = restore_in_one_go(source, tmp_path / "serial.mkv", model, manifest["cuts"])
    assert frame_hashes(result) == frame_hashes(expected)
    assert len(frame_hashes(result)) == sum(SHOTS)
