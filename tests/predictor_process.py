"""`upriver predictor` as an operator starts it, and Triton's clients of it.

Triton's gRPC client and the `kserve` package cannot share a process: both register messages of the same names. So a
test process imports the first alone, and whatever needs the second runs in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from infra.api_keys import changing, make_key
from infra.tenants import Scope
from tests.object_stores import free_ports

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = "stand-in:0"


@dataclass
class Predictor:
    """A running one."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    fronts: bool  # a service, and has no engine of its own

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def end(self, seconds: float = 60.0) -> int:
        """Ask it to end, as Kubernetes does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def predictor(*arguments: str | Path, settings: dict[str, str] | None = None) -> Iterator[Predictor]:
    """Run a predictor with these arguments and these settings of the environment."""
    http_port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "jobs.cli", "predictor", *map(str, arguments)]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment | (settings or {}))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Serving at"):
                break
        else:
            raise AssertionError(f"the predictor did not start: {process.wait()}")
        yield Predictor(process, http_port, grpc_port, "--service" in arguments)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close() if process.stdout else None


class TritonClient:
    """Triton's own client, over one of its transports."""

    def __init__(self, running: Predictor, transport: str, headers: dict[str, str] | None = None) -> None:
        self.library: Any = tritonclient.http if transport == "http" else tritonclient.grpc
        port = running.http_port if transport == "http" else running.grpc_port
        more = {"network_timeout": 300.0, "connection_timeout": 300.0} if transport == "http" else {}
        self.client: Any = self.library.InferenceServerClient(f"127.0.0.1:{port}", **more)
        self.transport, self.headers = transport, headers

    def tensor(self, frames: np.ndarray[Any, Any] | Sequence[bytes], name: str = "frame", **options: Any) -> Any:
        """Return an input: pixels, or files."""
        array = frames if isinstance(frames, np.ndarray) else np.array(frames, dtype=np.object_)
        datatype = "BYTES" if array.dtype == np.object_ else tritonclient.utils.np_to_triton_dtype(array.dtype)
        tensor = self.library.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, **options)
        return tensor

    def infer(self, frames: np.ndarray[Any, Any] | Sequence[bytes], model: str = STAND_IN, **options: Any) -> Any:
        """Send one request with pixels or files; returns Triton's result."""
        return self.send(model, [self.tensor(frames)], **options)

    def send(self, model: str, tensors: list[Any], **options: Any) -> Any:
        """Send one request with these tensors."""
        headers = None if self.headers is None else dict(self.headers)  # over REST, the client writes into it
        return self.client.infer(model, tensors, headers=headers, **options)

    def close(self) -> None:
        self.client.close()


@dataclass(frozen=True)
class Keys:
    """A file of API keys, and the keys: two tenants' for streams, and an operator's for everything."""

    file: Path
    live: str
    other: str
    admin: str

    @classmethod
    def make(cls, folder: Path) -> Keys:
        """Write the file."""
        file = folder / "keys.json"
        made = []
        for tenant, scopes in (("studio", {Scope.LIVE}), ("rival", {Scope.LIVE}), ("operator", set(Scope))):
            key, record = make_key(tenant, scopes)
            with changing(file) as records:
                records.append(record)
            made.append(key)
        return cls(file, *made)


def restored(result: Any) -> np.ndarray[Any, Any]:
    """Return the pixels of a result, or its files."""
    found: np.ndarray[Any, Any] = result.as_numpy("frame")
    return found


def enlarged(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what the stand-in makes of a frame, or of several."""
    return rgb.repeat(4, axis=-3).repeat(4, axis=-2)


def picture(number: int, height: int = 24, width: int = 32, count: int | None = None) -> np.ndarray[Any, Any]:
    """Return a frame, or some, that no other number has."""
    shape = (height, width, 3) if count is None else (count, height, width, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)
