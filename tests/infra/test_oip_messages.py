"""Our messages of Triton's service are Triton's: same fields, same numbers, same kinds."""

from __future__ import annotations

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from infra.oip_messages import DATA_TYPES, MESSAGES, message_class

ELSEWHERE = {
    "ModelIndex": service_pb2.RepositoryIndexResponse.ModelIndex,
    "RepositoryModelRequest": None,  # two messages in one, see there
    "RepositoryModelResponse": None,  # Triton's is empty
}


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_are_tritons(name: str) -> None:
    theirs = ELSEWHERE.get(name, getattr(service_pb2, name, None) or getattr(model_config_pb2, name, None))
    if theirs is None:
        assert name in ELSEWHERE
        return
    for field in message_class(name).DESCRIPTOR.fields:
        other = theirs.DESCRIPTOR.fields_by_name[field.name]
        assert (field.number, field.is_repeated) == (other.number, other.is_repeated)
        embedded = (field.name, other.type) in (("infer_response", other.TYPE_MESSAGE), ("data_type", other.TYPE_ENUM))
        assert field.type == other.type or embedded, field.name  # these are alike on the wire


def test_the_model_is_named_where_triton_names_it() -> None:
    asked = service_pb2.RepositoryModelLoadRequest(model_name="film").SerializeToString()
    read = message_class("RepositoryModelRequest").FromString(asked)
    assert (read.second or read.first) == "film"


def test_data_types_are_tritons() -> None:
    theirs = dict(model_config_pb2.DataType.items())
    assert {name: theirs["TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"] for name in DATA_TYPES} == DATA_TYPES
