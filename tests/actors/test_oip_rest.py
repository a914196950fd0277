"""Bodies of the Open Inference Protocol: what is read from them, what is refused, what is written."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.inference import Call, Result
from actors.oip import Clip, ClipLimits, Tensor, clip_of
from actors.oip_parameters import CallParameters
from actors.oip_rest import Wanted, elements_of, inflate, packed_elements, read_call, write_result
from infra.refusals import BadMessage, FrameTooLarge, Refusal

LIMITS = ClipLimits(max_frames=4, max_result_bytes=1 << 20)
PIXELS = bytes(range(256)) * 3


def body(*inputs: dict[str, Any], binary: bytes = b"", **more: Any) -> tuple[bytes, str | None]:
    head = json.dumps({"inputs": list(inputs), **more}).encode()
    return head + binary, str(len(head)) if binary else None


def read(content: tuple[bytes, str | None]) -> tuple[Call, Wanted]:
    return read_call(*content, model="m", version="")


def binary_frame(size: int = 768, **more: Any) -> dict[str, Any]:
    return {
        "name": "frame",
        "datatype": "UINT8",
        "shape": [16, 16, 3],
        "parameters": {"binary_data_size": size},
        **more,
    }


def test_binary_data_stays_a_view_of_the_body() -> None:
    content = body(binary_frame(), binary=PIXELS)
    call, wanted = read(content)
    data = call.inputs[0].data
    assert isinstance(data, memoryview) and data.obj is content[0] and bytes(data) == PIXELS
    assert call.frame_as_json and not wanted.binary_default
    clip = clip_of(call.inputs, LIMITS)
    assert isinstance(clip, Clip) and clip.single and clip.sizes == ((16, 16),)


def test_numbers_and_bytes_give_the_same_frame() -> None:
    rows = np.frombuffer(PIXELS, np.uint8).reshape(16, 16, 3)
    for data in (rows.tolist(), rows.ravel().tolist()):
        call, _ = read(body({"name": "frame", "datatype": "UINT8", "shape": [16, 16, 3], "data": data}))
        assert bytes(call.inputs[0].data) == PIXELS  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ((b"{", None), "bad-request"),
        ((b"[]", None), "bad-request"),
        ((b"[" * 100_000, None), "bad-request"),
        ((b"{}", "x"), "bad-request"),
        ((b"{}", "3"), "bad-request"),
        (body(*[binary_frame()] * 17, binary=b""), "bad-request"),
        (body(binary_frame(769), binary=PIXELS), "bad-binary-size"),
        (body(binary_frame(-1), binary=PIXELS), "bad-binary-size"),
        (body(binary_frame(True), binary=PIXELS), "bad-binary-size"),
        (body(binary_frame(700), binary=PIXELS), "bad-binary-size"),
        (body(binary_frame(shape=[1e3]), binary=PIXELS), "bad-shape"),
        (body(binary_frame(shape=[2**40]), binary=PIXELS), "bad-shape"),
        (body({"name": "frame", "datatype": "UINT8", "shape": [2], "data": [1, 256]}), "bad-datatype"),
        (body({"name": "frame", "datatype": "UINT8", "shape": [2], "data": [1, 0.5]}), "bad-shape"),
        (body({"name": "frame", "datatype": "UINT8", "shape": [2], "data": [1, [2]]}), "bad-shape"),
        (body({"name": "frame", "datatype": "UINT8", "shape": [3], "data": [1, 2]}), "bad-shape"),
        (body({"name": "frame", "datatype": "FP32", "shape": [1], "data": [1]}), "bad-datatype"),
        (body({"name": "frame", "datatype": "UINT8", "shape": [1]}), "bad-request"),
        (
            body({"name": "f", "datatype": "UINT8", "shape": [1], "parameters": {"shared_memory_region": "x"}}),
            "bad-request",
        ),
    ],
)  # fmt: skip
def test_what_is_no_request(content: tuple[bytes, str | None], code: str) -> None:
    with pytest.raises(BadMessage) as caught:
        read(content)
    assert caught.value.code == code


def test_much_json_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameTooLarge, match="JSON"):
        read((b" " * ((16 << 20) + 1), None))


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 300).map(str)))
@settings(max_examples=200, deadline=None)
def test_no_body_is_answered_but_by_a_refusal(content: bytes, length: str | None) -> None:
    try:
        read((content, length))
    except Refusal:
        pass


def test_encodings() -> None:
    content = b"frame" * 100
    assert inflate(gzip.compress(content), "GZIP", 1000) == inflate(zlib.compress(content), "deflate", 1000) == content
    assert inflate(content, "", 1) == content  # its bound is checked while it is read
    for wrong, encoding, code in (
        (content, "gzip", "body-damaged"),
        (gzip.compress(content)[:-3], "gzip", "body-damaged"),
        (gzip.compress(content) + b"x", "gzip", "body-damaged"),
        (content, "br", "encoding-unknown"),
    ):
        with pytest.raises(BadMessage) as caught:
            inflate(wrong, encoding, 1000)
        assert caught.value.code == code
    with pytest.raises(FrameTooLarge):
        inflate(gzip.compress(bytes(10_000_000)), "gzip", 1000)


def test_elements() -> None:
    elements = [b"", b"abc", bytes(300)]
    packed = b"".join(packed_elements(elements))
    assert elements_of(packed, "frame") == elements
    for wrong in (packed[:-1], packed + b"\1", b"\1\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(BadMessage):
            elements_of(wrong, "frame")


def test_answers() -> None:
    outputs = [
        Tensor("frame", "UINT8", (1, 2, 3), bytes(range(6))),
        Tensor("level", "INT32", (1,), np.array([4], np.int32).tobytes()),
    ]
    result = Result("m", "1", "7", {}, outputs)
    pieces, length = write_result(result, Wanted({"level": False}, True))
    told = json.loads(pieces[0])
    assert length == len(pieces[0]) and b"".join(pieces[1:]) == bytes(range(6)) and told["id"] == "7"
    assert told["outputs"][0]["parameters"] == {"binary_data_size": 6} and "data" not in told["outputs"][0]
    assert told["outputs"][1]["data"] == [4]
    (only,), length = write_result(result, Wanted({}, False))
    assert length is None and json.loads(only)["outputs"][0]["data"] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(BadMessage, match="JSON cannot carry"):
        write_result(Result("m", "1", "", {}, [Tensor("frame", "BYTES", (1,), [b"x"])]), Wanted({}, False))


def test_parameters() -> None:
    read_parameters = CallParameters.read
    for none in ({}, {"sequence_id": 0}, {"sequence_id": ""}, {"sequence_id": "0"}, {"sequence_id": None}):
        assert read_parameters(none).sequence_id == ""
    assert read_parameters({"sequence_id": 5}).sequence_id == read_parameters({"sequence_id": "5"}).sequence_id == "5"
    assert read_parameters({"sequence_id": 2**63}).sequence_id == str(2**63)
    assert read_parameters({"timeout": 1500}).timeout_s == 0.0015 and read_parameters({"timeout": 0}).timeout_s is None
    for wrong in (
        {"sequence_id": True},
        {"sequence_id": 1.5},
        {"sequence_id": "x" * 129},
        {"sequence_start": True},
        {"sequence_end": True, "sequence_id": 0},
        {"timeout": -1},
        {"scale": 1},
        {"output_codec": "h264"},
        {"seed": 2**63},
        {"seed ": 1},
    ):
        with pytest.raises(BadMessage):
            read_parameters(wrong)
