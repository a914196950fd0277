"""What a predictor's streams run on: an engine in this process, or a live service somewhere else.

Both are spoken to by the live protocol and its client, so admission, tenants, limits and hand-over are those of the
live service in both. An engine in this process is reached without sockets. A service is reached by its own transport,
with the credentials of the caller, who is named to it by `X-Forwarded-For`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from actors.errors import describe_failure
from actors.gate import SettingsGate
from actors.live_server import LiveConfig, LiveServer
from actors.local_channel import local_transport
from actors.model_loading import EngineConfig, load_engine
from infra import protocol
from infra.auth import credentials_in
from infra.client import LiveStream
from infra.listening import is_loopback
from infra.live_wire import transport_for
from infra.protocol import Credentials, Hello
from infra.refusals import AdmissionRefused, BadMessage, Forbidden, Refusal, ServiceFailure
from infra.telemetry import Telemetry
from infra.tenants import Scope

if TYPE_CHECKING:
    from infra.live_settings import LiveSettings
    from infra.predictor_settings import PredictorSettings

logger = logging.getLogger(__name__)

_PROBE_S: Final = 2.0
_SALT: Final = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        headers: of the request, names in lower case; of a gRPC call its metadata. peer: address that it came from.
        credentials: what they present. digest: of the credentials, for keys of tables; useless elsewhere.
        is_web: browsers can send such a request, from any page.
    """

    headers: Mapping[str, str]
    peer: str | None
    credentials: Credentials = field(repr=False)
    digest: bytes = field(repr=False)
    is_web: bool = True

    @classmethod
    def of(cls, headers: Mapping[str, str], peer: str | None, *, is_web: bool = True) -> Caller:
        """Return who sent these headers.

        Raises:
            Unauthorized: several credentials came together.
        """
        credentials = credentials_in(headers)
        parts = (credentials.api_key, credentials.token)
        text = "\0".join("" if part is None else part.get_secret_value() for part in parts)
        digest = hmac.new(_SALT, text.encode(), hashlib.sha256).digest()
        return cls(headers, peer, credentials, digest, is_web)


class Backend(Protocol):
    """See the module."""

    async def start(self) -> None:
        """Begin; models are loaded and have made a step when it returns, if they are here."""

    async def stop(self) -> None:
        """End; all streams have ended before."""

    async def admit(self, caller: Caller, scope: Scope | None) -> None:
        """Do nothing where the caller may ask for this; a service in front of us decides when it gets the hello.

        Raises:
            Unauthorized, Forbidden, RateExceeded: not this one.
        """

    def open_stream(self, caller: Caller, hello: Hello) -> LiveStream:
        """Return a stream of this caller that is not open yet."""

    def models(self) -> tuple[str, ...]:
        """Return the names of the models that can be asked for."""

    def fingerprint(self, model: str) -> str:
        """Return the hash of a model's weights and configuration; empty where it is not known yet."""

    async def is_ready(self) -> bool:
        """Whether a request would be served now."""

    async def load(self, model: str) -> None:
        """Load one of the models that may be loaded. Raises a refusal where it is not one, or cannot be loaded."""

    async def unload(self, model: str) -> None:
        """Serve a model no more; streams that have it keep it until they end."""

    async def metrics(self) -> bytes:
        """Return what the engine's own metrics are, as Prometheus text; empty where they are elsewhere."""


class OwnEngine:
    """Models in this process, behind a live server that no socket leads to.

    Attributes:
        server: the live server. gate: who may come in.
    """

    def __init__(self, settings: PredictorSettings, live: LiveSettings, engine: EngineConfig) -> None:
        room = settings.sequences + settings.requests
        if "sessions" not in live.limits.model_fields_set:  # every request is a stream, and the local tenant is all
            limits = live.limits.model_copy(update={"sessions": room})
            live = live.model_copy(update={"limits": limits})
        config = LiveConfig.from_settings(live)
        config = config.model_copy(
            update={
                "most_sessions": room,
                "most_hellos": room,
                "idle_timeout_s": max(config.idle_timeout_s, settings.sequence_idle_s + 60.0),
            }
        )
        self.gate = SettingsGate(live)
        telemetry = Telemetry.start(live.telemetry, "predictor")
        self.server = LiveServer(config, {}, gate=self.gate, telemetry=telemetry)
        self._settings, self._engine_config = settings, engine
        self._loading = asyncio.Lock()
        self._ready = False

    async def start(self) -> None:
        self.server.start()
        for name, source in self._settings.sources(self._settings.models).items():
            await self._load(name, source)
        self._ready = True

    async def stop(self) -> None:
        self._ready = False
        await self.server.stop()

    async def admit(self, caller: Caller, scope: Scope | None) -> None:
        await self.gate.tenant_of(caller.headers, caller.peer, scope, is_web=caller.is_web)

    def open_stream(self, caller: Caller, hello: Hello) -> LiveStream:
        transport = local_transport(self.server, caller.headers, caller.peer)
        return LiveStream("local", hello, connect=transport, open_s=self._settings.patience_s, give_up_s=0.0)

    def models(self) -> tuple[str, ...]:
        return tuple(self.server.engines)

    def fingerprint(self, model: str) -> str:
        engine = self.server.engines.get(model)
        return "" if engine is None else engine.model_sha256

    async def is_ready(self) -> bool:
        return self._ready and not self.server.draining

    async def load(self, model: str) -> None:
        source = require_loadable(model, self._settings)
        if model in self.server.engines:
            return
        try:
            await self._load(model, source)
        except Exception as error:
            failure = describe_failure(error)
            logger.error("the model %s cannot be loaded", model, exc_info=error)
            raise ServiceFailure(
                f"The model {model} cannot be loaded: {failure['message']}",
                code="model-load-failed",
                remedy=failure["remedy"],
            ) from None

    async def unload(self, model: str) -> None:
        require_loadable(model, self._settings)
        async with self._loading:
            self.server.engines.pop(model, None)

    async def metrics(self) -> bytes:
        return (await self.server.desk.page()).body

    async def _load(self, name: str, source: str) -> None:
        most = self.server.config.max_pixels
        async with self._loading:
            load = partial(load_engine, source, self._engine_config, max_pixels=most, name=name)
            engine = await asyncio.get_running_loop().run_in_executor(None, load)
            await self.server.stepper.in_thread(engine.warm)
            self.server.engines[name] = engine


def require_loadable(model: str, settings: PredictorSettings) -> str:
    """Return where a model comes from that callers may load and unload.

    Raises:
        Forbidden: they may not: the setting `loadable` does not list it.
    """
    sources = settings.sources(settings.loadable)
    if model not in sources:
        raise Forbidden(
            f"The model {model[:100]!r} cannot be loaded or unloaded from outside.",
            code="not-loadable",
            limit=", ".join(sources) or "none",
            remedy="Ask the operator to list it in the setting loadable of the predictor.",
        )
    return sources[model]


class GatewayUnsafe(Refusal):
    """The service asks nobody for credentials, and this gateway would let others reach it."""

    http_status = 503
    default_code = "gateway-unsafe"


class LiveService:
    """A live service at another address."""

    def __init__(self, settings: PredictorSettings) -> None:
        assert settings.service is not None
        self._settings, self._url = settings, settings.service
        self._known: dict[str, str] = {}
        self._safe = settings.insecure or is_loopback(settings.host)

    async def start(self) -> None:
        if not self._safe:
            logger.info("until the service has been asked whether it asks for credentials, nothing is served")

    async def stop(self) -> None:
        """Nothing is left: streams have their own connections."""

    async def admit(self, caller: Caller, scope: Scope | None) -> None:
        if scope is not Scope.LIVE:
            return  # what this process tells of itself is names and counts; the service decides on all else
        await self.require_safe()

    async def require_safe(self) -> None:
        """Do nothing where the service asks for credentials, or only this machine reaches the gateway.

        Raises:
            GatewayUnsafe: neither. AdmissionRefused: the service does not answer, so it is not known.
        """
        if self._safe:
            return
        answer = await self._anonymous_answer()
        if answer is None:
            raise AdmissionRefused(
                "The service does not answer.", code="unreachable", remedy="Try again.", retry_after_s=1.0
            )
        if answer.get("type") != "refused" or answer.get("kind") not in ("Unauthorized", "RateExceeded"):
            raise GatewayUnsafe(
                f"The service asks nobody for credentials, and {self._settings.host} is reached by others.",
                remedy="Give the service keys (`upriver keys create`), or listen on 127.0.0.1, or set insecure.",
            )
        self._safe = True

    async def _anonymous_answer(self) -> Mapping[str, object] | None:
        hello = Hello(width=protocol.SMALLEST_SIDE, height=protocol.SMALLEST_SIDE)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_PROBE_S):
                wire = await transport_for(self._url)(self._url)
                try:
                    await wire.send(protocol.dump(hello))
                    message = await wire.receive()
                finally:
                    await wire.close()
                return protocol.parse_answer(message) if isinstance(message, str) else None
        return None

    def open_stream(self, caller: Caller, hello: Hello) -> LiveStream:
        forwarded = ", ".join(part for part in (caller.headers.get("x-forwarded-for"), caller.peer) if part)
        headers = {"x-forwarded-for": forwarded} if forwarded else {}
        return LiveStream(
            self._url,
            hello,
            connect=transport_for(self._url, headers),
            open_s=self._settings.patience_s,
            give_up_s=self._settings.hand_over_s,
        )

    def models(self) -> tuple[str, ...]:
        return tuple(self._settings.sources(self._settings.models))

    def fingerprint(self, model: str) -> str:
        return self._known.get(model, "")

    def learn(self, model: str, fingerprint: str) -> None:
        """Remember what the service says of a model."""
        self._known[model] = fingerprint

    async def is_ready(self) -> bool:
        """Whether the service answers: by its own `/readyz` over WebSocket, by a connection over gRPC."""
        try:
            await self.require_safe()
            async with asyncio.timeout(_PROBE_S):
                if self._url.startswith("ws"):
                    return await self._is_ready_by_http()
                wire = await transport_for(self._url)(self._url)
                await wire.close()
        except (OSError, TimeoutError, Refusal):
            return False
        return True

    async def _is_ready_by_http(self) -> bool:
        import httpx

        address = "http" + self._url.removeprefix("ws").removesuffix("/v1/streams") + "/readyz"
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(address)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def load(self, model: str) -> None:
        raise _elsewhere()

    async def unload(self, model: str) -> None:
        raise _elsewhere()

    async def metrics(self) -> bytes:
        return b""


def _elsewhere() -> Refusal:
    return Forbidden(
        "This predictor has no models of its own.", code="not-loadable", remedy="Change the models of the service."
    )


def backend_for(settings: PredictorSettings, live: LiveSettings, engine: EngineConfig) -> OwnEngine | LiveService:
    """Return what the settings ask for. Call it in the event loop that serves."""
    return OwnEngine(settings, live, engine) if settings.service is None else LiveService(settings)


def require_model(backend: Backend, model: str, version: str) -> None:
    """Do nothing where there is this version of a model; the empty version is the only one that there is.

    Raises:
        BadMessage: there is not.
    """
    if model not in backend.models():
        raise BadMessage(
            f"There is no model {model[:100]!r} here.",
            code="model-unknown",
            limit=", ".join(backend.models()),
            remedy="Ask for one of the repository's index.",
        )
    if version not in ("", "1"):
        raise BadMessage(
            f"There is no version {version[:60]!r} of the model {model!r}.",
            code="version-unknown",
            limit="1",
            remedy="Ask for the version 1, or for none.",
        )
