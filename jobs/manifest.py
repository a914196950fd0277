"""What a finished job leaves beside its results: one manifest per video.

A manifest exists only for a finished video: it is written after the video itself has its name. It says what the result
was made from and with, so that the same command again knows that there is nothing to do.
"""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.records import Delivered, Part
from infra.errors import StorageError
from infra.storage import storage_for

MANIFEST_SUFFIX = ".manifest.json"
_COMPONENTS = ("upriver", "torch", "diffusers", "av", "ray", "numpy", "opencv-python-headless")


class SourceRecord(BaseModel):
    """The file that was restored."""

    model_config = ConfigDict(extra="forbid")
    path: str
    size_bytes: int
    version: str
    sha256: str | None


class OutputRecord(BaseModel):
    """The file that was written."""

    model_config = ConfigDict(extra="forbid")
    path: str
    size_bytes: int
    sha256: str | None  # None for a folder of pictures
    frames: int
    width: int
    height: int


class ModelRecord(BaseModel):
    """The model that was used and how it ran."""

    model_config = ConfigDict(extra="forbid")
    name: str
    sha256: str
    device: str
    dtype: str
    flow: str


class Split(BaseModel):
    """Where a shot was split: the first frame of a part, and how many frames before it were restored to warm up."""

    model_config = ConfigDict(extra="forbid")
    first_index: int
    warm_up: int


class Manifest(BaseModel):
    """Everything needed to know what a result is, and to make it again.

    Version 1, of whole videos restored in one go, had neither name, duration nor parts. Version 2 knew no splits.

    Attributes:
        name: of the source, below SRC. duration_s: of the video.
        parts: the segments that the result was joined from, in the order of the film.
        cuts: numbers of the first frames of all shots but the first.
        extras: what was made of the result, beside it; more may be made later.
        splits: where shots were split, which are no cuts: there the result is not quite that of the unsplit shot.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    manifest_version: Literal[1, 2, 3] = 3
    run_id: str
    name: str | None = None
    duration_s: float | None = None
    parts: list[Part] = []
    source: SourceRecord
    output: OutputRecord
    model: ModelRecord
    seed: int
    options: dict[str, Any]
    damage: list[str]
    warnings: list[str]
    cuts: list[int]
    splits: list[Split] = []
    seconds: dict[str, float]
    versions: dict[str, str]
    finished_at: str
    extras: Delivered = Delivered()


def manifest_place(destination: str) -> str:
    """Return where the manifest of a result lies."""
    return f"{destination}{MANIFEST_SUFFIX}"


def write_manifest(destination: str, manifest: Manifest, *, if_absent: bool = False) -> None:
    """Write the manifest of a finished result.

    Raises:
        StorageError: it cannot be written, or with `if_absent` there is one already.
    """
    content = manifest.model_dump_json(indent=2).encode() + b"\n"
    storage_for(destination).write(manifest_place(destination), content, if_absent=if_absent)


def read_manifest(destination: str) -> Manifest | None:
    """Return the manifest beside `destination`; None when there is none, or it is none of ours."""
    storage = storage_for(destination)
    if storage.stat(manifest_place(destination)) is None:
        return None
    try:
        return Manifest.model_validate_json(storage.read(manifest_place(destination)))
    except ValidationError:
        return None


def finished_already(destination: str, run_id: str, *, overwrite: bool) -> bool:
    """Return whether the result of `run_id` is at `destination`, whole.

    Raises:
        StorageError: something else is there and may not be replaced.
    """
    there = storage_for(destination).stat(destination)
    if there is None:
        return False
    manifest = read_manifest(destination)
    if manifest is not None and manifest.run_id == run_id and manifest.output.size_bytes == there.size_bytes:
        return True
    if overwrite:
        return False
    if manifest is None:
        what = "and was not written by a finished run of this command"
    else:
        what = "and is the result of another source, model or set of options"
    raise StorageError(
        f"{destination} exists already {what}.",
        code="destination-exists",
        remedy="Choose another destination, or replace it with --overwrite.",
    )


def component_versions() -> dict[str, str]:
    """Return the installed version of each component that can change a result."""
    found = {}
    for name in _COMPONENTS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def timestamp() -> str:
    """Return the time now in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
