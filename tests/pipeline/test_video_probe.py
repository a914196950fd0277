"""What `probe` says of good files, and how it refuses bad ones."""

from __future__ import annotations

import socket
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from pipeline.video import (
    FrameTooLarge,
    FrameTooSmall,
    Limits,
    NoVideoStream,
    UnreadableVideo,
    VideoError,
    VideoNotFound,
    VideoReader,
    probe,
)
from tests.video_files import FRAMES, HEIGHT, WIDTH, make_bad_files, make_video_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bad_files(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h264_vfr_mp4", {"codec": "h264", "bit_depth": 8, "time_base": Fraction(1, 30000), "interlaced": False}),
        ("anamorphic_mp4", {"sample_aspect_ratio": Fraction(64, 45), "pix_fmt": "yuv420p"}),
        ("hevc_10bit_hdr_mkv", {"codec": "hevc", "bit_depth": 10, "pix_fmt": "yuv420p10le"}),
        ("mpeg2_interlaced_ts", {"codec": "mpeg2video", "interlaced": True, "interlaced_flagged": True}),
        ("rotated_mp4", {"rotation_deg": 90}),
        ("odd_mp4", {"width": 97, "height": 65, "pix_fmt": "yuv444p"}),
        ("vp9_opus_webm", {"codec": "vp9", "interlaced": False}),
        ("av1_mkv", {"codec": "av1"}),
        ("ffv1_mkv", {"codec": "ffv1", "pix_fmt": "yuv422p"}),
        ("prores_mov", {"codec": "prores", "bit_depth": 10, "timecode": "01:02:03:04", "average_rate": 24}),
        ("mjpeg_avi", {"codec": "mjpeg", "container": "avi"}),
        ("offset_ts", {"start_pts": 5 * 90000}),
        ("png_folder", {"codec": "png", "is_sequence": True, "frames": 5, "container": "folder"}),
    ],
)
def test_it_says_what_the_file_is(files: dict[str, Path], name: str, expected: dict[str, object]) -> None:
    info = probe(files[name])
    assert {key: getattr(info, key) for key in expected} == expected
    if name != "odd_mp4":
        assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.frames is not None and abs(info.frames - (5 if info.is_sequence else FRAMES)) <= 1


def test_colour_tags_come_from_the_picture_or_the_container(files: dict[str, Path]) -> None:
    def tags(name: str) -> tuple[int, int, int, int]:
        colour = probe(files[name]).colour
        return colour.matrix, colour.primaries, colour.transfer, colour.range

    assert tags("anamorphic_mp4") == (5, 5, 6, 1)
    assert tags("hevc_10bit_hdr_mkv") == (9, 9, 16, 1)
    assert tags("prores_mov") == (1, 1, 1, 1)
    assert tags("full_range_mp4") == (1, 1, 1, 2)
    assert tags("rotated_mp4")[:3] == (2, 2, 2)
    assert probe(files["mjpeg_avi"]).colour.chroma_location == "center"
    assert probe(files["anamorphic_mp4"]).colour.chroma_location == "left"


def test_hdr_captions_and_streams_are_found(files: dict[str, Path]) -> None:
    info = probe(files["hevc_10bit_hdr_mkv"])
    assert info.mastering is not None and info.content_light is not None
    assert info.mastering.green == (Fraction(13250, 50000), Fraction(34500, 50000))
    assert (info.mastering.max_luminance, info.mastering.min_luminance) == (1000, Fraction(1, 200))
    assert (info.content_light.max_content, info.content_light.max_average) == (1000, 400)
    assert "A53_CC" in probe(files["captions_mp4"]).side_data
    multi = probe(files["multi_mkv"])
    assert [stream.kind for stream in multi.streams] == ["video", "audio", "audio", "subtitle", "attachment"]
    assert [stream.language for stream in multi.streams] == [None, "eng", "deu", "eng", None]
    assert multi.main_stream.index == 0 and len(multi.chapters) == 2


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("empty", UnreadableVideo, "0 bytes"),
        ("text", UnreadableVideo, "cannot be opened"),
        ("corrupt_header", UnreadableVideo, "cannot be opened"),
        ("no_index", UnreadableVideo, "cannot be opened"),
        ("nothing_decodes", UnreadableVideo, "no picture"),
        ("playlist", UnreadableVideo, "cannot be opened"),
        ("concat", UnreadableVideo, "cannot be opened"),
        ("audio_only", NoVideoStream, "audio"),
        ("huge", FrameTooLarge, "20000x20000"),
        ("tiny", FrameTooSmall, "8x8"),
        ("empty_folder", VideoNotFound, "no PNG or JPEG"),
    ],
)
def test_bad_files_are_refused_in_one_line_with_a_remedy(
    bad: dict[str, Path], name: str, kind: type[VideoError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        probe(bad[name])
    assert words in caught.value.message and caught.value.remedy and caught.value.code.startswith("video-")
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)


def test_a_missing_file_and_an_unreadable_place(tmp_path: Path) -> None:
    with pytest.raises(VideoNotFound, match="does not exist"):
        probe(tmp_path / "nothing.mp4")


def test_limits_apply_to_files_and_pictures(files: dict[str, Path]) -> None:
    for name in ("h264_vfr_mp4", "png_folder"):
        with pytest.raises(FrameTooLarge, match="96x64"):
            probe(files[name], limits=Limits(max_side=95))
        with pytest.raises(FrameTooLarge):
            probe(files[name], limits=Limits(max_pixels=96 * 64 - 1))
        with pytest.raises(FrameTooSmall, match="96x64"):
            probe(files[name], limits=Limits(min_side=65))
        assert probe(files[name], limits=Limits(min_side=64, max_side=96, max_pixels=96 * 64)).width == 96


def test_a_huge_header_allocates_nothing(bad: dict[str, Path]) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FrameTooLarge):
        probe(bad["huge"])
    # 20000x20000 in 4:2:0 would be 600 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_name_that_looks_like_an_address_or_a_protocol_is_a_file_name(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path("concat:a|b.mp4")
    odd.write_bytes(files["rotated_mp4"].read_bytes())
    assert probe(odd).width == WIDTH
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        connected = threading.Event()

        def listen() -> None:
            try:
                server.accept()[0].close()
                connected.set()
            except TimeoutError:
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        with pytest.raises(VideoNotFound):
            probe(f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4")
        playlist = Path("list.mp4")
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(UnreadableVideo):
            probe(playlist)
        listener.join()
    assert not connected.is_set()


def test_the_cover_of_a_song_is_no_video(tmp_path: Path, bad: dict[str, Path], files: dict[str, Path]) -> None:
    import av

    song = tmp_path / "song.m4a"
    cover = next(iter(sorted(files["png_folder"].iterdir()))).read_bytes()
    with av.open(str(bad["audio_only"])) as source, av.open(str(song), "w", format="mp4") as output:
        sound = output.add_stream_from_template(source.streams.audio[0])
        art = output.add_mux_stream("png", width=WIDTH, height=HEIGHT, time_base=Fraction(1, 90000))
        art.disposition = av.stream.Disposition.attached_pic
        picture = av.Packet(cover)
        picture.stream, picture.pts, picture.dts, picture.is_keyframe = art, 0, 0, True
        output.mux(picture)
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                output.mux(packet)
    with pytest.raises(NoVideoStream):
        probe(song)


def test_a_reader_raises_the_same_errors(bad: dict[str, Path]) -> None:
    with pytest.raises(NoVideoStream):
        VideoReader(bad["audio_only"])
