"""The live protocol over gRPC: messages, servicer and client wire. `live.proto` is the same for other languages.

gRPC carries frames above the 16 MiB of a WebSocket message. The message classes are made from a descriptor written
here, as protoc's output would do it, so that no generated code has to be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Final

import grpc  # type: ignore[import-untyped]
from google.protobuf import descriptor_pb2, descriptor_pool  # type: ignore[import-untyped]
from google.protobuf.internal import builder  # type: ignore[import-untyped]

SERVICE: Final = "upriver.live.v1.Live"
METHOD: Final = "Stream"
MESSAGE_LIMIT: Final = 128 * 1024 * 1024  # a raw frame of 7680x4320 has 95 MiB
SERVICER_FUNCTION: Final = "infra.live_grpc.add_LiveServicer_to_server"  # as Ray Serve is told of it


def _describe() -> bytes:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="upriver/live/v1/live.proto", package="upriver.live.v1", syntax="proto3"
    )
    packet = file.message_type.add(name="Packet")
    packet.oneof_decl.add(name="content")
    for number, (name, kind) in enumerate((("control", field.TYPE_STRING), ("frame", field.TYPE_BYTES)), 1):
        packet.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL, oneof_index=0)
    method = file.service.add(name="Live").method.add(name=METHOD)
    method.input_type = method.output_type = ".upriver.live.v1.Packet"
    method.client_streaming = method.server_streaming = True
    return file.SerializeToString()


DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(_describe())
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, __name__, globals())
Packet: Any = globals()["Packet"]  # its name here is how it is found again where it arrives by pickle


def add_LiveServicer_to_server(servicer: Any, server: Any) -> None:
    """Register a servicer with a method `Stream`; what Ray Serve's gRPC ingress asks for."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.Stream, request_deserializer=Packet.FromString, response_serializer=Packet.SerializeToString
    )
    handlers = {METHOD: handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if hasattr(server, "add_registered_method_handlers"):
        server.add_registered_method_handlers(SERVICE, handlers)


def pack(message: str | bytes) -> Any:
    """Return a message as a packet."""
    return Packet(control=message) if isinstance(message, str) else Packet(frame=message)


def unpack(packet: Any) -> str | bytes:
    """Return the message in a packet; an empty one is an empty frame, which the protocol refuses."""
    message: str | bytes = packet.control if packet.WhichOneof("content") == "control" else packet.frame
    return message


class _GrpcWire:
    def __init__(self, channel: grpc.aio.Channel, call: Any) -> None:
        self._channel, self._call = channel, call

    async def send(self, message: str | bytes) -> None:
        try:
            await self._call.write(pack(message))
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise ConnectionError(str(error)) from error
        except asyncio.CancelledError:
            if _is_wanted():
                raise ConnectionError("the call was cancelled") from None
            raise

    async def receive(self) -> str | bytes | None:
        try:
            packet = await self._call.read()
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            if _is_wanted():
                return None
            raise
        return None if packet is grpc.aio.EOF else unpack(packet)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)


def _is_wanted() -> bool:
    """Whether the present task goes on: then a cancellation that it meets is that of its call, by `close` elsewhere.

    The call itself cannot be asked: it does not say that it is cancelled before its status has come.
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling()


async def connect_grpc(url: str, application: str | None = None, headers: Mapping[str, str] | None = None) -> _GrpcWire:
    """Connect to ``grpc://host:port``, or ``grpcs://`` with TLS.

    Args:
        application: name of the Serve application, where the port serves several.
        headers: sent as metadata with the call, names in lower case.

    Raises:
        OSError: nobody is there.
    """
    scheme, _, address = url.partition("://")
    options = [("grpc.max_send_message_length", MESSAGE_LIMIT), ("grpc.max_receive_message_length", MESSAGE_LIMIT)]
    if scheme == "grpcs":
        channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
    else:
        channel = grpc.aio.insecure_channel(address, options=options)
    stream = channel.stream_stream(
        f"/{SERVICE}/{METHOD}", request_serializer=Packet.SerializeToString, response_deserializer=Packet.FromString
    )
    metadata = tuple((headers or {}).items()) + ((("application", application),) if application else ())
    try:
        await channel.channel_ready()
        return _GrpcWire(channel, stream(metadata=metadata))
    except BaseException:
        with contextlib.suppress(Exception):
            await channel.close(None)
        raise
