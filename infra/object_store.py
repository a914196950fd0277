"""Files in an S3-compatible object store, behind the verbs of `infra/storage.py`.

Credentials, region and endpoint come from where boto3 looks for them (`AWS_*`, profiles, the machine's role), so that a
cluster's nodes use their own. Folders are what keys have in common up to a slash; nothing is made for an empty one.
Knows nothing of videos or jobs. boto3 loads when the first request is made.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from infra.errors import StorageError
from infra.object_errors import explained, status_of, translated
from infra.ranged import RangedReader
from infra.storage import FileInfo, join, whole_file
from infra.uploads import abort_unfinished, upload

SCHEME = "s3://"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 12  # of one request, with growing random pauses: half a minute on average, so that a store can start again
BODY_ATTEMPTS = 5  # of one range whose connection breaks while it is read
_CHUNK = 1 << 20
_PAGE = 1000  # names that a store gives at a time
_MOST_PER_DELETE = 1000

_clients: dict[str, Any] = {}
_making = threading.Lock()


def client_for(*, patient: bool = True) -> Any:
    """Return this process's client for the `AWS_*` variables as they are now; clients may be shared by threads.

    Args:
        patient: try requests again for about half a minute; otherwise say at once that the store cannot be reached.

    Raises:
        StorageError: profile or endpoint are not usable.
    """
    # Not the variables themselves: a dictionary of them would show secrets in a debugger's or a crash report's listing.
    known = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = hashlib.sha256(repr((os.getpid(), patient, known)).encode()).hexdigest()
    with _making:  # sessions cannot be made by two threads at a time
        if key not in _clients:
            _clients[key] = _make_client(patient)
        return _clients[key]


def _make_client(patient: bool) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE", "standard")}
    if not patient:
        retries["total_max_attempts"] = 2
    elif "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = ATTEMPTS
    options: dict[str, Any] = {
        "signature_version": "s3v4",
        "retries": retries,
        "connect_timeout": CONNECT_TIMEOUT_S if patient else CONNECT_TIMEOUT_S / 2,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": 32,
        "tcp_keepalive": True,
        # Newer checksums make some stores fail (they send them for the whole object with a range). Uploads carry an
        # MD5 sum instead; what is read is checked against sums in the job's records.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    try:
        session = boto3.session.Session()
        client = session.client("s3", config=Config(**options))
        if not re.search(r"\.amazonaws\.com(\.cn)?$", client.meta.endpoint_url.rstrip("/")):
            # Other stores seldom have a host name for every bucket.
            client = session.client("s3", config=Config(**options, s3={"addressing_style": "path"}))
        return client
    except (BotoCoreError, ValueError) as error:
        if isinstance(error, BotoCoreError):
            raise explained(error, "use", "the object store", "") from error
        raise StorageError(
            "The endpoint of the object store is not a URL.",
            code="storage-endpoint",
            remedy="Set AWS_ENDPOINT_URL to something like https://store.example.org:9000.",
        ) from error


class ObjectStore:
    """Objects named `s3://bucket/key`. An empty bucket name or one with `@` in it is refused."""

    is_local = False

    def stat(self, place: str) -> FileInfo | None:
        key = _split(place)[1]
        if key and not key.endswith("/"):
            found = self._head(place)
            if found is not None:
                return FileInfo(place, int(found["ContentLength"]), _version(found))
        files = list(self.list(place))
        if not files:
            return None
        versions = "".join(f"{file.place[len(place) :].lstrip('/')} {file.version}\n" for file in files)
        return FileInfo(place, sum(file.size_bytes for file in files), hashlib.sha256(versions.encode()).hexdigest())

    def _head(self, place: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        bucket, key = _split(place)
        client = client_for()
        with translated("read", place, client.meta.endpoint_url):
            try:
                return dict(client.head_object(Bucket=bucket, Key=key))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                if status_of(error) == 403:  # an answer to HEAD cannot say why; one to GET does
                    client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
                raise

    def list(self, prefix: str) -> Iterator[FileInfo]:
        bucket, key = _split(prefix)
        client = client_for()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=_folder(key), MaxKeys=_PAGE)
        with translated("list", prefix, client.meta.endpoint_url):
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # what some programs make for an empty folder
                        yield FileInfo(f"{SCHEME}{bucket}/{item['Key']}", int(item["Size"]), _version(item))

    def folders(self, place: str) -> Iterator[str]:
        bucket, key = _split(place)
        client = client_for()
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=_folder(key), Delimiter="/", MaxKeys=_PAGE
        )
        with translated("list", place, client.meta.endpoint_url):
            names = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
        yield from (f"{SCHEME}{bucket}/{name.rstrip('/')}" for name in sorted(names))

    def read(self, place: str) -> bytes:
        info = self._file(place)
        return b"".join(self.stream(place, 0, info.size_bytes, info.version))

    def open(self, place: str) -> BinaryIO:
        info = self._file(place)
        return self.reader(place, info.size_bytes, info.version)

    def reader(self, place: str, size: int, version: str) -> BinaryIO:
        """Return a seekable file that raises `StorageError` when the object is not of this version any more."""

        def fetch(start: int, stop: int) -> bytes:
            return b"".join(self.stream(place, start, stop, version))

        return cast(BinaryIO, RangedReader(fetch, size, place.rpartition("/")[2]))

    def fetch(self, place: str, local_file: Path) -> None:
        info = self._file(place)
        try:
            local_file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(local_file) as file:
                for part in self.stream(place, 0, info.size_bytes, info.version):
                    file.write(part)
        except OSError as error:
            raise StorageError(
                f"Cannot write {local_file}: {(error.strerror or str(error)).lower()}.",
                code="storage-unwritable",
                remedy="Check free space and permissions.",
            ) from error

    def _file(self, place: str) -> FileInfo:
        found = self._head(place) if _split(place)[1] else None
        if found is None:
            raise StorageError(
                f"Cannot read {place}: there is no such object.",
                code="storage-missing",
                remedy="Check bucket, key and AWS_ENDPOINT_URL.",
            )
        return FileInfo(place, int(found["ContentLength"]), _version(found))

    def stream(self, place: str, start: int, stop: int, version: str) -> Iterator[bytes]:
        """Yield bytes `start` to `stop` of an object, going on where a connection broke.

        Raises:
            StorageError: it cannot be read, or is not of this version (`storage-changed`).
        """
        bucket, key = _split(place)
        client = client_for()
        at, failures = start, 0
        while at < stop:
            with translated("read", place, client.meta.endpoint_url):
                answer = client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={at}-{stop - 1}", IfMatch=f'"{version}"'
                )
            if _version(answer) != version:  # some stores ignore the condition
                answer["Body"].close()
                raise _changed(place)
            skip = _unwanted(answer, at, place)
            before = at
            try:
                for part in answer["Body"].iter_chunks(_CHUNK):
                    dropped = min(skip, len(part))
                    skip -= dropped
                    part = part[dropped : dropped + stop - at]
                    if part:
                        at += len(part)
                        yield part
                    if at == stop:
                        break
            except Exception as error:
                if not _is_broken_body(error):
                    raise
                failures = failures + 1 if at == before else 1
                if failures == BODY_ATTEMPTS:
                    raise explained(error, "read", place, client.meta.endpoint_url) from error
                time.sleep(0.1 * 2**failures)
            else:
                if at < stop:
                    raise _changed(place)
            finally:
                answer["Body"].close()

    def write(self, place: str, content: bytes, *, if_absent: bool = False) -> None:
        self._upload(place, content, if_absent)

    def publish(self, local_file: Path, place: str, *, if_absent: bool = False) -> None:
        """Upload a finished local file, then remove it.

        A folder becomes objects below `place`; it is not there at once, and when it fails, what had been uploaded is
        removed. Playlists come after all that they may name, those named last in the order of names last of all.
        """
        if local_file.is_dir():
            self._publish_folder(local_file, place, if_absent)
            return
        self._upload(place, local_file, if_absent)
        local_file.unlink()

    def _publish_folder(self, folder: Path, place: str, if_absent: bool) -> None:
        if if_absent and next(self.list(place), None) is not None:
            raise StorageError(
                f"{place} exists already.", code="destination-exists", remedy="Choose another name or --overwrite."
            )
        files = [file for file in folder.rglob("*") if file.is_file()]
        files.sort(key=lambda file: (file.suffix == ".m3u8", file))
        if not if_absent:
            self.delete(place)
        try:
            for file in files:
                self._upload(join(place, file.relative_to(folder).as_posix()), file, if_absent=False)
        except BaseException:
            self.delete(place)
            raise
        shutil.rmtree(folder)

    def _upload(self, place: str, content: bytes | Path, if_absent: bool) -> None:
        bucket, key = _named(place)
        client = client_for()
        with translated("write", place, client.meta.endpoint_url):
            upload(client, bucket, key, content, if_absent=if_absent)

    def delete(self, place: str) -> None:
        """Delete the object at `place` and all below it. A whole bucket is refused."""
        bucket, key = _named(place)
        client = client_for()
        with translated("delete", place, client.meta.endpoint_url):
            if not key.endswith("/") and self._head(place) is not None:  # some stores fail when a folder has this name
                client.delete_object(Bucket=bucket, Key=key)
            batch: list[str] = []
            for page in client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=_folder(key), MaxKeys=_PAGE
            ):
                batch += [item["Key"] for item in page.get("Contents", [])]
                while len(batch) >= _MOST_PER_DELETE:
                    _delete_batch(client, bucket, batch[:_MOST_PER_DELETE])
                    del batch[:_MOST_PER_DELETE]
            if batch:
                _delete_batch(client, bucket, batch)

    def abort_uploads(self, prefix: str) -> Sequence[str]:
        bucket, key = _split(prefix)
        client = client_for()
        with translated("list uploads of", prefix, client.meta.endpoint_url):
            return [f"{SCHEME}{bucket}/{one}" for one in abort_unfinished(client, bucket, key)]

    def make_folder(self, place: str) -> None:
        """Do nothing: folders need not be made here."""
        _split(place)

    def check_writable(self, place: str) -> None:
        """Raise unless an object could be written beside `place`: one is put there and deleted again."""
        bucket, key = _named(place)
        probe = f"{key.rpartition('/')[0]}/.upriver-{uuid.uuid4().hex}".lstrip("/")
        client = client_for(patient=False)
        with translated("write", place, client.meta.endpoint_url):
            client.put_object(Bucket=bucket, Key=probe, Body=b"")
        with translated("delete what was written beside", place, client.meta.endpoint_url):
            client.delete_object(Bucket=bucket, Key=probe)

    def check_reachable(self, place: str) -> None:
        bucket, key = _split(place)
        client = client_for(patient=False)
        with translated("list", place, client.meta.endpoint_url):
            client.list_objects_v2(Bucket=bucket, Prefix=_folder(key), MaxKeys=1)

    def free_bytes(self, place: str) -> int | None:
        """Return None: a store does not tell."""
        _split(place)
        return None


def _split(place: str) -> tuple[str, str]:
    bucket, _, key = place.removeprefix(SCHEME).partition("/")
    if not bucket or "@" in bucket or not place.startswith(SCHEME):
        raise StorageError(
            f"{SCHEME}... is not followed by the name of a bucket.",  # what is there may be a password
            code="storage-place",
            remedy="Write s3://bucket/key; keys and secrets belong into AWS_* or a profile.",
        )
    return bucket, key


def _named(place: str) -> tuple[str, str]:
    bucket, key = _split(place)
    if not key.strip("/"):
        raise StorageError(
            f"{place} names a whole bucket.", code="storage-place", remedy="Add a key: s3://bucket/folder/name."
        )
    return bucket, key


def _folder(key: str) -> str:
    return f"{key.rstrip('/')}/" if key.strip("/") else ""


def _version(found: dict[str, Any]) -> str:
    return str(found["ETag"]).removeprefix("W/").strip('"')


def _unwanted(answer: dict[str, Any], start: int, place: str) -> int:
    """Return how many bytes come before `start` in an answer; some stores send a range, or all, with status 200."""
    named = re.match(r"bytes (\d+)-", answer.get("ContentRange") or "")
    first = int(named[1]) if named else start if answer["ResponseMetadata"]["HTTPStatusCode"] == 206 else 0
    if first > start:
        answer["Body"].close()
        raise _changed(place)
    return start - first


def _is_broken_body(error: Exception) -> bool:
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return isinstance(error, HTTPClientError | IncompleteReadError | HTTPError | OSError)


def _delete_batch(client: Any, bucket: str, keys: Sequence[str]) -> None:
    from botocore.exceptions import ClientError

    try:
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        errors = client.delete_objects(Bucket=bucket, Delete=wanted).get("Errors", [])
    except ClientError as error:
        if status_of(error) not in (400, 405, 501):
            raise
        errors = [{"Key": key} for key in keys]  # a store that takes them one by one
    for item in errors:
        client.delete_object(Bucket=bucket, Key=item["Key"])


def _changed(place: str) -> StorageError:
    return StorageError(
        f"Cannot read {place}: it was changed meanwhile.",
        code="storage-changed",
        remedy="Start again: a changed source is a new job.",
    )
