"""`upriver serve` as an operator starts it: keys, a stream, an upload, metrics, and its end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import httpx2 as httpx
import numpy as np
import pytest

from infra.client import LiveStream
from infra.protocol import Hello
from infra.refusals import Unauthorized
from tests.object_stores import free_ports

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "tests" / "data" / "walk_lr.mp4"


def upriver(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A file with two keys: one for streams alone, one for everything."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = []
    for scopes in (["live"], ["live", "restore", "admin"]):
        told = upriver("keys", "create", "studio", *(f"--scope={s}" for s in scopes), "--file", file, "--json")
        assert told.returncode == 0, told.stderr
        made.append(json.loads(told.stdout)["key"])
    return file, made[0], made[1]


@pytest.fixture(scope="module")
def service(keys: tuple[Path, str, str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    (port,) = free_ports(1)
    command = ["serve", "--model", "stand-in:1", "--port", str(port), "--keys", str(keys[0])]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving at"):
            break
    else:
        raise AssertionError("the service did not start")
    yield process, port
    if process.poll() is None:
        process.kill()


def test_beyond_this_machine_it_wants_keys() -> None:
    told = upriver("serve", "--host", "0.0.0.0")
    assert told.returncode == 2
    assert "ask nobody for credentials" in told.stderr and "upriver keys create" in told.stderr
    assert "Traceback" not in told.stderr


def test_streams_want_a_key(service: tuple[subprocess.Popen[str], int], keys: tuple[Path, str, str]) -> None:
    url = f"ws://127.0.0.1:{service[1]}"
    hello = Hello(width=64, height=48)

    async def run() -> None:
        with pytest.raises(Unauthorized):
            async with LiveStream(url, hello, api_key="upr_wrong"):
                pass
        async with LiveStream(url, hello, api_key=keys[1]) as stream:
            await stream.send_picture(np.zeros((48, 64, 3), np.uint8))
            assert (await anext(stream)).picture().shape == (192, 256, 3)

    asyncio.run(run())


def test_other_routes_want_a_key_that_is_good_for_them(
    service: tuple[subprocess.Popen[str], int], keys: tuple[Path, str, str]
) -> None:
    base = f"http://127.0.0.1:{service[1]}"
    _, live, full = keys
    assert httpx.get(f"{base}/healthz").status_code == 200
    for key, status in ((None, 401), (live, 403), (full, 200)):
        headers = {"X-Api-Key": key} if key else {}
        assert httpx.get(f"{base}/metrics", headers=headers).status_code == status
        told = httpx.post(f"{base}/v1/restore", content=CLIP.read_bytes(), headers=headers, timeout=60)
        assert told.status_code == status
        assert key is None or key not in (told.text if status != 200 else "")
    with av.open(io.BytesIO(told.content)) as restored:
        assert sum(1 for _ in restored.decode(video=0)) == 60


def test_it_ends_when_it_is_told(service: tuple[subprocess.Popen[str], int]) -> None:
    process, _ = service
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
