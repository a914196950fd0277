"""Whether a replica takes another stream: by what its frames will cost, as measured, not by a fixed count.

A stream that says its frame rate and lets its quality go down under load is counted at its lowest level: the ladder
makes room. One that says no rate waits when the replica is busy, and is counted by its presence alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from infra.refusals import AdmissionRefused

if TYPE_CHECKING:
    from actors.live_engine import LiveEngine
    from actors.session import Session

RETRY_AFTER_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one replica.

    Attributes:
        most_sessions: streams at once, whatever they cost.
        most_load: share of the engine's time that may be promised, 0 to 1.
    """

    most_sessions: int
    most_load: float = 0.9

    def require_room(self, others: Iterable[tuple[Session, LiveEngine]], session: Session, engine: LiveEngine) -> None:
        """Raise AdmissionRefused unless `session` fits beside `others`."""
        there = list(others)
        if len(there) >= self.most_sessions:
            raise AdmissionRefused(
                f"This replica has {len(there)} streams.",
                code="sessions-full",
                limit=f"{self.most_sessions} streams",
                remedy="Try again later, or run more replicas.",
                retry_after_s=RETRY_AFTER_S,
            )
        wanted = promised_load(session, engine)
        taken = sum(promised_load(*one) for one in there)
        # The first stream is taken whatever it costs: nothing else waits for the engine, and its policy says what to do
        # with frames that are too late.
        if there and taken + wanted > self.most_load:
            raise AdmissionRefused(
                f"The stream would take {wanted:.0%} of this replica, of which {taken:.0%} is promised to others.",
                code="capacity-full",
                limit=f"{self.most_load:.0%} of the replica's time",
                remedy="Try again later, at a lower frame rate or size, or run more replicas.",
                retry_after_s=RETRY_AFTER_S,
            )


def promised_load(session: Session, engine: LiveEngine) -> float:
    """Return the share of the engine's time that a stream may always have, 0 where it said no frame rate."""
    hello = session.hello
    if hello.fps is None:
        return 0.0
    ladder = session.ladder
    steps = ladder.best if ladder.budget_s is None else ladder.least
    return hello.fps * engine.cost_s(hello.height, hello.width, steps)
