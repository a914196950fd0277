"""Whether an image works, from inside it: `docker run --rm --entrypoint python IMAGE -m infra.images.smoke`.

Each check is one line, `ok` or `FAILED`, with what was seen; the exit status is 0 if all are ok, else 1. Nothing
outside the container is needed: no network, no model but the built-in one, no volume. Everything is asked of the
commands that people and clusters run, in processes of their own, with free ports on loopback.

    --hardened   fails too where the container is not as docs/operations/images.md asks: root, or a writable file system
    --only NAME  one check; may be given again
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES: Final = ("pipeline", "actors", "jobs", "infra")
SBOM: Final = Path("/opt/upriver/sbom.cdx.json")
_WIDTH, _HEIGHT, _FRAMES = 64, 48, 2
_COMMAND_S: Final = 300.0
_START_S: Final = 180.0
_STOP_S: Final = 90.0
_POLL_S: Final = 0.2


class SmokeError(Exception):
    """A check saw something else than it should; the message is one line."""


def check_versions() -> str:
    """What runs here."""
    import av
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return (
        f"upriver {version('upriver')}, Python {sys.version.split()[0]}, torch {torch.__version__} ({cuda}), "
        f"Ray {version('ray')}, FFmpeg {av.ffmpeg_version_info}"
    )


def check_hardening() -> str:
    """Neither root nor able to write anywhere but where volumes and /tmp are."""
    if os.geteuid() == 0:
        raise SmokeError("this runs as root; run it as user 10001")
    writable = [place for place in _places() if os.access(place, os.W_OK) and not os.path.ismount(place)]
    if writable:
        raise SmokeError(f"can be written to without being a mount: {', '.join(writable[:5])}")
    with tempfile.TemporaryFile() as file:
        file.write(b"upriver")
    return f"user {os.geteuid()}, {len(_places())} folders not writable, {tempfile.gettempdir()} is"


def _places() -> list[str]:
    """Folders of the root file system that a program could want to write to."""
    own = [str(Path(sys.prefix) / part) for part in ("", "bin", "lib", "share", "etc")]
    return ["/", "/etc", "/usr", "/var", "/opt", "/home", "/var/tmp", "/models", "/data", *own]


def check_imports() -> str:
    """Every module of Upriver, so that nothing that one of them needs is missing."""
    names = []
    for package in PACKAGES:
        found = importlib.import_module(package)
        names += [each.name for each in pkgutil.walk_packages(found.__path__, f"{package}.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    return f"{len(names)} modules"


def check_programs() -> str:
    """What KubeRay's start commands and probes call, in a shell as it starts them; old versions use a login shell."""
    for shell in (["bash", "-c"], ["bash", "-lc"]):
        for program in ("upriver", "ray", "serve", "python", "wget", "grep"):
            told = subprocess.run([*shell, f"command -v {program}"], capture_output=True, text=True, timeout=30)
            if told.returncode != 0:
                raise SmokeError(f"`{' '.join(shell)}` finds no {program}")
    return "upriver, ray, serve, python, wget, grep; in login shells too"


def check_bill_of_materials() -> str:
    """The list of what is in the image is that of this image."""
    if not SBOM.is_file():
        raise SmokeError(f"there is no {SBOM}")
    document = json.loads(SBOM.read_text(encoding="utf-8"))
    own = document["metadata"]["component"]["purl"]
    listed = {one.get("purl", "") for one in document["components"]} | {own}
    installed = distributions(path=[sysconfig.get_path("purelib")])  # Ray puts folders of its own on the path
    missing = [one.name for one in installed if not any(_is_listed(one.name, purl) for purl in listed)]
    if missing:
        raise SmokeError(f"it does not list {', '.join(sorted(missing)[:5])}")
    return f"{len(document['components'])} components"


def _is_listed(name: str, purl: str) -> bool:
    plain = name.lower().replace("_", "-").replace(".", "-")
    return purl.startswith(f"pkg:pypi/{plain}@")


def check_doctor() -> str:
    """`upriver doctor` finds nothing wrong."""
    told = json.loads(_upriver("doctor", "--json"))
    if told["problems"]:
        raise SmokeError(" ".join(problem["what"] for problem in told["problems"]))
    return f"device {told['device']['used']}, {told['device']['dtype_first']}, model {told['model']['asked_for']}"


def check_restore() -> str:
    """Two frames of a clip, through Ray Data, with the built-in model."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        source, restored = Path(folder) / "clip.mp4", Path(folder) / "restored.mp4"
        _write_clip(source)
        _upriver("restore", str(source), str(restored), "--model", "tiny", "--steps", "1")
        with av.open(str(restored)) as video:
            sizes = [(frame.width, frame.height) for frame in video.decode(video=0)]
    if sizes != [(4 * _WIDTH, 4 * _HEIGHT)] * _FRAMES:
        raise SmokeError(f"{_FRAMES} frames of {4 * _WIDTH}x{4 * _HEIGHT} were expected, not {sizes}")
    return f"{len(sizes)} frames of {sizes[0][0]}x{sizes[0][1]}"


def check_serve() -> str:
    """`upriver serve` restores a live stream, and ends when it is told to."""
    (port,) = _free_ports(1)
    # Half a minute of it is meant for load balancers, which are not here.
    quick = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}
    with _running("serve", "--model", "tiny", "--port", str(port), environment=quick) as service:
        _wait_until_ready(f"http://127.0.0.1:{port}/readyz", service)
        service.wait_until_said("Serving at")  # what is stopped while it is still being deployed takes long to stop
        levels = asyncio.run(_one_stream(f"ws://127.0.0.1:{port}"))
    return f"{len(levels)} frames, with {', '.join(map(str, sorted(set(levels))))} steps"


async def _one_stream(url: str) -> list[int]:
    from infra.client import LiveStream
    from infra.protocol import Hello

    levels = []
    async with LiveStream(url, Hello(width=_WIDTH, height=_HEIGHT)) as stream:
        for picture in _pictures():
            await stream.send_picture(picture)
        await stream.close()
        async for answer in stream:
            shape = answer.picture().shape
            if shape != (4 * _HEIGHT, 4 * _WIDTH, 3):
                raise SmokeError(f"a frame of shape {shape} came back")
            levels.append(answer.header.level)
    if len(levels) != _FRAMES:
        raise SmokeError(f"{_FRAMES} frames were sent, {len(levels)} came back")
    return levels


def check_predictor() -> str:
    """`upriver predictor` says that it is ready, by the Open Inference Protocol."""
    told = subprocess.run(["upriver", "predictor", "--help"], capture_output=True, text=True, timeout=60)
    if told.returncode != 0:
        raise SmokeError("this version has no command `upriver predictor`")
    port, grpc_port = _free_ports(2)
    ports = {"UPRIVER_PREDICTOR_HTTP_PORT": str(port), "UPRIVER_PREDICTOR_GRPC_PORT": str(grpc_port)}
    with _running("predictor", "--model", "tiny", environment=ports) as service:
        _wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready", service)
    return f"ready on ports {port} and {grpc_port}"


CHECKS: Final[dict[str, Callable[[], str]]] = {
    "versions": check_versions,
    "hardening": check_hardening,
    "imports": check_imports,
    "programs": check_programs,
    "bill-of-materials": check_bill_of_materials,
    "doctor": check_doctor,
    "restore": check_restore,
    "serve": check_serve,
    "predictor": check_predictor,
}


def _pictures() -> list[NDArray[np.uint8]]:
    """Small pictures of a gradient that moves."""
    import numpy as np

    x = np.arange(_WIDTH)[None, :, None] * 4 + np.zeros((_HEIGHT, 1, 3))
    return [((x + 20 * k) % 256).astype(np.uint8) for k in range(_FRAMES)]


def _write_clip(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for picture in _pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _upriver(*arguments: str) -> str:
    """Run a command to its end and return what it printed."""
    told = subprocess.run(["upriver", *arguments], capture_output=True, text=True, timeout=_COMMAND_S)
    if told.returncode != 0:
        raise SmokeError(f"`upriver {arguments[0]}` ended with {told.returncode}: {_last_line(told.stderr)}")
    return told.stdout


@dataclass(frozen=True, slots=True)
class _Service:
    """A command that runs meanwhile, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    said: Path

    def output(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")

    def must_run(self) -> None:
        if self.process.poll() is not None:
            raise SmokeError(f"it ended with {self.process.returncode} before it was ready")

    def wait_until_said(self, text: str) -> None:
        limit = time.monotonic() + _START_S
        while text not in self.output():
            self.must_run()
            if time.monotonic() > limit:
                raise SmokeError(f"it did not say {text!r} within {_START_S:.0f} s")
            time.sleep(_POLL_S)


@contextmanager
def _running(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[_Service]:
    """Run a service meanwhile. It must end by itself, with status 0, when it gets SIGTERM, as Kubernetes sends it."""
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(
            ["upriver", *arguments], stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        service = _Service(process, Path(said.name))
        try:
            yield service
            process.send_signal(signal.SIGTERM)
            if process.wait(_STOP_S) != 0:
                raise SmokeError(f"`upriver {arguments[0]}` ended with {process.returncode} after SIGTERM")
        except subprocess.TimeoutExpired:
            raise SmokeError(f"`upriver {arguments[0]}` goes on {_STOP_S:.0f} s after SIGTERM") from None
        except SmokeError as error:
            raise SmokeError(f"{error} (it said: {_last_line(service.output())})") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, service: _Service) -> None:
    limit = time.monotonic() + _START_S
    answer = "nobody answers"
    while time.monotonic() < limit:
        service.must_run()
        try:
            with urllib.request.urlopen(url, timeout=5) as told:
                if told.status == 200:
                    return
        except urllib.error.HTTPError as error:
            answer = f"status {error.code}"
        except OSError as error:
            answer = str(error)
        time.sleep(_POLL_S)
    raise SmokeError(f"not ready after {_START_S:.0f} s: {answer}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m infra.images.smoke", description="Does this image work?")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="make this check; may be given again")
    parser.add_argument("--hardened", action="store_true", help="the container must not run as root, nor be writable")
    chosen = parser.parse_args(arguments)
    names = chosen.only or [name for name in CHECKS if name != "hardening" or chosen.hardened]
    if shutil.which("upriver") is None:
        print("FAILED: there is no command `upriver` on PATH.", flush=True)
        return 1
    failures = 0
    for name in names:
        began = time.monotonic()
        try:
            said = CHECKS[name]()
        except Exception as error:  # a check that cannot even be made has failed, and the others are still of interest
            failures += 1
            kind = "" if isinstance(error, SmokeError) else f"{type(error).__name__}: "
            print(f"FAILED {name}: {kind}{_last_line(str(error))}", flush=True)
        else:
            print(f"ok {name} ({time.monotonic() - began:.1f} s): {said}", flush=True)
    print(f"{len(names) - failures} of {len(names)} checks are ok.", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
