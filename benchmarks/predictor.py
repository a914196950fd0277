"""What the predictor adds to the model, asked by Triton's clients on this machine.

    python -m benchmarks.predictor overhead      # 160x120 -> 640x480, one request at a time; a stand-in takes no time
    python -m benchmarks.predictor large         # the same with frames of 1 MB, whose answers have 16 MB
    python -m benchmarks.predictor plain         # the same model in the kserve package's own server, for comparison

The client runs on the same machine and takes part of its cores. Latency is from the request to the decoded answer.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

MODEL = "stand-in:0"
SMALL, LARGE = (160, 120), (720, 486)  # width, height
WARM = 10


@contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """Run a server in a process of its own; yields its ports for REST and gRPC."""
    import socket

    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--http-port", str(ports[0]), "--grpc-port", str(ports[1])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        if not any(line.startswith("Serving at") for line in process.stdout):
            raise SystemExit("the server did not start")
        yield ports
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def clients(ports: tuple[int, int]) -> dict[str, tuple[Any, Any]]:
    """Triton's library and client by transport, when the server answers both."""
    import tritonclient.grpc
    import tritonclient.http

    found: dict[str, tuple[Any, Any]] = {
        "grpc": (tritonclient.grpc, tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports[1]}")),
        "rest": (
            tritonclient.http,
            tritonclient.http.InferenceServerClient(
                f"127.0.0.1:{ports[0]}", network_timeout=600.0, connection_timeout=600.0
            ),
        ),
    }
    over = time.monotonic() + 30
    for _, client in found.values():
        while time.monotonic() < over:
            try:
                if client.is_model_ready(MODEL):
                    break
            except Exception:  # it does not listen yet; the two libraries have errors of their own for it
                time.sleep(0.1)
    return found


def frame(size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Noise: nothing that travels can be made smaller."""
    return np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)


def latencies(ask: Callable[[int], Any], count: int) -> dict[str, float]:
    """Milliseconds of `count` requests, one after the other."""
    found = []
    for number in range(WARM + count):
        began = time.perf_counter()
        ask(number)
        found.append(1000 * (time.perf_counter() - began))
    cut = statistics.quantiles(found[WARM:], n=100, method="inclusive")
    return {"p50": round(cut[49], 2), "p90": round(cut[89], 2), "p99": round(cut[98], 2)}


def measure(ports: tuple[int, int], size: tuple[int, int], count: int, runs: int, *, jpeg: bool) -> dict[str, Any]:
    """Every way to send a frame; of several runs the one with the smallest median."""
    rgb = frame(size)
    shown: dict[str, Any] = {}
    for transport, (library, client) in clients(ports).items():
        for kind in ("pixels", "jpeg") if jpeg else ("pixels",):
            tensor = library.InferInput("frame", list(rgb.shape) if kind == "pixels" else [1], "UINT8")
            if kind == "jpeg":
                from PIL import Image

                file = io.BytesIO()
                Image.fromarray(rgb).save(file, "jpeg", quality=90)
                tensor = library.InferInput("frame", [1], "BYTES")
                tensor.set_data_from_numpy(np.array([file.getvalue()], dtype=np.object_))
            else:
                tensor.set_data_from_numpy(rgb)
            total = WARM + count

            def alone(number: int, client: Any = client, tensor: Any = tensor) -> None:
                client.infer(MODEL, [tensor]).as_numpy("frame")

            def in_sequence(number: int, client: Any = client, tensor: Any = tensor, total: int = total) -> None:
                place = {"sequence_id": 1, "sequence_start": number == 0, "sequence_end": number == total - 1}
                client.infer(MODEL, [tensor], **place).as_numpy("frame")

            for name, ask in (("alone", alone), ("sequence", in_sequence)):
                found = [latencies(ask, count) for _ in range(runs)]
                best = min(found, key=lambda run: run["p50"])
                shown[f"{transport} {kind} {name}"] = best | {"p50_of_runs": [run["p50"] for run in found]}
    return shown


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """See the module."""
    with server("jobs.cli", "predictor", "--model", MODEL) as ports:
        return measure(ports, SMALL, args.requests, args.runs, jpeg=True)


def large(args: argparse.Namespace) -> dict[str, Any]:
    """See the module."""
    with server("jobs.cli", "predictor", "--model", MODEL) as ports:
        return measure(ports, LARGE, args.requests // 10, args.runs, jpeg=False)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """See the module. Its REST binary data becomes lists of numbers."""
    with server("benchmarks.predictor", "serve-plain") as ports:
        few = measure(ports, SMALL, args.requests // 10, args.runs, jpeg=False)
        return {"160x120": few, "720x486": measure(ports, LARGE, 5, 1, jpeg=False)}


def serve_plain(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the model by `kserve.ModelServer` as it is, until it is stopped."""
    from actors.inference import Inference
    from actors.model_loading import EngineConfig
    from actors.predictor import UpriverModel, kserve
    from actors.predictor_backend import OwnEngine
    from infra.live_settings import LiveSettings
    from infra.predictor_settings import PredictorSettings

    settings = PredictorSettings(models=(MODEL,))
    inference = Inference(settings, OwnEngine(settings, LiveSettings(), EngineConfig()))

    class Server(kserve.ModelServer):
        async def _serve(self) -> None:
            await inference.start()
            print("Serving at", flush=True)
            await super()._serve()

    # Without these its gRPC takes no more than 8 MB.
    kserve.model_server.args.grpc_max_send_message_length = -1
    kserve.model_server.args.grpc_max_receive_message_length = -1
    Server(http_port=args.http_port, grpc_port=args.grpc_port).start([UpriverModel(MODEL, inference)])
    return {}


def main() -> None:
    """Run what the command line says and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "large", "plain", "serve-plain"])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--grpc-port", type=int, default=0)
    args = parser.parse_args()
    work = {"overhead": overhead, "large": large, "plain": plain, "serve-plain": serve_plain}[args.what]
    found = work(args)
    if found:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
