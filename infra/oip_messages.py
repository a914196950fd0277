"""Messages of Triton's gRPC service that the `kserve` package's copy of it does not have.

They belong to the same service, `inference.GRPCInferenceService`, and carry the field numbers of Triton's
`grpc_service.proto` and `model_config.proto`. They are made from a descriptor written here, in a pool of its own:
Triton's own client and the `kserve` package each register files of one name with one package, so neither can share a
process with the other, and these must not add a third.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

SERVICE: Final = "inference.GRPCInferenceService"
_PACKAGE: Final = "upriver.oip"
_Field = descriptor_pb2.FieldDescriptorProto
_TEXT, _FLAG, _U64, _I64, _I32, _RAW = (
    _Field.TYPE_STRING, _Field.TYPE_BOOL, _Field.TYPE_UINT64, _Field.TYPE_INT64, _Field.TYPE_INT32, _Field.TYPE_BYTES,
)  # fmt: skip
_Kind = int | str  # a scalar type, or the name of a message; "*" in front of it: repeated
_DURATIONS: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip

# By message: field, number, kind.
MESSAGES: Final[dict[str, tuple[tuple[str, int, _Kind], ...]]] = {
    "StatisticDuration": (("count", 1, _U64), ("ns", 2, _U64)),
    "InferStatistics": tuple((name, number, "StatisticDuration") for number, name in enumerate(_DURATIONS, 1)),
    "ModelStatistics": (
        ("name", 1, _TEXT),
        ("version", 2, _TEXT),
        ("last_inference", 3, _U64),
        ("inference_count", 4, _U64),
        ("execution_count", 5, _U64),
        ("inference_stats", 6, "InferStatistics"),
    ),
    "ModelStatisticsRequest": (("name", 1, _TEXT), ("version", 2, _TEXT)),
    "ModelStatisticsResponse": (("model_stats", 1, "*ModelStatistics"),),
    "ModelIndex": (("name", 1, _TEXT), ("version", 2, _TEXT), ("state", 3, _TEXT), ("reason", 4, _TEXT)),
    "RepositoryIndexRequest": (("repository_name", 1, _TEXT), ("ready", 2, _FLAG)),
    "RepositoryIndexResponse": (("models", 1, "*ModelIndex"),),
    # Triton has the repository's name first, the kserve package the model's; whichever comes last is the model's.
    "RepositoryModelRequest": (("first", 1, _TEXT), ("second", 2, _TEXT)),
    "RepositoryModelResponse": (("model_name", 1, _TEXT), ("done", 2, _FLAG)),
    # A message and its bytes are the same on the wire: this holds a `ModelInferResponse` that is written already.
    "ModelStreamInferResponse": (("error_message", 1, _TEXT), ("infer_response", 2, _RAW)),
    "ModelInput": (("name", 1, _TEXT), ("data_type", 2, _I32), ("dims", 4, "*int64"), ("optional", 8, _FLAG)),
    "ModelOutput": (("name", 1, _TEXT), ("data_type", 2, _I32), ("dims", 3, "*int64")),
    "ModelSequenceBatching": (("max_sequence_idle_microseconds", 1, _U64),),
    "ModelConfig": (
        ("name", 1, _TEXT),
        ("platform", 2, _TEXT),
        ("max_batch_size", 4, _I32),
        ("input", 5, "*ModelInput"),
        ("output", 6, "*ModelOutput"),
        ("sequence_batching", 13, "ModelSequenceBatching"),
        ("backend", 17, _TEXT),
    ),
    "ModelConfigRequest": (("name", 1, _TEXT), ("version", 2, _TEXT)),
    "ModelConfigResponse": (("config", 1, "ModelConfig"),),
}
DATA_TYPES: Final = {"BOOL": 1, "UINT8": 2, "INT32": 8, "INT64": 9, "BYTES": 13}  # inference.DataType


def _describe() -> bytes:
    file = descriptor_pb2.FileDescriptorProto(name="upriver/oip.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
            if isinstance(kind, str) and kind.startswith("*"):
                field.label, kind = _Field.LABEL_REPEATED, kind[1:]
            if kind == "int64":
                field.type = _I64
            elif isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = kind
    return bytes(file.SerializeToString())


_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(_describe())
_CLASSES: Final = {
    name: message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in MESSAGES
}


def message_class(name: str) -> Any:
    """Return the class of a message in `MESSAGES`."""
    return _CLASSES[name]
