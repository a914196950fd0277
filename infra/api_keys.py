"""API keys: made at random, shown once, kept as hashes in a file that may change while the service runs.

A key is ``upr_<id>_<secret>``. The id (16 hexadecimal digits) is public: it stands in lists and logs. The secret has
256 random bits. The file holds the SHA-256 of the whole key. A slow, salted hash such as scrypt protects what people
choose, which can be guessed; nobody guesses 256 random bits, so a fast hash loses nothing, and a check takes
microseconds instead of being a lever to exhaust the server (NIST SP 800-63B, section 5.1.2.2, draws the line at 112
bits).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from infra.errors import SettingsError
from infra.tenants import Scope, Tenant, is_tenant_name

logger = logging.getLogger(__name__)

PREFIX: Final = "upr_"  # lets secret scanners find keys that were published by mistake
SECRET_BYTES: Final = 32
LONGEST_KEY: Final = 512  # characters; ours have 64
LARGEST_FILE: Final = 16 * 1024 * 1024
_FORM: Final = re.compile(r"upr_([0-9a-f]{16})_[A-Za-z0-9_-]{43}", re.ASCII)


class KeyRecord(BaseModel):
    """What is kept of a key.

    Attributes:
        id: the public part. tenant: to whom it leads. scopes: what it is good for.
        sha256: of the whole key, hexadecimal.
        expires_at: None: never. disabled: revoked, and kept so that logs can be read.
        note: what people need to tell keys apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    tenant: str
    scopes: tuple[Scope, ...]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    disabled: bool = False
    note: str = Field(default="", max_length=200)

    @field_validator("tenant")
    @classmethod
    def _name(cls, value: str) -> str:
        if not is_tenant_name(value):
            raise ValueError(
                "a tenant's name has up to 128 letters, digits and ._@|:+- and begins with one of the first two"
            )
        return value

    def is_usable(self, now_s: float) -> bool:
        """Return whether the key is neither revoked nor expired; `now_s`: seconds since 1970."""
        return not self.disabled and (self.expires_at is None or now_s < self.expires_at.timestamp())

    def to_tenant(self) -> Tenant:
        """Return whom the key lets in."""
        expires_at_s = None if self.expires_at is None else self.expires_at.timestamp()
        return Tenant(self.tenant, frozenset(self.scopes), key_id=self.id, expires_at_s=expires_at_s)


class KeyFile(BaseModel):
    """The contents of a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        if len({key.id for key in keys}) < len(keys):
            raise ValueError("two keys have the same id")
        return keys


def make_key(
    tenant: str,
    scopes: Sequence[Scope] = (Scope.LIVE, Scope.RESTORE),
    *,
    expires_at: datetime | None = None,
    note: str = "",
) -> tuple[str, KeyRecord]:
    """Return a new key, which is to be shown once and nowhere kept, and its record.

    Raises:
        ValueError: no possible name of a tenant, or a note too long.
    """
    key_id = secrets.token_hex(8)
    key = f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    record = KeyRecord(
        id=key_id,
        tenant=tenant,
        scopes=tuple(dict.fromkeys(scopes)),
        sha256=_digest(key).hex(),
        created_at=datetime.now(UTC).replace(microsecond=0),
        expires_at=expires_at,
        note=note,
    )
    return key, record


def looks_like_a_key(text: str) -> bool:
    """Return whether a bearer token is meant to be an API key instead of a JSON web token."""
    return text.startswith(PREFIX)


class ApiKeys:
    """The keys of a file, read again whenever it changes; safe to use from several threads.

    A file that cannot be read, or is not a keys file, leaves the keys as they were and says so in the log, once per
    change: a slip of an editor must not lock everybody out, nor let anybody in. A file without keys lets nobody in.

    Args:
        path: as written by `write_keys`.

    Raises:
        SettingsError: there is no such file at the start, or it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen = _signature(path)
        self._keys = {key.id: key for key in read_keys(path).keys}

    def find(self, key: str, now_s: float) -> KeyRecord | None:
        """Return the record of a key that is known, right, not expired and not revoked; None otherwise.

        Whatever is wrong with a key, the same is computed: one hash, one comparison of 32 bytes in constant time.
        """
        match = _FORM.fullmatch(key[: LONGEST_KEY + 1])
        record = self._current().get(match[1]) if match else None
        expected = _NOBODY if record is None else bytes.fromhex(record.sha256)
        is_right = hmac.compare_digest(_digest(key[: LONGEST_KEY + 1]), expected)
        return record if is_right and record is not None and record.is_usable(now_s) else None

    def find_id(self, key_id: str, now_s: float) -> KeyRecord | None:
        """Return the record of a usable key by its id alone: whether one that was let in may stay."""
        record = self._current().get(key_id)
        return record if record is not None and record.is_usable(now_s) else None

    def _current(self) -> dict[str, KeyRecord]:
        # A look at the file takes two microseconds: a revocation holds from the next request on, without any timer.
        signature = _signature(self.path)
        if signature != self._seen:
            with self._lock:
                if signature != self._seen:
                    self._seen = signature
                    self._read_again()
        return self._keys

    def _read_again(self) -> None:
        try:
            self._keys = {key.id: key for key in read_keys(self.path).keys}
        except SettingsError as error:
            logger.error("the keys stay as they were: %s", error.message)
        else:
            logger.info("read %d keys from %s", len(self._keys), self.path)


# Compared with where no key has the id: of bytes that nobody knows, so that it fits none.
_NOBODY: Final = hashlib.sha256(secrets.token_bytes(SECRET_BYTES)).digest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_keys(path: Path) -> KeyFile:
    """Return the contents of a keys file.

    Raises:
        SettingsError: it cannot be read, or is no keys file; the message has none of its contents but names of fields.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise SettingsError(
            f"The keys file {path} cannot be read: {error.strerror or type(error).__name__}.",
            code="keys-unreadable",
            remedy="Make one with `upriver keys create`, or correct the path in `keys_file`.",
        ) from error
    try:
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
    except ValueError as error:
        what = str(error)
    raise SettingsError(
        f"The file {path} is not a keys file: {what}.",
        code="keys-invalid",
        remedy="Restore it from a copy, or make a new one with `upriver keys create`.",
    )


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyRecord]]:
    """Yield the keys of a file, to be changed in place; written at the end, unless an exception passes.

    Two processes that change the same file do so one after the other. A file that is not there yet begins empty.

    Raises:
        SettingsError: the file cannot be read or written.
    """
    path = path.resolve()  # the file behind a link is replaced, not the link
    with _locked(path.parent):
        try:
            keys = list(read_keys(path).keys)
        except SettingsError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            keys = []
        yield keys
        write_keys(path, KeyFile(keys=tuple(keys)))


def write_keys(path: Path, content: KeyFile) -> None:
    """Write a keys file that only its owner may read, whole or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    text = json.dumps(content.model_dump(mode="json"), indent=2) + "\n"
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself, which leaves no lock file behind."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the descriptor is closed
        yield
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"The keys file {path} cannot be written: {error.strerror or type(error).__name__}.",
        code="keys-unwritable",
        remedy="Name another with --file, or make its folder writable.",
    )
