"""A folder as archives have them: whole files of many kinds, damaged ones, and things that are no video at all."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from jobs.manifest import read_manifest
from jobs.verify import verify
from tests.video_files import picture

SIZE, FRAMES = (32, 24), 5
SOURCE = "source-unreadable"


def film(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    size: tuple[int, int] = SIZE,
    frames: int = FRAMES,
    rate: int = 25,
    sound: str | None = None,
    form: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a very small film, with a tone if `sound` names a codec."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form, container_options={"movflags": "faststart"}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        tone: Any = output.add_stream(sound, rate=48000, layout="stereo") if sound else None
        for index in range(frames):
            shown = picture(index, *size)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format=pix_fmt)))
        output.mux(stream.encode(None))
        if tone is not None:
            _sound(output, tone)
    return path


def _sound(output: Any, tone: Any) -> None:
    samples = (np.sin(np.arange(9600) / 20)[None].repeat(2, 0) * 0.3).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = 48000, 0
    resampler = av.AudioResampler(tone.codec_context.format, "stereo", 48000, tone.codec_context.frame_size or 1024)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        output.mux(tone.encode(piece))
    output.mux(tone.encode(None))


def make_good(folder: Path) -> set[str]:
    """Write 21 whole files; returns their names below the folder."""
    film(folder / "plain.mp4")
    film(folder / "with sound.mp4", sound="aac")
    film(folder / "deep/er/still.mkv", "ffv1")
    film(folder / "deep/er/talk.mkv", sound="libopus")
    film(folder / "deep/intra.mov", "prores_ks", "yuv422p10le")
    film(folder / "UPPER.MP4")
    film(folder / "Überfall [1] 'a' $b %41.mp4")
    film(folder / "-dash.mp4")
    film(folder / "colour.mp4", "libx264", "yuv444p")
    film(folder / "deep colour.mkv", "libx265", "yuv420p10le", options={"x265-params": "log-level=none:pools=none"})
    film(folder / "web.webm", "libvpx-vp9", sound="libopus", options={"cpu-used": "8"})
    film(folder / "odd.mkv", "ffv1", size=(33, 25))
    film(folder / "smallest.mkv", "ffv1", size=(16, 16))
    film(folder / "one frame.mp4", frames=1)
    film(folder / "fast.mp4", rate=50)
    film(folder / "disc.mpg", "mpeg2video", sound="mp2")
    film(folder / "broadcast.ts", "mpeg2video", sound="mp2")
    film(folder / "old.avi", "mjpeg", "yuvj420p")
    film(folder / "older.avi", "mpeg4")
    film(folder / "wrong ending.avi", form="mp4")
    film(folder / "wrong ending too.mp4", "ffv1", form="matroska")
    return names(folder)


def make_damaged(folder: Path) -> set[str]:
    """Write 4 files of which a part can be restored."""
    before = names(folder)
    data = film(folder / "whole.mp4", frames=40, options={"crf": "1", "g": "8"}).read_bytes()
    start = data.index(b"mdat") + 4
    (folder / "cut off.mp4").write_bytes(data[: start + (len(data) - start) * 6 // 10])
    holed = bytearray(data)
    middle = start + (len(data) - start) // 2
    holed[middle - 1500 : middle + 1500] = bytes(3000)
    (folder / "hole.mp4").write_bytes(holed)
    (folder / "whole.mp4").unlink()
    whole = film(folder / "whole.mkv", frames=40, options={"crf": "1", "g": "8"})
    data = whole.read_bytes()
    middle = len(data) // 2
    (folder / "hole.mkv").write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    (folder / "cut off.mkv").write_bytes(data[: len(data) * 6 // 10])
    whole.unlink()
    return names(folder) - before


def make_bad(folder: Path) -> dict[str, str]:
    """Write 16 things that cannot be restored; returns the class of failure of each."""
    before = names(folder)
    data = film(folder / "source.mp4", frames=12).read_bytes()
    start = data.index(b"mdat") + 4
    header = bytearray(data)
    header[4:start] = bytes((7 * i) % 251 for i in range(start - 4))
    wide = bytearray(film(folder / "huge.avi", "ffv1", frames=2).read_bytes())
    form = wide.index(b"strf") + 8
    wide[form + 4 : form + 12] = struct.pack("<ii", 20000, 20000)
    archive, scan = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("film.mp4", data)
    Image.fromarray(picture(0)).save(scan, "PNG")
    contents = {
        "empty.mp4": b"",
        "letter.mp4": b"This is a letter, not a film.\n" * 40,
        "corrupt header.mp4": bytes(header),
        "header only.mkv": film(folder / "source.mkv", "ffv1").read_bytes()[:100],
        "no index.mp4": b"".join((data[:32], b"\0\0\0\0mdat", data[start : start + 2000])),
        "nothing decodes.mp4": data[:start] + bytes(len(data) - start),
        "huge.avi": bytes(wide),
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nplain.mp4\n#EXT-X-ENDLIST\n",
        "concat.mp4": b"ffconcat version 1.0\nfile plain.mp4\n",
        "noise.mkv": np.random.default_rng(1).bytes(5000),
        "packed.mov": archive.getvalue(),
        "scan.mp4": scan.getvalue(),
        "locked.mp4": data,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "source.mp4").unlink()
    (folder / "source.mkv").unlink()
    (folder / "locked.mp4").chmod(0)
    film(folder / "tiny.mkv", "ffv1", size=(8, 8))
    with av.open(str(folder / "sound only.mp4"), "w") as output:
        _sound(output, output.add_stream("aac", rate=48000, layout="stereo"))
    os.mkfifo(folder / "pipe.mp4")
    return dict.fromkeys(names(folder) - before, SOURCE)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def result_of(out: Path, name: str) -> Path:
    """Where the result of a source lies: a container that is not written becomes Matroska."""
    path = out / name
    return path if path.suffix.lower() in (".mp4", ".mkv", ".mov", ".webm", ".ts") else path.with_suffix(".mkv")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_running")
def test_forty_one_mixed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    good, damaged, bad = make_good(source), make_damaged(source), make_bad(source)
    if os.access(source / "locked.mp4", os.R_OK):  # a user whom permissions do not stop
        good.add("locked.mp4")
        del bad["locked.mp4"]
    assert len(good) + len(damaged) + len(bad) == 41

    assert main(["restore", str(source), str(out), "--json"]) == 4  # finished, with failures
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 4

    ended = {video["name"]: video["status"] for video in told["videos"]}
    expected = dict.fromkeys(good, "restored") | dict.fromkeys(damaged, "damaged")
    assert ended == expected | dict.fromkeys(bad, "failed")

    for name in sorted(good):
        verified = verify(source / name, result_of(out, name), scale=4)
        assert verified.ok, (name, verified.unwanted)
        assert read_manifest(str(result_of(out, name))) is not None
    for name in sorted(damaged):
        manifest = read_manifest(str(result_of(out, name)))
        assert manifest is not None and manifest.damage and 0 < manifest.output.frames < 40, name

    (ledger,) = out.rglob("ledger.jsonl")
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {record["name"]: record["failure_class"] for record in records} == bad
    for record in records:
        assert record["message"] and record["remedy"] and "Traceback" not in record["message"], record
    assert not [name for name in bad if result_of(out, name).exists()]

    assert main(["status", str(out)]) == 0
    assert main(["report", str(out), "-o", str(tmp_path / "report.html"), "--samples", "0"]) == 0
