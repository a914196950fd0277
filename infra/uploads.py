"""Putting objects into a bucket: whole or not at all, in parts when they are large, and only if absent when asked.

S3 decides `If-None-Match: *` itself: 412 says that there is an object already, 409 that another write was under way and
that the whole upload has to be done again. Three things can still go wrong, and are taken care of here:

- An answer gets lost and the client's retry meets the object that its first attempt wrote. Every write carries a token
  of its own in the object's metadata, so that it knows its own work.
- A store ignores the condition (rclone's server does) or refuses the header. So there is a look before the write and
  another after it. What remains unsafe on such a store: two writers that both look before either has written, where the
  first one looks again before the second one's write arrives; both then believe they wrote it, and the second one's
  object stays. Objects are whole in every case.
- Parts stay behind, and are paid for, when a process is killed during an upload; `abort_unfinished` removes them. On
  every other way out, an interrupt included, the upload is aborted here.

boto3's own transfer functions are not used because they cannot send the condition.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any

from infra.errors import StorageError
from infra.object_errors import code_of, status_of

PART_BYTES = 16 << 20  # S3 takes 5 MiB to 5 GiB; four parts are in memory at a time
MOST_PARTS = 9_000  # of S3's 10,000
PARTS_AT_A_TIME = 4
CONFLICT_ATTEMPTS = 4
# By the ending of the key. Players go by these; browsers offer to save what has none.
_CONTENT_TYPES = {
    ".m3u8": "application/vnd.apple.mpegurl", ".mp4": "video/mp4", ".m4v": "video/mp4", ".m4a": "audio/mp4",
    ".mov": "video/quicktime", ".mkv": "video/x-matroska", ".webm": "video/webm", ".ts": "video/mp2t",
    ".m2ts": "video/mp2t", ".mts": "video/mp2t", ".json": "application/json", ".png": "image/png",
    ".sha256": "text/plain", ".framemd5": "text/plain",
}  # fmt: skip
TOKEN = "upriver-write"

logger = logging.getLogger(__name__)


def upload(client: Any, bucket: str, key: str, content: bytes | Path, *, if_absent: bool) -> None:
    """Put bytes or a file at `key`.

    Raises:
        StorageError: `if_absent` and there is an object already (`destination-exists`).
        ClientError, BotoCoreError: the store cannot be used; nothing is at `key`, or what was there before.
    """
    from botocore.exceptions import ClientError

    token = uuid.uuid4().hex
    if if_absent and _head(client, bucket, key) is not None:
        raise _exists(bucket, key)
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    for attempt in range(1, CONFLICT_ATTEMPTS + 1):
        try:
            etag = _upload_once(client, bucket, key, content, token, condition)
            break
        except ClientError as error:
            status = status_of(error)
            if if_absent and (status == 412 or (status == 404 and code_of(error) == "NoSuchUpload")):
                if _is_ours(_head(client, bucket, key), token, None):
                    return
                if status == 412:
                    raise _exists(bucket, key) from error
                raise
            if condition and status == 501:
                condition = {}  # the store does not know the header; the looks before and after it remain
            elif status != 409 or attempt == CONFLICT_ATTEMPTS:
                raise
            else:
                time.sleep(0.1 * 2**attempt)
    if if_absent and not _is_ours(_head(client, bucket, key), token, etag):
        raise _exists(bucket, key)


def abort_unfinished(client: Any, bucket: str, prefix: str) -> list[str]:
    """Abort every multipart upload to a key that begins with `prefix`, and return these keys."""
    keys = []
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Uploads", []):
            if item["Key"].startswith(prefix):  # not every store filters
                _abort(client, bucket, item["Key"], item["UploadId"])
                keys.append(item["Key"])
    return keys


def _upload_once(
    client: Any, bucket: str, key: str, content: bytes | Path, token: str, condition: dict[str, str]
) -> str:
    """Return the etag that the store gave."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    described: dict[str, Any] = {"Metadata": {TOKEN: token}}
    content_type = _CONTENT_TYPES.get(PurePosixPath(key).suffix.lower())
    if content_type is not None:
        described["ContentType"] = content_type
    if size <= PART_BYTES:
        body = content if isinstance(content, bytes) else content.read_bytes()
        put = client.put_object(Bucket=bucket, Key=key, Body=body, ContentMD5=_md5(body), **described, **condition)
        return str(put["ETag"]).strip('"')
    upload_id = client.create_multipart_upload(Bucket=bucket, Key=key, **described)["UploadId"]
    try:
        parts = _put_parts(client, bucket, key, upload_id, _parts_of(content, max(PART_BYTES, -(-size // MOST_PARTS))))
        done = client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition
        )
    except BaseException:
        try:
            _abort(client, bucket, key, upload_id)
        except Exception:
            logger.warning("an unfinished upload to s3://%s/%s could not be aborted", bucket, key)
        raise
    return str(done["ETag"]).strip('"')


def _put_parts(client: Any, bucket: str, key: str, upload_id: str, parts: Iterator[bytes]) -> list[dict[str, Any]]:
    def put(number: int, body: bytes) -> dict[str, Any]:
        answer = client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body, ContentMD5=_md5(body)
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    done: list[dict[str, Any]] = []
    running: set[Future[dict[str, Any]]] = set()
    pool = ThreadPoolExecutor(PARTS_AT_A_TIME, thread_name_prefix="upload")
    try:
        for number, body in enumerate(parts, 1):
            if len(running) == PARTS_AT_A_TIME:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += [future.result() for future in finished]
            running.add(pool.submit(put, number, body))
        done += [future.result() for future in running]
    finally:
        # A part that arrives after the abort would stay behind, so those under way are waited for.
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(done, key=lambda part: int(part["PartNumber"]))


def _parts_of(content: bytes | Path, length: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for start in range(0, len(content), length):
            yield content[start : start + length]
        return
    with content.open("rb") as file:
        expected = os.fstat(file.fileno()).st_size
        while part := file.read(length):
            expected -= len(part)
            yield part
    if expected:
        raise StorageError(
            f"{content} changed while it was uploaded.", code="storage-changed", remedy="Let nobody write to it."
        )


def _abort(client: Any, bucket: str, key: str, upload_id: str) -> None:
    from botocore.exceptions import ClientError

    try:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except ClientError as error:
        if code_of(error) != "NoSuchUpload":
            raise


def _head(client: Any, bucket: str, key: str) -> dict[str, Any] | None:
    from botocore.exceptions import ClientError

    try:
        return dict(client.head_object(Bucket=bucket, Key=key))
    except ClientError as error:
        if status_of(error) == 404:
            return None
        raise


def _is_ours(found: dict[str, Any] | None, token: str, etag: str | None) -> bool:
    """Whether the object is the one written with `token`; by its etag where the store keeps no metadata."""
    if found is None:
        return False
    kept = {name.lower(): value for name, value in found.get("Metadata", {}).items()}  # rclone changes the case
    if TOKEN in kept:
        return bool(kept[TOKEN] == token)
    return etag is not None and str(found.get("ETag", "")).strip('"') == etag


def _md5(body: bytes) -> str:
    """Lets the store refuse what changed on its way; of all checksums, every store knows this one."""
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _exists(bucket: str, key: str) -> StorageError:
    return StorageError(
        f"s3://{bucket}/{key} exists already.",
        code="destination-exists",
        remedy="Choose another name or --overwrite.",
    )
