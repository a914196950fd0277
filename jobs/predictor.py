"""`upriver predictor`: models by the Open Inference Protocol, as KServe and Triton's clients speak it, until stopped.

What it needs to know of settings is in `infra.predictor_settings` and, for an engine of its own, in
`infra.live_settings`; flags here are the few that are changed from run to run.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.listening import require_asking
from infra.live_settings import LiveSettings, load_live_settings
from infra.predictor_settings import PredictorSettings, load_predictor_settings
from infra.settings import Settings, load_settings
from jobs.options import BackendOption, Config, Debug, Device, Dtype, Flow, Threads

if TYPE_CHECKING:
    from actors.model_loading import EngineConfig

app = typer.Typer(add_completion=False)


@app.command()
def predictor(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model to serve, or NAME=SOURCE; may be given again. [default: tiny]"),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(help="Live service to stand in front of, ws://... or grpc://... [default: an engine of its own]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port for REST. [default: 8080]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC. [default: 8081]")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, see `upriver keys`.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without asking who is there.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendOption = None,
    flow: Flow = None,
    threads: Threads = None,
    config: Config = None,
    debug: Debug = False,
) -> int:
    """Serve models by the Open Inference Protocol: REST and gRPC for KServe and Triton clients, until interrupted."""
    flags = {
        "models": tuple(model) if model else None,
        "service": service,
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "insecure": insecure,
    }
    settings = load_predictor_settings(flags, config).values
    live = load_live_settings({"keys_file": keys}, config).values
    wanted = {"device": device, "dtype": dtype, "backend": backend, "flow": flow, "threads": threads}
    common = load_settings(wanted, config).values
    if settings.service is None:
        require_asking(live, settings.host, insecure=settings.insecure)
    _serve(settings, live, common)
    return 0


def _serve(settings: PredictorSettings, live: LiveSettings, common: Settings) -> None:
    from actors.model_loading import EngineConfig
    from actors.predictor_server import PredictorServer

    engine = EngineConfig(
        device=common.device,
        dtype=common.dtype,
        backend=common.backend,
        flow=common.flow,
        threads=common.threads or 0,
    )
    what = ", ".join(settings.models) if settings.service is None else settings.service
    print(f"Loading {what} ..." if settings.service is None else f"In front of {what} ...", flush=True)
    asyncio.run(_until_stopped(settings, live, engine, PredictorServer))


async def _until_stopped(
    settings: PredictorSettings, live: LiveSettings, engine: EngineConfig, server_class: type
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stop)

    def started() -> None:
        print(
            f"Serving at http://{settings.host}:{settings.http_port} and grpc://{settings.host}:{settings.grpc_port}. "
            "Ctrl-C ends it.",
            flush=True,
        )

    await server_class(settings, live, engine).serve(stop, started)


def _stop(stop: asyncio.Event) -> None:
    print("Finishing what is under way ...", flush=True)
    stop.set()
