"""The predictor, asked by clients that are not ours: Triton's over both transports, KServe's over both transports.

Everything runs against an engine in the predictor's process, and against a live service that the predictor fronts.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tritonclient.utils import InferenceServerException

from actors.replay import LogEntry, replay
from infra.live_settings import LiveSettings
from infra.tenants import TenantLimits
from pipeline.engine import open_engine
from tests.live_service import live_service
from tests.predictor_process import (
    ROOT,
    STAND_IN,
    Keys,
    Predictor,
    TritonClient,
    enlarged,
    picture,
    predictor,
    restored,
)
from tests.web_server import WebServer

LIMITS = {
    "UPRIVER_PREDICTOR_SEQUENCES": "256",
    "UPRIVER_PREDICTOR_MAX_FRAMES": "16",
    "UPRIVER_PREDICTOR_MAX_REQUEST_BYTES": "1000000",
    "UPRIVER_PREDICTOR_MAX_RESULT_BYTES": "8000000",
    "UPRIVER_PREDICTOR_SEQUENCE_QUEUE": "4",
    "UPRIVER_PREDICTOR_DRAIN_S": "0.1",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Both kinds ask for keys: the engine's by itself, the service behind the other."""
    return Keys.make(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def films() -> Iterator[WebServer]:
    """Where videos can be fetched from."""
    with WebServer() as server:
        server.pages["/walk.mp4"] = (ROOT / "tests/data/walk_lr.mp4").read_bytes()
        server.pages["/page.html"] = b"<html>" * 1000
        yield server


@pytest.fixture(scope="module", params=["engine", pytest.param("service", marks=pytest.mark.slow)])
def running(request: pytest.FixtureRequest, keys: Keys, films: WebServer) -> Iterator[Predictor]:
    """A predictor with an engine of its own, and one in front of a service."""
    reach = {"schemes": ["http"], "networks": ["127.0.0.0/8"], "ports": [films.port]}
    settings = LIMITS | {"UPRIVER_PREDICTOR_FETCH": json.dumps(reach)}
    if request.param == "engine":
        settings["UPRIVER_PREDICTOR_LOADABLE"] = "second=stand-in:1,absent=/nowhere/at/all"
        with predictor("--model", STAND_IN, "--model", "tiny", "--keys", keys.file, settings=settings) as own:
            yield own
    else:
        live = LiveSettings(sessions=512, keys_file=keys.file, limits=TenantLimits(sessions=512))
        with (
            live_service(None, STAND_IN, "tiny", settings=live) as service,
            predictor("--service", service.url, "--model", STAND_IN, "--model", "tiny", settings=settings) as gateway,
        ):
            yield gateway


@pytest.fixture(params=["http", "grpc"])
def client(running: Predictor, keys: Keys, request: pytest.FixtureRequest) -> Iterator[TritonClient]:
    """Triton's client of it, over each transport."""
    made = TritonClient(running, request.param, {"x-api-key": keys.live})
    yield made
    made.close()


def status(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def refused(client: TritonClient, by_http: int, by_grpc: str, words: str, call: Any) -> None:
    """The call is refused with this status, or code, and these words."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert status(caught.value) == (str(by_http) if client.transport == "http" else by_grpc), caught.value
    assert words in str(caught.value.message())


def png(rgb: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "png")
    return file.getvalue()


def opened(file: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(file)))


def offline(frames: list[np.ndarray[Any, Any]], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """What the engine makes of a sequence of frames, without anything around it."""
    torch.set_num_threads(1)
    pipe = open_engine("tiny", torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=1 << 20)
    log = [LogEntry(number, number, 4, number == 0) for number in range(len(frames))]
    return list(replay(pipe, log, lambda number: frames[number], seed=seed))


def equivalent(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """As the design says it: 99.9 % of values within one level."""
    return one.shape == other.shape and float((np.abs(one.astype(int) - other.astype(int)) <= 1).mean()) >= 0.999


def test_it_tells_what_it_is(client: TritonClient) -> None:
    asked, told = client.client, {"headers": client.headers}
    assert asked.is_server_live() and asked.is_server_ready() and asked.is_model_ready(STAND_IN)
    if client.transport == "http":
        about, server = asked.get_model_metadata(STAND_IN, **told), asked.get_server_metadata()
        config = asked.get_model_config(STAND_IN, **told)
        index = asked.get_model_repository_index(**told)
    else:
        told["as_json"] = True
        about, server = asked.get_model_metadata(STAND_IN, **told), asked.get_server_metadata(as_json=True)
        config = asked.get_model_config(STAND_IN, **told)["config"]
        index = asked.get_model_repository_index(**told)["models"]
    assert server["name"] == "upriver" and {"sequence", "binary_tensor_data", "statistics"} <= set(server["extensions"])
    assert about["versions"] == ["1"]
    assert [(each["name"], each["datatype"]) for each in about["inputs"]] == [
        ("frame", "UINT8"),
        ("video_uri", "BYTES"),
    ]
    assert [str(side) for side in about["outputs"][0]["shape"]] == ["-1", "-1", "-1", "3"]
    assert config["name"] == STAND_IN and config["input"][0]["data_type"] == "TYPE_UINT8"
    states = {each["name"]: each["state"] for each in index}
    assert states.pop(STAND_IN) == states.pop("tiny") == "READY" and set(states.values()) <= {"UNAVAILABLE"}


def test_one_frame_or_some(client: TritonClient) -> None:
    one = picture(1)
    answer = client.infer(one, request_id="abc")
    assert (restored(answer) == enlarged(one)).all()
    assert [answer.as_numpy(name).tolist() for name in ("index", "level", "reset")] == [[0], [4], [True]]
    told = answer.get_response()
    assert (told["id"] if client.transport == "http" else told.id) == "abc"

    some = picture(2, count=5)
    answer = client.infer(some)
    assert (restored(answer) == enlarged(some)).all()
    assert answer.as_numpy("index").tolist() == [0, 1, 2, 3, 4]
    assert client.infer(some[:1]).as_numpy("frame").shape == (1, 96, 128, 3)


def test_files_in_and_out(client: TritonClient) -> None:
    frames = [picture(number) for number in range(3)]
    files = restored(client.infer([png(frame) for frame in frames]))
    assert files.shape == (3,)
    for frame, file in zip(frames, files, strict=True):
        assert (opened(file) == enlarged(frame)).all()
    (jpeg,) = restored(client.infer([png(frames[0])], parameters={"output_codec": "jpeg", "quality": 95}))
    assert jpeg[:2] == b"\xff\xd8" and opened(jpeg).shape == (96, 128, 3)
    (again,) = restored(client.infer([jpeg]))
    assert again[:2] == b"\xff\xd8" and opened(again).shape == (384, 512, 3)
    raw = restored(client.infer([png(frames[1])], parameters={"output_codec": "raw", "scale": 2}))
    assert raw.shape == (1, 48, 64, 3)


def test_only_the_outputs_that_are_wanted(client: TritonClient) -> None:
    wanted = [client.library.InferRequestedOutput("level")]
    answer = client.infer(picture(1), outputs=wanted)
    assert answer.as_numpy("level").tolist() == [4] and answer.as_numpy("frame") is None
    unknown = [client.library.InferRequestedOutput("sharpness")]
    refused(client, 400, "INVALID_ARGUMENT", "sharpness", lambda: client.infer(picture(1), outputs=unknown))


def test_a_sequence_restores_each_frame_from_those_before_it(client: TritonClient) -> None:
    frames = [picture(number, 16, 16) for number in range(4)]
    found = []
    for number, frame in enumerate(frames):
        place = {"sequence_id": 77, "sequence_start": number == 0, "sequence_end": number == 3}
        answer = client.infer(frame, "tiny", parameters={"seed": 5, "scene_cuts": False}, **place)
        found.append(restored(answer))
        assert answer.as_numpy("index").tolist() == [number]
        assert answer.as_numpy("reset").tolist() == [number == 0]
    for one, other in zip(found, offline(frames, seed=5), strict=True):
        assert equivalent(one, other)
    assert not equivalent(found[3], offline(frames[3:], seed=5)[0])  # the memory has a part in it
    clip = restored(client.infer(np.stack(frames), "tiny", parameters={"seed": 5, "scene_cuts": False}))
    assert all(equivalent(one, other) for one, other in zip(clip, found, strict=True))


def test_sequences_run_side_by_side_and_do_not_mix(running: Predictor, keys: Keys) -> None:
    """200 at a time, frame by frame in turn, of two tenants who use the same names, which are numbers and texts."""
    tenants = [TritonClient(running, "grpc", {"x-api-key": key}) for key in (keys.live, keys.other)]

    def one_turn(number: int, turn: int) -> None:
        frame = picture(1000 * turn + number, 16, 16)
        name = number // 2 + 1 if number % 4 < 2 else f"camera {number // 2}"
        place = {"sequence_id": name, "sequence_start": turn == 0, "sequence_end": turn == 2}
        answer = tenants[number % 2].infer(frame, **place)
        assert (restored(answer) == enlarged(frame)).all()
        assert answer.as_numpy("index").tolist() == [turn]

    def open_sequences() -> str:
        page = httpx.get(f"{running.http}/metrics", headers={"X-Api-Key": keys.admin}).text
        (line,) = [line for line in page.splitlines() if line.startswith("upriver_predictor_sequences ")]
        return line.split()[1]

    with ThreadPoolExecutor(16) as pool:
        for turn in range(3):
            list(pool.map(one_turn, range(200), [turn] * 200))
            assert open_sequences() == ("200.0" if turn < 2 else "0.0")
    for each in tenants:
        each.close()


@pytest.mark.slow
def test_200_sequences_of_a_model_with_memory_equal_their_offline_runs(running: Predictor, keys: Keys) -> None:
    client = TritonClient(running, "grpc", {"x-api-key": keys.live})

    def frame(number: int, turn: int) -> np.ndarray[Any, Any]:
        return picture(1000 * turn + number, 16, 16)

    def one_turn(number: int, turn: int) -> np.ndarray[Any, Any]:
        place = {"sequence_id": number + 1, "sequence_start": turn == 0, "sequence_end": turn == 2}
        parameters = {"seed": number, "scene_cuts": False}
        return restored(client.infer(frame(number, turn), "tiny", parameters=parameters, **place))

    with ThreadPoolExecutor(16) as pool:
        found = [list(pool.map(one_turn, range(200), [turn] * 200)) for turn in range(3)]
    for number in range(200):
        expected = offline([frame(number, turn) for turn in range(3)], seed=number)
        assert all(equivalent(found[turn][number], expected[turn]) for turn in range(3)), number
    client.close()


def test_requests_of_one_sequence_take_turns(running: Predictor, client: TritonClient) -> None:
    """Several under way at once run in the order in which they arrive; more than wait in its queue are refused."""
    client.infer(picture(0), sequence_id=5, sequence_start=True)
    again: list[str] = []
    taken: list[tuple[int, int]] = []

    def send(number: int) -> None:
        own = TritonClient(running, client.transport, client.headers)  # over REST, a client is for one thread
        try:
            answer = own.infer(picture(number, count=4), sequence_id=5)
        except InferenceServerException as error:
            again.append(status(error))
        else:
            assert (restored(answer) == enlarged(picture(number, count=4))).all()
            taken.append((int(answer.as_numpy("index")[0]), number))
        finally:
            own.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send, range(1, 17)))
    assert len(taken) + len(again) == 16 and len(taken) >= 5
    assert sorted(index for index, _ in taken) == [1 + 4 * place for place in range(len(taken))]
    assert set(again) <= {"429", "RESOURCE_EXHAUSTED"}
    client.infer(picture(1), sequence_id=5, sequence_end=True)


def test_wrong_order(client: TritonClient) -> None:
    frame = picture(3)
    refused(client, 400, "FAILED_PRECONDITION", "sequence_start", lambda: client.infer(frame, sequence_id=6))
    client.infer(frame, sequence_id=6, sequence_start=True)
    client.infer(frame, sequence_id=6, parameters={"frame_index": 1})
    refused(
        client,
        409,
        "FAILED_PRECONDITION",
        "expects frame 2",
        lambda: client.infer(frame, sequence_id=6, parameters={"frame_index": 1}),
    )
    assert client.infer(frame, sequence_id=6, parameters={"frame_index": 2}).as_numpy("index").tolist() == [2]
    started_anew = client.infer(frame, sequence_id=6, sequence_start=True)
    assert started_anew.as_numpy("index").tolist() == [0] and started_anew.as_numpy("reset").tolist() == [True]
    client.infer(frame, sequence_id=6, sequence_end=True)
    refused(client, 400, "FAILED_PRECONDITION", "has ended", lambda: client.infer(frame, sequence_id=6))


def test_a_sequence_may_end_without_a_frame(client: TritonClient) -> None:
    client.infer(picture(3), sequence_id=8, sequence_start=True)
    answer = client.send(STAND_IN, [], sequence_id=8, sequence_end=True)
    assert answer.as_numpy("index").tolist() == []
    refused(client, 400, "FAILED_PRECONDITION", "has ended", lambda: client.infer(picture(3), sequence_id=8))


def test_what_does_not_fit_to_a_sequence_does_not_end_it(client: TritonClient) -> None:
    frame = picture(4)
    client.infer(frame, sequence_id=9, sequence_start=True, parameters={"seed": 1})
    for words, frames, more in (
        ("larger than the first", picture(1, 48, 64), {}),
        ("one codec", [png(frame)], {}),
        ("'seed' is 2", frame, {"parameters": {"seed": 2}}),
    ):
        code = (413 if "larger" in words else 400, "INVALID_ARGUMENT")
        refused(client, *code, words, lambda frames=frames, more=more: client.infer(frames, sequence_id=9, **more))
    assert client.infer(picture(5, 16, 16), sequence_id=9).as_numpy("index").tolist() == [1]
    assert client.infer(frame, sequence_id=9, sequence_end=True).as_numpy("index").tolist() == [2]


def test_requests_that_cannot_be(client: TritonClient) -> None:
    frame = picture(1)
    files = png(frame)
    for by_http, by_grpc, words, call in (
        (404, "NOT_FOUND", "no model 'other'", lambda: client.infer(frame, "other")),
        (404, "NOT_FOUND", "no version '2'", lambda: client.infer(frame, model_version="2")),
        (400, "INVALID_ARGUMENT", "datatype 'FP32'", lambda: client.infer(frame.astype(np.float32))),
        (400, "INVALID_ARGUMENT", "shape [24, 32]", lambda: client.infer(frame[..., 0].copy())),
        (400, "INVALID_ARGUMENT", "shape [24, 32, 4]", lambda: client.infer(np.zeros((24, 32, 4), np.uint8))),
        (413, "INVALID_ARGUMENT", "Frames of 8x8", lambda: client.infer(picture(1, 8, 8))),
        (413, "INVALID_ARGUMENT", "more than 16 frames", lambda: client.infer(picture(1, 16, 16, 17))),
        (413, "INVALID_ARGUMENT", "bytes of pixels", lambda: client.infer(picture(1, 400, 432))),
        (400, "INVALID_ARGUMENT", "no JPEG, PNG or WebP", lambda: client.infer([b"not a picture"])),
        (400, "INVALID_ARGUMENT", "no JPEG, PNG or WebP", lambda: client.infer([files[:40]])),
        (400, "INVALID_ARGUMENT", "several kinds", lambda: client.infer([files, b"\xff\xd8\xff\xd9"])),
        (400, "INVALID_ARGUMENT", "no parameter 'sed'", lambda: client.infer(frame, parameters={"sed": 1})),
        (400, "INVALID_ARGUMENT", "'scale'", lambda: client.infer(frame, parameters={"scale": 5})),
        (400, "INVALID_ARGUMENT", "no input 'other'", lambda: client.send(STAND_IN, [client.tensor(frame, "other")])),
        (400, "INVALID_ARGUMENT", "2 inputs", lambda: client.send(STAND_IN, [client.tensor(frame)] * 2)),
        (400, "INVALID_ARGUMENT", "no input", lambda: client.send(STAND_IN, [])),
    ):
        refused(client, by_http, by_grpc, words, call)
    assert (restored(client.infer(frame)) == enlarged(frame)).all()


def test_a_damaged_picture_costs_its_request_alone(client: TritonClient) -> None:
    file = png(picture(1))
    damaged = file[:-40] + bytes(28) + file[-12:]
    refused(client, 400, "INVALID_ARGUMENT", "Frame 0", lambda: client.infer([damaged]))
    client.infer([file], sequence_id=12, sequence_start=True)
    refused(client, 400, "INVALID_ARGUMENT", "Frame 0", lambda: client.infer([damaged], sequence_id=12))
    assert client.infer([file], sequence_id=12, sequence_end=True).as_numpy("index").tolist() == [1]


def test_a_request_larger_than_the_limit(client: TritonClient) -> None:
    large = picture(1, 600, 600)
    refused(
        client,
        413,
        "RESOURCE_EXHAUSTED",  # by gRPC itself, before the message is read
        "more than 1000000 bytes" if client.transport == "http" else "larger than max",
        lambda: client.infer(large),
    )


def test_time_that_is_up(client: TritonClient) -> None:
    refused(client, 504, "DEADLINE_EXCEEDED", "within 1e-06 s", lambda: client.infer(picture(1), timeout=1))
    client.infer(picture(0, 16, 16), "tiny", sequence_id=14, sequence_start=True)
    refused(
        client,
        504,
        "DEADLINE_EXCEEDED",
        "The sequence has the frames",
        lambda: client.infer(picture(1, 16, 16, 8), "tiny", sequence_id=14, timeout=20_000),
    )
    # They were restored all the same: the next frame is the ninth after the first.
    answer = client.infer(picture(2, 16, 16), "tiny", sequence_id=14, sequence_end=True)
    assert answer.as_numpy("index").tolist() == [9]
    assert client.infer(picture(1), timeout=60_000_000).as_numpy("index").tolist() == [0]


def test_credentials(running: Predictor, client: TritonClient, keys: Keys) -> None:
    frame = picture(1)
    client.infer(frame, sequence_id=30, sequence_start=True)
    for headers in (None, {"x-api-key": "upr_wrong"}, {"authorization": "Bearer nothing"}):
        stranger = TritonClient(running, client.transport, headers)
        refused(client, 401, "UNAUTHENTICATED", "not accepted", lambda s=stranger: s.infer(frame))
        code = (400, "FAILED_PRECONDITION") if running.fronts else (401, "UNAUTHENTICATED")
        refused(client, *code, "", lambda s=stranger: s.infer(frame, sequence_id=30))
        stranger.close()
    rival = TritonClient(running, client.transport, {"x-api-key": keys.other})
    assert (restored(rival.infer(frame)) == enlarged(frame)).all()
    refused(client, 400, "FAILED_PRECONDITION", "no open sequence", lambda: rival.infer(frame, sequence_id=30))
    rival.close()
    assert client.infer(frame, sequence_id=30, sequence_end=True).as_numpy("index").tolist() == [1]


def test_a_video_by_its_address(client: TritonClient, films: WebServer) -> None:
    def fetched(path: str, host: str = "127.0.0.1", **options: Any) -> Any:
        tensor = client.tensor([films.url(path, host).encode()], "video_uri")
        return client.send(STAND_IN, [tensor], **options)

    refused(client, 413, "INVALID_ARGUMENT", "more than 16 frames", lambda: fetched("/walk.mp4"))
    refused(client, 400, "INVALID_ARGUMENT", "404", lambda: fetched("/absent.mp4"))
    refused(client, 400, "INVALID_ARGUMENT", "Send", lambda: fetched("/page.html"))
    refused(client, 400, "INVALID_ARGUMENT", "not", lambda: fetched("/walk.mp4", "10.0.0.1"))
    films.pages["/short.mp4"] = short_film()
    answer = fetched("/short.mp4", parameters={"scale": 2})
    assert restored(answer).shape == (5, 96, 128, 3) and answer.as_numpy("index").tolist() == [0, 1, 2, 3, 4]
    files = restored(fetched("/short.mp4", parameters={"output_codec": "jpeg"}))
    assert [opened(file).shape for file in files] == [(192, 256, 3)] * 5


def short_film() -> bytes:
    """Five pictures of 64x48."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, 48, 64), format="rgb24")))
        film.mux(stream.encode())
    return file.getvalue()


def test_models_are_loaded_by_operators_alone(running: Predictor, client: TritonClient, keys: Keys) -> None:
    operator = TritonClient(running, client.transport, {"x-api-key": keys.admin})
    asked, mine = operator.client, {"headers": operator.headers}
    if running.fronts:
        refused(client, 403, "PERMISSION_DENIED", "no models of its own", lambda: asked.load_model("second", **mine))
        return
    refused(
        client, 403, "PERMISSION_DENIED", "admin", lambda: client.client.load_model("second", headers=client.headers)
    )
    refused(client, 403, "PERMISSION_DENIED", "cannot be loaded", lambda: asked.load_model("tiny-2", **mine))
    refused(client, 403, "PERMISSION_DENIED", "cannot be loaded", lambda: asked.unload_model("tiny", **mine))
    refused(client, 404, "NOT_FOUND", "no model 'second'", lambda: client.infer(picture(1), "second"))
    with pytest.raises(InferenceServerException) as caught:
        asked.load_model("absent", **mine)
    assert status(caught.value) in ("500", "INTERNAL")
    asked.load_model("second", **mine)
    assert asked.is_model_ready("second")
    client.infer(picture(1), "second", sequence_id=31, sequence_start=True)
    asked.unload_model("second", **mine)
    refused(client, 404, "NOT_FOUND", "no model 'second'", lambda: client.infer(picture(1), "second"))
    operator.close()


def test_statistics(client: TritonClient) -> None:
    def told() -> dict[str, Any]:
        if client.transport == "http":
            (found,) = client.client.get_inference_statistics(STAND_IN, headers=client.headers)["model_stats"]
        else:
            (found,) = client.client.get_inference_statistics(STAND_IN, headers=client.headers, as_json=True)[
                "model_stats"
            ]
        return dict(found)

    def number(value: Any) -> int:
        return int(value)

    before = told()
    client.infer(picture(1, count=3))
    with pytest.raises(InferenceServerException):
        client.infer(picture(1), parameters={"sed": 1})
    after = told()
    assert number(after["inference_count"]) - number(before["inference_count"]) == 3
    assert number(after["execution_count"]) - number(before["execution_count"]) == 1
    was, now = before["inference_stats"], after["inference_stats"]
    assert number(now["fail"]["count"]) - number(was["fail"].get("count", 0)) == 1
    assert number(now["compute_infer"]["ns"]) > number(was["compute_infer"]["ns"])
    assert number(after["last_inference"]) >= number(before["last_inference"])


def test_requests_of_a_stream_are_answered_in_their_order(running: Predictor, keys: Keys) -> None:
    """Triton's streaming call, which the `kserve` package does not have."""
    client = TritonClient(running, "grpc", {"x-api-key": keys.live})
    found: Queue[Any] = Queue()
    client.client.start_stream(lambda result, error: found.put((result, error)), headers=client.headers)
    frames = [picture(number) for number in range(5)]
    for number, frame in enumerate(frames):
        client.client.async_stream_infer(
            STAND_IN,
            [client.tensor(frame)],
            request_id=str(number),
            sequence_id=21,
            sequence_start=number == 0,
            sequence_end=number == 3,
        )
    for number, frame in enumerate(frames[:4]):
        result, error = found.get(timeout=30)
        assert error is None and result.get_response().id == str(number)
        assert (restored(result) == enlarged(frame)).all()
    _, error = found.get(timeout=30)
    assert "[sequence-ended]" in str(error)
    client.client.stop_stream()
    client.close()


def test_json_and_encodings_over_rest(running: Predictor, keys: Keys) -> None:
    client = TritonClient(running, "http", {"x-api-key": keys.live})
    frame = picture(7)
    wanted = [client.library.InferRequestedOutput("frame", binary_data=False)]
    answer = client.send(STAND_IN, [client.tensor(frame, binary_data=False)], outputs=wanted)
    assert (restored(answer) == enlarged(frame)).all() and "data" in answer.get_output("frame")
    for encoding in ("gzip", "deflate"):
        answer = client.infer(frame, request_compression_algorithm=encoding, response_compression_algorithm=encoding)
        assert (restored(answer) == enlarged(frame)).all()
    url = f"{running.http}/v2/models/{STAND_IN}/infer"
    body = {"inputs": [{"name": "frame", "datatype": "UINT8", "shape": [24, 32, 3], "data": frame.tolist()}]}
    mine = {"Authorization": f"Bearer {keys.live}"}
    told = httpx.post(url, json=body, headers=mine).json()
    assert (np.array(told["outputs"][0]["data"], np.uint8).reshape(96, 128, 3) == enlarged(frame)).all()
    assert told["model_name"] == STAND_IN and told["model_version"] == "1" and told["parameters"]["model_sha256"]
    assert httpx.post(url.replace("/infer", "/versions/1/infer"), json=body, headers=mine).status_code == 200
    for content, headers, code in (
        (json.dumps(body).encode(), {"Content-Encoding": "br"}, 415),
        (b"{", {}, 400),
        (json.dumps({"inputs": [{"name": "frame"}]}).encode(), {}, 400),
        (json.dumps(body).encode(), {"Inference-Header-Content-Length": "99999999"}, 400),
        (b"x" * 2_000_000, {}, 413),
    ):
        told = httpx.post(url, content=content, headers=mine | headers)
        assert told.status_code == code, told.text
        assert set(told.json()) == {"error"} and told.headers["upriver-code"]
    files = httpx.post(
        url, json={"inputs": [{**body["inputs"][0]}], "parameters": {"output_codec": "png"}}, headers=mine
    )
    assert files.status_code == 400 and "JSON cannot carry" in files.json()["error"]
    chunked = httpx.post(url, content=iter([b"x" * 600_000, b"x" * 600_000]), headers=mine)
    assert chunked.status_code == 413
    client.close()


KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

http, grpc_port, model, key = sys.argv[1:5]
mine = {"x-api-key": key}
frame = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
expected = frame.repeat(4, 0).repeat(4, 1)


def request(**parameters):
    tensor = InferInput("frame", [24, 32, 3], "UINT8")
    tensor.set_data_from_numpy(frame)
    return InferRequest(model, [tensor], parameters=parameters)


def check(response, index):
    outputs = {output.name: output.as_numpy() for output in response.outputs}
    assert (outputs["frame"] == expected).all()
    assert outputs["index"].tolist() == [index], outputs["index"]


async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    grpc = InferenceGRPCClient(f"127.0.0.1:{grpc_port}", timeout=60)
    assert await rest.is_server_ready(http) and await rest.is_model_ready(http, model)
    assert await grpc.is_server_ready() and await grpc.is_model_ready(model)
    check(await grpc.infer(request(), headers=tuple(mine.items())), 0)
    check(await rest.infer(http, request(binary_data_output=True), headers=mine, model_name=model), 0)
    check(await rest.infer(http, request(), headers=mine, model_name=model), 0)
    for number in range(4):
        place = {"sequence_id": "kserve", "sequence_start": number == 0, "sequence_end": number == 3}
        if number % 2:
            check(await grpc.infer(request(**place), headers=tuple(mine.items())), number)
        else:
            asked = request(binary_data_output=True, **place)
            check(await rest.infer(http, asked, headers=mine, model_name=model), number)
    try:
        await rest.infer(http, request(sequence_id="kserve"), headers=mine, model_name=model)
    except Exception as error:
        assert "400" in str(error), error
    else:
        raise AssertionError("it should have ended")
    await rest.close()
    await grpc.close()


asyncio.run(main())
print("fine")
"""


def test_kserves_own_clients(running: Predictor, keys: Keys) -> None:
    told = subprocess.run(
        [sys.executable, "-c", KSERVE, running.http, str(running.grpc_port), STAND_IN, keys.live],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.stdout.strip().endswith("fine"), told.stderr
