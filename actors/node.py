"""What a node of a cluster must have in common with the machine that started a job: code, sources, destination, model.

Asked of every node by a short task before hours of work, and of a worker before each row. Loads no model.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ActorsError, describe_failure
from infra.own_code import code_fingerprint
from infra.storage import join, parent, storage_for

VERSION_REMEDY = "Install one version on every node, or let the code travel: `upriver submit`, or RAY_ADDRESS."
_REMEDY = "Use a path on storage that all nodes share, or an object store."


@dataclass(frozen=True, slots=True)
class World:
    """What the driver has and sees: plain values, so that it can travel.

    Attributes:
        code: its fingerprint.
        sources: places with their versions; some of the job's are enough.
        files: other places that must be there: models, originals to compare with.
        mark: place of a small file that the driver has just written into the work area, under a name never used before;
            None where nothing is to be written.
    """

    code: str
    sources: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    mark: str | None


def look_at_node(world: World | None) -> dict[str, Any]:
    """Return what is to be known of the node that this runs on, as plain values.

    `host` is its name, `failure` (`actors.errors.Failure`) says what it has not in common with `world`, None if
    nothing; `scratch` is its temporary folder and `free_bytes` the room there.
    """
    folder = tempfile.gettempdir()
    return {
        "host": platform.node(),
        "failure": None if world is None else _difference(world),
        "scratch": folder,
        "free_bytes": shutil.disk_usage(folder).free,
    }


def _difference(world: World) -> Any:
    try:
        require_code(world.code)
        for place, version in world.sources:
            require_seen(place)
            require_same(place, version)
        for place in world.files:
            require_seen(place)
        if world.mark is None:
            return None
        require_seen(parent(world.mark))
        if storage_for(world.mark).stat(world.mark) is None:
            raise ActorsError(
                f"{_here()} sees another folder at {parent(world.mark)}: what was just written there is not in it.",
                code="worker-sees-other-files",
                remedy=_REMEDY,
            )
        storage_for(world.mark).check_writable(join(parent(world.mark), "probe"))
    except Exception as error:
        return describe_failure(error)
    return None


def require_code(fingerprint: str) -> None:
    """Raise ActorsError where this process runs another Upriver than the one with `fingerprint`."""
    here = code_fingerprint()
    if here != fingerprint:
        raise ActorsError(
            f"{_here()} runs another Upriver (code {here}) than the machine that started the job (code {fingerprint}).",
            code="worker-version",
            remedy=VERSION_REMEDY,
        )


def require_seen(place: str) -> None:
    """Raise ActorsError where `place` is local and this machine has nothing there."""
    if storage_for(place).is_local and not Path(place.removeprefix("file://")).exists():
        raise ActorsError(f"{_here()} does not see {place}.", code="worker-sees-no-file", remedy=_REMEDY)


def require_same(place: str, version: str) -> None:
    """Raise ActorsError where this machine has something else at `place` than what has `version`."""
    found = storage_for(place).stat(place)
    if found is None or found.version != version:
        raise ActorsError(f"{_here()} sees another file at {place}.", code="worker-sees-other-files", remedy=_REMEDY)


def _here() -> str:
    return f"The node {platform.node()}"
