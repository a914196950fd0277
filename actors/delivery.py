"""What is delivered beside a finished result: checksums of its pictures, and an HLS ladder.

Both are made from the finished file alone, so that they can be made at any later time without restoring anything again.
They are made in a scratch folder and get their places whole. What was made is noted in the work area before it is
published: after a crash that tells a run's own files from somebody else's.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from actors.errors import ActorsError, FailureClass, describe_failure
from actors.records import FRAMEMD5_SUFFIX, LADDER_SUFFIX, Delivered, ExtraFile
from actors.shot_store import hash_at
from infra.errors import StorageError
from infra.storage import join, parent, storage_for
from pipeline.encoder_options import Preset
from pipeline.framemd5 import framemd5
from pipeline.ladder import write_ladder
from pipeline.video import Limits

logger = logging.getLogger(__name__)

NOTE = "extras.json"
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)


@dataclasses.dataclass(frozen=True, slots=True)
class Extras:
    """What is wanted beside a result. `hls`: heights of the ladder's rungs in pixels, none for no ladder."""

    framemd5: bool = False
    hls: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.framemd5 or bool(self.hls)


NO_EXTRAS = Extras()


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """A finished result and what is to be made of it: plain values, so that it can travel.

    Attributes:
        place: of the video in the work area. sha256: of the result.
        before: what is there already, by the manifest. preset: speed of the ladder's encoder.
        overwrite: replace what somebody else put in the extras' places.
    """

    name: str
    destination: str
    place: str
    sha256: str
    before: Delivered
    extras: Extras
    preset: str
    overwrite: bool


class ResultChanged(ActorsError):
    """A result is not the file any more that its manifest describes."""

    failure_class = FailureClass.STORAGE


def extra_places(destination: str) -> tuple[str, str]:
    """Return where the extras of a result lie: the ladder's folder and the checksums of its pictures."""
    return f"{destination}{LADDER_SUFFIX}", f"{destination}{FRAMEMD5_SUFFIX}"


def missing(delivered: Delivered, extras: Extras, destination: str, *, certain: bool = False) -> Extras:
    """Return what of `extras` is still to be made, by the names and sizes of what is there.

    Args:
        certain: compare hashes too.
    """

    def is_there(one: ExtraFile) -> bool:
        place = join(parent(destination), one.name)
        found = storage_for(place).stat(place)
        if found is None or found.size_bytes != one.size_bytes:
            return False
        return not certain or hash_at(place) == one.sha256

    sums = _of(delivered, FRAMEMD5_SUFFIX)
    rungs = _of(delivered, LADDER_SUFFIX)
    has_sums = bool(sums) and (not extras.framemd5 or all(map(is_there, sums)))
    has_ladder = list(extras.hls) == delivered.hls and (not extras.hls or all(map(is_there, rungs)))
    return Extras(framemd5=extras.framemd5 and not has_sums, hls=() if has_ladder else extras.hls)


def refuse_foreign(delivered: Delivered, extras: Extras, destination: str) -> None:
    """Raise where a place that `extras` need is taken by what is not `delivered`.

    Raises:
        StorageError: somebody else's file or folder is there.
    """
    ladder, sums = extra_places(destination)
    wanted = [(ladder, LADDER_SUFFIX)] * bool(extras.hls) + [(sums, FRAMEMD5_SUFFIX)] * extras.framemd5
    for place, suffix in wanted:
        if not _of(delivered, suffix) and storage_for(place).stat(place) is not None:
            raise StorageError(
                f"{place} exists already and was not written by this run.",
                code="destination-exists",
                remedy="Move it away, or replace it with --overwrite.",
            )


def make_extras(result: Path, destination: str, extras: Extras, folder: Path, *, preset: str) -> Delivered:
    """Make `extras` of a local file in `folder`, under the names that they will have beside `destination`.

    Raises:
        PipelineError: the file cannot be read, or the ladder not be encoded.
    """
    name = destination.rpartition("/")[2]
    made: list[Path] = []
    warnings: tuple[str, ...] = ()
    if extras.framemd5:
        sums = folder / f"{name}{FRAMEMD5_SUFFIX}"
        with sums.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(f"{line}\n" for line in framemd5(result, limits=_ANY_SIZE))
        made.append(sums)
    if extras.hls:
        ladder = folder / f"{name}{LADDER_SUFFIX}"
        ladder.mkdir()
        warnings = write_ladder(ladder, result, extras.hls, preset=cast(Preset, preset))
        made += sorted(ladder.iterdir())
    files = [
        ExtraFile(name=file.relative_to(folder).as_posix(), size_bytes=file.stat().st_size, sha256=hash_at(str(file)))
        for file in made
    ]
    return Delivered(files=files, hls=list(extras.hls), warnings=list(warnings))


def publish_extras(folder: Path, extras: Extras, destination: str) -> None:
    """Move what `make_extras` made to its places; whatever is there is replaced.

    Raises:
        StorageError: they cannot be written.
    """
    for place in extra_places(destination):
        made = folder / place.rpartition("/")[2]
        if made.exists():
            storage_for(place).publish(made, place)


def merged(before: Delivered, made: Delivered, extras: Extras) -> Delivered:
    """Return what is there when `made`, made because of `extras`, has taken the place of what was there `before`."""
    renewed = [suffix for suffix, wanted in ((FRAMEMD5_SUFFIX, extras.framemd5), (LADDER_SUFFIX, extras.hls)) if wanted]
    kept = [one for one in before.files if not any(one in _of(before, suffix) for suffix in renewed)]
    return Delivered(
        files=sorted([*kept, *made.files], key=lambda one: one.name),
        hls=made.hls if extras.hls else before.hls,
        warnings=made.warnings if extras.hls else before.warnings,
    )


def deliver(task: Delivery) -> Delivered:
    """Make and publish what is missing beside a finished result; returns all that is there then.

    Raises:
        ResultChanged: the result is another file than its manifest says; nothing was made.
        PipelineError, StorageError: the extras cannot be made, or may not replace what is there.
    """
    note = _read_note(task.place)
    known = note or task.before
    todo = missing(known, task.extras, task.destination, certain=True)
    if not todo:
        return known
    if not task.overwrite:
        refuse_foreign(known, todo, task.destination)
    with scratch(task.destination, task.place) as folder:
        storage = storage_for(task.destination)
        local = Path(task.destination.removeprefix("file://"))
        if not storage.is_local:
            local = folder / f"result{Path(task.destination).suffix}"
            storage.fetch(task.destination, local)
        if hash_at(str(local)) != task.sha256:
            raise ResultChanged(
                f"{task.destination} was changed after it was restored.",
                code="result-changed",
                remedy="Restore it again with --overwrite, or put the file back that its manifest describes.",
            )
        delivered = merged(known, make_extras(local, task.destination, todo, folder, preset=task.preset), todo)
        storage_for(task.place).write(join(task.place, NOTE), delivered.model_dump_json(indent=1).encode() + b"\n")
        publish_extras(folder, todo, task.destination)
    return delivered


def attempt_delivery(task: Delivery) -> dict[str, Any]:
    """Call `deliver` and return what is there, or how it failed, as plain values: what a Ray task may return."""
    began = time.perf_counter()
    try:
        return {"delivered": deliver(task).model_dump()}
    except Exception as error:
        logger.exception("the extras of %s could not be made", task.name)
        return {
            "failure": describe_failure(error),
            "seconds": time.perf_counter() - began,
            "host": platform.node(),
        }


@contextmanager
def scratch(destination: str, place: str) -> Iterator[Path]:
    """A local folder; on the destination's file system if that is local, so that a result gets its name at once.

    Args:
        place: of the video in the work area.
    """
    if storage_for(destination).is_local:
        storage_for(place).make_folder(place)
        with tempfile.TemporaryDirectory(dir=place.removeprefix("file://"), prefix=".assembly-") as folder:
            yield Path(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="upriver-") as folder:
            yield Path(folder)


def _of(delivered: Delivered, suffix: str) -> list[ExtraFile]:
    """The files of one kind: those of a ladder lie in a folder."""
    return [one for one in delivered.files if one.name.partition("/")[0].endswith(suffix)]


def _read_note(place: str) -> Delivered | None:
    storage = storage_for(place)
    if storage.stat(join(place, NOTE)) is None:
        return None
    try:
        return Delivered.model_validate_json(storage.read(join(place, NOTE)))
    except ValidationError:
        return None
