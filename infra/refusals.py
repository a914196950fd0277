"""Refusals of the live service: what a stream, a frame or a request was refused for, its limit, and when to try again.

One class for each reason, the same on both sides of the wire: the endpoint raises it, the message carries it, the client
raises it again. A refusal closes its stream; what only a single frame is refused for is a reason of `infra.protocol`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from infra.errors import InfraError

NORMAL_CLOSURE: Final = 1000
SERVICE_RESTART: Final = 1012  # IANA's registry of WebSocket close codes: the service restarts, connect again
TRY_AGAIN_LATER: Final = 1013


class Refusal(InfraError):
    """Something that the service does not do, or not now.

    Args:
        message: what was refused, the offending value, the limit.
        limit: the limit alone, as text; empty where there is none.
        retry_after_s: when another attempt may succeed; None where it would meet the same refusal.

    Attributes:
        close_code: of the WebSocket (RFC 6455, section 7.4). http_status: of an answer to a request.
    """

    code: str
    close_code: ClassVar[int] = 1008
    http_status: ClassVar[int] = 400
    default_code: ClassVar[str] = "refused"

    def __init__(
        self,
        message: str,
        *,
        remedy: str,
        code: str | None = None,
        limit: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code or self.default_code, remedy=remedy)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def to_message(self) -> dict[str, Any]:
        """Return the refusal as the control message that the client gets before its stream is closed."""
        return {
            "type": "refused",
            "kind": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "limit": self.limit,
            "remedy": self.remedy,
            "retry_after_s": self.retry_after_s,
        }


class AdmissionRefused(Refusal):
    """No capacity: for another stream, another request, or this one's size and rate."""

    close_code = TRY_AGAIN_LATER
    http_status = 503
    default_code = "admission-refused"


class StateLost(Refusal):
    """A stream cannot be resumed: its state is gone, or is not this client's, or another client goes on with it."""

    close_code = 4410
    http_status = 410
    default_code = "state-lost"


class FrameTooLarge(Refusal):
    """A message or a picture is larger than agreed, or than anybody may send."""

    close_code = 1009
    http_status = 413
    default_code = "frame-too-large"


class OutOfOrder(Refusal):
    """Frames of a stream that loses none came repeated or in another order."""

    close_code = 4409
    http_status = 409
    default_code = "out-of-order"


class RateExceeded(Refusal):
    """More was sent than was granted, or than the tenant may send in this time."""

    close_code = 4429
    http_status = 429
    default_code = "rate-exceeded"


class Unauthorized(Refusal):
    """No credentials, or wrong ones; which of it is in the log alone."""

    close_code = 4401
    http_status = 401
    default_code = "unauthorized"


class Forbidden(Refusal):
    """Known credentials that are not good for this, or a page of another origin."""

    close_code = 4403
    http_status = 403
    default_code = "forbidden"


class BadMessage(Refusal):
    """A message that is not of the protocol, or a picture that is not what it says it is."""

    close_code = 4400
    http_status = 400
    default_code = "bad-message"


class TimedOut(Refusal):
    """Nothing came for too long, or the stream is as old as a stream may get, or its client does not read."""

    close_code = 4408
    http_status = 408
    default_code = "timed-out"


class ServiceFailure(Refusal):
    """The service itself failed for this stream; another attempt may meet another replica."""

    close_code = 1011
    http_status = 500
    default_code = "service-failure"


KINDS: Final = {
    kind.__name__: kind
    for kind in (
        AdmissionRefused,
        StateLost,
        FrameTooLarge,
        OutOfOrder,
        RateExceeded,
        Unauthorized,
        Forbidden,
        BadMessage,
        TimedOut,
        ServiceFailure,
    )
}


def refusal_from_message(message: dict[str, Any]) -> Refusal:
    """Return the refusal that a control message of type ``refused`` tells of; an unknown kind is a plain `Refusal`."""
    kind = KINDS.get(str(message.get("kind")), Refusal)
    retry_after_s = message.get("retry_after_s")
    return kind(
        str(message.get("message", "The service refused.")),
        code=str(message.get("code", kind.default_code)),
        remedy=str(message.get("remedy", "")),
        limit=str(message.get("limit", "")),
        retry_after_s=float(retry_after_s) if isinstance(retry_after_s, int | float) else None,
    )
