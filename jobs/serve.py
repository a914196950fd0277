"""`upriver serve`: the live service on this machine, or on the cluster that `RAY_ADDRESS` names, until it is stopped.

What it needs to know of settings is in `infra.live_settings`; flags here are the few that are changed from run to run.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from infra.listening import require_safe_listening
from infra.live_grpc import SERVICER_FUNCTION
from infra.live_settings import LiveSettings, load_live_settings
from infra.settings import load_settings
from jobs.options import BackendOption, Config, Debug, Device, Dtype, Flow, Threads

if TYPE_CHECKING:
    from types import FrameType

Ingress = Literal["haproxy", "python"]

_GRPC_MESSAGE_LIMIT: Final = 128 << 20
_STOP_S: Final = 60.0

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model to serve; may be given again, the first is the default. [default: tiny]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port for HTTP and WebSockets. [default: 8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC. [default: no gRPC]")] = None,
    replicas: Annotated[int, typer.Option(min=1, max=1024, help="Copies of the models, one a GPU.")] = 1,
    gpus: Annotated[
        float | None, typer.Option(min=0, max=8, help="GPUs of each replica. [default: 1 where there is one]")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, see `upriver keys`.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without asking who is there.")
    ] = None,
    ingress: Annotated[
        Ingress,
        typer.Option(help="What Ray Serve puts in front of the replicas; haproxy is faster and holds floods back."),
    ] = "haproxy",
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendOption = None,
    flow: Flow = None,
    threads: Threads = None,
    config: Config = None,
    debug: Debug = False,
) -> int:
    """Restore live streams: WebSocket, gRPC and a web page, until it is interrupted."""
    flags = {
        "models": tuple(model) if model else None,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "keys_file": keys,
        "insecure": insecure,
    }
    live = load_live_settings(flags, config).values
    wanted = {"device": device, "dtype": dtype, "backend": backend, "flow": flow, "threads": threads}
    common = load_settings(wanted, config).values
    require_safe_listening(live)
    _serve(live, common, replicas=replicas, gpus=gpus, ingress=ingress)
    return 0


def _serve(live: LiveSettings, common: Any, *, replicas: int, gpus: float | None, ingress: Ingress) -> None:
    # Ray Serve reads these when it is imported, here and in the processes that it starts.
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if ingress == "haproxy" else "0"
    os.environ.setdefault("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(_GRPC_MESSAGE_LIMIT))
    # Serve's web server would believe X-Forwarded-For of whoever connects from this machine; `trusted_proxies` decides.
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    from infra.cluster import connected

    over = threading.Event()
    print("Starting Ray ...", flush=True)
    with connected(max(4, 2 * replicas + 2)) as cluster:
        from ray import serve as ray_serve

        from actors.endpoint import APPLICATION, ApplicationArguments, EngineConfig, application

        grpc_options = None
        if live.grpc_port is not None:
            grpc_options = {"port": live.grpc_port, "grpc_servicer_functions": [SERVICER_FUNCTION]}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its progress is told here
        arguments = ApplicationArguments(
            live=live.model_dump(exclude_defaults=True),
            engine=EngineConfig(
                device=common.device,
                dtype=common.dtype,
                backend=common.backend,
                flow=common.flow,
                threads=common.threads or 0,
            ),
            replicas=replicas,
            num_gpus=(1.0 if cluster.gpus else 0.0) if gpus is None else gpus,
        )
        where = f"http://{live.host}:{live.port}"
        streams = where.replace("http", "ws", 1)
        # Ray has put handlers of its own there, which end the process at once. Replicas take streams some moments
        # before `run` returns, so this must not wait for that.
        _stop_on_signals(over)
        try:
            ray_serve.start(http_options={"host": live.host, "port": live.port}, grpc_options=grpc_options)
            print(f"Loading {', '.join(live.models)} ...", flush=True)
            ray_serve.run(application(arguments), name=APPLICATION, route_prefix="/")
            print(f"Serving at {where} (streams: {streams}/v1/streams). Ctrl-C ends it.", flush=True)
            over.wait()
        except _Stopped:
            pass
        finally:
            print("Handing streams over ...", flush=True)
            ray_serve.shutdown()


class _Stopped(Exception):
    """A signal has come."""


def _stop_on_signals(over: threading.Event) -> None:
    """Let the first signal raise `_Stopped` in the main thread, whatever that does; later ones change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            over.set()
            raise _Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
