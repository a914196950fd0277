"""The predictor's calls: Open Inference Protocol over gRPC, with those that Triton's clients make besides.

The servicer extends that of the `kserve` package. Added are statistics, the repository's index, a model's
configuration, and `ModelStreamInfer`, Triton's only streaming call: the requests of one call are answered one by one in
their order, which suits a sequence. What goes wrong ends a call with a code of its own, see `actors.oip_errors`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import grpc  # type: ignore[import-untyped]

from actors.grpc_channel import peer_address
from actors.inference import Call, Inference, Result
from actors.inference_statistics import DURATIONS
from actors.model_card import model_config, model_index, model_metadata, server_metadata
from actors.oip import VERSION, Tensor, bad
from actors.oip_errors import grpc_code, trailing_metadata
from actors.oip_rest import elements_of, packed_elements
from actors.predictor import CallerHeaders, InferenceServicer, UpriverRepository
from actors.predictor import messages as pb
from actors.predictor_backend import Caller, require_model
from infra.errors import SettingsError
from infra.oip_messages import DATA_TYPES, SERVICE, message_class
from infra.refusals import Refusal, ServiceFailure
from infra.tenants import Scope

if TYPE_CHECKING:
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension

logger = logging.getLogger(__name__)

_CONTENTS: Final = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """End the call with the code of what `method` refuses; the `kserve` package knows no such codes."""

    @wraps(method)
    async def called(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except Refusal as refusal:
            await context.abort(grpc_code(refusal), str(refusal), trailing_metadata(refusal))
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, "The call failed. Try again.")

    return called


def caller_of(context: Any) -> Caller:
    """Return whose call this is.

    Raises:
        Unauthorized: several credentials came together.
    """
    headers: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if not isinstance(value, str):
            continue
        if name in headers and name in ("authorization", "x-api-key"):
            headers["authorization"] = headers["x-api-key"] = ""  # to be refused
            break
        headers[name.lower()] = value
    return Caller.of(headers, peer_address(context.peer()), is_web=False)


class OipServicer(InferenceServicer):
    """All calls of the service. Its methods have the names that the protocol gives them."""

    def __init__(
        self,
        inference: Inference,
        repository: UpriverRepository,
        data_plane: DataPlane,
        extension: ModelRepositoryExtension,
    ) -> None:
        super().__init__(data_plane, extension)
        self._inference, self._repository, self._backend = inference, repository, inference.backend

    async def _ask(self, context: Any, scope: Scope | None = None) -> Caller:
        caller = caller_of(context)
        await self._backend.admit(caller, scope)
        return caller

    @_refusing
    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=await self._inference.is_ready())

    @_refusing
    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=await self._inference.is_ready(request.name, request.version))

    @_refusing
    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(**server_metadata())

    @_refusing
    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await self._ask(context)
        require_model(self._backend, request.name, request.version)
        told = model_metadata(request.name, self._backend.fingerprint(request.name))
        del told["properties"]  # the protocol's message has no place for it; every answer's parameters have
        return pb.ModelMetadataResponse(**told)

    @_refusing
    async def ModelInfer(self, requests: Any, context: Any) -> Any:
        """Answer one request. It is read as a stream of one, so that nothing is read of a caller who is refused."""
        caller = await self._ask(context, Scope.LIVE)
        with self._inference.place():
            request = await anext(aiter(requests), None)
            if request is None:
                raise bad("The call has no request.", "Send one.")
            return await self._infer(request, caller)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Answer the requests of one call one by one; what is refused is told in its place, and the call goes on."""
        answer = message_class("ModelStreamInferResponse")
        try:
            caller = await self._ask(context, Scope.LIVE)
        except Refusal as refusal:
            await context.abort(grpc_code(refusal), str(refusal), trailing_metadata(refusal))
            return
        async for request in requests:
            try:
                with self._inference.place():
                    response = await self._infer(request, caller)
            except Refusal as refusal:
                # The answer names its request, as Triton's does, so that a caller with several under way can tell.
                empty = pb.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield answer(error_message=f"[{refusal.code}] {refusal}", infer_response=empty.SerializeToString())
            else:
                yield answer(infer_response=response.SerializeToString())

    async def _infer(self, request: Any, caller: Caller) -> Any:
        require_model(self._backend, request.model_name, request.model_version)
        model = self._repository.get_model(request.model_name)
        assert model is not None
        call = read_request(request)
        try:
            result, _ = await model(call, headers=CallerHeaders(caller))
        except Refusal:
            raise
        except Exception as error:
            logger.exception("a request failed")
            raise ServiceFailure("The request failed.", code="internal", remedy="Try again.") from error
        return write_response(result)

    @_refusing
    async def ModelConfig(self, request: Any, context: Any) -> Any:
        await self._ask(context)
        require_model(self._backend, request.name, request.version)
        told = model_config(request.name, self._inference.settings)
        for each in (*told["input"], *told["output"]):
            name = each["data_type"].removeprefix("TYPE_")
            each["data_type"] = DATA_TYPES["BYTES" if name == "STRING" else name]
        return message_class("ModelConfigResponse")(config=told)

    @_refusing
    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        await self._ask(context)
        if request.name:
            require_model(self._backend, request.name, request.version)
        found = []
        for name in (request.name,) if request.name else self._backend.models():
            one = self._inference.statistics.of(name)
            durations = {each: {"count": one.durations[each].count, "ns": one.durations[each].ns} for each in DURATIONS}
            found.append(
                {
                    "name": name,
                    "version": VERSION,
                    "last_inference": one.last_ms,
                    "inference_count": one.inferences,
                    "execution_count": one.executions,
                    "inference_stats": durations,
                }
            )
        return message_class("ModelStatisticsResponse")(model_stats=found)

    @_refusing
    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        await self._ask(context)
        return message_class("RepositoryIndexResponse")(
            models=await model_index(self._inference, ready_only=request.ready)
        )

    @_refusing
    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await self._ask(context, Scope.ADMIN)
        name = request.second or request.first
        await self._repository.load(name)
        return message_class("RepositoryModelResponse")(model_name=name, done=True)

    @_refusing
    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await self._ask(context, Scope.ADMIN)
        name = request.second or request.first
        await self._backend.unload(name)
        return message_class("RepositoryModelResponse")(model_name=name, done=True)


def read_request(request: Any) -> Call:
    """Return what a `ModelInferRequest` asks for.

    Raises:
        BadMessage: its inputs and their contents do not belong together.
    """
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise bad(
            f"The request has {len(request.inputs)} inputs and {len(raws)} raw contents.",
            "Send raw contents for all inputs, or for none.",
        )
    inputs = []
    for number, each in enumerate(request.inputs):
        name, datatype = each.name, each.datatype.upper()
        if raws:
            if each.HasField("contents"):
                raise bad(f"The input {name[:60]!r} has contents twice.", "Send raw contents alone.")
            data = elements_of(raws[number], name) if datatype == "BYTES" else raws[number]
        else:
            data = _contents(each, name, datatype)
        inputs.append(Tensor(name, datatype, tuple(each.shape), data))
    return Call(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        parameters={name: _value(name, value) for name, value in request.parameters.items()},
        inputs=inputs,
        outputs=tuple(output.name for output in request.outputs),
        transport="grpc",
    )


def _contents(each: Any, name: str, datatype: str) -> bytes | list[bytes]:
    if datatype not in _CONTENTS:
        raise bad(
            f"The input {name[:60]!r} has the datatype {datatype[:20]!r}.",
            "Send UINT8 pixels, or BYTES.",
            code="bad-datatype",
        )
    values = getattr(each.contents, _CONTENTS[datatype])
    if datatype == "BYTES":
        return list(values)
    try:
        return bytes(values)
    except ValueError:
        raise bad(f"The input {name[:60]!r} is beyond 0 to 255.", "Send UINT8 numbers.", code="bad-datatype") from None


def _value(name: str, parameter: Any) -> Any:
    """Return a parameter's value; None for kinds that only Triton's messages have, such as its `priority`."""
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None and name not in ("priority",):
        raise bad(
            f"The parameter {name[:60]!r} is of a kind that this protocol does not have.",
            "Send a bool, an int64 or a string.",
            code="bad-parameter",
        )
    return None if kind is None else getattr(parameter, kind)


def write_response(result: Result) -> Any:
    """Return the `ModelInferResponse`; its data is raw, whatever form the request's had, as Triton answers."""
    response = pb.ModelInferResponse(model_name=result.model, model_version=result.version, id=result.id)
    for name, value in result.parameters.items():
        response.parameters[name].string_param = value
    for tensor in result.outputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        elements = tensor.data
        response.raw_output_contents.append(
            b"".join(packed_elements(elements)) if isinstance(elements, list) else bytes(elements)
        )
    return response


def add_to_server(servicer: OipServicer, server: grpc.aio.Server) -> None:
    """Register all calls of the service, those that the `kserve` package does not know included."""

    def unary(name: str, request: Any, response: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )

    handlers = {
        name: unary(name, getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response"))
        for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
    }
    # One message or a stream of one are the same on the wire.
    handlers["ModelInfer"] = grpc.stream_unary_rpc_method_handler(
        servicer.ModelInfer,
        request_deserializer=pb.ModelInferRequest.FromString,
        response_serializer=pb.ModelInferResponse.SerializeToString,
    )
    for name in ("ModelConfig", "ModelStatistics", "RepositoryIndex"):
        handlers[name] = unary(name, message_class(f"{name}Request"), message_class(f"{name}Response"))
    for name in ("RepositoryModelLoad", "RepositoryModelUnload"):
        handlers[name] = unary(name, message_class("RepositoryModelRequest"), message_class("RepositoryModelResponse"))
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.ModelStreamInfer,
        request_deserializer=pb.ModelInferRequest.FromString,
        response_serializer=message_class("ModelStreamInferResponse").SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


async def start_grpc(
    servicer: OipServicer, address: str, *, max_request_bytes: int, max_result_bytes: int, most_calls: int
) -> grpc.aio.Server:
    """Return a server that listens at ``host:port``.

    Args:
        most_calls: at a time, those included that only ask; more end with RESOURCE_EXHAUSTED.

    Raises:
        SettingsError: it cannot listen there.
    """
    server = grpc.aio.server(
        maximum_concurrent_rpcs=most_calls,
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", max_result_bytes + (1 << 20)),
            ("grpc.so_reuseport", 0),  # a second process on the port is an error, not half of its calls
        ],
    )
    add_to_server(servicer, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise port_taken(address) from None
    await server.start()
    return server


def port_taken(address: str) -> SettingsError:
    """Return the error of a server that cannot listen."""
    return SettingsError(
        f"The address {address} cannot be listened on.",
        code="port-taken",
        remedy="Choose another port, or stop what listens there; see --http-port and --grpc-port.",
    )


async def stop_grpc(server: grpc.aio.Server, grace_s: float) -> None:
    """Take no more calls, and end when those that run are answered, or after so long."""
    await asyncio.shield(server.stop(grace_s))
