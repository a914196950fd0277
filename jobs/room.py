"""How much room a job needs: at its destination, and in the temporary folders of the nodes that do its work.

Sizes of results are estimates. A job that would run into a full disk days later is refused before it begins.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra.preflight import check_free, check_space
from jobs.nodes import Scratch
from jobs.records import VideoPlan
from pipeline.encoder_options import DEFAULT_CRF

# Bits per pixel of the result at the default quality; between 0.15 and 0.8 for soft and busy films where it is 0.4.
_BITS_PER_PIXEL = {"h264": 0.4, "hevc": 0.3, "av1": 0.3, "vp9": 0.4, "ffv1": 8.0, "prores": 4.0}
# So much more of it, and a result is about half as large: measured on tests/data/walk_hr.mp4, 16 to 34.
_HALVING_CRF = {"h264": 6, "hevc": 6, "av1": 14, "vp9": 12}
_STATE_BYTES_PER_PIXEL = (3 * 16 + 3) * 4  # previous output and input as float32, per pixel of the source
_STATES_HELD = 2  # of a shot that is being restored
_SEGMENTS_HELD = 3  # of such a shot, in the worker's own folder: one grows, one waits, one is uploaded


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a job will write and hold at its worst moment.

    Attributes:
        results: of what is not finished. work: beside them in the work area, at most.
        scratch: in a node's temporary folder, for the largest video to be put together there; 0 where unfinished files
            lie in the work area.
    """

    results: int
    work: int
    scratch: int


def result_bytes(plan: VideoPlan) -> int:
    """Return roughly how large a result will be; a codec that is not named is counted as H.264."""
    codec, crf = plan.options["codec"] or "h264", plan.options["crf"]
    bits = _BITS_PER_PIXEL[codec]
    if crf is not None and codec in DEFAULT_CRF:
        bits *= 2 ** ((DEFAULT_CRF[codec] - crf) / _HALVING_CRF[codec])
    return int(plan.frames * plan.out_width * plan.out_height * bits / 8)


def room_needed(
    plans: Sequence[VideoPlan],
    *,
    rows: int,
    assemblies: int,
    finished: Mapping[str, int] | None = None,
    keep: bool = False,
    remote: bool = False,
) -> Room:
    """Add up plans.

    Segments become results: of each video there are either the ones or the others, and for a while both.

    Args:
        rows: restored at a time. assemblies: videos put together at a time.
        finished: frames by run id that are in segments already.
        keep: segments stay.
        remote: the destination is in an object store; unfinished files lie on the nodes.
    """
    done = finished or {}
    sizes = [result_bytes(plan) for plan in plans]
    results = sum(
        size * (plan.frames - done.get(plan.run_id, 0)) // max(1, plan.frames)
        for plan, size in zip(plans, sizes, strict=True)
    )
    if not plans:
        return Room(0, 0, 0)
    twice = sum(sizes) if keep else sum(heapq.nlargest(assemblies, sizes))
    states = sum(_states(plan) for plan in plans)
    under_way = rows * max(_states_under_way(plan) for plan in plans)
    segments = max(
        size * min(plan.segment_frames, plan.frames) // max(1, plan.frames)
        for plan, size in zip(plans, sizes, strict=True)
    )
    scratch = 2 * max(sizes) + _SEGMENTS_HELD * segments if remote else 0
    return Room(results, twice + states + under_way, scratch)


def check_room(room: Room, destination: str, scratch: Iterable[Scratch]) -> list[str]:
    """Return warnings where room is narrow.

    Args:
        destination: a place in the folder or prefix that is written to.
        scratch: of the nodes.

    Raises:
        StorageError: there is too little (`storage-full`), here or on a node; or `destination` cannot be written to.
    """
    warnings = check_space(destination, room.results + room.work)
    for one in scratch:
        warnings += check_free(
            f"{one.folder} on the node {one.host}",
            room.scratch,
            one.free_bytes,
            remedy="Free some space there, or start its Ray with TMPDIR set to a folder on a larger disk.",
        )
    return warnings


def _states_under_way(plan: VideoPlan) -> int:
    """What one shot of the video has at most while it is being restored; none before its second segment."""
    segments = max(-(-shot.frames // plan.segment_frames) for shot in plan.shots)
    return min(_STATES_HELD, segments - 1) * plan.width * plan.height * _STATE_BYTES_PER_PIXEL


def _states(plan: VideoPlan) -> int:
    """What is left of finished shots until the video is: one state of each that has more than one segment."""
    long_shots = sum(shot.frames > plan.segment_frames for shot in plan.shots)
    return long_shots * plan.width * plan.height * _STATE_BYTES_PER_PIXEL
