"""Sources of many kinds, restored in one job: each result verifies, and its sound is the source's, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import av
import pytest

from jobs.cli import main
from jobs.verify import verify


def sound(path: Path) -> list[str]:
    """Return a digest of the packets of each sound stream."""
    with av.open(str(path)) as container:
        digests = {stream.index: hashlib.sha256() for stream in container.streams.audio}
        for packet in container.demux(container.streams.audio) if digests else ():
            digests[packet.stream.index].update(bytes(packet))
    return [digest.hexdigest() for digest in digests.values()]


@pytest.mark.usefixtures("ray_running")
def test_every_kind_of_source_verifies_after_restoration(
    videos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    files = [path for path in videos.values() if path.is_file()]
    for path in files:
        shutil.copy(path, source / path.name)
    assert main(["restore", str(source), str(out), "--json", "--actors", "2"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert {video["status"] for video in told["videos"]} == {"restored"} and len(told["videos"]) == len(files) >= 12
    with_sound = 0
    for video in told["videos"]:
        before, after = source / video["name"], Path(video["destination"])
        report = verify(before, after, scale=4)
        assert report.ok, (video["name"], report.unwanted, video["notes"])
        assert report.frames_result == report.frames_source == video["frames"]
        assert report.largest_time_error_s <= 0.001, video["name"]
        if after.suffix == before.suffix:
            assert sound(after) == sound(before), video["name"]
            with_sound += bool(sound(before))
    assert with_sound >= 6


@pytest.mark.usefixtures("ray_running")
def test_the_command_tells_wanted_from_unwanted_differences(
    videos: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = videos["odd_mp4"]
    enlarged = tmp_path / "out.mkv"
    assert main(["restore", str(source), str(enlarged)]) == 0
    assert main(["verify", str(source), str(enlarged), "--scale", "4"]) == 0
    assert main(["verify", str(source), str(enlarged), "--scale", "2"]) == 8
    assert "expected 2x" in capsys.readouterr().out
    assert main(["verify", str(source), str(videos["mjpeg_avi"])]) == 8
    assert main(["verify", str(source), str(tmp_path / "none.mkv")]) == 5
    assert main(["verify", str(source), str(enlarged), "--scale", "4", "--height", "260"]) == 2
