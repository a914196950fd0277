"""What went wrong with an object store, in words that say what to do; keys, tokens and signed URLs appear in none.

The store's own message is never passed on, because some stores repeat the request in it. Loads botocore only when an
error is at hand, which means that it is loaded already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from infra.errors import StorageError

_WRONG_KEY = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in AWS_PROFILE."
_NO_RIGHT = "Give the key the right to {verb} there: s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket."
_NOT_THERE = "Check bucket, key and AWS_ENDPOINT_URL."
_LATER = "Try again later; the store or the way to it has a problem."

# By the code that S3 gives in its answer: our code, what is the matter, the remedy.
_BY_CODE: dict[str, tuple[str, str, str]] = {
    "NoSuchBucket": ("storage-bucket-missing", "there is no such bucket", "Make the bucket, or check its name."),
    "NoSuchKey": ("storage-missing", "there is no such object", _NOT_THERE),
    "NoSuchUpload": ("storage-changed", "its upload was aborted by somebody else", "Run one job for a destination."),
    "InvalidAccessKeyId": ("storage-credentials", "the store does not know the access key", _WRONG_KEY),
    "SignatureDoesNotMatch": ("storage-credentials", "the secret key is wrong", _WRONG_KEY),
    "ExpiredToken": ("storage-credentials", "the session token has expired", "Sign in again."),
    "ExpiredTokenException": ("storage-credentials", "the session token has expired", "Sign in again."),
    "InvalidToken": ("storage-credentials", "the session token is not valid", _WRONG_KEY),
    "RequestTimeTooSkewed": ("storage-clock", "this machine's clock is wrong", "Set the clock."),
    "AccessDenied": ("storage-denied", "access is denied", _NO_RIGHT),
    "AllAccessDisabled": ("storage-denied", "access is denied", _NO_RIGHT),
    "PreconditionFailed": (
        "storage-changed",
        "it was changed meanwhile",
        "Start again: a changed source is a new job.",
    ),
    "InvalidRange": ("storage-changed", "it has become shorter", "Start again: a changed source is a new job."),
    "ConditionalRequestConflict": ("storage-conflict", "another write was under way", "Run one job for a destination."),
    "OperationAborted": ("storage-conflict", "another write was under way", "Run one job for a destination."),
    "InvalidBucketName": ("storage-place", "a bucket cannot have this name", "Write s3://bucket/key."),
    "PermanentRedirect": ("storage-region", "the bucket is in another region", "Set AWS_REGION or AWS_ENDPOINT_URL."),
    "AuthorizationHeaderMalformed": ("storage-region", "the region is wrong", "Set AWS_REGION to the bucket's."),
    "SlowDown": (
        "storage-busy",
        "the store asks to be left alone for a while",
        "Use fewer actors, or try again later.",
    ),
    "QuotaExceeded": ("storage-full", "the quota is used up", "Free some space or choose another destination."),
    "InsufficientStorage": ("storage-full", "the store is full", "Free some space or choose another destination."),
    "XMinioStorageFull": ("storage-full", "the store is full", "Free some space or choose another destination."),
}
# Where an answer has no body (to HEAD), or a code that no store but one has.
_BY_STATUS: dict[int, str] = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    416: "InvalidRange",
    429: "SlowDown",
    503: "SlowDown",
    507: "InsufficientStorage",
}


def status_of(error: Exception) -> int:
    """Return the HTTP status of a store's answer, 0 where there was none."""
    answer = getattr(error, "response", None) or {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Exception) -> str:
    """Return S3's code of a store's answer, such as `NoSuchKey`; empty where there was none."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def explained(error: Exception, verb: str, place: str, endpoint: str) -> StorageError:
    """Return the `StorageError` for what botocore raised while it tried to `verb` what is at `place`.

    Args:
        endpoint: URL of the store; only its host is shown.
    """
    code, reason, remedy = _classified(error, _host(endpoint))
    return StorageError(f"Cannot {verb} {place}: {reason}.", code=code, remedy=remedy.format(verb=verb))


@contextmanager
def translated(verb: str, place: str, endpoint: str) -> Iterator[None]:
    """Raise `StorageError` for whatever the client raises inside."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise explained(error, verb, place, endpoint) from error


def _classified(error: Exception, host: str) -> tuple[str, str, str]:
    from botocore import exceptions as botocore

    status = status_of(error)
    if status:
        known = _BY_CODE.get(code_of(error)) or _BY_CODE.get(_BY_STATUS.get(status, ""))
        if known:
            return known
        if status >= 500:
            return "storage-server", f"the store at {host} answers with error {status}", _LATER
        return "storage-refused", f"the store at {host} refuses the request ({status} {code_of(error)})", _NOT_THERE
    if isinstance(
        error, botocore.EndpointConnectionError | botocore.ConnectTimeoutError | botocore.ProxyConnectionError
    ):
        return "storage-unreachable", _unreachable(error, host), "Check AWS_ENDPOINT_URL and the network."
    if isinstance(error, botocore.SSLError):
        return "storage-tls", f"no secure connection to {host}", "Check the certificate, or AWS_CA_BUNDLE."
    if isinstance(error, botocore.HTTPClientError | botocore.IncompleteReadError | OSError):
        return "storage-unreachable", f"the connection to {host} broke or stalled", _LATER
    if isinstance(error, botocore.ParamValidationError):
        return "storage-place", "bucket or key are not possible", "Write s3://bucket/key."
    missing = (
        botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.CredentialRetrievalError,
        botocore.ProfileNotFound, botocore.TokenRetrievalError, botocore.SSOError, botocore.NoAuthTokenError,
    )  # fmt: skip
    if isinstance(error, missing):
        return "storage-credentials", "there are no usable credentials", _WRONG_KEY
    return "storage-failed", f"{type(error).__name__} at {host}", _LATER


def _unreachable(error: Exception, host: str) -> str:
    cause = f"{getattr(error, 'kwargs', {}).get('error', '')}"
    if "resolve" in cause or "Name or service not known" in cause:
        return f"the name {host.rpartition(':')[0] or host} is not known (DNS)"
    if "refused" in cause:
        return f"nobody listens at {host}"
    return f"{host} does not answer"


def _host(endpoint: str) -> str:
    """Host and port: a URL may carry a password, which must not be shown."""
    return urlsplit(endpoint).netloc.rpartition("@")[2] or "the store"
