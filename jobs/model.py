"""Which model a job uses: found and checked once, before anything is started, and named by its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infra.model_cache import local_model


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`source` is what actors load: a name that means the same on every machine, or an absolute folder.

    A place in an object store stays one: every machine fetches it into a cache of its own.
    """

    source: str
    sha256: str


def resolve_model(source: str) -> ResolvedModel:
    """Load the model's weights, compare them with its configuration, and return its identity.

    Raises:
        CheckpointError: it is unknown, incomplete, pickled, or does not fit its configuration.
        StorageError: it is in an object store and cannot be fetched.
    """
    from pipeline.checkpoint import built_in_models
    from pipeline.engine import identify

    sha256 = identify(local_model(source))
    folder = Path(source).expanduser()
    if source not in built_in_models() and folder.is_dir():
        source = str(folder.resolve())
    return ResolvedModel(source, sha256)
