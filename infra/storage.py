"""Places that files are read from and written to, behind one small interface.

Local paths are served here; an object store fits the same verbs, which are those that have an exact meaning there
too: a write is whole or absent, `if_absent` is decided by the store and not by a look beforehand, nothing is appended.
Knows nothing of videos or jobs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.errors import StorageError


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a store knows of one file, or of all files of a folder together, without reading them.

    `version` changes whenever the content may have changed (an etag; size and modification time for local files).
    """

    place: str
    size_bytes: int
    version: str


class Storage(Protocol):
    """The verbs. Every method raises `StorageError` when the place cannot be used."""

    def stat(self, place: str) -> FileInfo | None:
        """Return what is known of the file or folder at `place`, or None when there is none."""

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """Yield every file under `prefix`, in sorted order; nothing there is no error."""

    def folders(self, place: str) -> Iterator[str]:
        """Yield the folders directly below `place`, sorted; nothing there is no error."""

    def read(self, place: str) -> bytes:
        """Return the content of a small file."""

    def write(self, place: str, content: bytes, *, if_absent: bool = False) -> None:
        """Write a small file as a whole; with `if_absent` refuse when there is one already."""

    def publish(self, local_file: Path, place: str, *, if_absent: bool = False) -> None:
        """Move a finished local file to `place`, whole or not at all."""

    def delete(self, place: str) -> None:
        """Delete the file or the tree at `place`; nothing there is no error."""

    def make_folder(self, place: str) -> None:
        """Make a folder for unfinished local files, with its parents."""

    def check_writable(self, place: str) -> None:
        """Raise unless a file could be written at `place`; leaves nothing behind."""


def storage_for(place: str) -> Storage:
    """Return the store that serves `place`.

    Raises:
        StorageError: `place` is a URL with a scheme that no store here serves.
    """
    scheme, separator, _ = place.partition("://")
    if separator and scheme != "file":
        raise StorageError(
            f"{place} is in a kind of storage ({scheme}://) that this version cannot use.",
            code="storage-scheme",
            remedy="Give a local path; copy the files or mount the store.",
        )
    return LocalStorage()


class LocalStorage:
    """Files of this machine or of a file system mounted on it."""

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

    def write(self, place: str, content: bytes, *, if_absent: bool = False) -> None:
        path = _path(place)
        with _translated("write", place):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())
                self._move(Path(temporary), path, if_absent)
            finally:
                Path(temporary).unlink(missing_ok=True)

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
