"""List files: tables that name the videos of a job one by one, with options of their own where they need any.

A list is CSV, JSON Lines or Parquet. Its columns: `source`, `destination`, `priority` and the options in `OPTIONS`;
`source` alone is needed, and an empty cell means the job's own value. Knows the table, not the videos: whether they
exist is seen later.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from infra.settings import Settings
from infra.storage import storage_for
from jobs.errors import UsageError

LIST_SUFFIXES = frozenset({".csv", ".jsonl", ".ndjson", ".parquet"})
OPTIONS = ("seed", "scale", "height", "codec", "crf", "preset", "pix_fmt", "steps", "deinterlace", "cuts")
_COLUMNS = ("source", "destination", "priority", *OPTIONS)
_MAX_PRIORITY = 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a list: `source` and `destination` as written (None: derived from the source)."""

    source: str
    destination: str | None
    priority: int
    overrides: dict[str, object]


def is_list(place: str) -> bool:
    """Whether the ending of `place` is that of a list file."""
    return PurePosixPath(place).suffix.lower() in LIST_SUFFIXES


def read_list(place: str) -> list[Entry]:
    """Read a list file.

    Raises:
        UsageError: it is no such table, or a cell or column is not possible; names file, row (from 1) and column.
        StorageError: it cannot be read.
    """
    content = storage_for(place).read(place)
    entries = []
    try:
        for number, cells in enumerate(_rows(PurePosixPath(place).suffix.lower(), content), 1):
            entries.append(_entry(f"{place}, row {number}", cells))
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, _pyarrow_error()) as error:
        raise UsageError(
            f"{place} cannot be read as a list after row {len(entries)}: {_first_line(error)}.",
            code="list-unreadable",
            remedy="Write CSV with a header line, one JSON object a line, or Parquet.",
        ) from error
    return entries


def _rows(suffix: str, content: bytes) -> Iterator[dict[str, Any]]:
    if suffix == ".parquet":
        from pyarrow import parquet

        yield from parquet.ParquetFile(io.BytesIO(content)).read().to_pylist()
    elif suffix == ".csv":
        for cells in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True):
            # What stands right of the last column has the key None.
            yield {"" if column is None else column.strip(): cell for column, cell in cells.items()}
    else:
        for line in content.decode("utf-8-sig").splitlines():
            if line.strip():
                cells = json.loads(line)
                yield cells if isinstance(cells, dict) else {"": cells}


def _entry(where: str, cells: dict[str, Any]) -> Entry:
    given = {column: cell for column, cell in cells.items() if cell is not None and cell != ""}
    for column in cells:
        if column not in _COLUMNS:
            raise _impossible(where, column, cells[column], f"known columns are {', '.join(_COLUMNS)}")
    for column in ("source", "destination"):
        if not isinstance(given.get(column, ""), str):
            raise _impossible(where, column, given[column], "it must be text")
    if "source" not in given:
        raise _impossible(where, "source", None, "every row needs one")
    if "scale" in given and "height" in given:
        raise _impossible(where, "height", given["height"], "scale and height exclude each other")
    return Entry(
        source=given["source"].strip(),
        destination=given["destination"].strip() if "destination" in given else None,
        priority=_priority(where, given.get("priority", 0)),
        overrides=_overrides(where, {name: given[name] for name in OPTIONS if name in given}),
    )


def _priority(where: str, cell: object) -> int:
    try:
        number = int(str(cell))
    except ValueError:
        raise _impossible(where, "priority", cell, "it must be a whole number") from None
    if abs(number) > _MAX_PRIORITY:
        raise _impossible(where, "priority", cell, f"its limit is {_MAX_PRIORITY}")
    return number


def _overrides(where: str, given: dict[str, Any]) -> dict[str, object]:
    """The options as typed values: `4` where a table of text has `"4"`."""
    try:
        values = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        column = str(first["loc"][0])
        raise _impossible(where, column, given[column], first["msg"]) from error
    return {name: getattr(values, name) for name in given}


def _impossible(where: str, column: str, cell: object, why: str) -> UsageError:
    return UsageError(
        f"{where}, column {column!r}: {cell!r} is not possible: {why}.", code="list-invalid", remedy="Correct the list."
    )


def _pyarrow_error() -> type[Exception]:
    from pyarrow import ArrowInvalid

    return ArrowInvalid


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
