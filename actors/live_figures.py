"""A replica's figures as they are at this moment, and the page of metrics that shows those of all replicas.

What is counted as it happens is in `infra.metrics`; here is what is read from sessions, stepper, engines and device
when somebody asks. Behind a proxy a scrape meets any replica: each hands its metrics to a board every few seconds, and
the one that is asked shows what the board has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from actors.admission import promised_load
from actors.session import LEGAL_MOVES, SessionState
from infra import exposition
from infra.exposition import Page
from infra.metrics import ReplicaFigures, SessionFigures, application_metrics

if TYPE_CHECKING:
    import torch

    from actors.live_connection import LiveConnection
    from actors.live_server import LiveServer
    from actors.state_book import StateStore

logger = logging.getLogger(__name__)

_FRESH_S: Final = 1.0  # a replica's own figures are collected again after so long, however often they are asked for
_Figures: TypeAlias = dict[str, dict[tuple[str, ...], float]]  # by family, by label values
_SHOWN_STATES: Final = [state for state in SessionState if LEGAL_MOVES[state]]


class Board(Protocol):
    """Where replicas show each other their metrics."""

    async def exchange_metrics(self, replica: str, number: int, packed: bytes) -> dict[str, tuple[float, bytes]]:
        """Put up a replica's metrics, return those of all: age in seconds, and packed metrics, by replica."""


class MetricsDesk:
    """Hands out the page of metrics.

    Args:
        board: None where this replica is the only one.
    """

    def __init__(
        self, server: LiveServer, states: StateStore, board: Board | None, *, clock: Callable[[], float]
    ) -> None:
        self._server, self._states, self._board, self._clock = server, states, board, clock
        self._lock = asyncio.Lock()  # posts arrive in the order in which they were made
        self._packed, self._packed_at = b"", float("-inf")
        self._number = 0

    async def page(self, accept: str = "", accept_encoding: str = "") -> Page:
        """Return the metrics of all replicas, in the format that these headers of the request ask for."""
        replicas = await self._exchange()
        about: _Figures = {"figures_age_seconds": {(replica,): age_s for replica, (age_s, _) in replicas.items()}}
        try:
            held = await self._states.figures()
        except Exception as error:
            logger.warning("the keeper of states does not tell its figures: %s", error)
        else:
            names = {"streams": "held_states", "bytes": "held_state_bytes", "limit_bytes": "held_state_limit_bytes"}
            about |= {names[name]: {(): float(value)} for name, value in held.items()}
        return await asyncio.to_thread(_page, replicas, about, accept, accept_encoding)

    async def post_forever(self) -> None:
        """Show this replica's metrics to the others every few seconds."""
        while True:
            await self._exchange()
            await asyncio.sleep(exposition.POST_EVERY_S)

    async def _exchange(self) -> dict[str, tuple[float, bytes]]:
        async with self._lock:
            replica = self._server.telemetry.replica
            await self._collect()
            if self._board is not None:
                # The board is read each time: what it showed a moment ago of another replica may be older than what
                # that replica has shown itself since.
                try:
                    return await self._board.exchange_metrics(replica, self._number, self._packed)
                except Exception as error:  # the holder restarts: one replica is better than none
                    logger.warning("the metrics of other replicas cannot be had: %s", error)
            return {replica: (time.monotonic() - self._packed_at, self._packed)}

    async def _collect(self) -> None:
        if time.monotonic() - self._packed_at < _FRESH_S:
            return
        metrics = self._server.telemetry.metrics
        metrics.figures = figures(self._server, self._clock())
        self._packed_at = time.monotonic()
        self._packed = await asyncio.to_thread(exposition.pack, metrics.registry)
        self._number = max(self._number + 1, time.time_ns())  # grows also if a replica comes back under its name


def _page(
    replicas: dict[str, tuple[float, bytes]],
    about: _Figures,
    accept: str,
    accept_encoding: str,
) -> Page:
    merged = exposition.merge({replica: exposition.unpack(packed) for replica, (_, packed) in replicas.items()})
    return exposition.render([*merged, *application_metrics(about)], accept, accept_encoding)


def figures(server: LiveServer, now: float) -> ReplicaFigures:
    """Return what there is to be read from a replica; in its event loop. `now`: by its sessions' clock."""
    connections = list(server.connections.values())
    sessions = [connection.session for connection in connections]
    lives = Counter(session.life for session in sessions)
    levels = Counter(session.ladder.level for session in sessions)
    values = {
        "engine_busy_seconds": server.stepper.busy_s,
        "ready": float(bool(server.engines) and not server.draining),
        "draining": float(server.draining),
        "streams_limit": float(server.config.most_sessions),
        "waiting_frames": float(sum(session.waiting for session in sessions)),
        "outstanding_frames": float(sum(session.outstanding for session in sessions)),
        "promised_load_ratio": sum(promised_load(one.session, one.engine) for one in connections),
        "promised_load_limit_ratio": server.config.most_load,
    }
    by_label = {
        "streams": {state.value: float(lives[state]) for state in _SHOWN_STATES},
        "streams_by_level": {str(level): float(levels[level]) for level in (4, 2, 1, 0)},
    }
    engines = list(server.engines.values())
    if engines:
        by_label["gpu_memory_bytes"] = gpu_memory(engines[0].pipe.device)
    models = tuple((engine.name, engine.model_sha256, str(engine.pipe.device)) for engine in engines)
    shown = server.telemetry.metrics.most_sessions
    newest = connections[-shown:] if shown else []
    return ReplicaFigures(values, by_label, models, tuple(_session_figures(one, now) for one in newest))


def _session_figures(connection: LiveConnection, now: float) -> SessionFigures:
    session = connection.session
    values = {
        "level": float(session.ladder.level),
        "latency_seconds": session.latency_s,
        "waiting_frames": float(session.waiting),
        "age_seconds": now - session.opened,
        "state_bytes": float(connection.report.state_bytes),
        "hand_offs": float(session.hand_offs),
        "frames_received": float(session.totals.frames_in),
        "frames_answered": float(session.totals.frames_out),
        "frames_dropped": float(session.totals.dropped.total()),
    }
    policy = session.hello.policy.kind
    return SessionFigures(session.key.session, session.key.tenant, connection.engine.name, policy, values)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return bytes of a CUDA device: allocated and reserved by this process, free, total; empty for another device."""
    if device.type != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": float(torch.cuda.memory_allocated(device)),
        "reserved": float(torch.cuda.memory_reserved(device)),
        "free": float(free),
        "total": float(total),
    }
