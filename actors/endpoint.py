"""The live service as a Ray Serve application: each replica is one `LiveServer` with its own ingress.

A stream's socket ends at the replica that holds its state, so its frames always meet it. When Serve stops a replica
(upgrade, scale-down, deletion), it hands its streams over as soon as another one runs. Models are named by the
deployment's `user_config`, which Serve can change without restarting replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from actors.autoscaling import AutoscalingArguments, SessionLoadPolicy, measured_load
from actors.gate import SettingsGate
from actors.live_server import LiveConfig, LiveServer
from actors.model_loading import EngineConfig, load_engine
from actors.state_holder import HeldStates, holder
from infra.listening import origin_policy_for
from infra.live_settings import LiveSettings, load_live_settings
from infra.structured_logs import serve_logging, use_serve_handlers
from infra.telemetry import Telemetry
from infra.tenants import Scope

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from actors.live_engine import LiveEngine

logger = logging.getLogger(__name__)

APPLICATION: Final = "upriver"
DEPLOYMENT: Final = "live"
_ASK_S: Final = 20.0
_TELL_S: Final = 2.0  # between two figures of a replica's load


class ModelList(BaseModel):
    """The deployment's `user_config`: names, folders, hub ids or s3:// places of models; the first is the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    models: list[str] = Field(default=["tiny"], min_length=1)


def _build(told: dict[str, Any]) -> FastAPI:
    """Return a replica's web application; `told` are the settings."""
    from actors.live_app import make_app
    from actors.service_routes import add_service_routes, jobs_settings, tenant_with, upload_settings

    settings = LiveSettings(**told)

    def endpoint() -> Endpoint:
        made: Endpoint = serve.get_replica_context().servable_object  # type: ignore[assignment]
        return made

    app = make_app(
        lambda: endpoint().server,
        origins=origin_policy_for(settings),
        admit=tenant_with(lambda: endpoint().gate, None),
        admit_scrape=tenant_with(lambda: endpoint().gate, Scope.ADMIN),
    )
    add_service_routes(
        app,
        lambda: endpoint().server,
        lambda: endpoint().gate,
        uploads=upload_settings(settings),
        jobs=jobs_settings(settings),
    )
    return app


class Endpoint:
    """One replica. Loads its models before it counts as ready."""

    def __init__(self, settings: dict[str, Any], engine: dict[str, Any]) -> None:
        self._settings = LiveSettings(**settings)
        self._config = LiveConfig.from_settings(self._settings)
        self._engine_config = EngineConfig(**engine)
        context = serve.get_replica_context()
        actor = holder(
            context.app_name,
            kept_s=self._config.idle_timeout_s + 60.0,
            most_bytes=self._config.state_bytes,
        )
        self._replica = context.replica_tag
        self._holder: Any = actor
        self.gate = SettingsGate(self._settings)
        shown = self._settings.telemetry
        use_serve_handlers(shown.logs, replica=self._replica)
        held = HeldStates(actor)
        self.server = LiveServer(
            self._config,
            {},
            states=held,
            gate=self.gate,
            telemetry=Telemetry.start(shown, self._replica),
            board=held,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._started = False

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the models that are not there yet; streams keep the one that they began with until they end."""
        wanted = ModelList(**user_config).models
        loop = asyncio.get_running_loop()
        if not self._started:
            self._started = True
            self.server.start()
            self._tasks.append(loop.create_task(self._watch_for_drain()))
            self._tasks.append(loop.create_task(self.server.desk.post_forever()))
        engines: dict[str, LiveEngine] = {}
        for name in wanted:
            engine = self.server.engines.get(name)
            if engine is None:
                engine = await loop.run_in_executor(
                    None, partial(load_engine, name, self._engine_config, max_pixels=self._config.max_pixels)
                )
                await self.server.stepper.in_thread(engine.warm)
            engines[name] = engine
        self.server.engines.clear()
        self.server.engines.update(engines)

    async def _watch_for_drain(self) -> None:
        while True:
            try:
                if await self._holder.told_to_go.remote(self._replica, _ASK_S):
                    break
            except Exception as error:  # the holder restarts
                logger.warning("the keeper of states does not answer: %s", error)
                await asyncio.sleep(1.0)
        logger.info("this replica is being stopped: %d streams are handed over", len(self.server.connections))
        await self.server.drain()

    async def Stream(self, request_stream: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """One stream over gRPC: see `infra.live_grpc`."""
        from actors.grpc_channel import GrpcChannel, peer_address, serve_call

        metadata = {str(name).lower(): str(value) for name, value in grpc_context.invocation_metadata()}
        channel = GrpcChannel(request_stream, metadata, peer_address(grpc_context.peer()))
        async with aclosing(serve_call(self.server.serve, channel)) as packets:
            async for packet in packets:
                yield packet

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller asks each replica for, and hands to the policy: see `actors.autoscaling`."""
        return measured_load(self.server)

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.server.stop()


class ApplicationArguments(BaseModel):
    """What an application is made from: the `args` of a Serve configuration file.

    Attributes:
        live: settings of the service, see `infra.live_settings`; those of the environment and the file apply as well.
        replicas: each holds all models. autoscaling: if it is there, their number follows the streams' load.
        num_gpus, num_cpus: what a replica reserves.
        drain_s: how long a replica that is stopped may take to hand its streams over.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    live: dict[str, Any] = {}
    engine: EngineConfig = EngineConfig()
    replicas: int = Field(default=1, ge=1, le=4096)
    autoscaling: AutoscalingArguments | None = None
    num_gpus: float = Field(default=0.0, ge=0, le=64)
    num_cpus: float = Field(default=1.0, ge=0, le=4096)
    drain_s: float = Field(default=60.0, gt=0, le=86_400)


def application(args: ApplicationArguments | dict[str, Any]) -> Application:
    """Return the live service as Ray Serve deploys it: the `import_path` of a Serve configuration file.

    Raises:
        SettingsError: the settings do not go together.
        ValidationError: no such argument.
    """
    args = ApplicationArguments.model_validate(args)
    settings = load_live_settings(args.live).values
    told = settings.model_dump(mode="json", exclude={"models"})
    deployment: Any = serve.deployment(  # Serve's types do not know what its decorators return
        serve.ingress(lambda: _build(told))(Endpoint),
        name=DEPLOYMENT,
        **_number_of_replicas(args),
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        # Streams are counted and refused by the replica itself, in words; Serve must not queue them before.
        max_ongoing_requests=4 * settings.sessions + 100,
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        user_config=ModelList(models=list(settings.models)).model_dump(),
        logging_config=serve_logging(settings.telemetry.logs),
    )
    made: Application = deployment.bind(told, args.engine.model_dump())
    return made


def _number_of_replicas(args: ApplicationArguments) -> dict[str, Any]:
    scaling = args.autoscaling
    if scaling is None:
        return {"num_replicas": args.replicas}
    policy = {
        # By its place, so that Serve's controller imports it, and a new version of it comes with the new code.
        "policy_function": f"{SessionLoadPolicy.__module__}:{SessionLoadPolicy.__qualname__}",
        "policy_kwargs": {"target_load": scaling.target_load},
    }
    return {
        "num_replicas": None,
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "metrics_interval_s": _TELL_S,
            "look_back_period_s": 5 * _TELL_S,
            "policy": policy,
        },
    }
