"""Refusals as the Open Inference Protocol tells them: `{"error": "..."}` with a status over REST, a code over gRPC.

| refusal | REST | gRPC |
|---|---|---|
| a request that cannot be: tensor, datatype, shape, parameter, picture | 400 | INVALID_ARGUMENT |
| a sequence that is not open, frames out of order | 400, 409 | FAILED_PRECONDITION |
| too large, too many frames | 413 | INVALID_ARGUMENT |
| credentials missing or wrong; not good for this | 401; 403 | UNAUTHENTICATED; PERMISSION_DENIED |
| no such model or version | 404 | NOT_FOUND |
| no room, going away, the service does not answer | 503 | UNAVAILABLE |
| too many requests of a sequence, a tenant's rate | 429 | RESOURCE_EXHAUSTED |
| not in time | 504 (408 for a body) | DEADLINE_EXCEEDED |
| the service failed | 500 | INTERNAL |

Where another attempt may succeed, REST has `Retry-After` (RFC 9110, section 10.2.3) and gRPC the trailing metadata
`grpc-retry-pushback-ms` (gRFC A6). The refusal's own code is in `upriver-code`, header or trailing metadata.
"""

from __future__ import annotations

import math
from typing import Final

import grpc  # type: ignore[import-untyped]

from infra.refusals import (
    AdmissionRefused,
    Forbidden,
    OutOfOrder,
    RateExceeded,
    Refusal,
    ServiceFailure,
    StateLost,
    TimedOut,
    Unauthorized,
)

CODE_HEADER: Final = "upriver-code"
PUSHBACK: Final = "grpc-retry-pushback-ms"
_Code = grpc.StatusCode
_BY_CODE: Final = {
    "model-unknown": (404, _Code.NOT_FOUND),
    "version-unknown": (404, _Code.NOT_FOUND),
    "not-found": (404, _Code.NOT_FOUND),
    "method-not-allowed": (405, _Code.UNIMPLEMENTED),
    "encoding-unknown": (415, _Code.UNIMPLEMENTED),
    "out-of-order": (409, _Code.FAILED_PRECONDITION),
    "unreachable": (503, _Code.UNAVAILABLE),
    "gateway-unsafe": (503, _Code.UNAVAILABLE),
    "model-not-ready": (503, _Code.UNAVAILABLE),
    "deadline-exceeded": (504, _Code.DEADLINE_EXCEEDED),
    "deadline-in-queue": (504, _Code.DEADLINE_EXCEEDED),
}
_BY_KIND: Final[tuple[tuple[type[Refusal], grpc.StatusCode], ...]] = (
    (Unauthorized, _Code.UNAUTHENTICATED),
    (Forbidden, _Code.PERMISSION_DENIED),
    (AdmissionRefused, _Code.UNAVAILABLE),
    (RateExceeded, _Code.RESOURCE_EXHAUSTED),
    (TimedOut, _Code.DEADLINE_EXCEEDED),
    (StateLost, _Code.ABORTED),
    (OutOfOrder, _Code.FAILED_PRECONDITION),
    (ServiceFailure, _Code.INTERNAL),
)


def http_status(refusal: Refusal) -> int:
    """Return the status of an answer over REST."""
    found = _BY_CODE.get(refusal.code)
    return refusal.http_status if found is None else found[0]


def grpc_code(refusal: Refusal) -> grpc.StatusCode:
    """Return the status of a call over gRPC."""
    if refusal.code in _BY_CODE:
        return _BY_CODE[refusal.code][1]
    if refusal.code.startswith("sequence-") and type(refusal).__name__ == "SequenceRefused":
        return _Code.FAILED_PRECONDITION
    return next((code for kind, code in _BY_KIND if isinstance(refusal, kind)), _Code.INVALID_ARGUMENT)


def http_headers(refusal: Refusal) -> dict[str, str]:
    """Return the headers of an answer over REST."""
    headers = {CODE_HEADER: refusal.code}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if http_status(refusal) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def trailing_metadata(refusal: Refusal) -> tuple[tuple[str, str], ...]:
    """Return what a call over gRPC ends with."""
    metadata: tuple[tuple[str, str], ...] = ((CODE_HEADER, refusal.code),)
    if refusal.retry_after_s is not None:
        metadata += ((PUSHBACK, str(max(1, round(1000 * refusal.retry_after_s)))),)
    return metadata
