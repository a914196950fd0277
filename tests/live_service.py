"""A live service on this machine, without Ray: a `LiveServer` behind a real uvicorn, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from actors.gate import SettingsGate
from actors.live_app import make_app
from actors.live_engine import LiveEngine
from actors.live_server import LiveConfig, LiveServer
from actors.service_routes import add_service_routes, jobs_settings, tenant_with, upload_settings
from infra.listening import origin_policy_for
from infra.live_settings import LiveSettings
from infra.tenants import Scope
from pipeline.engine import open_engine


def open_live_engine(model: str = "stand-in:0", *, largest_batch: int = 8, threads: int = 1) -> LiveEngine:
    """Return a model for live streams, on the CPU in fp32."""
    pipe = open_engine(model, torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=1 << 24)
    engine = LiveEngine(pipe, model, largest_batch=largest_batch, threads=threads)
    engine.warm()
    return engine


class LiveService:
    """A running service. `server` belongs to the loop of its thread: use `call` for coroutines of it."""

    def __init__(self, server: LiveServer, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.port, self._loop = server, port, loop
        self.url = f"ws://127.0.0.1:{port}"
        self.http = f"http://127.0.0.1:{port}"

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine in the service's loop; returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)


def _whole_app(server: LiveServer, gate: SettingsGate, settings: LiveSettings, job_server: str | None) -> FastAPI:
    app = make_app(
        lambda: server,
        origins=origin_policy_for(settings),
        admit=tenant_with(lambda: gate, None),
        admit_scrape=tenant_with(lambda: gate, Scope.ADMIN),
    )
    jobs = jobs_settings(settings).model_copy(update={"job_server": job_server})
    add_service_routes(app, lambda: server, lambda: gate, uploads=upload_settings(settings), jobs=jobs)
    return app


@contextmanager
def live_service(
    config: LiveConfig | None = None,
    *models: str,
    engine: Any = None,
    admit_scrape: Any = None,
    settings: LiveSettings | None = None,
    job_server: str | None = None,
    **options: Any,
) -> Iterator[LiveService]:
    """Run a service.

    Args:
        settings: the whole service by them, as the endpoint makes it: its gate, its limits, and the routes of uploads
            and jobs, whose cluster is `job_server`; `config` goes before what they say of a replica.
        options: as for `LiveServer`. admit_scrape: as for `make_app`.
    """
    gate = None if settings is None else SettingsGate(settings)
    if settings is not None:
        config = config or LiveConfig.from_settings(settings)
        options["gate"] = gate
    engines = (
        {engine.name: engine} if engine is not None else {n: open_live_engine(n) for n in models or ("stand-in:0",)}
    )
    started = threading.Event()
    told: dict[str, Any] = {}

    def run() -> None:
        asyncio.run(serve())

    async def serve() -> None:
        server = LiveServer(config or LiveConfig(), engines, **options)
        server.start()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        if settings is None or gate is None:
            app = make_app(lambda: server, admit_scrape=admit_scrape)
        else:
            app = _whole_app(server, gate, settings, job_server)
        web = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", forwarded_allow_ips="")
        )
        told.update(server=server, port=listener.getsockname()[1], loop=asyncio.get_running_loop(), web=web)
        task = asyncio.create_task(web.serve(sockets=[listener]))
        while not web.started:
            await asyncio.sleep(0.01)
        started.set()
        await task
        await server.stop()

    thread = threading.Thread(target=run, name="live-service")
    thread.start()
    try:
        assert started.wait(30)
        yield LiveService(told["server"], told["port"], told["loop"])
    finally:
        told["web"].should_exit = True
        told["web"].force_exit = True
        thread.join(30)
