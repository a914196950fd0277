"""Places that files are read from and written to, behind one small interface.

A *place* is a local path or `s3://bucket/key`. Local paths are served here, object stores in `infra/object_store.py`.
The verbs are those that have an exact meaning in both: a write is whole or absent, `if_absent` is decided by the store
and not by a look beforehand, nothing is appended. Knows nothing of videos or jobs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from infra.errors import StorageError


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a store knows of one file, or of all files of a folder together, without reading them.

    `version` changes whenever the content may have changed (an etag; size and modification time for local files).
    """

    place: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of `size` bytes in an object store, to be read where this object travels to.

    It stands for the content that had `version`: reading fails with `storage-changed` when there is another.
    """

    place: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rpartition("/")[2]

    def open(self) -> BinaryIO:
        """Return a fresh seekable handle at the beginning; it may be used by one thread at a time."""
        from infra.object_store import ObjectStore

        return ObjectStore().reader(self.place, self.size, self.version)


class Storage(Protocol):
    """The verbs. Every method raises `StorageError` when the place cannot be used."""

    is_local: bool

    def stat(self, place: str) -> FileInfo | None:
        """Return what is known of the file or folder at `place`, or None when there is none."""

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """Yield every file under `prefix`, in sorted order; nothing there is no error."""

    def folders(self, place: str) -> Iterator[str]:
        """Yield the folders directly below `place`, sorted; nothing there is no error."""

    def read(self, place: str) -> bytes:
        """Return the content of a small file."""

    def open(self, place: str) -> BinaryIO:
        """Return a seekable file for reading; from an object store it comes in ranges, with read-ahead."""

    def fetch(self, place: str, local_file: Path) -> None:
        """Copy a whole file to `local_file`, which is complete or absent."""

    def write(self, place: str, content: bytes, *, if_absent: bool = False) -> None:
        """Write a small file as a whole; with `if_absent` refuse when there is one already."""

    def publish(self, local_file: Path, place: str, *, if_absent: bool = False) -> None:
        """Move a finished local file, or a folder of pictures, to `place`, whole or not at all."""

    def delete(self, place: str) -> None:
        """Delete the file or the tree at `place`; nothing there is no error."""

    def make_folder(self, place: str) -> None:
        """Make a folder for unfinished local files, with its parents."""

    def check_writable(self, place: str) -> None:
        """Raise unless a file could be written at `place`; leaves nothing behind."""

    def check_reachable(self, place: str) -> None:
        """Raise at once when the store of `place` cannot be used; what is at `place` is not looked at."""

    def free_bytes(self, place: str) -> int | None:
        """Return how much can still be written at `place`; None where nobody knows."""

    def abort_uploads(self, prefix: str) -> Sequence[str]:
        """Remove what killed processes left of uploads to places that begin with `prefix`; return these places.

        Uploads that are under way are aborted too: only for prefixes that nobody writes to now.
        """


def join(place: str, *parts: str) -> str:
    """Return the place `parts` below the folder `place`."""
    return "/".join([place.rstrip("/"), *parts]) if place else "/".join(parts)


def parent(place: str) -> str:
    """Return the folder that `place` lies in; a bucket lies in itself."""
    if "://" not in place:
        return str(Path(place).parent)
    scheme, _, rest = place.rstrip("/").partition("://")
    return f"{scheme}://{rest.rpartition('/')[0] or rest}"


def whole_path(place: str) -> str:
    """Return a place that means the same in every folder of this machine: a relative path becomes a whole one."""
    return place if "://" in place else os.path.abspath(place)


def video_source(place: str) -> Path | RemoteFile:
    """Return what a video at `place` is read through: its path, or a handle for an object store.

    Raises:
        StorageError: there is no such object, or the store cannot be read. Local paths are not looked at.
    """
    storage = storage_for(place)
    if storage.is_local:
        return _path(place)
    info = storage.stat(place)
    if info is None:
        raise StorageError(
            f"Cannot read {place}: there is no such object.",
            code="storage-missing",
            remedy="Check bucket, key and AWS_ENDPOINT_URL.",
        )
    return RemoteFile(place, info.size_bytes, info.version)


def storage_for(place: str) -> Storage:
    """Return the store that serves `place`.

    Raises:
        StorageError: `place` is a URL with a scheme that no store here serves.
    """
    scheme, separator, _ = place.partition("://")
    if separator and scheme == "s3":
        from infra.object_store import ObjectStore

        return ObjectStore()
    if separator and scheme != "file":
        shown = place.partition("?")[0]  # what follows may be a signature
        raise StorageError(
            f"{shown} is in a kind of storage ({scheme}://) that this version cannot use.",
            code="storage-scheme",
            remedy="Give a local path or s3://bucket/key; copy the files or mount the store.",
        )
    return LocalStorage()


class LocalStorage:
    """Files of this machine or of a file system mounted on it."""

    is_local = True

    def stat(self, place: str) -> FileInfo | None:
        with _translated("read", place):
            try:
                found = _path(place).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            if _path(place).is_dir():
                return self._stat_tree(place)
        return FileInfo(place, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")

    def _stat_tree(self, place: str) -> FileInfo:
        files = list(self.list(place))
        versions = "".join(f"{os.path.relpath(file.place, place)} {file.version}\n" for file in files)
        digest = hashlib.sha256(versions.encode()).hexdigest()
        return FileInfo(place, sum(file.size_bytes for file in files), digest)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # as an object store: nothing is no error
                raise error

        if not _path(prefix).is_dir():
            return
        with _translated("list", prefix):
            for folder, folders, names in os.walk(_path(prefix), onerror=refuse):
                folders.sort()
                for name in sorted(names):
                    info = self.stat(os.path.join(folder, name))
                    if info is not None:  # a dangling link, or gone since the folder was listed
                        yield info

    def folders(self, place: str) -> Iterator[str]:
        with _translated("list", place):
            try:
                found = sorted(entry.name for entry in os.scandir(_path(place)) if entry.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                return
        yield from (os.path.join(place, name) for name in found)

    def read(self, place: str) -> bytes:
        with _translated("read", place):
            return _path(place).read_bytes()

    def open(self, place: str) -> BinaryIO:
        with _translated("read", place):
            return _path(place).open("rb")

    def fetch(self, place: str, local_file: Path) -> None:
        with _translated("read", place):
            content = _path(place).open("rb")
        with content, _translated("write", str(local_file)):
            local_file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(local_file) as file:
                shutil.copyfileobj(content, file, 1 << 20)

    def write(self, place: str, content: bytes, *, if_absent: bool = False) -> None:
        path = _path(place)
        with _translated("write", place):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, move=lambda temporary: self._move(temporary, path, if_absent)) as file:
                file.write(content)

    def publish(self, local_file: Path, place: str, *, if_absent: bool = False) -> None:
        path = _path(place)
        with _translated("write", place):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not if_absent:
                shutil.rmtree(path)  # a folder of pictures cannot be replaced by a rename
            self._move(local_file, path, if_absent)

    def delete(self, place: str) -> None:
        path = _path(place)
        with _translated("delete", place):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def make_folder(self, place: str) -> None:
        with _translated("write", place):
            _path(place).mkdir(parents=True, exist_ok=True)

    def check_writable(self, place: str) -> None:
        """Raise unless a file could be written at `place`. Folders that it would need are made and removed again."""
        path = _path(place)
        with _translated("write", place):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
            missing = [folder for folder in [path.parent, *path.parent.parents] if not folder.exists()]
            made: list[Path] = []
            try:
                for folder in reversed(missing):
                    folder.mkdir()
                    made.append(folder)
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
            finally:
                for folder in reversed(made):
                    folder.rmdir()

    def check_reachable(self, place: str) -> None:
        pass

    def free_bytes(self, place: str) -> int | None:
        path = _path(place).absolute()
        with _translated("read", place):
            return shutil.disk_usage(next(folder for folder in [path, *path.parents] if folder.exists())).free

    def abort_uploads(self, prefix: str) -> Sequence[str]:
        return ()  # a rename has no parts

    @staticmethod
    def _move(source: Path, target: Path, if_absent: bool) -> None:
        if not if_absent:
            os.replace(source, target)
            return
        try:
            os.link(source, target)  # unlike a rename, a link fails when the target exists, without a race
        except FileExistsError as error:
            raise StorageError(
                f"{target} exists already.", code="destination-exists", remedy="Choose another name or --overwrite."
            ) from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
                raise
            if target.exists():  # a file system without hard links: look, then move
                raise StorageError(
                    f"{target} exists already.", code="destination-exists", remedy="Choose another name or --overwrite."
                ) from error
            os.replace(source, target)
        else:
            source.unlink()


@contextmanager
def whole_file(path: Path, move: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Yield a file beside `path` that takes its name (by `move`, or a rename) when all has been written and is safe."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if move is None:
            os.replace(temporary, path)
        else:
            move(Path(temporary))
    finally:
        Path(temporary).unlink(missing_ok=True)


def _path(place: str) -> Path:
    return Path(place.removeprefix("file://"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _translated(verb: str, place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno == errno.ENOSPC:
            code, remedy = "storage-full", "Free some space or choose another destination."
        elif verb == "read" or verb == "list":
            code, remedy = "storage-unreadable", "Check the path and its permissions."
        else:
            code, remedy = (
                "storage-unwritable",
                "Choose a destination that can be written to, or change its permissions.",
            )
        raise StorageError(f"Cannot {verb} {place}: {reason}.", code=code, remedy=remedy) from error
