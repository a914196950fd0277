"""Bodies of inference requests and answers over REST: JSON, and the binary tensor data behind it.

Written for frames: pixels stay bytes, as views of the body, and are never lists of numbers unless the caller sends or
wants JSON. Everything is bounded before it is allocated. Knows no web framework and not the `kserve` package.
Source: the Open Inference Protocol, and Triton's `extension_binary_data`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from actors.inference import Call, Result
from actors.oip import FRAME, Payload, Tensor, array_of, bad, files_as_json
from infra.refusals import FrameTooLarge

HEADER_LENGTH: Final = "inference-header-content-length"
_MOST_TENSORS: Final = 16
_LARGEST_JSON: Final = 16 << 20  # bytes of a request: each number in it becomes an object of many more
_LONGEST_SHAPE: Final = 8
_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}  # of zlib: with gzip's header; with zlib's (RFC 9110, 8.4.1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the answer is to be written.

    Attributes:
        binary: by output, whether its data goes behind the JSON. binary_default: of the others.
    """

    binary: Mapping[str, bool]
    binary_default: bool


def inflate(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Return a body without its encoding (RFC 9110, section 8.4).

    Raises:
        BadMessage: an encoding that is not known, or damaged. FrameTooLarge: it inflates to more than the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise bad(
            f"The encoding {encoding[:40]!r} is not known here.",
            "Send gzip or deflate, or the body as it is: frames get hardly smaller.",
            code="encoding-unknown",
        )
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = inflater.decompress(body, limit_bytes + 1)
    except zlib.error:
        raise bad(f"The body is no {encoding}.", "Send it whole.", code="body-damaged") from None
    if len(content) > limit_bytes:
        raise too_large(limit_bytes)
    if not inflater.eof or inflater.unused_data:
        raise bad(f"The body is no whole {encoding}.", "Send it whole, and nothing behind it.", code="body-damaged")
    return content


def too_large(limit_bytes: int) -> FrameTooLarge:
    """Return the refusal of a body."""
    return FrameTooLarge(
        f"The request has more than {limit_bytes} bytes.",
        code="request-too-large",
        limit=f"{limit_bytes} bytes",
        remedy="Send fewer frames in a request, as a sequence, or compressed pictures.",
    )


def read_call(body: bytes, header_length: str | None, *, model: str, version: str) -> tuple[Call, Wanted]:
    """Return what a body asks for, and how it wants the answer.

    Args:
        header_length: bytes of the JSON, where binary data follows it; None: all is JSON.

    Raises:
        BadMessage: not a request of this protocol. The message names the place.
    """
    size = len(body) if header_length is None else _length(header_length, len(body))
    if size > _LARGEST_JSON:
        raise FrameTooLarge(
            f"The JSON of the request has {size} bytes.",
            code="json-too-large",
            limit=f"{_LARGEST_JSON} bytes",
            remedy="Send frames as binary data.",
        )
    try:
        told = json.loads(memoryview(body)[:size].tobytes())
    except (ValueError, RecursionError):
        raise bad("The request is not JSON.", f"If binary data follows it, send {HEADER_LENGTH}.") from None
    told = _object(told, "the request")
    rest = memoryview(body)[size:]
    tensors, used = [], 0
    for number, each in enumerate(_few(told.get("inputs", []), "inputs")):
        tensor, taken = _input(_object(each, f"inputs[{number}]"), rest[used:])
        tensors.append(tensor)
        used += taken
    if used != len(rest):
        raise bad(
            f"{len(rest)} bytes follow the JSON; the inputs name {used}.",
            "Give each input its binary_data_size.",
            code="bad-binary-size",
        )
    parameters = _object(told.get("parameters") or {}, "parameters")
    outputs, binary = [], {}
    for number, each in enumerate(_few(told.get("outputs") or [], "outputs")):
        output = _object(each, f"outputs[{number}]")
        name = _text(output.get("name"), f"outputs[{number}].name")
        outputs.append(name)
        wants = _object(output.get("parameters") or {}, f"outputs[{number}].parameters")
        if "classification" in wants:
            raise bad("Outputs are not classified here.", "Leave out classification.")
        if "binary_data" in wants:
            binary[name] = wants["binary_data"] is True
    wanted = Wanted(binary, parameters.get("binary_data_output") is True)
    call = Call(
        model=model,
        version=version,
        id=_text(told.get("id") or "", "id"),
        parameters=parameters,
        inputs=tensors,
        outputs=tuple(outputs),
        frame_as_json=not wanted.binary.get(FRAME, wanted.binary_default) and (not outputs or FRAME in outputs),
    )
    return call, wanted


def write_result(result: Result, wanted: Wanted) -> tuple[list[Payload], int | None]:
    """Return the pieces of an answer's body, and the bytes of its JSON where binary data follows it.

    Raises:
        BadMessage: pictures are wanted as JSON, which has no bytes.
    """
    outputs, pieces = [], []
    for tensor in result.outputs:
        shown: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if wanted.binary.get(tensor.name, wanted.binary_default):
            data = _packed(tensor)
            shown["parameters"] = {"binary_data_size": sum(len(piece) for piece in data)}
            pieces.extend(data)
        elif tensor.datatype == "BYTES":
            raise files_as_json()
        else:
            shown["data"] = array_of(tensor).ravel().tolist()
        outputs.append(shown)
    told = {
        "model_name": result.model,
        "model_version": result.version,
        **({"id": result.id} if result.id else {}),
        "parameters": dict(result.parameters),
        "outputs": outputs,
    }
    head = json.dumps(told, separators=(",", ":")).encode()
    binary = any("parameters" in output for output in outputs)
    return [head, *pieces], len(head) if binary else None


def elements_of(data: Payload, name: str) -> list[bytes]:
    """Return the elements of a BYTES tensor: each has four bytes of length in front.

    Raises:
        BadMessage: they do not fill it.
    """
    view, at, found = memoryview(data), 0, []
    while at < len(view):
        end = at + 4 + int.from_bytes(view[at : at + 4], "little")
        if at + 4 > len(view) or end > len(view):
            raise bad(f"The elements of {name[:60]!r} end early.", "Write their lengths in front.", code="bad-bytes")
        found.append(bytes(view[at + 4 : end]))
        at = end
    return found


def packed_elements(elements: list[bytes]) -> list[Payload]:
    """Return a BYTES tensor in pieces, lengths in front of its elements."""
    return [piece for element in elements for piece in (len(element).to_bytes(4, "little"), element)]


def _packed(tensor: Tensor) -> list[Payload]:
    return packed_elements(tensor.data) if isinstance(tensor.data, list) else [tensor.data]


def _input(told: dict[str, Any], rest: memoryview) -> tuple[Tensor, int]:
    name = _text(told.get("name"), "an input's name")
    datatype = _text(told.get("datatype"), f"the datatype of {name[:60]!r}").upper()
    shape = told.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > _LONGEST_SHAPE
        or any(not isinstance(side, int) or isinstance(side, bool) or not 0 <= side < 2**31 for side in shape)
    ):
        raise bad(f"The shape of {name[:60]!r} is no list of a few numbers.", "Send its sides.", code="bad-shape")
    parameters = _object(told.get("parameters") or {}, f"the parameters of {name[:60]!r}")
    size = parameters.get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
            raise bad(
                f"The input {name[:60]!r} has binary_data_size={size!r}, and {len(rest)} bytes are left.",
                "Send as many bytes as it says.",
                code="bad-binary-size",
            )
        data = rest[:size]
        return Tensor(name, datatype, tuple(shape), elements_of(data, name) if datatype == "BYTES" else data), size
    for unknown in parameters:
        raise bad(
            f"The input {name[:60]!r} has the parameter {unknown[:60]!r}.",
            "Send data as JSON or binary_data_size; shared memory is not offered.",
        )
    values = told.get("data")
    if not isinstance(values, list):
        raise bad(f"The input {name[:60]!r} has no data.", "Send data, or binary_data_size and the bytes.")
    return Tensor(name, datatype, tuple(shape), _from_json(name, datatype, shape, values)), 0


def _from_json(name: str, datatype: str, shape: list[int], values: list[Any]) -> Payload | list[bytes]:
    if datatype == "BYTES":
        if not all(isinstance(value, str) for value in values):
            raise bad(f"The data of {name[:60]!r} is no list of texts.", "Send BYTES as texts, or as binary data.")
        return [value.encode() for value in values]
    if datatype != "UINT8":
        raise bad(
            f"The input {name[:60]!r} has the datatype {datatype[:20]!r}.",
            "Send UINT8 pixels, or BYTES.",
            code="bad-datatype",
        )
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.dtype.kind not in "iu" or array.size != math.prod(shape) or array.size == 0:
        raise bad(f"The data of {name[:60]!r} is no UINT8 of its shape.", "Send whole numbers.", code="bad-shape")
    if array.min() < 0 or array.max() > 255:
        raise bad(f"The data of {name[:60]!r} is beyond 0 to 255.", "Send UINT8 numbers.", code="bad-datatype")
    return cast("Payload", array.astype(np.uint8).tobytes())


def _length(text: str, most: int) -> int:
    size = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not 0 < size <= most:
        raise bad(
            f"{HEADER_LENGTH} is {text[:20]!r}, and the body has {most} bytes.", "Send the bytes of the JSON alone."
        )
    return size


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(f"{what} is no JSON object.".capitalize(), "See docs/predictor.md.")
    return value


def _few(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_TENSORS:
        raise bad(f"{what} is no list of at most {_MOST_TENSORS}.".capitalize(), "See docs/predictor.md.")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise bad(f"{what} is no text.".capitalize(), "See docs/predictor.md.")
    return value
