"""A restore job played through in events instead of hours: when would it end, and what would failures cost?

The rules are those of the job: the row with the most work left starts first, a row runs on one GPU, what a GPU had not
closed as a segment is lost when its node dies, and the row waits again with what is left. Nodes die at random and come
back; some are slower than others; every worker loads the model before its first row. Times are seconds, costs are
seconds of one GPU of ordinary speed.

Pure and seeded: equal arguments give equal results. Knows no videos and no cluster.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class World:
    """The machines.

    Attributes:
        gpus: workers, one row each at a time. gpus_per_node: how many of them die together.
        load_s: to start a worker and load the model.
        row_s: beside the model, to begin a row: opening and decoding from the key frame before.
        segment_s: of GPU time between two points from which a row can go on; 0: a row starts over.
        node_mtbf_h: mean hours between failures of a node, exponentially distributed; None: nodes never die.
        repair_s: until a dead node is back or replaced.
        slow_share, slow_factor: share of nodes that take `slow_factor` times as long for everything.
        seed: of the failures and of which nodes are slow.
    """

    gpus: int
    gpus_per_node: int = 8
    load_s: float = 0.0
    row_s: float = 0.0
    segment_s: float = 0.0
    node_mtbf_h: float | None = None
    repair_s: float = 300.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Course:
    """How it went.

    Attributes:
        makespan_s: from the start to the end of the last row.
        work_s: what had to be done. lost_s: GPU time of work that was done again. failures: of nodes.
        load_s: GPU time of loading models. idle_s: GPU time without anything to do, at the end above all.
        down_s: GPU time of dead nodes.
        efficiency: work over all GPU time until the end.
        bound_s: no schedule on machines that never fail could end before: the mean load, or the longest row.
    """

    gpus: int
    makespan_s: float
    work_s: float
    lost_s: float
    load_s: float
    idle_s: float
    down_s: float
    failures: int
    efficiency: float
    bound_s: float


_State = Literal["loading", "working", "idle", "down"]


@dataclass(slots=True)
class _Gpu:
    factor: float
    state: _State = "loading"
    since: float = 0.0
    row: int | None = None
    turn: int = 0  # events of earlier turns are void


@dataclass(slots=True)
class _Play:
    world: World
    left_s: list[float]  # of each row
    gpus: list[_Gpu] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)  # the most work left first
    idle: set[int] = field(default_factory=set)
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    spent_s: dict[_State, float] = field(default_factory=lambda: dict.fromkeys(get_args(_State), 0.0))
    lost_s: float = 0.0
    failures: int = 0
    done: int = 0
    number: int = 0


def simulate(costs: Iterable[float], world: World) -> Course:
    """Play through rows of the given costs.

    Args:
        costs: GPU seconds of each row; rows without cost are left out.

    Raises:
        ValueError: no GPU, a negative cost, or machines on which a row cannot end: a node lives shorter than a segment.
    """
    rows = sorted((cost for cost in costs if cost), reverse=True)
    if world.gpus < 1 or (rows and rows[-1] < 0):
        raise ValueError(f"{world.gpus} GPUs and a least cost of {rows[-1] if rows else 0} s make no schedule.")
    if world.node_mtbf_h is not None and rows:
        longest = world.load_s + world.row_s + (world.segment_s or rows[0])
        if longest > 10 * world.node_mtbf_h * _HOUR:
            raise ValueError(f"A stretch of {longest:.0f} s does not end on nodes that live {world.node_mtbf_h} hours.")
    play = _Play(world, list(rows))
    play.waiting = [(-cost, row) for row, cost in enumerate(rows)]
    heapq.heapify(play.waiting)
    luck = random.Random(world.seed)
    nodes = -(-world.gpus // world.gpus_per_node)
    slow = set(luck.sample(range(nodes), round(world.slow_share * nodes)))
    for gpu in range(world.gpus):
        node = gpu // world.gpus_per_node
        play.gpus.append(_Gpu(world.slow_factor if gpu // world.gpus_per_node in slow else 1.0))
        _load(play, gpu, 0.0)
    if world.node_mtbf_h is not None:
        for node in range(nodes):
            _push(play, luck.expovariate(1 / (world.node_mtbf_h * _HOUR)), "die", node, 0)
    now = 0.0
    while play.done < len(rows):
        now, _, kind, which, turn = heapq.heappop(play.events)
        if kind == "die":
            _die(play, which, now)
            _push(play, now + world.repair_s, "back", which, 0)
        elif kind == "back":
            for gpu in _gpus_of(play, which):
                _load(play, gpu, now)
            assert world.node_mtbf_h is not None
            _push(play, now + luck.expovariate(1 / (world.node_mtbf_h * _HOUR)), "die", which, 0)
        elif turn == play.gpus[which].turn:
            _free(play, which, now)
    return _course(play, now, rows)


def predict_makespan(costs: Sequence[float], actors: int, load_s: float = 0.0, row_s: float = 0.0) -> float:
    """Return the seconds that a pool of like actors takes for rows of the given costs when nothing fails.

    Args:
        costs: seconds of each row inside an actor, as measured.
        actors: of the pool. load_s: until an actor takes its first row. row_s: beside the model, per row.
    """
    return simulate(costs, World(gpus=actors, load_s=load_s, row_s=row_s)).makespan_s


def bundled(costs: Iterable[float], least_s: float) -> list[float]:
    """Join rows until each has at least `least_s`: the same work in fewer rows, for archives of millions of shots.

    It makes the end of the schedule less smooth by at most one bundle; choose `least_s` far below the makespan.
    """
    bundles, held = [], 0.0
    for cost in costs:
        held += cost
        if held >= least_s:
            bundles.append(held)
            held = 0.0
    return [*bundles, held] if held else bundles


def _push(play: _Play, at: float, kind: str, which: int, turn: int) -> None:
    play.number += 1  # events of one moment happen in the order in which they were made
    heapq.heappush(play.events, (at, play.number, kind, which, turn))


def _gpus_of(play: _Play, node: int) -> range:
    first = node * play.world.gpus_per_node
    return range(first, min(first + play.world.gpus_per_node, play.world.gpus))


def _enter(play: _Play, which: int, state: _State, now: float) -> _Gpu:
    gpu = play.gpus[which]
    play.spent_s[gpu.state] += now - gpu.since
    gpu.state, gpu.since = state, now
    gpu.turn += 1
    return gpu


def _load(play: _Play, which: int, now: float) -> None:
    gpu = _enter(play, which, "loading", now)
    _push(play, now + play.world.load_s * gpu.factor, "ready", which, gpu.turn)


def _free(play: _Play, which: int, now: float) -> None:
    """A GPU has loaded its model, or ended its row: it takes the next one."""
    gpu = play.gpus[which]
    if gpu.row is not None:
        play.done += 1
        gpu.row = None
    if play.waiting:
        _begin(play, which, now)
    else:
        _enter(play, which, "idle", now)
        play.idle.add(which)


def _begin(play: _Play, which: int, now: float) -> None:
    gpu = _enter(play, which, "working", now)
    _, gpu.row = heapq.heappop(play.waiting)
    _push(play, now + (play.world.row_s + play.left_s[gpu.row]) * gpu.factor, "ready", which, gpu.turn)


def _die(play: _Play, node: int, now: float) -> None:
    world = play.world
    play.failures += 1
    for which in _gpus_of(play, node):
        worked_s = now - play.gpus[which].since
        gpu = _enter(play, which, "down", now)
        play.idle.discard(which)
        if gpu.row is not None:
            done_s = max(0.0, worked_s / gpu.factor - world.row_s)
            kept_s = done_s // world.segment_s * world.segment_s if world.segment_s else 0.0
            play.lost_s += worked_s - kept_s * gpu.factor
            play.left_s[gpu.row] -= kept_s
            heapq.heappush(play.waiting, (-play.left_s[gpu.row], gpu.row))
            gpu.row = None
    while play.waiting and play.idle:
        which = min(play.idle)
        play.idle.remove(which)
        _begin(play, which, now)


def _course(play: _Play, end: float, costs: Sequence[float]) -> Course:
    for which, gpu in enumerate(play.gpus):
        _enter(play, which, gpu.state, end)
    work, gpus = sum(costs), play.world.gpus
    return Course(
        gpus=gpus,
        makespan_s=end,
        work_s=work,
        lost_s=play.lost_s,
        load_s=play.spent_s["loading"],
        idle_s=play.spent_s["idle"],
        down_s=play.spent_s["down"],
        failures=play.failures,
        efficiency=work / (gpus * end) if end else 1.0,
        bound_s=max(work / gpus, costs[0]) if costs else 0.0,
    )
