"""The HLS ladder: it plays, rung by rung, what the video plays, and its playlists keep the rules."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.encoder_options import Preset
from pipeline.ladder import can_copy, plan_rungs, write_ladder
from pipeline.timeline import read_timeline
from pipeline.video import EncodeError, VideoReader, probe
from tests.films import scene
from tests.hls_playlists import MasterPlaylist, MediaPlaylist, read_master, read_media
from tests.video_files import make_video_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


def make(
    folder: Path, source: Path, heights: list[int], preset: Preset = "ultrafast"
) -> tuple[MasterPlaylist, dict[str, MediaPlaylist], tuple[str, ...]]:
    folder.mkdir()
    warnings = write_ladder(folder, source, heights, preset=preset, threads=1)
    master = read_master(folder / "master.m3u8")
    lists = {one["URI"].strip('"'): None for one in [*master.variants, *master.audio]}
    media = {name: read_media(folder / name) for name in lists}
    listed = {"master.m3u8", *media, *(one.file.name for one in media.values())}
    assert {file.name for file in folder.iterdir()} == listed
    return master, media, warnings


def played(playlist: Path, kind: str = "video") -> list[Any]:
    """Frames as a player gets them from the playlist on the disk."""
    with av.open(str(playlist), format="hls", options={"allowed_extensions": "ALL"}) as container:
        return list(container.decode(**{kind: 0}))


def times(frames: list[Any]) -> list[float]:
    return [float(frame.pts * frame.time_base) for frame in frames]


def shown(source: Path) -> tuple[list[np.ndarray], list[float]]:
    with VideoReader(source, deinterlace="off") as reader:
        frames = list(reader)
    return [frame.rgb_HWC for frame in frames], [float(frame.pts * frame.time_base) for frame in frames]


def keys_of(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [
            packet.pts * packet.time_base
            for packet in container.demux(video=0)
            if packet.is_keyframe and packet.pts is not None and packet.time_base
        ]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("h264_vfr_mp4", {64: 96, 48: 72}),
        ("hevc_10bit_hdr_mkv", {64: 96, 32: 48}),
        ("anamorphic_mp4", {64: 136, 48: 102}),
        ("rotated_mp4", {96: 64, 48: 32}),
        ("odd_mp4", {64: 96, 32: 48}),
        ("full_range_mp4", {64: 96}),
        ("multi_mkv", {64: 96, 48: 72}),
        ("offset_ts", {64: 96, 48: 72}),
        ("vp9_opus_webm", {48: 72}),
        ("av1_mkv", {64: 96}),
        ("prores_mov", {64: 96}),
    ],
)
def test_every_rung_shows_what_the_video_shows(
    files: dict[str, Path], tmp_path: Path, name: str, sizes: dict[int, int]
) -> None:
    source = files[name]
    info = probe(source)
    master, media, _ = make(tmp_path / "ladder", source, list(sizes))
    pictures, stamps = shown(source)
    starts = set()
    for variant, (height, width) in zip(master.variants, sizes.items(), strict=True):
        assert variant["RESOLUTION"] == f"{width}x{height}" and variant["URI"] == f"{height}p.m3u8"
        frames = played(tmp_path / "ladder" / variant["URI"])
        found = times(frames)
        starts.add(round(found[0], 4))
        assert [at - found[0] for at in found] == pytest.approx([at - stamps[0] for at in stamps], abs=1e-3)
        assert {(one.width, one.height, one.format.name) for one in frames} == {(width, height, "yuv420p")}
        total = float(sum(one.duration_s for one in media[variant["URI"]].segments))
        assert total == pytest.approx(stamps[-1] - stamps[0] + 1 / float(info.average_rate), abs=0.05)
        upright = np.rot90(pictures[5], info.rotation_deg // 90)
        told = frames[5].to_ndarray(format="rgb24", width=upright.shape[1], height=upright.shape[0]).astype(float)
        deep = upright.dtype == np.uint16
        error = np.abs(told - (upright >> 8 if deep else upright))
        assert error.mean() < 4.5, "upright, in the same colours"
    assert len(starts) == 1, "one clock"
    for track in master.audio:
        sound = times(played(tmp_path / "ladder" / track["URI"].strip('"'), "audio"))
        assert 0 <= min(starts) - sound[0] < 0.05, "one frame of AAC, of which the first one decodes"


def film(
    path: Path,
    seconds: int,
    *,
    gop: int = 50,
    options: dict[str, str] | None = None,
    sound: str = "",
    late_s: float = 0,
) -> Path:
    """A film of a scene every three seconds and, if asked for, a sound that is silent but for a click each second."""
    with av.open(str(path), "w") as output:
        video: Any = output.add_stream("libx264", rate=25, options={"preset": "fast", "g": str(gop), **(options or {})})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        tone: Any = output.add_stream(sound, rate=48000, layout="stereo") if sound else None
        for index in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(scene(index // 75, index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if tone is not None:
            samples = np.zeros((48000 * seconds, 2), np.int16)
            for second in range(seconds):
                samples[48000 * second : 48000 * second + 480] = 20000
            resampler = av.AudioResampler(tone.codec_context.format, "stereo", 48000, tone.frame_size or 1024)
            for at in range(int(48000 * late_s) // 1024 * 1024, len(samples), 1024):
                piece = av.AudioFrame.from_ndarray(
                    samples[at : at + 1024].reshape(1, -1), format="s16", layout="stereo"
                )
                piece.sample_rate, piece.pts = 48000, at
                for one in resampler.resample(piece):
                    output.mux(tone.encode(one))
            output.mux(tone.encode(None))
    return path


def test_segments_begin_at_key_pictures_that_all_rungs_share(tmp_path: Path) -> None:
    source = film(tmp_path / "film.mp4", 20, gop=100)
    master, media, warnings = make(tmp_path / "ladder", source, [64, 48, 32])
    assert warnings == ()
    keys = {name: keys_of(one.file) for name, one in media.items()}
    assert len({tuple(one) for one in keys.values()}) == 1 and len(keys["64p.m3u8"]) >= 7
    lengths = {tuple(segment.duration_s for segment in one.segments) for one in media.values()}
    assert len(lengths) == 1 and len(lengths.pop()) == 4
    for name, one in media.items():
        at = keys[name][0]
        for number, segment in enumerate(one.segments):
            # Each one decodes from nothing but the header and its own bytes.
            with av.open(io.BytesIO(one.content(number))) as container:
                frames = list(container.decode(video=0))
            assert frames[0].key_frame and frames[0].pts is not None
            assert frames[0].pts * frames[0].time_base == at and len(frames) == 25 * segment.duration_s
            at += Fraction(segment.duration_s)
    # The rung of the video's own height is the video.
    assert packets(media["64p.m3u8"].file) == packets(source)
    for variant in master.variants:
        assert variant["FRAME-RATE"] == "25.000"
        one = media[variant["URI"]]
        # The last segment is shorter than half the target, and does not count by itself (RFC 8216, section 4.1).
        rates = [float(8 * segment.size / segment.duration_s) for segment in one.segments[:-1]]
        assert max(rates) <= int(variant["BANDWIDTH"]) <= 1.02 * max(rates)


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize(
    ("name", "options", "copied"),
    [
        ("closed", {}, True),
        (
            "open",
            {"flags": "-cgop", "b_strategy": "0", "sc_threshold": "0", "g": "26", "x264-params": "open-gop=1"},
            False,
        ),
        ("long", {"g": "1000", "sc_threshold": "0"}, False),
    ],
)
def test_only_what_players_can_change_to_is_copied(
    tmp_path: Path, name: str, options: dict[str, str], copied: bool
) -> None:
    source = film(tmp_path / f"{name}.mp4", 13, options=options)
    info = probe(source)
    assert can_copy(info, read_timeline(source, info)) == copied
    _, media, _ = make(tmp_path / "ladder", source, [64])
    assert (packets(media["64p.m3u8"].file) == packets(source)) == copied
    assert len(media["64p.m3u8"].segments) == 3 and len(played(tmp_path / "ladder" / "64p.m3u8")) == 13 * 25


@pytest.mark.parametrize("name", ["full_range_mp4", "rotated_mp4", "anamorphic_mp4", "odd_mp4", "hevc_10bit_hdr_mkv"])
def test_what_players_would_show_otherwise_is_not_copied(files: dict[str, Path], name: str) -> None:
    info = probe(files[name])
    assert not can_copy(info, read_timeline(files[name], info))


def test_rungs_above_the_video_are_left_out(files: dict[str, Path]) -> None:
    info = probe(files["odd_mp4"])
    timeline = read_timeline(files["odd_mp4"], info)
    rungs, warnings = plan_rungs(info, timeline, [32, 720, 64])
    assert [(rung.width, rung.height) for rung in rungs] == [(96, 64), (48, 32)]
    assert [warning for warning in warnings if "720" in warning]
    rungs, warnings = plan_rungs(info, timeline, [1080, 720])
    assert [rung.name for rung in rungs] == ["64p"] and "one of 64" in warnings[-1]
    assert "PQ" in plan_rungs(hdr := probe(files["hevc_10bit_hdr_mkv"]), timeline, [64])[1][-1] and hdr.bit_depth == 10


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "aac"), (".mkv", "aac"), (".mkv", "pcm_s16le"), (".ts", "mp2")])
@pytest.mark.parametrize("late_s", [0.0, 1.4])
def test_sound_stays_with_the_picture(tmp_path: Path, suffix: str, codec: str, late_s: float) -> None:
    source = film(tmp_path / f"film{suffix}", 8, sound=codec, late_s=late_s)
    _, media, _ = make(tmp_path / "ladder", source, [64, 32])
    with av.open(str(source)) as container:
        expected = clicks(list(container.decode(audio=0)))
        first = next(container_times(source))
    start = times(played(tmp_path / "ladder" / "32p.m3u8"))[0]
    found = clicks(played(tmp_path / "ladder" / "audio-1.m3u8", "audio"))
    assert len(expected) in (6, 7, 8)
    assert [at - start for at in found] == pytest.approx([at - first for at in expected], abs=0.003)
    assert [len(one.segments) for one in media.values()][-1] in (1, 2)


def container_times(source: Path) -> Any:
    with av.open(str(source)) as container:
        yield from times(list(container.decode(video=0)))


def clicks(frames: list[Any]) -> list[float]:
    """When the sound becomes loud after half a second of silence."""
    found: list[float] = []
    last = -1.0
    for frame in frames:
        samples = frame.to_ndarray().astype(float)
        level = np.abs(samples.reshape(-1, samples.shape[-1])[0])
        if not frame.format.is_planar:
            level = level[:: len(frame.layout.channels)]
        loud = np.flatnonzero(level > (0.2 if samples.max() <= 2 else 6000))
        start = float(frame.pts * frame.time_base)
        for sample in loud:
            at = start + sample / frame.sample_rate
            if at - last > 0.5:
                found.append(at)
            last = at
    return found


def test_tracks_are_named_for_viewers(files: dict[str, Path], tmp_path: Path) -> None:
    master, media, warnings = make(tmp_path / "ladder", files["multi_mkv"], [64])
    assert [(one["NAME"], one["LANGUAGE"], one["DEFAULT"]) for one in master.audio] == [
        ('"eng"', '"en"', "YES"),
        ('"Kommentar"', '"de"', "NO"),
    ]
    assert any("subtitles" in warning for warning in warnings) and len(media) == 3


def test_a_track_that_does_not_decode_is_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(files["multi_mkv"].read_bytes())
    with av.open(str(files["multi_mkv"])) as container:
        (stream,) = (one for one in container.streams.audio if one.codec_context.name == "ac3")
        payloads = [bytes(packet) for packet in container.demux(stream) if packet.size]
    for payload in payloads:
        at = data.index(payload[:64])
        data[at : at + len(payload)] = bytes(len(payload))
    (tmp_path / "broken.mkv").write_bytes(bytes(data))
    master, _, warnings = make(tmp_path / "ladder", tmp_path / "broken.mkv", [64])
    assert len(master.audio) == 1 and any("ac3" in warning and "left out" in warning for warning in warnings)


def test_captions_stay_in_every_rung(files: dict[str, Path], tmp_path: Path) -> None:
    make(tmp_path / "ladder", files["captions_mp4"], [64, 48])
    for name in ("64p", "48p"):
        frames = played(tmp_path / "ladder" / f"{name}.m3u8")
        assert any(item.type.name == "A53_CC" for frame in frames for item in frame.side_data), name


def test_slow_pictures_do_not_begin_before_time(tmp_path: Path) -> None:
    """A picture every two seconds: decoding must begin long before the first one is shown."""
    source = tmp_path / "slides.mkv"
    with av.open(str(source), "w") as output:
        video: Any = output.add_stream("libx264", rate=Fraction(1, 2), options={"g": "6", "bf": "2", "b_strategy": "0"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for index in range(9):
            output.mux(video.encode(av.VideoFrame.from_ndarray(scene(0, index), format="rgb24")))
        output.mux(video.encode(None))
    master, media, _ = make(tmp_path / "ladder", source, [64, 48], "fast")
    timeline = read_timeline(source, probe(source))
    assert timeline.delay and timeline.start_s > 2
    for one in media.values():
        # No decoding time is below zero: in a fragment's header it would be a number near 2**64.
        header = one.content(0)[one.header_bytes :]
        assert int.from_bytes(header[(at := header.index(b"tfdt") + 8) : at + 8], "big") < 1 << 40
        assert times(played(one.path)) == pytest.approx([timeline.start_s + 2 * index for index in range(9)], abs=1e-3)
    assert {one["FRAME-RATE"] for one in master.variants} == {"0.500"}


def test_an_unusable_video_is_an_error(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.ladder

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.ladder, "copy_picture", full)
    (tmp_path / "ladder").mkdir()
    with pytest.raises(EncodeError, match="No space left"):
        write_ladder(tmp_path / "ladder", files["h264_vfr_mp4"], [64])
    assert not (tmp_path / "ladder" / "master.m3u8").exists()


def test_the_header_says_which_profile(files: dict[str, Path], tmp_path: Path) -> None:
    master, media, _ = make(tmp_path / "ladder", files["h264_vfr_mp4"], [64])
    header = media["64p.m3u8"].content(0)
    at = header.index(b"avcC")
    profile, constraints, level = struct.unpack_from("3B", header, at + 5)
    assert master.variants[0]["CODECS"].startswith(f'"avc1.{profile:02X}{constraints:02X}{level:02X}')
