"""HLS streams from real servers on loopback, written by libav and decoded again; and what evil playlists gain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from infra.errors import FetchFailed, NetworkError, PlaylistError, UrlRefused
from infra.hls import HlsSource
from infra.network import FetchLimits, FetchPolicy
from tests.web_server import Names, WebServer, endless_page, redirect, send

FRAMES, GROUP = 60, 10
KEY = bytes(range(16))


def write_stream(folder: Path, **options: str) -> Path:
    """Six segments of ten frames each as libav's own HLS writer cuts them; returns the playlist."""
    folder.mkdir()
    playlist = folder / "list.m3u8"
    options = {"hls_time": "0.4", "hls_list_size": "0", "hls_playlist_type": "vod"} | options
    with av.open(str(playlist), "w", format="hls", options=options) as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "threads": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", GROUP
        for number in range(FRAMES):
            picture = np.full((48, 64, 3), 4 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return playlist


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of stream."""
    root = tmp_path_factory.mktemp("hls")
    (root / "key").write_bytes(KEY)
    (root / "key_info").write_text(f"../key\n{root / 'key'}\n000102030405060708090a0b0c0d0e0f\n")
    write_stream(root / "ts")
    write_stream(root / "fmp4", hls_segment_type="fmp4")
    write_stream(root / "ranges", hls_flags="single_file")
    write_stream(root / "fmp4_ranges", hls_segment_type="fmp4", hls_flags="single_file")
    write_stream(root / "encrypted", hls_key_info_file=str(root / "key_info"))
    return root


@pytest.fixture
def server(streams: Path) -> Iterator[WebServer]:
    with WebServer() as running:
        for file in streams.rglob("*"):
            if file.is_file():
                running.pages["/" + file.relative_to(streams).as_posix()] = file.read_bytes()
        yield running


def policy(*servers: WebServer, **limits: Any) -> FetchPolicy:
    return FetchPolicy(
        schemes={"http"},
        networks=tuple(f"{one.address}/32" for one in servers),
        ports={one.port for one in servers},
        limits=FetchLimits(**{"seconds": 5.0, "stall_seconds": 5.0, **limits}),
    )


def brightness(source: HlsSource) -> list[int]:
    """Decode a stream through its file object; each frame was made 4 levels brighter than the one before."""
    with av.open(source, format=source.demuxer) as container:
        return [round(float(frame.to_ndarray(format="rgb24").mean()) / 4) for frame in container.decode(video=0)]


def segments_of(streams: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((streams / "ts").glob("*.ts"))]


@pytest.mark.parametrize(
    ("kind", "demuxer"),
    [("ts", "mpegts"), ("fmp4", "mp4"), ("ranges", "mpegts"), ("fmp4_ranges", "mp4"), ("encrypted", "mpegts")],
)
def test_a_recorded_stream_is_decoded(server: WebServer, streams: Path, kind: str, demuxer: str) -> None:
    with HlsSource(server.url(f"/{kind}/list.m3u8"), policy(server)) as source:
        assert source.demuxer == demuxer and not source.is_live
        shown = brightness(source)
        assert len(shown) == FRAMES and np.abs(np.subtract(shown, range(FRAMES))).max() <= 1
        assert source.read(10) == b"" and source.skipped_segments == 0
    with av.open(str(streams / "ts/list.m3u8")) as direct:
        assert len(list(direct.decode(video=0))) == FRAMES, "as libav itself reads it from the disk"


def test_segments_are_fetched_only_as_they_are_read(server: WebServer) -> None:
    with HlsSource(server.url("/ts/list.m3u8"), policy(server)) as source:
        first = source.read(1)
        assert first == b"G" and server.paths == ["/ts/list.m3u8", "/ts/list0.ts"]
        while source.read(100_000):
            pass
        assert server.paths[2:] == [f"/ts/list{number}.ts" for number in range(1, 6)]


def test_a_master_playlist_leads_to_a_variant_that_fits(server: WebServer) -> None:
    server.pages["/master.m3u8"] = (
        b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9,RESOLUTION=1920x1080\nlarge.m3u8\n"
        b"#EXT-X-STREAM-INF:BANDWIDTH=5,RESOLUTION=64x48\nts/list.m3u8\n"
    )
    with HlsSource(server.url("/master.m3u8"), policy(server), max_height=480) as source:
        assert len(brightness(source)) == FRAMES
    assert "/large.m3u8" not in server.paths


class Live:
    """A live playlist of which each load shows `steps` segments more, the last `window` of them, and then the end."""

    def __init__(
        self, server: WebServer, streams: Path, *, window: int, first: int = 3, steps: int = 2, target_s: int = 1
    ) -> None:
        self.segments = segments_of(streams)
        self.loads = 0
        self.ends = True
        for number, content in enumerate(self.segments):
            server.pages[f"/live/{number}.ts"] = content

        def page(handler: Any) -> None:
            end = min(first + steps * self.loads, len(self.segments))
            self.loads += 1
            start = max(end - window, 0)
            lines = ["#EXTM3U", f"#EXT-X-TARGETDURATION:{target_s}", f"#EXT-X-MEDIA-SEQUENCE:{start}"]
            lines += [f"#EXTINF:0.4,\n{number}.ts" for number in range(start, end)]
            if end == len(self.segments) and self.ends:
                lines.append("#EXT-X-ENDLIST")
            send(handler, ("\n".join(lines) + "\n").encode())

        server.pages["/live/list.m3u8"] = page


def test_a_live_stream_that_grows_is_decoded_without_a_gap(server: WebServer, streams: Path) -> None:
    live = Live(server, streams, window=3)
    with HlsSource(server.url("/live/list.m3u8"), policy(server)) as source:
        assert source.is_live
        assert len(brightness(source)) == FRAMES
    assert live.loads == 3 and source.skipped_segments == 0
    assert [path for path in server.paths if path.endswith(".ts")] == [f"/live/{number}.ts" for number in range(6)]


def test_a_live_stream_begins_near_its_edge_or_at_its_start(server: WebServer, streams: Path) -> None:
    Live(server, streams, window=9, first=5, steps=1)
    with HlsSource(server.url("/live/list.m3u8"), policy(server)) as source:
        assert source.read(1) and server.paths[-1] == "/live/2.ts"
    Live(server, streams, window=9, first=5, steps=1)
    with HlsSource(server.url("/live/list.m3u8"), policy(server), from_start=True) as source:
        assert source.read(1) and server.paths[-1] == "/live/0.ts"


def test_segments_that_have_left_the_window_are_counted(server: WebServer, streams: Path) -> None:
    Live(server, streams, window=1, first=1, steps=3)
    del server.pages["/live/3.ts"]
    with HlsSource(server.url("/live/list.m3u8"), policy(server)) as source:
        frames = len(brightness(source))
    assert source.skipped_segments == 4 and frames == 2 * GROUP, "1 and 2, 3, which is gone, and 4"


def test_a_live_stream_that_stands_still_ends_with_its_reason(server: WebServer, streams: Path) -> None:
    live = Live(server, streams, window=9, first=6)
    live.ends = False
    with HlsSource(server.url("/live/list.m3u8"), policy(server, stall_seconds=0.6)) as source:
        with pytest.raises(PlaylistError, match="nothing") as caught:
            while source.read(100_000):
                pass
        assert caught.value.code == "playlist-stalled"
    assert 2 <= live.loads <= 5, "it is not asked again and again"


def test_a_stream_of_gaps_alone_ends_too(server: WebServer) -> None:
    loads = iter(range(1000))

    def page(handler: Any) -> None:
        start = 5 * next(loads)
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:0\n#EXT-X-MEDIA-SEQUENCE:{start}\n"
        send(handler, (text + "#EXT-X-GAP\n#EXTINF:1,\na.ts\n" * 5).encode())

    server.pages["/gaps.m3u8"] = page
    assert code_of(server, "/gaps.m3u8", stall_seconds=0.3) == "playlist-stalled"
    assert server.paths.count("/a.ts") == 0 and len(server.paths) < 5


def test_stop_ends_a_read_that_waits(server: WebServer, streams: Path) -> None:
    live = Live(server, streams, window=9, first=6, target_s=9)
    live.ends = False
    with HlsSource(server.url("/live/list.m3u8"), policy(server, stall_seconds=60)) as source:
        wanted, at_the_edge = sum(len(one) for one in live.segments[3:]), threading.Event()

        def read_on() -> None:
            left = wanted
            while part := source.read(1 << 20):
                left -= len(part)
                if not left:
                    at_the_edge.set()

        reader = threading.Thread(target=read_on)
        reader.start()
        assert at_the_edge.wait(5)
        source.stop()
        reader.join(3)
        assert not reader.is_alive()


def test_a_passing_failure_of_a_live_playlist_is_survived(server: WebServer, streams: Path) -> None:
    Live(server, streams, window=3)
    whole: Callable[[Any], None] = server.pages["/live/list.m3u8"]  # type: ignore[assignment]
    failures = [False, True, False, False]

    def page(handler: Any) -> None:
        if failures.pop(0):
            send(handler, b"", status=503)
        else:
            whole(handler)

    server.pages["/live/list.m3u8"] = page
    with HlsSource(server.url("/live/list.m3u8"), policy(server)) as source:
        assert len(brightness(source)) == FRAMES


def playlist(*lines: str) -> bytes:
    head = ["#EXTM3U", "#EXT-X-VERSION:7", "#EXT-X-TARGETDURATION:4"]
    return ("\n".join([*head, *lines, "#EXT-X-ENDLIST"]) + "\n").encode()


def code_of(server: WebServer, path: str, resolver: Names | None = None, **limits: Any) -> str:
    with pytest.raises(NetworkError) as caught:
        source = HlsSource(server.url(path), policy(server, **limits), resolver=resolver or Names({}))
        with source:
            while source.read(100_000):
                pass
    assert caught.value.remedy
    return caught.value.code


EVIL = [
    ("file:///etc/passwd", "url-scheme"),
    ("file:/etc/passwd", "url-scheme"),
    ("concat:http://127.0.0.1:{port}/ts/list0.ts|file:///etc/passwd", "url-scheme"),
    ("concat:/etc/passwd", "url-scheme"),
    ("subfile,,start,0,end,64,,:/etc/passwd", "url-scheme"),
    ("crypto:http://127.0.0.1:{port}/ts/list0.ts", "url-scheme"),
    ("data:text/plain;base64,AAAA", "url-scheme"),
    ("http://127.0.0.2:{port}/a.ts", "url-address"),
    ("http://169.254.169.254:{port}/latest/meta-data/", "url-address"),
    ("http://[::ffff:7f00:1]:{port}/a.ts", "url-address"),
    ("http://2130706433:{port}/a.ts", "url-host"),
    ("http://inside.test:{port}/a.ts", "url-address"),
    ("//inside.test:{port}/a.ts", "url-address"),
    ("http://127.0.0.1:22/a.ts", "url-port"),
    ("http://user:pw@127.0.0.1:{port}/ts/list0.ts", "url-credentials"),
]


@pytest.mark.parametrize("place", ["variant", "segment", "header", "key"])
@pytest.mark.parametrize(("uri", "code"), EVIL)
def test_nothing_in_a_playlist_leads_where_a_user_may_not(server: WebServer, place: str, uri: str, code: str) -> None:
    uri = uri.format(port=server.port)
    lines = {
        "variant": [f"#EXT-X-STREAM-INF:BANDWIDTH=1\n{uri}"],
        "segment": [f"#EXTINF:4,\n{uri}"],
        "header": [f'#EXT-X-MAP:URI="{uri}"\n#EXTINF:4,\n/ts/list0.ts'],
        "key": [f'#EXT-X-KEY:METHOD=AES-128,URI="{uri}"\n#EXTINF:4,\n/ts/list0.ts'],
    }[place]
    server.pages["/evil.m3u8"] = playlist(*lines)
    with WebServer("127.0.0.2", server.port) as inside:
        assert code_of(server, "/evil.m3u8", Names({"inside.test": [["10.0.0.5"]]})) == code
        assert inside.seen == []
    assert set(server.paths) <= {"/evil.m3u8", "/ts/list0.ts"}


@pytest.mark.parametrize("what", ["segment", "playlist"])
def test_a_child_that_redirects_inside(server: WebServer, what: str) -> None:
    server.pages["/sly.ts"] = redirect(f"http://169.254.169.254:{server.port}/a")
    line = "#EXTINF:4,\n/sly.ts" if what == "segment" else "#EXT-X-STREAM-INF:BANDWIDTH=1\n/sly.ts"
    server.pages["/evil.m3u8"] = playlist(line)
    assert code_of(server, "/evil.m3u8") == "url-address"


def test_a_live_playlist_whose_name_moves_inside(server: WebServer, streams: Path) -> None:
    """DNS rebinding between two loads: every load and every segment is checked anew."""
    Live(server, streams, window=3)
    names = Names({"films.test": [["127.0.0.1"]] * 4 + [["127.0.0.2"]]})
    with WebServer("127.0.0.2", server.port) as inside:
        url = server.url("/live/list.m3u8", "films.test")
        with HlsSource(url, policy(server), resolver=names) as source, pytest.raises(UrlRefused) as caught:
            while source.read(100_000):
                pass
        assert caught.value.code == "url-address" and inside.seen == []


def test_credentials_stay_with_the_playlists_host(server: WebServer, streams: Path) -> None:
    with WebServer("127.0.0.2") as cdn:
        cdn.pages["/a.ts"] = segments_of(streams)[0]
        server.pages["/both.m3u8"] = playlist("#EXTINF:4,\n/ts/list0.ts", f"#EXTINF:4,\n{cdn.url('/a.ts')}")
        rules = policy(server, cdn)
        with HlsSource(server.url("/both.m3u8"), rules, authorization="Bearer hunter2") as source:
            while source.read(100_000):
                pass
        assert [headers.get("Authorization") for _, headers in server.seen] == ["Bearer hunter2"] * 2
        assert "hunter2" not in str(cdn.seen) and cdn.paths == ["/a.ts"]


def test_a_playlist_without_end(server: WebServer) -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n#EXTM3U\n#EXT-X-TARGETDURATION:4\n"
    server.pages["/endless.m3u8"] = endless_page(head, b"#EXTINF:4,\n/ts/list0.ts\n" * 100)
    assert code_of(server, "/endless.m3u8") == "fetch-too-large"
    server.pages["/many.m3u8"] = playlist(*["#EXTINF:4,\n/ts/list0.ts"] * 2001)
    assert code_of(server, "/many.m3u8", playlist_segments=2000) == "playlist-too-large"
    server.pages["/master.m3u8"] = b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nmaster.m3u8\n"
    assert code_of(server, "/master.m3u8") == "playlist-nested"


def test_segments_that_are_too_large_alone_or_together(server: WebServer, streams: Path) -> None:
    sizes = [len(one) for one in segments_of(streams)]
    assert code_of(server, "/ts/list.m3u8", segment_bytes=max(sizes) - 1) == "fetch-too-large"
    assert code_of(server, "/ts/list.m3u8", bytes=sum(sizes) - 1) == "fetch-too-large"
    with HlsSource(server.url("/ts/list.m3u8"), policy(server, bytes=max(sizes)), endless=True) as source:
        assert len(brightness(source)) == FRAMES
    server.pages["/range.m3u8"] = playlist(f"#EXTINF:4,\n#EXT-X-BYTERANGE:{10**15}@0\n/ts/list0.ts")
    server.seen.clear()
    assert code_of(server, "/range.m3u8") == "fetch-too-large"
    assert server.paths == ["/range.m3u8"], "nobody is asked for so much"
    server.pages["/endless.ts"] = endless_page(b"HTTP/1.1 200 OK\r\n\r\n", b"G" + bytes(187))
    server.pages["/big.m3u8"] = playlist("#EXTINF:4,\n/endless.ts")
    assert code_of(server, "/big.m3u8", segment_bytes=1 << 20) == "fetch-too-large"


@pytest.mark.parametrize("key", [b"short", bytes(17), bytes(16)])
def test_keys_that_do_not_fit(server: WebServer, key: bytes) -> None:
    server.pages["/key"] = key
    assert code_of(server, "/encrypted/list.m3u8") in ("playlist-key", "fetch-too-large", "playlist-media")


def test_what_is_decrypted_is_what_was_encrypted(server: WebServer, streams: Path) -> None:
    """By an initialisation vector that is given, as libav writes it, and by the numbers of the segments."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    segments = segments_of(streams)
    with HlsSource(server.url("/encrypted/list.m3u8"), policy(server)) as source:
        assert source.readall() == b"".join(segments)
    for number in (7, 8):
        content = segments[number - 7]
        padding = 16 - len(content) % 16
        encryptor = Cipher(algorithms.AES(KEY), modes.CBC(number.to_bytes(16, "big"))).encryptor()
        server.pages[f"/{number}.ts"] = encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()
    lines = ('#EXT-X-MEDIA-SEQUENCE:7\n#EXT-X-KEY:METHOD=AES-128,URI="key"', "#EXTINF:4,\n7.ts", "#EXTINF:4,\n8.ts")
    server.pages["/numbered.m3u8"] = playlist(*lines)
    with HlsSource(server.url("/numbered.m3u8"), policy(server)) as source:
        assert source.readall() == b"".join(segments[:2])


def test_a_key_is_fetched_once(server: WebServer) -> None:
    with HlsSource(server.url("/encrypted/list.m3u8"), policy(server)) as source:
        assert len(brightness(source)) == FRAMES
    assert server.paths.count("/key") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<MPD></MPD>",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
        b"",
    ],
)
def test_segments_are_media_and_no_playlists(server: WebServer, content: bytes) -> None:
    server.pages["/odd.ts"] = content
    server.pages["/evil.m3u8"] = playlist("#EXTINF:4,\n/odd.ts")
    assert code_of(server, "/evil.m3u8") == "playlist-media"


def test_a_playlist_later_in_the_stream_is_never_opened_by_libav(server: WebServer, streams: Path) -> None:
    """The demuxer is fixed by the first segment: to it, the text of a playlist is noise between packets."""
    server.pages["/odd.ts"] = playlist(f"#EXTINF:4,\n{server.url('/inner.ts')}") * 20
    server.pages["/mixed.m3u8"] = playlist(
        "#EXTINF:4,\n/ts/list0.ts", "#EXTINF:4,\n/odd.ts", "#EXTINF:4,\n/ts/list1.ts"
    )
    with HlsSource(server.url("/mixed.m3u8"), policy(server)) as source:
        assert len(brightness(source)) >= GROUP
    assert "/inner.ts" not in server.paths


def test_other_parameters_in_the_middle_are_told(server: WebServer, streams: Path) -> None:
    header = next((streams / "fmp4").glob("init*")).read_bytes()
    server.pages["/other.mp4"] = header + b"\0\0\0\x08free"
    server.pages["/same.mp4"] = header
    text = (streams / "fmp4/list.m3u8").read_text()
    segments = [line for line in text.splitlines() if line and not line.startswith("#")]
    for name, code in (("other", "playlist-header"), ("same", "")):
        server.pages["/two.m3u8"] = playlist(
            f'#EXT-X-MAP:URI="/fmp4/init.mp4"\n#EXTINF:4,\n/fmp4/{segments[0]}',
            f'#EXT-X-DISCONTINUITY\n#EXT-X-MAP:URI="/{name}.mp4"\n#EXTINF:4,\n/fmp4/{segments[1]}',
        )
        if code:
            assert code_of(server, "/two.m3u8") == code
        else:
            with HlsSource(server.url("/two.m3u8"), policy(server)) as source:
                assert len(brightness(source)) == 2 * GROUP and source.discontinuities == 1


def test_a_segment_that_is_missing_from_a_recording_is_an_error(server: WebServer) -> None:
    del server.pages["/ts/list3.ts"]
    with HlsSource(server.url("/ts/list.m3u8"), policy(server)) as source, pytest.raises(FetchFailed, match="404"):
        brightness(source)


def test_a_segment_that_drips_is_left(server: WebServer) -> None:
    def page(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not server.stopping.wait(0.02):
            handler.wfile.write(b"G")

    server.pages["/slow.ts"] = page
    server.pages["/slow.m3u8"] = playlist("#EXTINF:4,\n/slow.ts")
    began = time.monotonic()
    assert code_of(server, "/slow.m3u8", seconds=0.4) == "fetch-timeout"
    assert time.monotonic() - began < 3, "tried twice"
