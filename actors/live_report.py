"""What one stream's connection reports of it: its frames, its saved states, its end; as metrics and as traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from actors.session import Answer, Incoming, Session
from infra.protocol import DropReason, FrameHeader
from infra.refusals import Refusal, StateLost
from infra.telemetry import Telemetry


class StreamReport:
    """See the module. The stream counts as opened when this is made.

    Args:
        headers: that came with the connection; `traceparent` names the client's trace.

    Attributes:
        state_bytes: of the last snapshot that is safe.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        session: Session,
        model: str,
        headers: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        tenant, policy = session.key.tenant, session.hello.policy.kind
        self._clock, self._metrics = clock, telemetry.metrics
        self._meter = telemetry.metrics.stream(tenant, model, policy)
        about = {"tenant": tenant, "model": model, "policy": policy, "session": session.key.session}
        attributes = {f"upriver.{name}": value for name, value in about.items()}
        tracer = telemetry.tracer
        self._tracer = None if tracer is None else tracer.stream(headers.get("traceparent"), attributes, clock=clock)
        self.state_bytes = 0

    def received(self, size_bytes: int) -> None:
        """A frame's message has come."""
        self._meter.received(size_bytes)

    def arrived(self, frame: Incoming) -> None:
        """A frame has its place in the stream; one in many is traced from here on."""
        if self._tracer is not None:
            frame.trace = self._tracer.frame(frame.id, frame.arrived)

    def replayed(self) -> None:
        """A frame that was sent again has done its work, and gets no answer."""
        self._meter.replayed()

    def sent(self, answer: Answer, header: FrameHeader, size_bytes: int, *, began: float, encoded: float) -> None:
        """An answer was sent; `began`: to be encoded."""
        now, trace = self._clock(), answer.frame.trace
        if trace is not None:
            if answer.reason is DropReason.NONE:
                trace.stage("encode", encoded, began=began)
            trace.stage("send", now, began=encoded)
            about: dict[str, str | int] = {"upriver.level": header.level, "upriver.index": header.index}
            trace.finish(now, about | {"upriver.dropped": header.reason.name.lower()})
        trace_id = None if trace is None else trace.trace_id
        self._meter.answered(header, size_bytes, now - answer.frame.arrived, now - encoded, trace_id)

    @contextmanager
    def saving(self) -> Iterator[Callable[[int], None]]:
        """Around the saving of a state; call what it gives with the state's bytes when it is safe."""
        began = self._clock()

        def safe(size_bytes: int) -> None:
            self.state_bytes = size_bytes
            self._metrics.saved(size_bytes, self._clock() - began)

        try:
            yield safe
        except StateLost:  # another replica has the stream: nothing is wrong
            raise
        except Exception:
            self._metrics.not_saved()
            raise

    def ended(self, how: Literal["closed", "lost", "handed_over", "refused"], refusal: Refusal | None = None) -> None:
        """The stream has ended here."""
        self._meter.ended(how)
        if how == "handed_over":
            self._metrics.handed_off("out")
        if refusal is not None:
            self._metrics.refused(type(refusal).__name__, refusal.code)
