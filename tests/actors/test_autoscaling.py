"""How many replicas streams need."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.autoscaling import (
    LOAD,
    REFUSED,
    REMEMBERED_S,
    SLACK,
    STREAMS,
    AutoscalingArguments,
    Demand,
    ReplicaLoad,
    SessionLoadPolicy,
    measured_load,
    replicas_wanted,
)
from actors.live_server import LiveConfig
from infra.client import LiveStream
from infra.protocol import Hello
from tests.live_service import live_service

TARGET = 0.7
NONE = Demand({})
loads_of = st.lists(st.floats(0, 3), min_size=1, max_size=40)


def told(*loads: float, refused: float = 0.0) -> dict[str, ReplicaLoad | None]:
    return {f"r{number}": ReplicaLoad(load, 4.0, refused) for number, load in enumerate(loads)}


def wanted(loads: dict[str, ReplicaLoad | None], *, coming: int = 0, demand: Demand = NONE, now_s: float = 0.0) -> int:
    return replicas_wanted(loads, coming=coming, target_load=TARGET, demand=demand, now_s=now_s)[0]


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([0.0], 1),
        ([0.7], 1),
        ([0.71], 2),
        ([2.1], 3),  # 2.1 / 0.7 is a little more than 3 in floating point
        ([0.9, 0.9], 3),
        ([0.7, 0.7, 0.7], 3),
        ([0.6, 0.6], 2),  # would fit into less than two only without room for anything to move
        ([0.3, 0.2], 1),
        ([0.35, 0.35], 2),  # one would be at its target exactly: none goes
        ([0.0, 0.0, 0.0], 1),
    ],
)
def test_enough_that_each_has_its_target(loads: list[float], expected: int) -> None:
    assert wanted(told(*loads)) == expected


@given(loads_of, st.integers(0, 39), st.floats(0, 2))
def test_more_load_never_wants_fewer(loads: list[float], which: int, more: float) -> None:
    heavier = list(loads)
    heavier[which % len(loads)] += more
    assert wanted(told(*heavier)) >= wanted(told(*loads))


@given(loads_of)
def test_what_is_wanted_holds_the_load_and_no_more_is_wanted_than_that(loads: list[float]) -> None:
    found, total = wanted(told(*loads)), sum(loads)
    assert total <= found * TARGET + 1e-6
    if found > len(loads):
        assert total > (found - 1) * TARGET - 1e-6
    if found < len(loads):  # those that are left take the streams of those that go, with room to spare
        assert total <= found * TARGET * SLACK + 1e-6


@given(st.floats(0.01, 20), st.lists(st.floats(0.94, 1.06), min_size=30, max_size=30))
def test_a_load_that_moves_a_little_opens_and_closes_nothing_by_turns(total: float, noise: list[float]) -> None:
    running, changes = max(1, math.ceil(total / TARGET)), []
    for factor in noise:
        now = wanted(told(*[total * factor / running] * running))
        if now != running:
            changes.append(now - running)
            running = now
    assert not (any(one > 0 for one in changes) and any(one < 0 for one in changes))


def test_a_replica_that_tells_nothing_counts_as_full() -> None:
    assert wanted({**told(0.0, 0.0), "silent": None}) == 2  # one of the idle ones may go, the silent one is in use
    assert wanted({**told(0.7), "silent": None}) == 2


def test_refused_clients_are_demand_at_once_and_for_a_while() -> None:
    full = told(0.65, 0.65)
    assert wanted(full) == 2
    _, demand = replicas_wanted(full, coming=0, target_load=TARGET, demand=NONE, now_s=0.0)
    found, demand = replicas_wanted(told(0.65, 0.65, refused=1), coming=0, target_load=TARGET, demand=demand, now_s=2.0)
    assert found == 3
    for now_s in (4.0, 2.0 + REMEMBERED_S - 0.1):  # no more are refused, and the new one is not there yet
        found, demand = replicas_wanted(
            told(0.65, 0.65, refused=1), coming=1, target_load=TARGET, demand=demand, now_s=now_s
        )
        assert found == 3
    found, _ = replicas_wanted(
        told(0.65, 0.65, 0.0, refused=1), coming=0, target_load=TARGET, demand=demand, now_s=2.0 + REMEMBERED_S
    )
    assert found == 3  # what is there stays until its load says otherwise
    assert wanted(told(0.3, 0.2, 0.0, refused=1), demand=demand, now_s=2.0 + REMEMBERED_S) == 1


def test_many_refused_clients_want_many_replicas() -> None:
    before = Demand({"r0": 0.0})
    # Four streams load one replica to 0.7, so eight more would need two more; but what is known of them is little.
    assert wanted(told(0.7, refused=8), demand=before) == 2
    wide = {f"r{n}": 0.0 for n in range(8)}
    assert wanted(told(*[0.7] * 8, refused=2), demand=Demand(wide)) == 12  # sixteen, each a quarter of a replica


def test_replicas_that_are_coming_are_the_answer_to_those_that_were_refused() -> None:
    before = Demand({"r0": 0.0})
    assert wanted(told(0.7, refused=1), coming=1, demand=before) == 2
    assert wanted(told(0.7, refused=1), coming=3, demand=before) == 4


def test_what_was_refused_before_anybody_asked_is_not_counted() -> None:
    assert wanted(told(0.1, refused=99)) == 1


def context(*told_by: dict[str, float] | None, target: int | None = None, **state: object) -> SimpleNamespace:
    """Return what Serve hands to a policy, with series of measurements."""
    names = [f"id{number}" for number in range(len(told_by))]
    metrics: dict[str, dict[str, list[SimpleNamespace]]] = {}
    for name, values in zip(names, told_by, strict=True):
        for metric, value in (values or {}).items():
            metrics.setdefault(metric, {})[name] = [SimpleNamespace(value=9.0), SimpleNamespace(value=value)]
    return SimpleNamespace(
        raw_metrics=metrics,
        running_replicas=names,
        target_num_replicas=len(names) if target is None else target,
        policy_state=state,
        current_time=100.0,
    )


def test_serve_s_context_is_read() -> None:
    policy = SessionLoadPolicy(target_load=0.5)
    found, state = policy(context({LOAD: 1.2, STREAMS: 3.0, REFUSED: 0.0}))
    assert (found, state["seen"]) == (3, {"id0": 0.0})
    found, state = policy(context({LOAD: 0.1, STREAMS: 1.0, REFUSED: 1.0}, **state))
    assert (found, state["until_s"]) == (2, 100.0 + REMEMBERED_S)
    assert policy(context({LOAD: 0.1, STREAMS: 1.0, REFUSED: 1.0}, target=2, **state))[0] == 2
    assert policy(context(None, {LOAD: 0.0}))[0] == 2  # neither tells all


def test_arguments() -> None:
    assert AutoscalingArguments(min_replicas=2, max_replicas=2).target_load == 0.7
    with pytest.raises(ValidationError, match="max_replicas=1 is less than min_replicas=2"):
        AutoscalingArguments(min_replicas=2, max_replicas=1)


def test_a_replica_tells_what_its_streams_want() -> None:
    async def run() -> None:
        with live_service(LiveConfig(most_sessions=10), "stand-in:100") as service:
            before = service.server.config.most_load
            async with LiveStream(service.url, Hello(width=32, height=24, fps=3, codec_in="raw", codec_out="raw")):
                (engine,) = service.server.engines.values()
                found = measured_load(service.server)
                cost_s = engine.cost_s(24, 32, 4)
                assert found[LOAD] == pytest.approx(max(3 * cost_s / before, 0.1)) and found[STREAMS] == 1.0
            service.server.refused["capacity-full"] = 2
            service.server.refused["draining"] = 5
            assert measured_load(service.server)[REFUSED] == 2.0

    asyncio.run(run())
