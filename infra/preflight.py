"""What can be known before hours of work: stores answer, places can be written to, and there is room.

Knows nothing of plans: how many bytes will be written is given.
"""

from __future__ import annotations

from infra.errors import StorageError
from infra.storage import storage_for

NARROW = 1.25  # less room than this times what is needed gets a warning: sizes are estimates


def check_reachable(*places: str) -> None:
    """Raise at once, not after patient retries, when the store of a place cannot be used at all.

    Raises:
        StorageError: wrong endpoint, credentials or bucket. That there is something at a place is not asked for.
    """
    for place in places:
        storage_for(place).check_reachable(place)


def check_space(place: str, needed_bytes: int) -> list[str]:
    """Check that `needed_bytes` can be written at `place`, and return warnings for people.

    Raises:
        StorageError: `place` cannot be written to, or too little is free (`storage-full`).
    """
    storage = storage_for(place)
    storage.check_writable(place)
    free_bytes = storage.free_bytes(place)
    if free_bytes is None:
        return []
    remedy = "Free some space, choose another destination, or restore fewer videos with --limit."
    return check_free(place, needed_bytes, free_bytes, remedy=remedy)


def check_free(where: str, needed_bytes: int, free_bytes: int, *, remedy: str) -> list[str]:
    """Check that `needed_bytes` go into `free_bytes`; `where` names the place for people. Return warnings.

    Raises:
        StorageError: they do not (`storage-full`).
    """
    if free_bytes < needed_bytes:
        raise StorageError(
            f"About {in_words(needed_bytes)} will be written to {where}, but only {in_words(free_bytes)} are free.",
            code="storage-full",
            remedy=remedy,
        )
    if free_bytes < NARROW * needed_bytes:
        return [
            f"About {in_words(needed_bytes)} will be written to {where}, where {in_words(free_bytes)} are free: "
            "the estimate may be too low."
        ]
    return []


def in_words(size_bytes: int) -> str:
    """Return a size as people write it: `1.5 GB`; decimal, as disks are sold."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
