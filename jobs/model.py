"""Which model a job uses: found and checked once, before anything is started, and named by its fingerprint.

Reading and checking a checkpoint takes seconds, most of them for the libraries that do it. The outcome is kept in the
user's cache under a name made of the files' sizes and times of change, so that only the first job with a model waits.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from infra.model_cache import cache_folder, local_model

_SHA256_LENGTH = 64


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`source` is what actors load: a name that means the same on every machine, or an absolute folder.

    A place in an object store stays one: every machine fetches it into a cache of its own.
    """

    source: str
    sha256: str


def resolve_model(source: str) -> ResolvedModel:
    """Compare a model's weights with its configuration, unless that has been done before, and return its identity.

    Raises:
        CheckpointError: it is unknown, incomplete, pickled, or does not fit its configuration.
        StorageError: it is in an object store and cannot be fetched.
    """
    from pipeline.model_source import STAND_IN_SHA256, built_in_models, is_stand_in, resolve, stand_in_step_s

    if is_stand_in(source):
        stand_in_step_s(source)
        return ResolvedModel(source, STAND_IN_SHA256)
    local = local_model(source)
    note = cache_folder() / "fingerprints" / _listing(resolve(local))
    sha256 = _noted(note)
    if sha256 is None:
        sha256 = _identify(local)
        _keep(note, sha256)
    folder = Path(source).expanduser()
    if source not in built_in_models() and folder.is_dir():
        source = str(folder.resolve())
    return ResolvedModel(source, sha256)


def _identify(local: str) -> str:
    from pipeline.checkpoint import load_checkpoint

    return load_checkpoint(local).model_sha256


def _listing(folder: Path) -> str:
    """A name that changes with every file of the model, and with the version that reads them."""
    real = folder.resolve()
    lines = [version("upriver"), str(real)]
    for path in sorted(real.rglob("*")):
        if path.is_file():
            about = path.stat()
            lines.append(f"{path.relative_to(real)} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _noted(note: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        content = note.read_text().strip()
        if len(content) == _SHA256_LENGTH:
            return content
    return None


def _keep(note: Path, sha256: str) -> None:
    """Write the note whole; where there is no room for a cache, there is none."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{secrets.token_hex(4)}")
        partial.write_text(sha256 + "\n")
        os.replace(partial, note)
