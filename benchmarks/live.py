"""What the live service adds to the model, through a real Ray Serve on this machine.

    python -m benchmarks.live latency --ingress haproxy     # one stream, frame by frame; a stand-in that takes no time
    python -m benchmarks.live latency --ingress python
    python -m benchmarks.live flood --ingress haproxy       # a client that ignores its credit; also with --grpc
    python -m benchmarks.live streams --model tiny          # 1, 4 and 8 streams, in batches and one by one

The client runs on the same machine and takes part of its cores. Latency is from the sending of a frame to its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from infra.client import LiveStream
from infra.live_answer import encode_picture
from infra.live_grpc import SERVICER_FUNCTION
from infra.live_wire import transport_for
from infra.protocol import FrameHeader, Hello, dump

CLIP = Path(__file__).parents[1] / "tests" / "data" / "walk_lr.mp4"
PORT = 8231
GRPC_PORT = 9231


@contextmanager
def service(models: list[str], *, largest_batch: int = 8, replicas: int = 1) -> Iterator[str]:
    """Run the application on a Ray of its own; yields its address."""
    import ray
    from ray import serve

    from actors.endpoint import ApplicationArguments, EngineConfig, application

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(
        http_options={"host": "127.0.0.1", "port": PORT},
        grpc_options={"port": GRPC_PORT, "grpc_servicer_functions": [SERVICER_FUNCTION]},
    )
    engine = EngineConfig(largest_batch=largest_batch)
    live = {"models": models, "window": 16}
    arguments = ApplicationArguments(live=live, engine=engine, replicas=replicas, num_cpus=0.5, drain_s=5.0)
    serve.run(application(arguments), name="bench", route_prefix="/")
    try:
        yield f"ws://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def pictures(width: int, height: int, count: int) -> list[np.ndarray[Any, Any]]:
    """Real frames, repeated as needed."""
    import cv2

    with av.open(str(CLIP)) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    small = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]
    return [np.ascontiguousarray(small[n % len(small)]) for n in range(count)]


async def latencies_ms(url: str, hello: Hello, frames: list[bytes]) -> tuple[list[float], dict[str, float]]:
    """Send each frame when the one before has been answered."""
    found, stations = [], []
    async with LiveStream(url, hello) as stream:
        for number, frame in enumerate(frames):
            began = time.perf_counter()
            await stream.send(frame)
            answer = await anext(stream)
            if number >= 10:
                found.append(1000 * (time.perf_counter() - began))
                header = answer.header
                stations.append((header.decode_us, header.queue_us, header.step_us, header.encode_us))
    medians = [statistics.median(column) / 1000 for column in zip(*stations, strict=True)]
    return found, dict(zip(("decode", "queue", "step", "encode"), medians, strict=True))


def measure_latency(args: argparse.Namespace) -> dict[str, Any]:
    """Latency of one stream at 320x180 -> 1280x720, with and without codecs."""
    shown: dict[str, Any] = {}
    with service(["stand-in:0"]) as url:
        for name, codec in (("jpeg", "jpeg"), ("raw", "raw")):
            hello = Hello(width=320, height=180, codec_in=codec, codec_out=codec, cuts=not args.no_cuts)
            frames = [encode_picture(one, codec, 90) for one in pictures(320, 180, args.frames)]
            runs = []
            for _ in range(args.runs):
                found, stations = asyncio.run(latencies_ms(url, hello, frames))
                percentiles = statistics.quantiles(found, n=100)
                runs.append({"p50": percentiles[49], "p90": percentiles[89], "p99": percentiles[98], **stations})
            best = min(runs, key=lambda run: run["p50"])
            shown[name] = {"best": _rounded(best), "p50_of_runs": [round(run["p50"], 1) for run in runs]}
    return shown


FLOOD = Hello(width=320, height=180, codec_in="raw", codec_out="jpeg")


def measure_flood(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the service while a client sends without regard to its credit, above what an honest one moved."""
    shown: dict[str, Any] = {}
    with service(["stand-in:40"]) as url:
        frames = [encode_picture(one, "raw", 90) for one in pictures(320, 180, 100)]
        asyncio.run(_all_at_once(url, FLOOD, frames))
        for number in range(3):
            before, peak = resident_mb(), Peak()
            with peak:
                refusal, sent = asyncio.run(_flood(f"grpc://127.0.0.1:{GRPC_PORT}" if args.grpc else url, args.seconds))
            moved = {name: round(peak.mb[name] - before.get(name, 0.0), 1) for name in peak.mb}
            shown[f"round {number + 1}"] = {"refusal": refusal, "sent_mb": round(sent / 1e6, 1), "moved_mb": moved}
    return shown


async def _flood(url: str, seconds: float) -> tuple[str, int]:
    payload = bytes(FLOOD.width * FLOOD.height * 3)
    sent = 0
    wire = await transport_for(url)(url)
    await wire.send(dump(FLOOD))
    await wire.receive()
    over = time.monotonic() + seconds

    async def listen() -> str:
        while (message := await wire.receive()) is not None:
            if isinstance(message, str) and json.loads(message)["type"] == "refused":
                return str(json.loads(message)["code"])
        return "closed without a word"

    listening = asyncio.create_task(listen())
    number = 0
    with contextlib.suppress(OSError):
        while time.monotonic() < over:  # it goes on sending after it was told
            message = FrameHeader(number).pack(payload)
            await wire.send(message)
            sent += len(message)
            number += 1
    reason = await listening
    await wire.close()
    return reason, sent


async def _all_at_once(url: str, hello: Hello, frames: list[bytes]) -> None:
    async with LiveStream(url, hello) as stream:

        async def send() -> None:
            for frame in frames:
                await stream.send(frame)
            await stream.close()

        sending = asyncio.create_task(send())
        async for _ in stream:
            pass
        await sending


class Peak:
    """The most memory that the service's processes have meanwhile, in MB by kind; a context manager."""

    def __init__(self) -> None:
        self.mb: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(0.02)
            for kind, mb in resident_mb().items():
                self.mb[kind] = max(self.mb.get(kind, 0.0), mb)


def resident_mb() -> dict[str, float]:
    """Memory of the service's processes, by kind."""
    found: dict[str, float] = {}
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or [])
        for kind, part in (("replica", "ServeReplica"), ("proxy", "ProxyActor"), ("haproxy", "haproxy -")):
            if part in title:
                found[kind] = found.get(kind, 0.0) + process.info["memory_info"].rss / 1e6
    return found


def measure_streams(args: argparse.Namespace) -> dict[str, Any]:
    """Frames per second of several streams at once, stepped together and one by one."""
    shown: dict[str, Any] = {}
    for batch in (1, 8):
        with service([args.model], largest_batch=batch) as url:
            for count in (1, 4, 8):
                began = time.perf_counter()
                asyncio.run(_streams(url, count, args.frames))
                rate = count * args.frames / (time.perf_counter() - began)
                shown[f"{count} streams, batches of {batch}"] = round(rate, 2)
    return shown


async def _streams(url: str, count: int, frames: int) -> None:
    hello = Hello(width=160, height=120)
    encoded = [encode_picture(one, "jpeg", 90) for one in pictures(160, 120, frames)]

    await asyncio.gather(*(_all_at_once(url, hello, encoded) for _ in range(count)))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def main() -> None:
    """Run what the command line says and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["latency", "flood", "streams"])
    parser.add_argument("--ingress", choices=["haproxy", "python"], default="haproxy")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--grpc", action="store_true", help="flood by gRPC instead of a WebSocket")
    parser.add_argument("--no-cuts", action="store_true", help="do not look for cuts")
    args = parser.parse_args()
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if args.ingress == "haproxy" else "0"
    measured = {"latency": measure_latency, "flood": measure_flood, "streams": measure_streams}[args.what](args)
    print(json.dumps({"ingress": args.ingress, **measured}, indent=2))


if __name__ == "__main__":
    main()
