"""The predictor as a process: `kserve.ModelServer` with Upriver's routes, its own listening rules and an orderly end.

    server = PredictorServer(settings, live, engine)
    await server.serve(stop)         # until `stop` is set: then drains

The base class starts servers on all interfaces, with routes that ask nobody; so only its parts are used: the
repository of models, the data plane, and the REST server's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from actors.inference import Inference
from actors.predictor import RESTServer, UpriverRepository, kserve
from actors.predictor_backend import GatewayUnsafe, LiveService, backend_for
from actors.predictor_grpc import OipServicer, port_taken, start_grpc, stop_grpc
from actors.predictor_rest import make_predictor_app
from infra.errors import SettingsError
from infra.refusals import AdmissionRefused

if TYPE_CHECKING:
    from fastapi import FastAPI

    from actors.model_loading import EngineConfig
    from infra.live_settings import LiveSettings
    from infra.predictor_settings import PredictorSettings

logger = logging.getLogger(__name__)

_GRACE_S: Final = 10
_LOOK_S: Final = 2.0
_OTHER_CALLS: Final = 64  # that ask for readiness, metadata, statistics


class _Rest(RESTServer):
    """The package's web server with an application of ours, at an address of ours, without handlers of signals."""

    def __init__(self, app: FastAPI, server: PredictorServer, host: str) -> None:
        super().__init__(
            app,
            server.dataplane,
            server.model_repository_extension,
            server.http_port,
            grace_period=server.grace_period,
        )
        self.config.host = host
        self.config.access_log = False
        self.config.forwarded_allow_ips = ""  # `trusted_proxies` decides whom X-Forwarded-For is believed
        self.config.proxy_headers = False
        self.server = self._server
        self.server.capture_signals = contextlib.nullcontext  # they mean: drain

    def create_application(self) -> None:
        """Nothing: it is there. The base class would add its routes to one application for the whole process."""


class PredictorServer(kserve.ModelServer):
    """See the module.

    Args:
        live: settings of the live service, for an engine in this process.

    Attributes:
        inference: what answers requests.

    Raises:
        SettingsError: a file of keys cannot be used.
    """

    def __init__(self, settings: PredictorSettings, live: LiveSettings, engine: EngineConfig) -> None:
        quiet = logging.getLogger("kserve")
        if not quiet.handlers:
            quiet.addHandler(logging.NullHandler())  # else the package sets up everybody's logs
        self.settings = settings
        self.inference = Inference(settings, backend_for(settings, live, engine))
        super().__init__(
            http_port=settings.http_port,
            grpc_port=settings.grpc_port,
            workers=1,
            enable_latency_logging=False,
            grace_period=_GRACE_S,
            registered_models=UpriverRepository(self.inference.backend, self.inference),
        )

    async def serve(self, stop: asyncio.Event, started: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is set, and then until what is under way has ended.

        Args:
            started: called when both ports are open and models are ready.

        Raises:
            SettingsError: a port is taken; the gateway would let others reach a service that asks nobody.
            PipelineError, StorageError: a model cannot be loaded.
        """
        settings, inference = self.settings, self.inference
        await inference.start()
        repository: UpriverRepository = self.registered_models
        servicer = OipServicer(inference, repository, self.dataplane, self.model_repository_extension)
        host = settings.host or "0.0.0.0"
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        calls = await start_grpc(
            servicer,
            address,
            max_request_bytes=settings.max_request_bytes,
            max_result_bytes=settings.max_result_bytes,
            most_calls=settings.requests + settings.sequences + _OTHER_CALLS,
        )
        rest = _Rest(make_predictor_app(inference, repository), self, host)
        serving = asyncio.create_task(_run(rest))
        stopping = asyncio.create_task(stop.wait())
        looking = asyncio.create_task(self._look_at_service())
        try:
            while not rest.server.started and not serving.done():
                await asyncio.sleep(0.01)
            if not serving.done():
                started()
            await asyncio.wait([serving, stopping, looking], return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
            if stopping.done():
                await inference.drain(settings.drain_s)
        finally:
            stopping.cancel()
            looking.cancel()
            await inference.sequences.stop()  # requests that have their turn are answered before the ports close
            rest.server.should_exit = True
            await asyncio.gather(stop_grpc(calls, _GRACE_S), serving, return_exceptions=True)
            await inference.stop()
        serving.result()

    async def _look_at_service(self) -> None:
        """Never return, but for a gateway that must not go on."""
        backend = self.inference.backend
        while isinstance(backend, LiveService):
            try:
                await backend.require_safe()
                break
            except AdmissionRefused:
                await asyncio.sleep(_LOOK_S)
            except GatewayUnsafe as refusal:
                raise SettingsError(refusal.message, code=refusal.code, remedy=refusal.remedy) from None
        await asyncio.Event().wait()


async def _run(rest: _Rest) -> None:
    try:
        await rest.start()
    except SystemExit as error:  # the web server's way to say that it cannot listen
        raise port_taken(f"{rest.config.host}:{rest.config.port}") from error
