"""The predictor's routes: Open Inference Protocol over REST, health, metrics, and the live service's own stream.

They stand in for those of the `kserve` package, whose inference endpoint makes a list of numbers of every frame, and
which ask nobody for credentials. Every route but liveness and readiness asks who is there. What goes wrong is told as
the protocol wants it: ``{"error": "..."}``.
"""

# No postponed annotations here: FastAPI evaluates them, and cannot see what is local to a function.
import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from actors.inference import Inference, Result
from actors.live_app import add_streams
from actors.model_card import model_config, model_index, model_metadata, server_metadata
from actors.oip import VERSION, bad
from actors.oip_errors import http_headers, http_status
from actors.oip_rest import HEADER_LENGTH, Wanted, inflate, read_call, too_large, write_result
from actors.predictor import CallerHeaders, UpriverRepository
from actors.predictor_backend import Caller, OwnEngine, require_model
from actors.request_head import RequestHeadLimits
from infra.refusals import AdmissionRefused, BadMessage, Refusal, ServiceFailure, TimedOut
from infra.tenants import Scope

_BODY_IDLE_S: Final = 30.0
_IN_THREAD_BYTES: Final = 1 << 20  # what is larger is read and written off the event loop
_UNSERVED: Final = {404: ("not-found", "Nothing is at this address."), 405: ("method-not-allowed", "Not this method.")}


def make_predictor_app(inference: Inference, repository: UpriverRepository) -> FastAPI:
    """Return the web application."""
    app = FastAPI(
        title="Upriver predictor",
        summary="Video super-resolution by the Open Inference Protocol.",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(RequestHeadLimits, tell=lambda refusal: {"error": str(refusal)})
    _tell_errors(app)
    app.include_router(_health(inference))
    app.include_router(_models(inference, repository))
    app.include_router(_repository(inference, repository))
    if isinstance(inference.backend, OwnEngine):
        server = inference.backend.server
        add_streams(app, lambda: server)
    return app


def told(refusal: Refusal) -> Response:
    """Return a refusal as an answer."""
    return JSONResponse({"error": str(refusal)}, http_status(refusal), http_headers(refusal))


def _tell_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return told(refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return told(bad(f"{place} is not possible: {first['msg']}.", "See docs/predictor.md."))

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        code, message = _UNSERVED.get(error.status_code, ("bad-request", "The request is not possible."))
        return told(BadMessage(message, code=code, remedy="See docs/predictor.md."))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        """What nobody foresaw: logged by the server with its traceback, which the caller never sees."""
        return told(ServiceFailure("The request failed.", remedy="Try again; if it lasts, tell the operator."))


def _asker(inference: Inference, scope: Scope | None) -> Any:
    """Return a FastAPI dependency: the caller, who was let in."""

    async def caller(request: Request) -> Caller:
        # `Headers` of starlette has one value of a name; several credentials must be seen, to be refused.
        headers = {name.lower(): value for name, value in request.headers.items()}
        for name in ("authorization", "x-api-key"):
            if len(request.headers.getlist(name)) > 1:
                headers["authorization"] = headers["x-api-key"] = ""
        found = Caller.of(headers, request.client.host if request.client else None)
        await inference.backend.admit(found, scope)
        return found

    return caller


def _health(inference: Inference) -> APIRouter:
    router = APIRouter()
    ask_admin = _asker(inference, Scope.ADMIN)

    @router.get("/", summary="Whether the process is alive, as KServe asks")
    async def root() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/v2/health/live", summary="Whether the process is alive")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/readyz", summary="Whether it restores: models have made a step, or the service answers")
    @router.get("/v2/health/ready", summary="The same")
    async def ready() -> dict[str, bool]:
        await _require_ready(inference)
        return {"ready": True}

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics(caller: Annotated[Caller, Depends(ask_admin)]) -> Response:
        return Response(await inference.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _require_ready(inference: Inference, model: str | None = None, version: str = "") -> None:
    if not await inference.is_ready(model, version):
        raise AdmissionRefused("Nothing is served now.", code="model-not-ready", remedy="Ask again.", retry_after_s=1.0)


def _models(inference: Inference, repository: UpriverRepository) -> APIRouter:
    router = APIRouter(prefix="/v2")
    ask, ask_live = _asker(inference, None), _asker(inference, Scope.LIVE)
    backend = inference.backend

    @router.get("", summary="What this server is")
    async def server() -> dict[str, Any]:
        return server_metadata()

    @router.get("/models", summary="The models")
    async def models(caller: Annotated[Caller, Depends(ask)]) -> dict[str, list[str]]:
        return {"models": list(backend.models())}

    @router.get("/models/stats", summary="What all models have done")
    async def all_stats(caller: Annotated[Caller, Depends(ask)]) -> dict[str, Any]:
        return {"model_stats": [inference.statistics.of(name).as_json(name, VERSION) for name in backend.models()]}

    @router.get("/models/{model}/versions", summary="The versions of a model")
    async def versions(model: str, caller: Annotated[Caller, Depends(ask)]) -> dict[str, Any]:
        require_model(backend, model, "")
        return {"name": model, "versions": [VERSION]}

    # Each of these is there with and without a version.
    async def metadata(model: str, caller: Annotated[Caller, Depends(ask)], version: str = "") -> dict[str, Any]:
        require_model(backend, model, version)
        return model_metadata(model, backend.fingerprint(model))

    async def config(model: str, caller: Annotated[Caller, Depends(ask)], version: str = "") -> dict[str, Any]:
        require_model(backend, model, version)
        return model_config(model, inference.settings)

    async def stats(model: str, caller: Annotated[Caller, Depends(ask)], version: str = "") -> dict[str, Any]:
        require_model(backend, model, version)
        return {"model_stats": [inference.statistics.of(model).as_json(model, VERSION)]}

    async def ready(model: str, version: str = "") -> dict[str, Any]:
        await _require_ready(inference, model, version)
        return {"name": model, "ready": True}

    async def infer(
        model: str, request: Request, caller: Annotated[Caller, Depends(ask_live)], version: str = ""
    ) -> Response:
        require_model(backend, model, version)
        with inference.place():
            try:
                return await restored(model, request, caller, version)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it

    async def restored(model: str, request: Request, caller: Caller, version: str) -> Response:
        limit = inference.settings.max_request_bytes
        body = await _body(request, limit)
        encoding, length = (request.headers.get(name) for name in ("content-encoding", HEADER_LENGTH))

        def read() -> Any:
            return read_call(inflate(body, encoding or "", limit), length, model=model, version=version)

        call, wanted = read() if len(body) < _IN_THREAD_BYTES and not encoding else await asyncio.to_thread(read)
        found = repository.get_model(model)
        assert found is not None
        result, _ = await found(call, headers=CallerHeaders(caller))
        if sum(len(tensor.data) for tensor in result.outputs) < _IN_THREAD_BYTES or wanted.binary_default:
            return _written(result, wanted)
        return await asyncio.to_thread(_written, result, wanted)

    for path, handler, method in (
        ("", metadata, "GET"),
        ("/config", config, "GET"),
        ("/stats", stats, "GET"),
        ("/ready", ready, "GET"),
        ("/infer", infer, "POST"),
    ):
        for place in ("/models/{model}", "/models/{model}/versions/{version}"):
            router.add_api_route(place + path, handler, methods=[method], response_model=None)
    return router


def _written(result: Result, wanted: Wanted) -> Response:
    pieces, length = write_result(result, wanted)
    if length is None:
        return Response(pieces[0], media_type="application/json")
    return Response(b"".join(pieces), headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")


async def _body(request: Request, limit_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise too_large(limit_bytes)
    pieces, size = [], 0
    pending: AsyncIterator[bytes] = request.stream()
    try:
        while True:
            async with asyncio.timeout(_BODY_IDLE_S):
                piece = await anext(pending, None)
            if piece is None:
                break
            size += len(piece)
            if size > limit_bytes:
                raise too_large(limit_bytes)
            pieces.append(piece)
    except TimeoutError:
        raise TimedOut(
            f"Nothing of the body came for {_BODY_IDLE_S:g} s.", code="body-late", remedy="Send it at once."
        ) from None
    return b"".join(pieces)


def _repository(inference: Inference, repository: UpriverRepository) -> APIRouter:
    router = APIRouter(prefix="/v2/repository")
    ask, ask_admin = _asker(inference, None), _asker(inference, Scope.ADMIN)
    backend = inference.backend

    @router.post("/index", summary="All models, those that may be loaded included")
    async def index(request: Request, caller: Annotated[Caller, Depends(ask)]) -> list[dict[str, str]]:
        wanted = await _small_object(request)
        return await model_index(inference, ready_only=wanted.get("ready") is True)

    @router.post("/models/{model}/load", summary="Load a model that may be loaded")
    async def load(model: str, request: Request, caller: Annotated[Caller, Depends(ask_admin)]) -> Response:
        await _no_parameters(request)
        await repository.load(model)
        return Response(status_code=200)

    @router.post("/models/{model}/unload", summary="Serve a model no more; its streams keep it until they end")
    async def unload(model: str, request: Request, caller: Annotated[Caller, Depends(ask_admin)]) -> Response:
        await _small_object(request)
        await backend.unload(model)
        return Response(status_code=200)

    return router


async def _no_parameters(request: Request) -> None:
    """A configuration or files that come with a load would be code or weights from a stranger: never taken."""
    if (await _small_object(request)).get("parameters"):
        raise bad("Models are loaded as the operator has configured them.", "Leave out config and files.")


async def _small_object(request: Request) -> dict[str, Any]:
    body = await _body(request, 64 << 10)
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad("The body is no JSON object.", "Send {} or nothing.")
    return value
