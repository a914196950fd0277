"""Attacks on a running service over real sockets: each is refused in words, and the service goes on with others.

After every test the same is checked: an honest tenant's stream is restored, no answer and no log holds a credential or
a traceback, and no stream is left over.

What attacks the fetching of URLs is tested where URLs are fetched:

| attack                                              | test                                                       |
|-----------------------------------------------------|------------------------------------------------------------|
| a name that is rebound between check and connection | infra/test_downloads.py: ..._no_name_is_asked_twice        |
| a name that is rebound between two redirections     | infra/test_downloads.py: test_rebinding_between_two_...    |
| a redirection inside, to another scheme, for ever   | infra/test_downloads.py: test_redirections_...             |
| private, link-local, IPv6-mapped addresses          | infra/test_addresses.py: test_special_addresses_...        |
| addresses in unusual spellings                      | infra/test_addresses.py: test_unusual_spellings_...        |
| one bad address among good ones                     | infra/test_addresses.py: test_one_bad_address_...          |
| schemes, user names and ports in URLs               | infra/test_network.py                                      |
| a playlist that leads inside, or redirects there    | infra/test_hls.py: test_nothing_in_a_playlist_leads_...    |
| a playlist as a segment, opened by libav            | infra/test_hls.py: test_a_playlist_later_in_the_stream_... |
| endless, dripping and compressed answers            | infra/test_downloads.py                                    |
| forged tokens: none, confused keys, jku             | infra/test_tokens.py                                       |
| listening beyond loopback without credentials       | infra/test_listening.py                                    |
| the API's description as a map for fuzzing          | actors/test_live_openapi.py                                |
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import os
import resource
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import av
import jwt
import numpy as np
import pytest
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from actors import refusing_route
from actors.live_server import LiveConfig
from infra.api_keys import changing, make_key
from infra.client import LiveStream
from infra.live_settings import LiveSettings
from infra.protocol import HELLO_TIMEOUT_S, DropReason, FrameHeader, Hello, Newest, dump
from infra.refusals import AdmissionRefused, StateLost, Unauthorized
from infra.tenants import Scope
from tests.coded_frames import parameter_set
from tests.http_server import Duplex
from tests.identity_provider import AUDIENCE, ISSUER, claims, public_pem, rsa_key, token
from tests.live_service import LiveService, live_service
from tests.object_stores import free_ports

RAW: dict[str, Any] = {"width": 32, "height": 24, "codec_in": "raw", "codec_out": "raw"}
PICTURE = np.random.default_rng(5).integers(0, 256, (24, 32, 3), np.uint8)
FRAME = FrameHeader(0).pack(PICTURE.tobytes())
MB = 1 << 20
TENANTS: dict[str, dict[str, int]] = {
    "greedy": {"sessions": 1, "jobs": 1},
    "metered": {"pixels_per_second": 5 * 32 * 24},
    "thin": {"bytes_per_second": 5 * len(FRAME)},
    "small": {"upload_bytes": 100_000},
    "banned": {"jobs": 0},
}
NAMES = ("honest", "alice", "bob", "jobber", *TENANTS)


class Told:
    """Everything that the service has said, so that nothing in it can be overlooked; and what it must not say."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.secrets: list[str] = []


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(keys_file: Path, told: Told) -> dict[str, str]:
    """The tenants' keys; `expired` and `reader` are alice's."""
    made: dict[str, str] = {}
    every = (Scope.LIVE, Scope.RESTORE, Scope.JOBS)
    with changing(keys_file) as records:
        for name in NAMES:
            made[name], record = make_key(name, every)
            records.append(record)
        past = datetime.now(UTC) - timedelta(seconds=5)
        made["expired"], record = make_key("alice", every, expires_at=past)
        records.append(record)
        made["reader"], record = make_key("alice", [Scope.RESTORE])
        records.append(record)
    told.secrets += [key.split("_", 2)[2] for key in made.values()]
    return made


def settings_of(keys_file: Path | None, **more: Any) -> LiveSettings:
    return LiveSettings(
        keys_file=keys_file, failures_per_minute=0, sessions=16, tenants=TENANTS,
        upload_idle_s=0.5, job_sources=("s3://tapes/{tenant}/",), job_destinations=("s3://out/{tenant}/",), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service(keys_file: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    pem = tmp_path_factory.mktemp("jwt") / "public.pem"
    pem.write_bytes(public_pem(rsa_key("provider")))
    settings = settings_of(keys_file, jwt_key_file=pem, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_leeway_s=0)
    config = LiveConfig.from_settings(settings).model_copy(update={"unread_timeout_s": 3.0, "hello_timeout_s": 1.0})
    (nobody,) = free_ports(1)
    with live_service(config, settings=settings, job_server=f"http://127.0.0.1:{nobody}") as running:
        yield running


@pytest.fixture(autouse=True)
def afterwards(
    service: LiveService, keys: dict[str, str], told: Told, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    caplog.set_level(logging.DEBUG, "actors")
    caplog.set_level(logging.DEBUG, "infra")
    caplog.set_level(logging.INFO, "uvicorn")
    yield
    asyncio.run(restored(service, keys["honest"]))
    until(lambda: not service.server.connections and not service.server.stepper.seats)
    said = "\n".join([*told.words, *(record.getMessage() for record in caplog.records)])
    assert [secret for secret in told.secrets if secret in said] == []
    assert "Traceback" not in said and 'File "' not in said
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    told.words.clear()


async def restored(service: LiveService, key: str | None = None, count: int = 2) -> None:
    """An honest client's whole life."""
    async with LiveStream(service.url, hello(key)) as stream:
        for _ in range(count):
            await stream.send_picture(PICTURE)
            async with asyncio.timeout(20):
                assert ((await anext(stream)).picture()[::4, ::4] == PICTURE).all()
        await stream.close()
        async for _ in stream:
            pass


def until(condition: Any, limit_s: float = 15.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def hello(key: str | None = None, **more: Any) -> Hello:
    credentials = {} if key is None else {"credentials": {"api_key": key}}
    return Hello(**(RAW | credentials | more))


async def talk(
    service: LiveService, told: Told, *messages: str | bytes, path: str = "/v1/streams", **options: Any
) -> tuple[dict[str, Any], int]:
    """Send messages whatever comes back; returns the last words of the service and its close code."""
    last: dict[str, Any] = {}
    async with asyncio.timeout(20), connect(service.url + path, max_size=None, **options) as socket_:
        try:
            for message in messages:
                await socket_.send(message)
            while True:
                answer = await socket_.recv()
                if isinstance(answer, str):
                    told.words.append(answer if '"welcome"' not in answer else "")
                    last = json.loads(answer)
        except ConnectionClosed as closed:
            while not last.get("kind"):  # what came before the close, while this side was still sending
                try:
                    answer = await socket_.recv()
                except ConnectionClosed:
                    break
                last = json.loads(answer) if isinstance(answer, str) else last
            assert closed.rcvd is not None
            told.words.append(closed.rcvd.reason)
            return last, closed.rcvd.code


def said(service: LiveService, told: Told, *messages: str | bytes, **options: Any) -> tuple[str, int]:
    refusal, closed = asyncio.run(talk(service, told, *messages, **options))
    assert refusal.get("type") == "refused" and refusal["remedy"], refusal
    return refusal["code"], closed


def ask(
    service: LiveService,
    told: Told,
    method: str,
    path: str,
    body: Any = None,
    key: str | None = None,
    **headers: str,
) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    """One request; underscores in the names of headers become hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["Authorization"] = f"Bearer {key}"
    content = json.dumps(body) if isinstance(body, dict) else body
    if isinstance(body, dict):
        sent["Content-Type"] = "application/json"
    connection.request(method, path, content, sent)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    told.words.append(f"{answer.headers} {text}")
    is_json = answer.headers.get("Content-Type", "").startswith("application/json")
    return answer.status, json.loads(text) if is_json and text else {}, answer.headers


@contextlib.contextmanager
def peak_below(size_bytes: int) -> Iterator[None]:
    """The process's peak of memory grows by less; client and server are one process here."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < size_bytes


# -- credentials ------------------------------------------------------------------------------------------------------


def test_a_hello_without_credentials(service: LiveService, told: Told) -> None:
    assert said(service, told, dump(hello())) == ("unauthorized", 4401)


@pytest.mark.parametrize("kind", ["unknown", "changed", "expired", "not-ascii", "empty", "header-twice"])
def test_a_wrong_key(service: LiveService, told: Told, keys: dict[str, str], kind: str) -> None:
    other = make_key("alice")[0]
    wrong = {
        "unknown": other, "changed": keys["alice"][:-1] + ("x" if keys["alice"][-1] != "x" else "y"),
        "expired": keys["expired"], "not-ascii": "upr_" + "é" * 60, "empty": "", "header-twice": None,
    }[kind]  # fmt: skip
    told.secrets.append(other.split("_", 2)[2])
    headers = {"additional_headers": [("X-Api-Key", keys["alice"])] * 2} if wrong is None else {}
    assert said(service, told, dump(hello(wrong)), **headers) == ("unauthorized", 4401)


@pytest.mark.parametrize("kind", ["no-signature", "other-key", "expired", "other-audience", "secret-is-the-public-key"])
def test_a_wrong_token(service: LiveService, told: Told, kind: str) -> None:
    import base64
    import hashlib
    import hmac

    def forged() -> str:
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in
                 ({"alg": "HS256", "typ": "JWT"}, claims())]  # fmt: skip
        mac = hmac.new(public_pem(rsa_key("provider")), b".".join(parts), hashlib.sha256).digest()
        return b".".join([*parts, base64.urlsafe_b64encode(mac).rstrip(b"=")]).decode()

    made = {
        "no-signature": lambda: jwt.encode(claims(), None, algorithm="none"),
        "other-key": lambda: token(rsa_key("thief")),
        "expired": lambda: token(rsa_key("provider"), exp=int(time.time()) - 5),
        "other-audience": lambda: token(rsa_key("provider"), aud="another service"),
        "secret-is-the-public-key": forged,
    }[kind]()
    told.secrets.append(made)
    assert said(service, told, dump(Hello(**RAW, credentials={"token": made}))) == ("unauthorized", 4401)


def test_a_key_that_is_revoked_while_its_stream_runs(
    service: LiveService, told: Told, keys_file: Path, keys: dict[str, str]
) -> None:
    key, record = make_key("alice")
    with changing(keys_file) as records:
        records.append(record)

    async def run() -> None:
        async with LiveStream(service.url, hello(key)) as stream:
            await stream.send_picture(PICTURE)
            await anext(stream)
            with changing(keys_file) as records:
                records[-1] = record.model_copy(update={"disabled": True})
            with pytest.raises(Unauthorized) as caught:
                async with asyncio.timeout(10):
                    await anext(stream)
            assert caught.value.code in ("credentials-ended", "unauthorized")

    asyncio.run(run())
    assert said(service, told, dump(hello(key))) == ("unauthorized", 4401)


def test_a_token_that_expires_while_its_stream_runs(service: LiveService, told: Told) -> None:
    brief = token(rsa_key("provider"), exp=int(time.time()) + 2)
    text = dump(Hello(**RAW, credentials={"token": brief}))
    assert said(service, told, text, FRAME) == ("credentials-ended", 4401)


def test_credentials_of_another_scope(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    assert said(service, told, dump(hello(keys["reader"]))) == ("forbidden", 4403)
    for method, path, name in (
        ("GET", "/metrics", "honest"),
        ("POST", "/v1/jobs", "reader"),
        ("GET", "/v1/jobs", "reader"),
    ):
        body = {"source": "s3://tapes/alice/a", "destination": "s3://out/alice/a"} if method == "POST" else None
        assert ask(service, told, method, path, body, keys[name])[0] == 403, path


def test_requests_without_credentials(service: LiveService, told: Told) -> None:
    for method, path in (
        ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/restore"), ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/upriver-000000000000"), ("DELETE", "/v1/jobs/upriver-000000000000"),
    ):  # fmt: skip
        status, refusal, _ = ask(service, told, method, path)
        assert (status, refusal["code"]) == (401, "unauthorized"), path


def test_credentials_in_the_address_do_not_count_and_are_not_logged(
    service: LiveService, told: Told, keys: dict[str, str]
) -> None:
    for name in ("api_key", "token", "access_token", "key"):
        path = f"/v1/streams?{name}={keys['alice']}"
        assert said(service, told, dump(hello()), path=path) == ("unauthorized", 4401)
        assert ask(service, told, "GET", f"/v1/models?{name}={keys['alice']}")[0] == 401
        status, _, _ = ask(service, told, "POST", f"/v1/restore?{name}={keys['alice']}", b"x")
        assert status in (400, 401)


def test_credentials_that_come_late(service: LiveService, told: Told) -> None:
    assert LiveConfig.from_settings(LiveSettings()).hello_timeout_s == HELLO_TIMEOUT_S == 5.0
    assert said(service, told) == ("hello-late", 4408)


def test_guessing_is_slowed_down_whatever_address_the_guesser_claims(told: Told, keys_file: Path) -> None:
    settings = LiveSettings(keys_file=keys_file, failures_per_minute=1)
    with live_service(settings=settings) as service:
        codes = [ask(service, told, "GET", "/v1/models", X_Forwarded_For=f"10.0.0.{n}")[0] for n in range(22)]
    assert codes == [401] * 20 + [429] * 2


# -- other tenants, and limits ----------------------------------------------------------------------------------------


def test_another_tenants_stream_is_not_resumed(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    async def run() -> None:
        async with LiveStream(service.url, hello(keys["alice"])) as stream:
            await stream.send_picture(PICTURE)
            await anext(stream)
            welcome = stream.welcome
            stolen = {"session": welcome.session, "token": welcome.resume_token, "received": 0}
            told.secrets.append(welcome.resume_token)
            refusal, closed = await talk(service, told, dump(hello(keys["bob"], resume=stolen)))
            assert (refusal["kind"], closed) == (StateLost.__name__, 4410)
            for guess in ("x" * 32, "\ud83d\ude00", "\0"):
                guessed = {"session": welcome.session, "token": guess, "received": 0}
                refusal, closed = await talk(service, told, dump(hello(keys["alice"], resume=guessed)))
                assert (refusal["kind"], closed) == (StateLost.__name__, 4410)
            await stream.send_picture(PICTURE)
            assert (await anext(stream)).header.index == 1  # its owner noticed nothing

    asyncio.run(run())


def test_more_streams_than_a_tenant_may_have(service: LiveService, keys: dict[str, str]) -> None:
    async def run() -> None:
        async with LiveStream(service.url, hello(keys["greedy"])):
            with pytest.raises(AdmissionRefused, match="1 sessions"):
                async with LiveStream(service.url, hello(keys["greedy"]), give_up_s=0.1):
                    pass
            await restored(service, keys["bob"])

    asyncio.run(run())


@pytest.mark.parametrize("name", ["metered", "thin"])
def test_more_pixels_or_bytes_in_a_second_than_a_tenant_may_send(
    service: LiveService, keys: dict[str, str], name: str
) -> None:
    async def run(count: int, **more: Any) -> tuple[list[DropReason | None], float]:
        began = time.monotonic()
        async with LiveStream(service.url, hello(keys[name], **more)) as stream:
            for _ in range(count):
                await stream.send_picture(PICTURE)
            await stream.close()
            return [answer.dropped async for answer in stream], time.monotonic() - began

    dropped, took_s = asyncio.run(run(8))
    assert dropped == [None] * 8 and took_s > 0.5  # three frames more than the burst, a fifth of a second each
    dropped, _ = asyncio.run(run(8, policy=Newest()))
    assert DropReason.RATE in dropped


@pytest.mark.parametrize(("width", "height", "code"), [(8192, 16, "frame-sides"), (4096, 4096, "frame-too-large")])
def test_a_hello_of_a_size_that_is_not_served(
    service: LiveService, told: Told, keys: dict[str, str], width: int, height: int, code: str
) -> None:
    large = hello(keys["alice"], width=width, height=height, codec_in="jpeg", codec_out="jpeg")
    assert said(service, told, dump(large))[0] == code


# -- pages of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"]
)
def test_a_foreign_page(service: LiveService, told: Told, keys: dict[str, str], origin: str) -> None:
    assert said(service, told, dump(hello(keys["alice"])), origin=origin) == ("forbidden", 4403)
    for path in ("/v1/restore", "/v1/jobs"):
        body = {"source": "s3://tapes/alice/a", "destination": "s3://out/alice/a"}
        status, refusal, headers = ask(service, told, "POST", path, body, keys["alice"], Origin=origin)
        assert (status, refusal["kind"]) == (403, "Forbidden")
        assert headers["Access-Control-Allow-Origin"] is None


def test_cors_is_closed(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    asked = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    for path in ("/", "/v1/models", "/v1/restore", "/v1/jobs", "/openapi.json"):
        for method in ("OPTIONS", "GET"):
            status, _, headers = ask(service, told, method, path, None, keys["alice"], **asked)
            assert status < 500 and headers["Access-Control-Allow-Origin"] is None
            assert headers["Access-Control-Allow-Credentials"] is None


def test_a_name_that_is_pointed_here(told: Told) -> None:
    """DNS rebinding: the page is of the same origin as the service, by a name of the attacker's."""
    with live_service(settings=LiveSettings()) as service:
        for host in (
            "evil.example",
            f"evil.example:{service.port}",
            "127.0.0.1.evil.example",
            "[::1].evil.example",
            "",
        ):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("POST", "/v1/restore"),
                ("GET", "/v1/jobs"),
            ):
                assert ask(service, told, method, path, Host=host)[0] == 403, (host, path)
            with raw_websocket(service, host=host or "evil") as client:
                client.send_text(dump(hello()))
                assert client.until_closed()[0]["kind"] == "Forbidden"
        asyncio.run(restored(service))


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_giant_text(service: LiveService, told: Told, keys: dict[str, str], compression: str | None) -> None:
    with peak_below(128 * MB):
        for before in ((), (dump(hello(keys["alice"])),)):
            assert said(service, told, *before, "x" * (15 * MB), compression=compression) == ("bad-message", 4400)
        _, closed = asyncio.run(talk(service, told, "x" * (17 * MB), compression=compression))
        assert closed == 1009


def test_a_giant_frame(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    with peak_below(128 * MB):
        assert said(service, told, dump(hello(keys["alice"])), FRAME + bytes(15 * MB)) == ("frame-too-large", 1009)


@pytest.mark.parametrize("side", [8000, 50_000])
@pytest.mark.parametrize("codec", ["png", "jpeg", "webp", "h264"])
def test_a_picture_that_says_it_is_enormous(
    service: LiveService, told: Told, keys: dict[str, str], codec: Any, side: int
) -> None:
    side = min(side, 16383) if codec == "webp" else side  # WebP has no greater one
    bomb = enormous(codec, side)
    text = dump(hello(keys["alice"], codec_in=codec, codec_out="jpeg"))
    with peak_below(64 * MB):
        assert said(service, told, text, FrameHeader(0).pack(bomb)) == ("frame-too-large", 1009)


def enormous(codec: str, side: int) -> bytes:
    if codec == "h264":
        return parameter_set(side // 16 * 16, side // 16 * 16, 1, 4)
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, codec.upper(), quality=90)
    data = bytearray(file.getvalue())
    if codec == "png":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif codec == "jpeg":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    else:
        at = data.index(b"\x9d\x01\x2a")
        data[at + 3 : at + 7] = struct.pack("<HH", side, side)
    return bytes(data)


def test_a_picture_that_inflates(service: LiveService, keys: dict[str, str]) -> None:
    """60 kB of PNG, 60 MB of rows behind those of its picture: no more is inflated than the picture needs."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(60 * MB), 9)) + chunk(b"IEND", b"")

    async def run() -> None:
        async with LiveStream(service.url, hello(keys["alice"], codec_in="png")) as stream:
            for _ in range(4):
                await stream.send(bomb)
                assert (await anext(stream)).dropped in (None, DropReason.UNDECODABLE)

    with peak_below(40 * MB):
        asyncio.run(run())


def test_a_flood_beyond_what_was_granted(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    flood = [FrameHeader(n).pack(PICTURE.tobytes()) for n in range(2000)]
    with peak_below(64 * MB):
        assert said(service, told, dump(hello(keys["alice"])), *flood) == ("window-exceeded", 4429)


@pytest.mark.parametrize("text", ['{"type":"stats"}', '{"type":"size","width":32,"height":24}', '{"type":"close"}'])
def test_a_flood_of_control_messages(
    service: LiveService, keys: dict[str, str], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    with peak_below(64 * MB), raw_websocket(service, buffer_bytes=4096) as client:
        client.send_text(dump(hello(keys["metered"])))
        # Frames that must wait for their rate keep what is behind them waiting, and nothing is read.
        for number in range(7):
            client.send(2, FrameHeader(number).pack(PICTURE.tobytes()))
        with contextlib.suppress(OSError):
            for _ in range(40):
                client.send_text(text, times=1000)
        # One answer serves all questions; who does not read it is sent away.
        code = "unread-answers" if "stats" in text else "controls-exceeded"
        until(lambda: f"is refused: {code}" in caplog.text)
        until(lambda: not service.server.connections)


def test_a_client_that_reads_nothing(service: LiveService, keys: dict[str, str]) -> None:
    with peak_below(128 * MB), raw_websocket(service, buffer_bytes=4096) as client:
        client.send_text(dump(hello(keys["alice"], width=320, height=180)))
        for number in range(8):
            client.send(2, FrameHeader(number).pack(bytes(320 * 180 * 3)))
        until(lambda: bool(service.server.connections))
        until(lambda: not service.server.connections)  # though its socket is full and still open
        asyncio.run(restored(service, keys["bob"]))


@pytest.mark.parametrize("acknowledged", [1, 7, 2**64 - 1])
def test_a_client_that_lies_about_what_it_received(
    service: LiveService, told: Told, keys: dict[str, str], acknowledged: int
) -> None:
    lie = FrameHeader(1, acknowledged=acknowledged, receipt=12345).pack(PICTURE.tobytes())
    assert said(service, told, dump(hello(keys["alice"])), FRAME, lie) == ("bad-receipt", 4400)


def test_many_connections_that_say_nothing(told: Told, keys_file: Path, keys: dict[str, str]) -> None:
    settings = settings_of(keys_file)
    config = LiveConfig.from_settings(settings).model_copy(update={"most_hellos": 20, "hello_timeout_s": 1.0})

    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, hello(keys["alice"])) as stream:
            outcomes = await asyncio.gather(*(talk(service, told) for _ in range(60)))
            assert {refusal["code"] for refusal, _ in outcomes} == {"hello-late", "hellos-full"}
            await stream.send_picture(PICTURE)  # who was there before goes on
            await anext(stream)
        await restored(service, keys["honest"])

    with live_service(config, settings=settings) as service:
        asyncio.run(run(service))


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        [("X-Many", "1")] * 110,
        [(f"X-Long-{n}", "a" * 8000) for n in range(5)],
        [(f"X-{n}-" + "n" * 8000, "a") for n in range(5)],
    ],
    ids=["many", "long", "long-names"],
)
def test_header_fields(service: LiveService, told: Told, fields: list[tuple[str, str]]) -> None:
    for path in ("/healthz", "/v1/restore"):
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
        connection.putrequest("GET", path)
        for name, value in fields:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 431 and json.loads(text)["code"] == "head-too-large"
        connection.close()
    assert said(service, told, additional_headers=fields) == ("head-too-large", 1009)
    assert ask(service, told, "GET", "/healthz?" + "q" * 40_000)[0] == 431


@pytest.mark.parametrize(
    "path",
    ["/page/../live_app.py", "/page/..%2flive_app.py", "/page/%2e%2e/%2e%2e/pyproject.toml", "/page//etc/passwd",
     "/page/..\\live_app.py", "/page/page.js%00.html", "//etc/passwd", "/page/....//....//etc/passwd", "/page/"],
)  # fmt: skip
def test_paths_that_leave_the_page(service: LiveService, told: Told, path: str) -> None:
    status, refusal, _ = ask(service, told, "GET", path)
    assert (status, refusal["code"]) == (404, "not-found")


def test_a_body_without_end_before_anybody_is_known(service: LiveService, told: Told) -> None:
    head = {"Content-Type": "application/json"}
    with peak_below(32 * MB), Duplex(service.port, "/v1/jobs", headers=head) as request:
        with contextlib.suppress(OSError):
            for _ in range(100):
                request.send(b" " * MB)
        refusal = request.refusal()
        assert (refusal["status"], refusal["code"]) == (413, "body-too-large")


def test_a_body_that_never_comes(service: LiveService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusing_route, "BODY_TIMEOUT_S", 0.2)
    head = {"Content-Type": "application/json", "Content-Length": "100"}
    with Duplex(service.port, "/v1/jobs", headers=head, chunked=False) as request:
        refusal = request.refusal()
        assert (refusal["status"], refusal["code"]) == (408, "body-late")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("/etc/passwd", "job-source"), ("file:///etc/passwd", "job-place"), ("--config=x", "job-place"),
        ("-", "job-place"), ("http://169.254.169.254/latest/meta-data/", "job-place"),
        ("s3://tapes/bob/a", "job-source"),
        ("s3://tapes/jobber/../bob/a", "job-place"), ("s3://tapes/jobber-of-bob/a", "job-source"),
        ("s3://tapes/jobber/*", "job-place"), ("s3://tapes/jobber/a.csv", "job-list"),
        ("s3://tapes/jobber/a\n--debug", "job-place"), ("s3://tapes/jobber/\ud800", None),
        ("s3://tapes/jobber/\0", "job-place"),
        ("s3://tapes/jobber/--debug", "job-place"), ("s3://user:sesame@tapes/jobber/a", "job-source"),
    ],
)  # fmt: skip
def test_places_that_a_job_may_not_name(
    service: LiveService, told: Told, keys: dict[str, str], source: str, code: str | None
) -> None:
    body = {"source": source, "destination": "s3://out/jobber/a"}
    status, refusal, _ = ask(service, told, "POST", "/v1/jobs", body, keys["jobber"])
    assert status in (400, 403) and refusal["type"] == "refused" and "sesame" not in str(refusal)
    assert code is None or refusal["code"] == code
    back = {"source": "s3://tapes/jobber/a", "destination": source}
    assert ask(service, told, "POST", "/v1/jobs", back, keys["jobber"])[0] in (400, 403) or code == "job-list"


@pytest.mark.parametrize(
    "options",
    [{"model": "--debug"}, {"model": "../../x"}, {"config": "/etc/passwd"}, {"hls": "240 --debug"}, {"seed": "1;id"}],
)
def test_options_that_a_job_may_not_have(
    service: LiveService, told: Told, keys: dict[str, str], options: dict[str, Any]
) -> None:
    body = {"source": "s3://tapes/jobber/a", "destination": "s3://out/jobber/a", "options": options}
    assert ask(service, told, "POST", "/v1/jobs", body, keys["jobber"])[0] in (400, 403)


# -- uploads ----------------------------------------------------------------------------------------------------------


def upload(service: LiveService, told: Told, content: bytes, key: str, **headers: str) -> tuple[int, str]:
    with Duplex(service.port, "/v1/restore", headers={"X-Api-Key": key, **headers}) as request:
        with contextlib.suppress(OSError):
            request.send(content)
            request.end()
        refusal = request.refusal()
        told.words.append(str(refusal))
        return refusal["status"], refusal["code"]


def test_a_playlist_as_an_upload(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    for content in (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
    ):
        assert upload(service, told, content, keys["alice"])[0] == 400


def test_an_upload_of_too_many_streams(service: LiveService, told: Told, keys: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "many.mkv"
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for _ in range(40):
            output.add_stream("pcm_s16le", rate=8000)
        for _ in range(3):
            output.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(video.encode(None))
    assert upload(service, told, path.read_bytes(), keys["alice"]) == (413, "upload-streams")


def test_an_upload_without_end(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    with peak_below(64 * MB):
        # An MP4 whose index would lie behind a terabyte of pictures: it must be stored, and is not.
        film = b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\1mdat" + struct.pack(">Q", 1 << 40)
        assert upload(service, told, film + os.urandom(20 * MB), keys["small"]) == (413, "upload-bytes")
        status, refusal, _ = ask(service, told, "POST", "/v1/restore", None, keys["small"], Content_Length="999999999")
        assert (status, refusal["code"]) == (413, "upload-bytes")


def test_an_upload_that_falls_silent_or_lies_about_its_length(
    service: LiveService, told: Told, keys: dict[str, str]
) -> None:
    for declared, sent in (("100000", b"\x47" + bytes(187)), ("4", b"\x47" + bytes(187))):
        head = {"X-Api-Key": keys["alice"], "Content-Length": declared}
        with Duplex(service.port, "/v1/restore", headers=head, chunked=False) as request:
            request.send(sent)  # fewer bytes than declared, then none; or more, which are no part of the request
            assert request.answer.status in (400, 408)


def test_one_tenant_does_not_take_all_places_of_uploads(service: LiveService, told: Told, keys: dict[str, str]) -> None:
    with Duplex(service.port, "/v1/restore", headers={"X-Api-Key": keys["greedy"]}) as first:
        first.send(b"\x47" + bytes(187))
        until(lambda: "greedy" in service.server._gate.accounts.held())  # type: ignore[attr-defined]
        assert upload(service, told, b"x", keys["greedy"])[0] == 503
        assert upload(service, told, b"x", keys["bob"])[0] == 400  # looked at
    assert upload(service, told, b"x", keys["banned"])[0] == 503


# -- a client that keeps to no rules ----------------------------------------------------------------------------------


class RawWebSocket:
    """A WebSocket without a library, that reads only when it is told to."""

    def __init__(self, service: LiveService, host: str, buffer_bytes: int | None) -> None:
        self.socket = socket.socket()
        if buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", service.port))
        self.socket.sendall(
            f"GET /v1/streams HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        self._input = self.socket.makefile("rb", buffering=0)
        while self._line() != b"\r\n":
            pass

    def _line(self) -> bytes:
        return self._input.readline()

    def send(self, kind: int, content: bytes, *, times: int = 1) -> None:
        """One unfragmented frame (RFC 6455, section 5.2), masked with zeros."""
        size = len(content)
        if size < 126:
            length = bytes([0x80 | size])
        else:
            length = b"\xfe" + struct.pack(">H", size) if size < 65536 else b"\xff" + struct.pack(">Q", size)
        self.socket.sendall((bytes([0x80 | kind]) + length + bytes(4) + content) * times)

    def send_text(self, text: str, *, times: int = 1) -> None:
        self.send(1, text.encode(), times=times)

    def until_closed(self) -> tuple[dict[str, Any], int]:
        """The last text of the service, and its close code."""
        last: dict[str, Any] = {}
        while True:
            kind, size = self._exactly(2)
            size = int.from_bytes(self._exactly({126: 2, 127: 8}[size])) if size > 125 else size
            content = self._exactly(size)
            if kind & 15 == 8:
                return last, int.from_bytes(content[:2])
            last = json.loads(content) if kind & 15 == 1 else last

    def _exactly(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            piece = self._input.read(size - len(content))
            assert piece
            content += piece
        return content


@contextlib.contextmanager
def raw_websocket(
    service: LiveService, *, host: str = "127.0.0.1", buffer_bytes: int | None = None
) -> Iterator[RawWebSocket]:
    client = RawWebSocket(service, host, buffer_bytes)
    try:
        yield client
    finally:
        client._input.close()
        client.socket.close()
