"""docs/reference/protocol.md says what infra/protocol.py does: fields, numbers, and three messages byte by byte."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra import protocol
from infra.protocol import DropReason, Flag, FrameHeader
from infra.refusals import KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/protocol.md").read_text()
JPEG = bytes.fromhex("ffd8ffe000104a464946000101010060")
EXAMPLES = {
    "sent": FrameHeader(7, 280_000, receipt=0x5EEDC0DE, acknowledged=6).pack(JPEG),
    "restored": FrameHeader(
        7, 280_000, level=4, index=6, receipt=0x0BADCAFE, acknowledged=3, granted=22,
        decode_us=412, queue_us=35, step_us=41_000, encode_us=2210,
    ).pack(JPEG),
    "dropped": FrameHeader(
        8, 320_000, Flag.DROPPED, reason=DropReason.LATE, receipt=0x7E57AB1E, acknowledged=3, granted=23,
        decode_us=400,
    ).pack(),
}  # fmt: skip


def dump(data: bytes) -> str:
    """Return bytes as `hexdump -C` shows them."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        numbers = "  ".join(row[half : half + 8].hex(" ") for half in (0, 8))
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:08x}  {numbers}  |{letters}|\n")
    return "".join(lines)


def rows(table: str) -> list[list[str]]:
    """Return the cells of the table whose head begins so."""
    (found,) = re.findall(rf"^{re.escape(table)}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_the_code_makes(name: str) -> None:
    (shown,) = re.findall(rf"<!-- example: {name} -->\n```text\n(.*?)```", PAGE, re.S)
    assert shown == dump(EXAMPLES[name])


def test_the_header_has_the_fields_of_the_table() -> None:
    fields = {row[2]: (int(row[0]), row[1]) for row in rows("| offset | type")}
    assert set(FrameHeader.__slots__) <= set(fields)
    sizes = {"2 bytes": 2, "u8": 1, "u16": 2, "u32": 4, "u64": 8, "i64": 8}
    end = 0
    for offset, kind in fields.values():
        assert offset == end
        end += sizes[kind]
    assert end == protocol.HEADER_BYTES
    for name in FrameHeader.__slots__:  # each field lies where the table says: put a 1 in and look
        offset, kind = fields[name]
        value = {"flags": Flag.KEY, "reason": DropReason.NEWER}.get(name, 1)
        packed = FrameHeader(**{"id": 0, name: value}).pack()
        plain = FrameHeader(0).pack()
        assert packed[offset + sizes[kind] - 1] == 1
        assert [n for n in range(64) if packed[n] != plain[n]] == [offset + sizes[kind] - 1]


def test_flags_and_reasons_have_the_numbers_of_the_code() -> None:
    assert {(names(row[0])[0], int(row[1])) for row in rows("| flag | value")} == {(f.name, f.value) for f in Flag}
    assert {(names(row[0])[0], int(row[1])) for row in rows("| reason | value")} == {
        (reason.name, reason.value) for reason in DropReason
    }


@pytest.mark.parametrize(("table", "model"), [("hello", protocol.Hello), ("welcome", protocol.Welcome)])
def test_every_field_of_hello_and_welcome_is_described(table: str, model: type[BaseModel]) -> None:
    described = [name for row in rows(f"| field of `{table}`") for name in names(row[0])]
    assert sorted(described) == sorted(model.model_fields)


def test_every_control_message_is_described_with_its_fields() -> None:
    client = {names(row[0])[0]: set(names(row[1])) for row in rows("| from the client | fields")}
    service = {names(row[0])[0]: set(names(row[1])) for row in rows("| from the service | fields")}
    sent = (protocol.Reset, protocol.Resize, protocol.AskStats, protocol.Delivered, protocol.Close)
    told = (protocol.Stats, protocol.Durable, protocol.Granted, protocol.Drain, protocol.Closed)
    for table, models in ((client, sent), (service, told)):
        for model in models:
            fields = dict(model.model_fields)
            assert table[fields.pop("type").default] == set(fields)
    assert len(client) == len(sent) and len(service) == len(told) + 1  # refused has a section of its own


def test_every_refusal_is_described_with_its_codes() -> None:
    described = {names(row[0])[0]: (int(row[1]), int(row[2])) for row in rows("| kind | close code")}
    for name, kind in KINDS.items():
        assert described[name] == (kind.close_code, kind.http_status)


def test_the_limits_are_those_of_the_code() -> None:
    limits = {row[0]: row[1] for row in rows("| limit | value")}
    assert limits["time until the hello"] == f"{protocol.HELLO_TIMEOUT_S:g} s"
    assert limits["text messages"] == f"{protocol.CONTROL_MESSAGE_LIMIT} bytes"
    assert limits["binary messages over WebSocket"].startswith(f"{protocol.WEBSOCKET_MESSAGE_LIMIT} bytes")
    sides = f"{protocol.SMALLEST_SIDE} to {protocol.LARGEST_SIDE}"
    assert limits["a side of a frame"].startswith(sides) and sides in PAGE.split("| limit | value")[0]
    assert f"`{protocol.SUBPROTOCOL}`" in PAGE


PREDICTOR = ("inference", "oip", "predictor", "sequences")
"""How the modules begin whose codes are on the predictor's page."""


def refusal_codes() -> Iterator[tuple[str, str, str]]:
    """Yield place, kind and code of every refusal that the code makes with a code of its own."""
    for path in (file for package in ("actors", "infra") for file in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
                continue
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    yield f"{path.name}:{node.lineno}", node.func.id, str(keyword.value.value)


def test_every_code_is_in_the_table_with_its_kind() -> None:
    told = {code: names(row[1]) for row in rows("| code | kind") for code in re.findall(r"`([\w-]+)`", row[0])}
    made = [one for one in refusal_codes() if not one[0].startswith(PREDICTOR)]
    assert len(made) > 20
    assert [one for one in made if told.get(one[2]) != [one[1]]] == []


def test_every_code_of_the_predictor_is_on_its_page() -> None:
    page = (ROOT / "docs/predictor.md").read_text()
    modules = [path for path in (ROOT / "actors").glob("*.py") if path.name.startswith(PREDICTOR)]
    codes = {code for path in modules for code in re.findall(r'\bcode="([\w-]+)"', path.read_text())}
    codes -= {"gateway-unsafe", "kserve-missing", "port-taken"}  # said to who starts it, not to its callers
    assert len(codes) > 20
    assert {code for code in codes if f"`{code}`" not in page} == set()
