"""The protocol over gRPC: what is written here by hand is what `live.proto` says."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

from infra.live_grpc import DESCRIPTOR, Packet, pack, unpack

PROTO = Path(__file__).parents[2] / "infra" / "live.proto"


def test_the_proto_file_says_the_same() -> None:
    text = re.sub(r"//.*", "", PROTO.read_text())
    assert f"package {DESCRIPTOR.package};" in text
    fields = dict(re.findall(r"(?:string|bytes) (\w+) = (\d+);", text))
    message = DESCRIPTOR.message_types_by_name["Packet"]
    assert {field.name: str(field.number) for field in message.fields} == fields
    (method,) = DESCRIPTOR.services_by_name["Live"].methods
    assert f"rpc {method.name}(stream Packet) returns (stream Packet);" in text


def test_packets_travel_by_wire_and_by_pickle() -> None:
    for message in ("{}", b"\x00frame", b""):
        packet = Packet.FromString(pack(message).SerializeToString())
        assert unpack(packet) == message
        assert unpack(pickle.loads(pickle.dumps(packet))) == message
