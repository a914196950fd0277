"""Uploads through a real server: the pictures, the stamps and the sound of the answer, when it begins, how it ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from torch import Tensor

from actors.byte_pipe import BytePipe
from actors.pictures import resize
from actors.restore_api import UploadPlaces, make_router
from actors.thread_call import ThreadCall
from actors.upload import RestoreUpload, UploadOptions, UploadSettings
from infra.refusals import AdmissionRefused
from pipeline.engine import open_engine
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.piped_output import END_BOX
from pipeline.shots import CutDetector
from pipeline.state import StreamState
from pipeline.video import EncoderOptions, VideoInfo, VideoReader, VideoWriter, probe
from tests.films import make_film
from tests.http_server import TIMEOUT_S, Duplex, served
from tests.upload_files import CONTAINERS, STREAMED, make_apart, make_silent, make_upload
from tests.video_files import make_bad_files, make_video_files

LOSSLESS = "crf=0&codec=h264"
THREADS = ("upload-", "read-ahead", "write-behind")


@dataclass
class Lease:
    """A place in a model of its own. `fails_at`: the step that fails, counted from 0."""

    engine: Any  # a pipeline or a stand-in
    fails_at: int | None = None
    steps: int = 0
    closed: threading.Event = field(default_factory=threading.Event)

    def start(self, seed: int) -> StreamState:
        return self.engine.start(seed)

    def step(self, frame_13HW: Tensor, state: StreamState, steps: int | None) -> Tensor:
        if self.steps == self.fails_at:
            raise AdmissionRefused("The model is gone.", code="model-gone", remedy="Try again.")
        self.steps += 1
        return self.engine.step(frame_13HW, [state], steps=steps)

    def close(self) -> None:
        self.closed.set()


@dataclass
class Service:
    """An application with nothing but uploads. `leases` were lent so far; `fails_at` is for the next ones."""

    settings: UploadSettings
    model: str = "stand-in:0"
    fails_at: int | None = None
    leases: list[Lease] = field(default_factory=list)

    async def open_step(self, tenant: Any, options: UploadOptions, info: VideoInfo) -> Lease:
        if options.model not in (None, "ours"):
            raise AdmissionRefused(f"No model {options.model}.", code="model-unknown", remedy="See /v1/models.")
        engine = open_engine(self.model, torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=10**7)
        self.leases.append(Lease(engine, self.fails_at))
        return self.leases[-1]

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(make_router(lambda: "tenant", self.open_step, self.settings))
        return app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(UploadSettings(preset="ultrafast", threads=1, spool_folder=str(tmp_path)))


@pytest.fixture
def port(service: Service, tmp_path: Path) -> Iterator[int]:
    """A server; when it has ended, nothing of any upload may be left: no thread, no file, no place in the model."""
    with served(service.app()) as number:
        yield number
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)] == []
    files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists() or link.is_symlink()]
    assert [file for file in files if file.startswith(f"{tmp_path}/") and file.endswith("(deleted)")] == []
    assert all(lease.closed.is_set() for lease in service.leases)


def post(port: int, content: bytes, query: str = "") -> Duplex:
    """Send everything from another thread; the answer is read by the caller."""
    request = Duplex(port, f"/v1/restore?{query}")

    def send() -> None:
        try:
            request.send(content)
            request.end()
        except OSError:
            pass  # the server has answered already

    threading.Thread(target=send, daemon=True).start()
    return request


def restored(port: int, content: bytes, query: str = "") -> tuple[bytes, Any]:
    with post(port, content, query) as request:
        assert request.answer.status == 200, request.rest()
        return request.rest(), request.answer.headers


def boxes(content: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of all boxes of the outermost level; there is nothing behind the last."""
    found, at = [], 0
    while at < len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        assert size >= 8 and at + size <= len(content)
        found.append((kind, content[at + 8 : at + size]))
        at += size
    return found


def told(content: bytes) -> dict[str, Any]:
    """What the last box says."""
    kind, inside = boxes(content)[-1]
    assert kind == b"uuid" and inside[:16] == END_BOX.bytes
    return json.loads(inside[16:])


def pictures(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.pts * frame.time_base, frame.to_ndarray()) for frame in container.decode(video=0)]


def sound(path: Path) -> list[tuple[float, bytes]]:
    """(seconds, bytes) of the sound's packets, AAC without the headers that MPEG-TS gives it."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return []
        has_headers = container.format.name == "mpegts"
        return [
            (float((packet.pts or 0) * packet.time_base), bytes(packet)[7 if has_headers else 0 :])
            for packet in container.demux(container.streams.audio[0])
            if packet.size
        ]


def offline(path: Path, result: Path, *, scale: int, model: str = "stand-in:0", seed: int = 0) -> Path:
    """What the engine makes of the same file, written without loss."""
    engine = open_engine(model, torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=10**7)
    info = probe(path)
    state, detector = engine.start(seed), CutDetector()
    width, height = info.width * scale, info.height * scale
    options = EncoderOptions(codec="h264", crf=0, preset="ultrafast", threads=1)
    with (
        VideoReader(path, info=info, threads=1) as reader,
        VideoWriter(result, info, width=width, height=height, options=options) as writer,
    ):
        for frame in reader:
            if detector.update(frame.rgb_HWC):
                state.reset()
            output = engine.step(frame_to_tensor(frame.rgb_HWC), [state])
            picture: Any = tensor_to_frame(output[0], frame.rgb_HWC.dtype)
            writer.write(replace(frame, rgb_HWC=resize(picture, width, height)))
    return result


@pytest.mark.parametrize("kind", CONTAINERS)
def test_pictures_stamps_and_sound_of_every_container(port: int, folder: Path, tmp_path: Path, kind: str) -> None:
    path = make_upload(folder, kind)
    content, headers = restored(port, path.read_bytes(), f"scale=2&{LOSSLESS}")
    assert headers["Upriver-Input"] == ("streamed" if kind in STREAMED else "spooled")
    assert headers["Upriver-Size"] == "320x240" and headers["Content-Type"] == "video/mp4"
    assert told(content) == {"frames": 60, "cuts": 0, "damage": [], "left_out": []}
    got = tmp_path / "got.mp4"
    got.write_bytes(content)
    expected = pictures(offline(path, tmp_path / "expected.mkv", scale=2))
    answer = pictures(got)
    assert len(answer) == len(expected) == 60
    for (at, picture), (expected_at, expected_picture) in zip(answer, expected, strict=True):
        assert np.array_equal(picture, expected_picture)
        assert abs(at - expected_at) < Fraction(2, 1000)  # Matroska, which holds the expected ones, counts milliseconds
    heard = sound(path)
    assert [data for _, data in sound(got)] == [data for _, data in heard] != []
    assert max(abs(at - before) for (at, _), (before, _) in zip(sound(got), heard, strict=True)) < 0.002


@pytest.mark.parametrize("kind", STREAMED)
def test_fragments_come_back_before_the_upload_has_ended(port: int, folder: Path, tmp_path: Path, kind: str) -> None:
    content = make_upload(folder, kind, rounds=4).read_bytes()
    with Duplex(port, "/v1/restore?scale=2") as request:
        request.send(content[: len(content) // 2])
        early = b""
        while b"moof" not in early or b"mdat" not in early[early.index(b"moof") :]:
            piece = request.read()
            assert piece, "the answer ended"
            early += piece
        request.send(content[len(content) // 2 :])
        request.end()
        whole = early + request.rest()
    assert told(whole)["frames"] == 240
    assert sum(kind == b"moof" for kind, _ in boxes(whole)) >= 8  # one a second: the first need not wait for a key
    got = tmp_path / "got.mp4"
    got.write_bytes(whole)
    assert len(pictures(got)) == 240


def test_sound_that_is_announced_and_never_comes_keeps_nothing_back(port: int, tmp_path: Path) -> None:
    content = make_silent(tmp_path / "silent.ts", rounds=4).read_bytes()
    with Duplex(port, "/v1/restore?scale=2") as request:
        request.send(content[: 3 * len(content) // 4])
        assert "audio" in request.answer.headers["Upriver-Left-Out"]
        assert "first 2 seconds" in request.answer.headers["Upriver-Left-Out"]
        assert request.read()
        request.send(content[3 * len(content) // 4 :])
        request.end()
        assert request.rest()


def test_sound_that_lies_behind_all_pictures_is_kept_by_storing_the_upload(port: int, tmp_path: Path) -> None:
    path = make_apart(tmp_path / "apart.mp4", rounds=4)
    content, headers = restored(port, path.read_bytes(), "scale=2")
    assert headers["Upriver-Input"] == "spooled" and told(content)["left_out"] == []
    (tmp_path / "got.mp4").write_bytes(content)
    assert [data for _, data in sound(tmp_path / "got.mp4")] == [data for _, data in sound(path)] != []


def test_a_cut_is_found_and_the_model_is_as_offline(folder: Path, tmp_path: Path) -> None:
    """With the real model: memory from frame to frame, and a cut that clears it."""
    film = make_film(tmp_path / "film.ts", (4, 4))
    service = Service(UploadSettings(preset="ultrafast", threads=1), model="tiny")
    with served(service.app()) as port:
        content, _ = restored(port, film.read_bytes(), f"seed=7&{LOSSLESS}")
        without, _ = restored(port, film.read_bytes(), f"seed=7&cuts=false&{LOSSLESS}")
    assert told(content)["cuts"] == 1 and told(without)["cuts"] == 0
    (tmp_path / "got.mp4").write_bytes(content)
    answer = pictures(tmp_path / "got.mp4")
    expected = pictures(offline(film, tmp_path / "expected.mkv", scale=4, model="tiny", seed=7))
    assert len(answer) == 8
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(answer, expected, strict=True))
    (tmp_path / "without.mp4").write_bytes(without)
    assert not np.array_equal(pictures(tmp_path / "without.mp4")[4][1], answer[4][1])


def test_steps_may_be_left_to_what_the_pictures_show(service: Service, port: int, tmp_path: Path) -> None:
    still = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "still.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for moment in range(30):
            shown = still if moment != 20 else still[::-1]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")))
        container.mux(stream.encode(None))
    content = (tmp_path / "still.mkv").read_bytes()
    every, _ = restored(port, content, "cuts=false")
    fewer, _ = restored(port, content, "cuts=false&steps=auto")
    assert told(every)["frames"] == told(fewer)["frames"] == 30
    assert service.leases[0].steps == 30 and 10 <= service.leases[1].steps < 24
    kept = {}
    for name, answer in (("every", every), ("fewer", fewer)):
        (tmp_path / f"{name}.mp4").write_bytes(answer)
        kept[name] = [picture.astype(int) for _, picture in pictures(tmp_path / f"{name}.mp4")]
    worst = max(abs(a - b).mean() for a, b in zip(kept["every"], kept["fewer"], strict=True))
    assert worst < 4, "a picture that changed is restored at once"


def test_the_answer_of_a_client_that_sends_all_before_it_reads(folder: Path) -> None:
    content = make_upload(folder, "mkv", rounds=2).read_bytes()
    with served(Service(UploadSettings(preset="ultrafast", threads=1, buffer_bytes=1 << 16)).app()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        connection.request("POST", "/v1/restore?crf=0", body=content)
        answer = connection.getresponse().read()
        connection.close()
    assert told(answer)["frames"] == 120 and len(answer) > 1 << 20


@pytest.mark.parametrize(
    "kind", ["mpeg2_interlaced_ts", "hevc_10bit_hdr_mkv", "multi_mkv", "offset_ts", "anamorphic_mp4"]
)
def test_other_sources_keep_what_mp4_holds(port: int, tmp_path: Path, kind: str) -> None:
    path = make_video_files(tmp_path)[kind]
    content, headers = restored(port, path.read_bytes(), "scale=2")
    (tmp_path / "got.mp4").write_bytes(content)
    source, result = probe(path), probe(tmp_path / "got.mp4")
    assert (result.width, result.height) == (source.width * 2, source.height * 2)
    assert result.sample_aspect_ratio == source.sample_aspect_ratio
    assert result.colour.transfer == source.colour.transfer and result.mastering == source.mastering
    sounds = [stream for stream in source.streams if stream.kind == "audio"]
    assert [stream.language for stream in result.streams if stream.kind == "audio"] == [
        stream.language or "und" for stream in sounds
    ]
    assert abs(result.start_pts * result.time_base - source.start_pts * source.time_base) < Fraction(2, 1000)
    if kind == "multi_mkv":
        assert "subtitle" in headers["Upriver-Left-Out"] and "only sound" in headers["Upriver-Left-Out"]


def test_damage_is_told_and_the_rest_is_restored(port: int, folder: Path, tmp_path: Path) -> None:
    bad = make_bad_files(tmp_path)
    for name in ("truncated", "holed"):
        content, headers = restored(port, bad[name].read_bytes(), "scale=2")
        last = told(content)
        assert 0 < last["frames"] <= 48 and last["damage"], name
        assert headers["Upriver-Input"] == "streamed"
    cut = make_upload(folder, "moov_last").read_bytes()
    with post(port, cut[: len(cut) // 2]) as request:  # nothing can be read without the index at its end
        assert request.refusal()["code"] == "video-unreadable"


REFUSED: list[tuple[str, str, str, int, str]] = [
    ("text", "", "BadMessage", 400, "upload-kind"),
    ("playlist", "", "BadMessage", 400, "upload-kind"),
    ("concat", "", "BadMessage", 400, "upload-kind"),
    ("empty", "", "BadMessage", 400, "upload-kind"),
    ("audio_only", "", "BadMessage", 400, "video-no-stream"),
    ("nothing_decodes", "", "BadMessage", 400, "video-unreadable"),
    ("huge", "", "FrameTooLarge", 413, "video-frame-too-large"),
    ("tiny", "", "BadMessage", 400, "video-frame-too-small"),
    ("truncated", "scale=5", "BadMessage", 400, "bad-request"),
    ("truncated", "codec=prores", "BadMessage", 400, "bad-request"),
    ("truncated", "preset=slow", "BadMessage", 400, "bad-request"),
    ("truncated", "codec=h264&crf=60", "BadMessage", 400, "video-output-unsupported"),
    ("truncated", "model=theirs", "AdmissionRefused", 503, "model-unknown"),
]


def test_what_is_not_possible_is_refused_before_the_answer_begins(port: int, tmp_path: Path) -> None:
    bad = make_bad_files(tmp_path)
    for name, query, kind, status, code in REFUSED:
        with post(port, bad[name].read_bytes(), query) as request:
            refusal = request.refusal()
        assert (refusal["kind"], refusal["status"], refusal["code"]) == (kind, status, code), (name, refusal)
        assert refusal["remedy"] and str(tmp_path) not in str(refusal)


@pytest.mark.parametrize(
    ("limits", "kind", "code"),
    [
        ({"max_pixels": 160 * 119}, "mkv", "video-frame-too-large"),
        ({"max_seconds": 1.5}, "faststart", "upload-seconds"),
        ({"max_frames": 59}, "faststart", "upload-frames"),
        ({"max_frames": 10}, "ts", "upload-frames"),
        ({"max_streams": 1}, "ts", "upload-streams"),
        ({"max_bytes": 50_000}, "mkv", "upload-bytes"),
        ({"spool_bytes": 50_000}, "moov_last", "upload-spool-full"),
    ],
)
def test_limits(folder: Path, limits: dict[str, Any], kind: str, code: str) -> None:
    content = make_upload(folder, kind).read_bytes()
    service = Service(UploadSettings(preset="ultrafast", threads=1, **limits))
    with served(service.app()) as port, post(port, content) as request:
        refusal = request.refusal()
    assert (refusal["kind"], refusal["status"], refusal["code"]) == ("FrameTooLarge", 413, code)
    assert refusal["limit"] or code.startswith("video-")


def test_a_limit_that_is_met_on_the_way_ends_the_body_early(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = make_upload(folder, "ts", rounds=4).read_bytes()
    service = Service(UploadSettings(preset="ultrafast", threads=1, max_frames=200))
    incomplete = pytest.raises(http.client.IncompleteRead)
    with served(service.app()) as port, post(port, content) as request, incomplete as caught:
        request.rest()
    assert b"moof" in caught.value.partial and END_BOX.bytes not in caught.value.partial
    assert "ends early: upload-frames" in caplog.text


def test_a_model_that_fails_before_the_first_fragment_is_a_refusal(service: Service, port: int, folder: Path) -> None:
    service.fails_at = 3
    with post(port, make_upload(folder, "mkv").read_bytes()) as request:
        refusal = request.refusal()
    assert (refusal["status"], refusal["code"]) == (503, "model-gone")


def test_a_model_that_fails_later_ends_the_body_early(
    service: Service, port: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    service.fails_at = 200
    with post(port, make_upload(folder, "mkv", rounds=4).read_bytes()) as request:
        assert request.answer.status == 200
        with pytest.raises(http.client.IncompleteRead):
            request.rest()
    assert "/v1/restore ends early: model-gone" in caplog.text


@pytest.mark.parametrize("kind", ["ts", "moov_last"])
def test_a_client_that_goes_away_leaves_nothing_behind(service: Service, port: int, folder: Path, kind: str) -> None:
    """In the middle of the upload, with the answer under way if it is streamed; the fixture looks for threads."""
    content = make_upload(folder, kind, rounds=4).read_bytes()
    with Duplex(port, "/v1/restore?scale=2") as request:
        request.send(content[: len(content) // 2])
        if kind == "ts":
            assert request.read()
    if kind == "ts":
        assert service.leases[0].closed.wait(TIMEOUT_S)
        assert service.leases[0].steps < 240
    # Its place is free again.
    for _ in range(service.settings.max_uploads + 1):
        assert told(restored(port, make_upload(folder, "mkv").read_bytes(), "scale=2")[0])["frames"] == 60


def test_an_upload_is_tidied_up_though_nobody_waits_for_it() -> None:
    """A server may cancel a request while what it used is being released."""

    async def check() -> None:
        settings = UploadSettings(max_uploads=1)
        places, step = UploadPlaces(settings.max_uploads), threading.Event()
        lease, upload = Lease(engine=None), RestoreUpload(BytePipe(1), UploadOptions(), settings)
        places.take()
        releasing = asyncio.create_task(places.give_back([ThreadCall(step.wait, "upload-run")], lease, upload))
        await asyncio.sleep(0)
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing
        with pytest.raises(AdmissionRefused):
            places.take()
        assert not lease.closed.is_set()
        step.set()
        assert await asyncio.to_thread(lease.closed.wait, TIMEOUT_S)
        await asyncio.sleep(0)
        places.take()

    asyncio.run(check())


def test_a_client_that_does_not_read_is_let_go(folder: Path) -> None:
    service = Service(UploadSettings(preset="ultrafast", threads=1, buffer_bytes=1 << 16, spool_bytes=0, idle_s=0.5))
    content = make_upload(folder, "mkv", rounds=4).read_bytes()
    with served(service.app()) as port, Duplex(port, "/v1/restore?crf=0&codec=h264") as request:
        request.send(content[:-1])
        assert request.answer.status == 200
        request.end()
        wait_for(lambda: bool(service.leases) and service.leases[0].closed.wait(TIMEOUT_S))


def test_a_client_that_falls_silent_is_told(folder: Path) -> None:
    service = Service(UploadSettings(preset="ultrafast", threads=1, idle_s=0.5))
    content = make_upload(folder, "mkv").read_bytes()
    with served(service.app()) as port, Duplex(port, "/v1/restore") as request:
        request.send(content[:20_000])
        refusal = request.refusal()
    assert (refusal["kind"], refusal["status"]) == ("TimedOut", 408)


def test_more_uploads_than_there_are_places_are_told_when_to_come_again(folder: Path) -> None:
    service = Service(UploadSettings(preset="ultrafast", threads=1, max_uploads=1))
    content = make_upload(folder, "ts", rounds=4).read_bytes()
    with served(service.app()) as port, Duplex(port, "/v1/restore?scale=2") as first:
        first.send(content[: len(content) // 2])
        assert first.answer.status == 200
        with post(port, content) as second:
            refusal = second.refusal()
            assert (refusal["status"], refusal["code"]) == (503, "uploads-full")
            assert int(second.answer.headers["Retry-After"]) > 0
        first.send(content[len(content) // 2 :])
        first.end()
        assert told(first.rest())["frames"] == 240


def test_the_description_for_programs_is_complete(port: int) -> None:
    with Duplex(port, "/openapi.json", method="GET", chunked=False) as request:
        operation = json.loads(request.rest())["paths"]["/v1/restore"]["post"]
    names = {one["name"] for one in operation["parameters"]}
    assert names == {"scale", "model", "steps", "seed", "codec", "crf", "cuts"}
    assert "video/mp4" in operation["responses"]["200"]["content"] and operation["requestBody"]["required"]
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}


def wait_for(condition: Callable[[], bool]) -> None:
    async def look() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.01)

    asyncio.run(look())
