"""Models in an object store, as folders of this machine: fetched once a machine, checked, safe for many processes.

A cached model lies under a name made of its place and the versions of its files, so that a model that changes in the
store is fetched anew and a running job keeps the one it began with. What is fetched is compared with the sums in
`SHA256SUMS` when the model has such a file. Knows nothing of what a model consists of.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import StorageError
from infra.storage import FileInfo, storage_for

SUMS = "SHA256SUMS"  # lines of `<sha256>  <name>`, as sha256sum writes them
MOST_BYTES = 64 << 30  # more than any model: a mistyped prefix must not fill the disk
WAIT_S = 3600.0
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where models are kept: `UPRIVER_MODEL_CACHE`, or `upriver/models` in the user's cache folder."""
    named = os.environ.get("UPRIVER_MODEL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upriver" / "models"


def is_remote(source: str) -> bool:
    """Whether a model's name is a place in an object store, which has to be fetched before it can be loaded."""
    return source.startswith("s3://")


def local_model(source: str, cache: Path | None = None) -> str:
    """Return a folder of this machine with the model at `source`; other names are returned as they are.

    Processes that ask for the same model at once wait for the one that fetches it.

    Raises:
        StorageError: there is nothing, too much, something damaged, or no room for it.
    """
    if not is_remote(source):
        return source
    place = source.rstrip("/")
    files = list(storage_for(place).list(place))
    if not files:
        raise StorageError(
            f"There is no model at {place}.",
            code="storage-missing",
            remedy="Give the folder that holds model_index.json.",
        )
    size_bytes = sum(file.size_bytes for file in files)
    if size_bytes > MOST_BYTES:
        raise StorageError(
            f"What lies below {place} is {size_bytes} bytes large; a model has at most {MOST_BYTES}.",
            code="model-too-large",
            remedy="Give the folder of the model itself.",
        )
    folder = (cache or cache_folder()) / f"{place.rpartition('/')[2]}-{_identity(place, files)[:16]}"
    if not folder.is_dir():
        with _as_storage_errors(folder), _only_one(folder):
            if not folder.is_dir():
                _fetch(place, files, size_bytes, folder)
    return str(folder)


def _identity(place: str, files: list[FileInfo]) -> str:
    listing = "".join(f"{file.place} {file.size_bytes} {file.version}\n" for file in files)
    return hashlib.sha256(f"{place}\n{listing}".encode()).hexdigest()


def _fetch(place: str, files: list[FileInfo], size_bytes: int, folder: Path) -> None:
    storage = storage_for(place)
    if shutil.disk_usage(folder.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, "no space left on device")
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for file in files:
            name = file.place[len(place) + 1 :]
            if ".." in name.split("/") or name.startswith("/"):
                raise StorageError(
                    f"{file.place} cannot be a file of a model.", code="storage-place", remedy="Remove it from there."
                )
            storage.fetch(file.place, made / name)
        _check(place, made)
        made.chmod(0o755)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(place: str, folder: Path) -> None:
    sums = folder / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition(" ")
        file = folder / name.strip().removeprefix("*")
        if not file.is_file() or _sha256(file) != expected.lower():
            raise StorageError(
                f"{place}/{name.strip()} is not what {SUMS} says.",
                code="model-damaged",
                remedy="Upload the model again, with the sums last.",
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the lock beside `folder`; it ends with the process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    limit = time.monotonic() + WAIT_S
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise StorageError(
                        f"Another process has been fetching {folder.name} for an hour.",
                        code="storage-timeout",
                        remedy="Look at the process that holds the lock in the model cache.",
                    ) from None
                time.sleep(0.1)
        yield


@contextmanager
def _as_storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise StorageError(
            f"Cannot keep a model at {folder}: {(error.strerror or str(error)).lower()}.",
            code="storage-full" if full else "storage-unwritable",
            remedy="Free some space, or set UPRIVER_MODEL_CACHE to another folder.",
        ) from error
