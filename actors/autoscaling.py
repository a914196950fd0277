"""How many replicas the live streams need, by what their frames cost: the policy that Ray Serve asks.

Serve counts open requests. A stream is one request for hours, whatever it costs, so that says little: here a replica
tells the share of its engine's time that its streams want at full quality, as admission measures it. Enough replicas
are wanted that each has `target_load` of it. Clients that are refused for want of room are demand that is not seen
otherwise, and count at once.

Fewer are wanted only where those that are left can take the streams of the one that goes. How long a wish must last
before it is fulfilled is Serve's part (`upscale_delay_s`, `downscale_delay_s`), and so is which replica goes; its
streams are handed over (`actors.state_holder`). Knows no Ray: Serve's context is read by its attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from actors.live_server import LiveServer

LOAD: Final = "upriver_load"
STREAMS: Final = "upriver_streams"
REFUSED: Final = "upriver_refused"
"""What a replica tells of itself: see `ReplicaLoad`."""

NO_ROOM: Final = ("capacity-full", "sessions-full")
SLACK: Final = 0.85
"""Replicas go only where the rest would be loaded to this part of the target: so a load that moves a little about the
target opens and closes nothing."""
REMEMBERED_S: Final = 30.0
"""How long a refused client counts as demand: its next attempts, and the start of a replica, take about that."""


class AutoscalingArguments(BaseModel):
    """Part of the `args` of a Serve configuration file.

    Attributes:
        target_load: share of a replica's time that its streams should want, 0 to 1. What is left takes streams that
            come while another replica starts, and those of one that dies.
        upscale_delay_s, downscale_delay_s: how long more, or fewer, replicas must be wanted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    min_replicas: int = Field(default=1, ge=1, le=4096)
    max_replicas: int = Field(default=4, ge=1, le=4096)
    target_load: float = Field(default=0.7, ge=0.05, le=1.0)
    upscale_delay_s: float = Field(default=5.0, ge=0, le=3600)
    downscale_delay_s: float = Field(default=600.0, ge=0, le=86_400)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        return self


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells.

    Attributes:
        load: share of what it may promise that its streams want at full quality, or of the streams that it may have,
            whichever is more; above 1 where quality went down to take them.
        streams: that it has. refused: for want of room, since it started.
    """

    load: float
    streams: float
    refused: float


@dataclass(frozen=True, slots=True)
class Demand:
    """Clients that were refused, and until when they count.

    Attributes:
        seen: by replica, how many it had refused when it was last asked.
        replicas: how many were wanted for them. until_s: on the caller's clock.
    """

    seen: Mapping[str, float]
    replicas: int = 0
    until_s: float = 0.0


def replicas_wanted(
    loads: Mapping[str, ReplicaLoad | None], *, coming: int, target_load: float, demand: Demand, now_s: float
) -> tuple[int, Demand]:
    """Return how many replicas the streams need, 1 or more, before any bounds; and the demand to hand in next time.

    Args:
        loads: of the replicas that run, by name. One that tells nothing (None) counts as full.
        coming: replicas that were asked for and do not run yet.
        demand: what this returned last time.
    """
    running = len(loads)
    told = [one for one in loads.values() if one is not None]
    total = sum(one.load for one in told) + target_load * (running - len(told))
    by_load = _enough_for(total, target_load)
    wanted = by_load if by_load > running else min(running, max(by_load, _enough_for(total, SLACK * target_load)))

    # A replica that was not asked before may have refused long ago: only what comes after counts.
    seen = {name: one.refused for name, one in loads.items() if one is not None}
    refused = sum(max(0.0, count - demand.seen.get(name, count)) for name, count in seen.items())
    asked, until_s = demand.replicas, demand.until_s
    if refused > 0:
        streams = sum(one.streams for one in told)
        # As heavy as those that were let in, as far as is known; each replica's worth of them wants one more.
        each = total / streams if streams else target_load
        more = max(1, math.ceil(min(refused * each, total) / target_load - 1e-9))
        asked = max(asked if now_s < until_s else 0, running + max(coming, more))
        until_s = now_s + REMEMBERED_S
    if now_s < until_s:
        wanted = max(wanted, asked)
    return max(1, wanted), Demand(seen, asked, until_s)


def _enough_for(load: float, target_load: float) -> int:
    return max(1, math.ceil(load / target_load - 1e-9))  # 2.1 / 0.7 must be 3


def measured_load(server: LiveServer) -> dict[str, float]:
    """Return what a replica tells Serve: see `ReplicaLoad`. In its event loop."""
    sessions = [(one.session, one.engine) for one in server.connections.values()]
    wanted = sum(
        (session.hello.fps or 0.0) * engine.cost_s(session.hello.height, session.hello.width, session.ladder.best)
        for session, engine in sessions
    )
    load = max(wanted / server.config.most_load, len(sessions) / server.config.most_sessions)
    refused = sum(server.refused.get(code, 0) for code in NO_ROOM)
    return {LOAD: load, STREAMS: float(len(sessions)), REFUSED: float(refused)}


class SessionLoadPolicy:
    """`replicas_wanted` as Ray Serve calls it (`AutoscalingPolicy.policy_function`).

    Args:
        target_load: see `AutoscalingArguments`.
    """

    def __init__(self, target_load: float = 0.7) -> None:
        self._target_load = target_load

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the replicas that are wanted, and the state to be handed in with the next context."""
        told: Mapping[str, Mapping[Any, Any]] = context.raw_metrics or {}
        loads = {str(each): _told_by(each, told) for each in context.running_replicas}
        state = context.policy_state or {}
        wanted, demand = replicas_wanted(
            loads,
            coming=max(0, context.target_num_replicas - len(loads)),
            target_load=self._target_load,
            demand=Demand(state.get("seen", {}), state.get("replicas", 0), state.get("until_s", 0.0)),
            now_s=context.current_time,
        )
        return wanted, {"seen": dict(demand.seen), "replicas": demand.replicas, "until_s": demand.until_s}


def _told_by(replica: Any, told: Mapping[str, Mapping[Any, Any]]) -> ReplicaLoad | None:
    series = [told.get(name, {}).get(replica) for name in (LOAD, STREAMS, REFUSED)]
    if not all(series):
        return None
    load, streams, refused = (one[-1].value for one in series if one)
    return ReplicaLoad(load, streams, refused)
