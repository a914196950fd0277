"""The live page in a real browser, with a fake camera that shows a real clip, against a real service."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from actors.live_app import PAGE
from actors.live_channel import Channel
from actors.live_server import Guest, LiveConfig, open_gate
from infra import protocol
from infra.protocol import FrameHeader
from infra.refusals import Unauthorized
from tests.browser import Page, browser, chromium
from tests.live_service import LiveService, live_service

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "tests/data/walk_lr.mp4"  # 160x120
START = "document.getElementById('start').click()"
SHOWN = "document.getElementById('stage').dataset.phase === 'shown'"
RUNS = f"{SHOWN} && document.getElementById('connection').dataset.state === 'open'"
STOPPED = "document.getElementById('start').textContent === 'Start'"
RESTORED = "Number(/(\\d+) in all/.exec(document.getElementById('rate-note').textContent)?.[1] ?? 0)"

# Mean difference, 0 to 255, between the restored picture and (near) the original's pixels repeated, which is what the
# stand-in makes; (enlarged) the original as the browser enlarges it; both in one task, so that no frame comes between.
DIFFERENCES = """(() => {
  const [original, restored] = ["original", "restored"].map((id) => document.getElementById(id));
  const { width, height } = restored;
  const pixels = (source, smooth) => {
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.imageSmoothingEnabled = smooth;
    context.drawImage(source, 0, 0, width, height);
    return context.getImageData(0, 0, width, height).data;
  };
  const [near, enlarged, result] = [pixels(original, false), pixels(original, true), pixels(restored, false)];
  const mean = (other) => result.reduce((sum, value, n) => sum + Math.abs(value - other[n]), 0) / result.length;
  return { near: mean(near), enlarged: mean(enlarged), size: [original.width, original.height, width, height] };
})()"""


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip as a camera of Chromium shows it: uncompressed, again and again."""
    path = tmp_path_factory.mktemp("camera") / "walk.y4m"
    with av.open(str(CLIP)) as clip, path.open("wb") as file:
        stream = clip.streams.video[0]
        file.write(f"YUV4MPEG2 W{stream.width} H{stream.height} F25:1 Ip A1:1 C420jpeg\n".encode())
        for frame in clip.decode(stream):
            file.write(b"FRAME\n" + frame.reformat(format="yuv420p").to_ndarray().tobytes())
    return path


@pytest.fixture(scope="module")
def page(camera: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = chromium()
    if program is None:
        pytest.skip("needs chromium")
    switches = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    switches.append(f"--use-file-for-fake-video-capture={camera}")
    with browser(program, tmp_path_factory.mktemp("profile"), *switches) as tab:
        yield tab


@pytest.fixture(autouse=True)
def problems(page: Page) -> Iterator[list[str]]:
    """No test may leave an error in the browser's console, or anything that the page's security policy refused."""
    page.problems.clear()
    yield page.problems


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    with live_service(LiveConfig(state_interval_s=0.2), "stand-in:5") as running:
        yield running


def show(page: Page, service: LiveService, *, width: int = 1280, dark: bool = False, **fields: Any) -> None:
    """Open the page and fill in fields by their names."""
    page.open(f"{service.http}/", width=width, dark=dark)
    page.wait("document.documentElement.dataset.ready")
    for name, value in fields.items():
        choose(page, name, value)


def choose(page: Page, name: str, value: Any) -> None:
    """Fill in a field as a person does."""
    page.run(f"""(() => {{
        const value = {json.dumps(value)};
        const field = document.getElementById("controls").elements.namedItem({json.dumps(name)});
        field[typeof value === "boolean" ? "checked" : "value"] = value;
        const one = field instanceof RadioNodeList ? field[0] : field;
        for (const kind of ["input", "change"]) one.dispatchEvent(new Event(kind, {{ bubbles: true }}));
    }})()""")


def text(page: Page, id: str) -> str:
    return str(page.run(f"document.getElementById({id!r}).textContent"))


def stop(page: Page) -> None:
    page.run(START)
    page.wait(STOPPED)


def test_the_page_opens_without_a_problem(page: Page, service: LiveService) -> None:
    show(page, service)
    assert page.problems == []
    models = page.run("[...document.querySelector('[name=model]').options].map(o => o.value)")
    assert models == ["stand-in:5"]
    assert page.run("document.querySelector('[name=codec]').value") == "jpeg"
    assert page.run("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    # The policy is in force: what got in all the same would neither run nor tell anybody.
    refused = "Object.assign(document.createElement('script'), { src: 'https://example.org/x.js' })"
    assert page.run(f"(() => {{ try {{ {refused}; }} catch (error) {{ return error.name; }} }})()") == "TypeError"
    assert page.run("fetch('https://example.org/').catch((error) => error.name)") == "TypeError"
    assert any("Content Security Policy" in problem for problem in page.problems)
    assert any("TrustedScriptURL" in problem for problem in page.problems)
    page.problems.clear()


def test_files_come_with_their_headers_and_nothing_else_comes(service: LiveService) -> None:
    for file in PAGE.iterdir():
        place = "/" if file.name == "index.html" else f"/page/{file.name}"
        answer = httpx.get(service.http + place)
        assert answer.status_code == 200 and answer.content == file.read_bytes(), place
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        again = httpx.get(service.http + place, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
        assert httpx.head(service.http + place).status_code == 200
    for place in ("/page/", "/page/../live_app.py", "/page/%2e%2e/live_app.py", "/page/none.js"):
        assert httpx.get(service.http + place).status_code == 404
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", html)  # no policy would let them pass


def test_a_camera_is_restored_beside_itself(page: Page, service: LiveService) -> None:
    show(page, service)
    page.run(START)
    page.wait(RUNS)
    seen = set()
    for number in range(5):
        page.wait(f"{RESTORED} > {number * 4}")
        told = page.run(DIFFERENCES)
        assert told["size"] == [160, 120, 640, 480]
        assert told["near"] < 3 < 3.5 < told["enlarged"], told
        seen.add(round(told["enlarged"], 6))
    assert len(seen) > 1  # the pictures move
    assert text(page, "level") == "4 steps"
    assert re.fullmatch(r"[\d.]+ ms", text(page, "latency"))
    assert re.fullmatch(r"[\d.]+ fps", text(page, "rate"))
    assert "now" in page.run("document.getElementById('graph').getAttribute('aria-label')")
    assert len(page.run("document.getElementById('station-words').innerText").splitlines()) == 5
    assert "stand-in:5" in text(page, "connection")
    (connection,) = service.server.connections.values()
    stop(page)
    assert connection.session.is_over and not service.server.connections
    assert page.run("document.getElementById('video').srcObject === null")
    assert text(page, "connection") == "Not connected"


def test_the_divider_moves_by_keyboard_and_by_mouse(page: Page, service: LiveService) -> None:
    show(page, service)
    page.run(START)
    page.wait(RUNS)
    value = "Number(document.getElementById('divider').getAttribute('aria-valuenow'))"
    share = """(() => {
        const [stage, divider] = ["stage", "divider"].map((id) => document.getElementById(id).getBoundingClientRect());
        return (divider.left + divider.width / 2 - stage.left) / stage.width;
    })()"""
    page.run("document.getElementById('divider').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.run(value) == 54 and abs(page.run(share) - 0.54) < 0.01
    page.press("Home")
    assert page.run(value) == 0
    assert page.run("getComputedStyle(document.getElementById('original')).clipPath") == "inset(0px 100% 0px 0px)"
    page.press("End", "ArrowRight", "ArrowLeft")
    assert page.run(value) == 98
    left, top, width = page.run(
        "(({left, top, width}) => [left, top, width])(document.getElementById('stage').getBoundingClientRect())"
    )
    page.drag((left + 0.6 * width, top + 40), (left + 0.4 * width, top + 45), (left + 0.25 * width, top + 50))
    assert page.run(value) == 25 and abs(page.run(share) - 0.25) < 0.01
    assert (
        page.run("document.getElementById('divider').getAttribute('aria-valuetext')") == "25 % original, 75 % restored"
    )
    stop(page)


def test_a_keyboard_starts_and_stops(page: Page, service: LiveService) -> None:
    show(page, service)
    page.run("document.getElementById('start').focus()")
    page.press("Enter")
    page.wait(RUNS)
    page.press("Enter")
    page.wait(STOPPED)
    assert page.run("""[...document.querySelectorAll("input, select")].every((field) => field.labels.length > 0)""")
    assert page.run(
        """[...document.querySelectorAll("button")].every((one) => one.ariaLabel || one.textContent.trim())"""
    )


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_a_drained_replica_is_left_without_a_lost_frame(page: Page, service: LiveService, codec: str) -> None:
    show(page, service, policy="lossless")
    if codec in page.run("[...document.querySelector('[name=codec]').options].map((one) => one.value)"):
        choose(page, "codec", codec)  # a browser without H.264 is tried with JPEG twice
    page.run(START)
    page.wait(f"{RESTORED} > 5")
    for number in (1, 2):
        (connection,) = service.server.connections.values()
        service.call(connection.drain())
        page.wait(f"document.getElementById('hand-overs').textContent === '{number}'")
        page.wait(f"{RUNS} && {RESTORED} > {20 * number}")
    (connection,) = service.server.connections.values()
    assert connection.session.hand_offs == 2
    assert re.fullmatch(r"none|\d+ not sent", text(page, "dropped-note"))
    assert text(page, "hand-overs-note") == "to another replica"  # and not: began anew
    told = page.run(DIFFERENCES)
    assert told["near"] < (3 if codec == "jpeg" else 6), told  # still pairs of the same frame
    stop(page)


STREAM = """(async () => {
    const sockets = (window.sockets = []);
    window.WebSocket = class extends WebSocket {
        constructor(...given) {
            super(...given);
            sockets.push(this);
        }
    };
    const { UpriverStream, Flag } = await import("/page/client.js");
    const size = { width: 32, height: 24 };
    const picture = (id) => new Uint8Array(32 * 24 * 3).map((_, n) => (n * 7 + id * 13) % 256);
    const stream = await UpriverStream.open(location.origin, { ...size, codec_in: "raw", codec_out: "raw" });
    const told = { ids: [], indices: [], resumed: 0, wrong: 0, pts: [] };
    Object.assign(window, { stream, told });
    (async () => {
        for (let id = 0; id < 120; id++) await stream.send(picture(id), { pts: -5 * id });
        await stream.close();
    })();
    for await (const answer of stream) {
        const sent = picture(answer.id);
        // The stand-in repeats each pixel four times each way.
        for (let n = 0; n < 32; n++) told.wrong += answer.payload[12 * n + (n % 3)] !== sent[3 * n + (n % 3)];
        told.ids.push(answer.id);
        told.indices.push(answer.header.index);
        told.pts.push(answer.pts);
        told.resumed += (answer.header.flags & Flag.RESUMED) !== 0;
        if (answer.id === 40 || answer.id === 80) await new Promise((resolve) => (window.goOn = resolve));
    }
    const { handOvers, restarts, state, totals } = stream;
    return { ...told, handOvers, restarts, state, totals };
})()"""


@pytest.mark.parametrize("how", ["drained", "cut", "state lost"])
def test_the_client_loses_repeats_and_reorders_nothing(page: Page, service: LiveService, how: str) -> None:
    show(page, service)
    page.run(f"window.done = {STREAM}; null")
    for number in (40, 80):
        page.wait(f"window.told?.ids.at(-1) === {number} && window.goOn")
        if how == "drained":
            (connection,) = service.server.connections.values()
            service.call(connection.drain())
        else:
            if how == "state lost":
                service.server._states.book._entries.clear()  # type: ignore[attr-defined]
            page.run("window.sockets.at(-1).close(4000)")
        page.run("window.goOn(); window.goOn = null")
    told = page.run("window.done")
    assert told["ids"] == list(range(120))
    assert told["pts"] == [-5 * number for number in range(120)]
    assert told["wrong"] == 0
    assert (told["state"], told["handOvers"] + told["restarts"]) == ("closed", 2)
    if how == "state lost":
        assert told["restarts"] == 2 and told["indices"].count(0) == 3
    else:
        assert told["restarts"] == 0 and told["indices"] == list(range(120)) and told["resumed"] == 2


def test_both_sides_write_the_same_bytes(page: Page, service: LiveService) -> None:
    show(page, service)
    header = FrameHeader(
        2**40 + 7, -(2**40), protocol.Flag.CUT | protocol.Flag.KEY, level=2, index=2**32 - 1, receipt=2**31 + 5,
        acknowledged=2**33, granted=2**34, decode_us=1, queue_us=2, step_us=3, encode_us=2**32 - 1,
        reason=protocol.DropReason.RATE,
    )  # fmt: skip
    packed = header.pack(b"picture")
    told = page.run(f"""import("/page/protocol.js").then((side) => {{
        const {{ header, payload }} = side.unpackFrame(new Uint8Array({list(packed)}).buffer);
        return {{ ...side, header, again: [...side.packFrame(header, payload)] }};
    }})""")
    assert bytes(told["again"]) == packed
    assert told["header"]["id"] == header.id and told["header"]["pts"] == header.pts
    assert told["header"]["encodeUs"] == header.encode_us and told["header"]["receipt"] == header.receipt
    assert told["DROP_REASONS"] == [reason.name.lower() for reason in protocol.DropReason]
    assert told["Flag"] == {flag.name: flag.value for flag in protocol.Flag}
    assert told["SUBPROTOCOL"] == protocol.SUBPROTOCOL


def test_credentials_travel_in_the_hello_and_wrong_ones_are_explained(page: Page) -> None:
    async def gate(hello: protocol.Hello, channel: Channel) -> Guest:
        key = hello.credentials.api_key
        if key is None or key.get_secret_value() != "right":
            raise Unauthorized("No.", remedy="None.")
        return await open_gate(hello, channel)

    with live_service(None, "stand-in:5", gate=gate) as guarded:
        show(page, guarded, key="wrong")
        page.run(START)
        page.wait("!document.getElementById('notice').hidden")
        assert "credentials" in text(page, "notice-what") and "key" in text(page, "notice-remedy")
        assert page.run("document.activeElement.name") == "key"
        assert page.run("sessionStorage.length") == 0
        choose(page, "key", "right")
        page.run(START)
        page.wait(RUNS)
        stop(page)
        assert page.run("document.getElementById('notice').hidden")
        choose(page, "remember", True)
        assert page.run("sessionStorage.getItem('upriver.key')") == "right"
        show(page, guarded)
        assert page.run("document.querySelector('[name=key]').value") == "right"
        choose(page, "remember", False)
        assert page.run("sessionStorage.length + localStorage.length") == 0
        assert page.run("performance.getEntriesByType('resource').every((one) => !one.name.includes('right'))")


def test_every_codec_that_the_browser_has(page: Page, service: LiveService) -> None:
    show(page, service)
    codecs = page.run("[...document.querySelector('[name=codec]').options].map((one) => one.value)")
    assert {"jpeg", "png"} <= set(codecs)
    for codec in codecs:
        show(page, service, codec=codec)
        page.run(START)
        page.wait(f"{RUNS} && {RESTORED} > 10")
        (connection,) = service.server.connections.values()
        assert (connection.session.hello.codec_in, connection.session.hello.codec_out) == (codec, codec)
        told = page.run(DIFFERENCES)
        assert told["near"] < (0.01 if codec == "png" else 6), (codec, told)
        stop(page)


def test_a_refusal_is_told_in_words_with_its_remedy(page: Page) -> None:
    with live_service(LiveConfig(max_pixels=64 * 64), "stand-in:5") as small:
        show(page, small)
        page.run(START)
        page.wait("!document.getElementById('notice').hidden")
        assert "160x120" in text(page, "notice-what")
        assert "Send smaller frames" in text(page, "notice-remedy") and "4096" in text(page, "notice-remedy")
        assert page.run(STOPPED) and text(page, "connection") == "Stopped"


@contextmanager
def videos(allowed: bool) -> Iterator[str]:
    """Another server with the clip, which permits other pages to read it, or does not."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = CLIP.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Content-Length", str(len(data)))
            if allowed:
                self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/clip.mp4"
    finally:
        server.shutdown()
        thread.join()


def test_a_file_is_restored_to_its_end(page: Page, service: LiveService) -> None:
    show(page, service, source="file", policy="lossless", repeat=False)
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    node = page.send("DOM.querySelector", nodeId=root, selector="[name=file]")["nodeId"]
    page.send("DOM.setFileInputFiles", nodeId=node, files=[str(CLIP)])
    page.run(START)
    page.wait("document.getElementById('notice-what').textContent === 'The video has ended.'", 40)
    assert page.run(STOPPED) and page.run(RESTORED) > 10
    assert text(page, "dropped") == "0"
    assert not service.server.connections


def test_a_video_at_an_address_needs_its_servers_permission(page: Page, service: LiveService) -> None:
    with videos(allowed=True) as address:
        show(page, service, source="address", address=address)
        page.run(START)
        page.wait(f"{RUNS} && {RESTORED} > 3")
        stop(page)
    with videos(allowed=False) as address:
        choose(page, "address", address)
        page.run(START)
        page.wait("!document.getElementById('notice').hidden")
        assert "cannot be played" in text(page, "notice-what") and "CORS" in text(page, "notice-remedy")
    page.problems.clear()  # the browser tells of it as well
    choose(page, "address", "file:///etc/hostname")
    page.run(START)
    page.wait("document.getElementById('notice-what').textContent.includes('no address')")


def test_a_snapshot_has_both_sides(page: Page, service: LiveService, tmp_path: Path) -> None:
    page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    show(page, service)
    page.run(START)
    page.wait(f"{RUNS} && !document.getElementById('snapshot').disabled")
    page.run("document.getElementById('snapshot').click()")
    page.wait("document.getElementById('spoken').textContent.includes('saved')")
    stop(page)
    end = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("upriver-frame-*.png"))):
        assert time.monotonic() < end
        page.wait("new Date()")
    both = np.asarray(Image.open(saved[0]).convert("RGB"), np.int16)
    assert both.shape == (480, 1280, 3)
    assert 0.2 < np.abs(both[:, :640] - both[:, 640:]).mean() < 12  # the same moment, not the same pixels


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1000, True), (390, False), (320, True)])
def test_nothing_sticks_out_and_colours_follow_the_reader(
    page: Page, service: LiveService, width: int, dark: bool
) -> None:
    show(page, service, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(int(part) for part in paper[4:-1].split(",")) < 200) == dark


@pytest.mark.slow
def test_pictures_for_the_documentation(page: Page, tmp_path: Path) -> None:
    """Screenshots with the built-in model; `make page-pictures` puts them into docs/pictures."""
    folder = Path(os.environ.get("PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    with live_service(None, "tiny") as real:
        for name, width, height, dark in (
            ("live-page", 1280, 1010, False),
            ("live-page-dark", 1280, 1010, True),
            ("live-page-narrow", 390, 844, False),
        ):
            show(page, real, width=width, dark=dark, side="120", fps="5", budget="1500")
            page.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            page.run(START)
            page.wait(f"{RUNS} && {RESTORED} >= 12", 120)
            page.send("Emulation.setScrollbarsHidden", hidden=True)
            picture = Image.open(io.BytesIO(page.picture())).convert("RGB")
            assert picture.size == (width, height)
            picture.save(folder / f"{name}.jpg", quality=88, optimize=True)
            stop(page)
    page.send("Emulation.setScrollbarsHidden", hidden=False)
    assert all((folder / f"{name}.jpg").stat().st_size > 20_000 for name in ("live-page", "live-page-dark"))
