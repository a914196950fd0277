"""`upriver predictor` as an operator meets it: where it listens, how it ends, what it says when it cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from tritonclient.utils import InferenceServerException

from infra.live_settings import LiveSettings
from tests.live_service import live_service
from tests.object_stores import free_ports
from tests.predictor_process import ROOT, STAND_IN, Predictor, TritonClient, enlarged, picture, predictor, restored


def upriver(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "predictor", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=120,
    )


def test_beyond_this_machine_it_wants_keys() -> None:
    told = upriver("--host", "0.0.0.0")
    assert told.returncode == 2
    assert "ask nobody for credentials" in told.stderr and "upriver keys create" in told.stderr
    assert "Traceback" not in told.stderr


def test_without_the_extra_it_says_how_to_get_it() -> None:
    program = "import sys; sys.modules['kserve'] = None; from jobs.cli import main; sys.exit(main(['predictor']))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert told.returncode and "Traceback" not in told.stderr
    assert "pip install 'upriver[kserve]'" in told.stderr


def ready(running: Predictor) -> int:
    return httpx.get(f"{running.http}/v2/health/ready").status_code


def test_idle_sequences_expire_and_sigterm_lets_open_ones_end(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[predictor]\nsequence_idle_s = 0.5\ndrain_s = 60\n")  # kserve must not take --config for its own
    with predictor("--model", f"film={STAND_IN}", "--config", config) as running:
        client = TritonClient(running, "grpc")
        assert ready(running) == 200 and httpx.get(f"{running.http}/healthz").status_code == 200

        client.infer(picture(1), "film", sequence_id=1, sequence_start=True)
        over = time.monotonic() + 20
        while "sequences 1.0" in httpx.get(f"{running.http}/metrics").text and time.monotonic() < over:
            time.sleep(0.05)
        with pytest.raises(InferenceServerException) as caught:
            client.infer(picture(2), "film", sequence_id=1)
        assert "FAILED_PRECONDITION" in caught.value.status() and "not used for 0.5 s" in caught.value.message()

        client.infer(picture(1), "film", sequence_id=2, sequence_start=True)
        running.process.terminate()
        over = time.monotonic() + 20
        while ready(running) == 200 and time.monotonic() < over:
            client.infer(picture(1), "film", sequence_id=2)
        with pytest.raises(InferenceServerException) as caught:
            client.infer(picture(1), "film", sequence_id=3, sequence_start=True)
        assert "UNAVAILABLE" in caught.value.status()
        assert (restored(client.infer(picture(4), "film")) == enlarged(picture(4))).all()  # single requests go on
        client.infer(picture(1), "film", sequence_id=2, sequence_end=True)
        assert running.process.wait(30) == 0
        client.close()


@pytest.mark.slow
def test_what_keeps_it_from_starting_is_said_in_a_line() -> None:
    (free,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, status, words in (
            (("--model", "/nowhere/at/all"), 7, "no model"),
            (("--model", STAND_IN, "--grpc-port", port, "--http-port", str(free)), 2, "cannot be listened on"),
            (("--model", STAND_IN, "--http-port", port, "--grpc-port", str(free)), 2, "cannot be listened on"),
            (("--service", "http://127.0.0.1:1"), 2, "a service is"),
        ):
            told = upriver(*arguments)
            assert told.returncode == status, told.stderr
            assert words in told.stderr and "Traceback" not in told.stderr
    told = upriver(UPRIVER_PREDICTOR_SEQUENCE="3")
    assert told.returncode == 2 and "Unknown setting" in told.stderr


@pytest.mark.slow
def test_a_gateway_does_not_open_a_service_that_asks_nobody() -> None:
    http_port, grpc_port = map(str, free_ports(2))
    with live_service(None, STAND_IN, settings=LiveSettings()) as service:
        where = ("--service", service.url, "--host", "0.0.0.0", "--http-port", http_port, "--grpc-port", grpc_port)
        told = upriver(*where)
    assert told.returncode == 2 and "asks nobody for credentials" in told.stderr and "Traceback" not in told.stderr


@pytest.mark.slow
def test_a_gateway_outlives_its_service() -> None:
    """It starts before the service does, is ready when that is, and says so when that has gone."""
    (port,) = free_ports(1)
    settings = {"UPRIVER_PREDICTOR_PATIENCE_S": "0.1", "UPRIVER_PREDICTOR_HAND_OVER_S": "0.1"}
    with predictor("--service", f"ws://127.0.0.1:{port}", "--model", STAND_IN, settings=settings) as running:
        client = TritonClient(running, "http")
        assert ready(running) == 503
        told = httpx.get(f"{running.http}/readyz")
        assert told.json()["error"] and told.headers["retry-after"] == "1"
        with pytest.raises(InferenceServerException) as caught:
            client.infer(picture(1))
        assert caught.value.status() == "503" and "does not answer" in caught.value.message()
        client.close()


KSERVES_SERVER = """
import sys
from actors.predictor import UpriverModel
import kserve
from actors.inference import Inference
from actors.model_loading import EngineConfig
from actors.predictor_backend import OwnEngine
from infra.live_settings import LiveSettings
from infra.predictor_settings import PredictorSettings

class Server(kserve.ModelServer):
    async def _serve(self):
        await inference.start()
        print("Serving at", flush=True)
        await super()._serve()

settings = PredictorSettings(models=("stand-in:0",))
inference = Inference(settings, OwnEngine(settings, LiveSettings(), EngineConfig(threads=1)))
Server(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2])).start([UpriverModel("stand-in:0", inference)])
"""


@pytest.mark.slow
def test_the_model_runs_in_a_plain_kserve_server_too() -> None:
    http_port, grpc_port = free_ports(2)
    process = subprocess.Popen(
        [sys.executable, "-c", KSERVES_SERVER, str(http_port), str(grpc_port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("Serving at") for line in process.stdout)
        running = Predictor(process, http_port, grpc_port, False)
        for transport in ("grpc", "http"):
            client = TritonClient(running, transport)
            over = time.monotonic() + 20
            while time.monotonic() < over:
                try:
                    if client.client.is_model_ready(STAND_IN):
                        break
                except (OSError, InferenceServerException):
                    time.sleep(0.1)
            assert (restored(client.infer(picture(1))) == enlarged(picture(1))).all()
            client.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
