"""The last task of a video: its segments become one file, are checked against the plan, and get their place.

Runs where there is a processor to spare, beside the actors. What it does is safe to do again at any moment: the video
gets its name at once or not at all, never instead of somebody else's file, and the manifest is written after it, by
the job. Until then a draft in the work area says what was made, so that a job that died in between knows its own work.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.comparison import Comparison
from actors.delivery import NO_EXTRAS, Extras, make_extras, merged, missing, publish_extras, refuse_foreign, scratch
from actors.errors import DamagedWork, UnfaithfulResult, describe_failure
from actors.output import encoder_options
from actors.records import Delivered, Part, RowOptions, SegmentRecord, segment_stem
from actors.shot_store import RECORD_SUFFIX, hash_at
from actors.upscaler import require_version
from infra.storage import join, parent, storage_for, video_source
from pipeline.assembly import assemble
from pipeline.encoder_options import CONTAINERS
from pipeline.fingerprint import fingerprint
from pipeline.segments import Segment
from pipeline.video import Deinterlace, Limits, VideoInfo, VideoReader, presented, probe

logger = logging.getLogger(__name__)

DRAFT = "result.json"
SHA256_SUFFIX = ".sha256"
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)
# Clocks of containers differ: 1 ms in Matroska.
_TIME_TOLERANCE_S = 0.001 + 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Assembly:
    """What is to be assembled: plain values, so that it can travel.

    Attributes:
        place: of the video in the work area. shots: frames of each shot.
        damaged: the source has damage, so that what is copied from it need not be whole.
        stale: places of what describes the file that `overwrite` replaces; removed before it.
        compare, truth: also make a side-by-side picture and video, with this original as a further panel.
        exact: leave out of the file what differs from run to run.
        extras: what else is to be made of the result.
    """

    run_id: str
    name: str
    source: str
    source_version: str
    destination: str
    place: str
    segments: str
    shots: tuple[int, ...]
    segment_frames: int
    width: int
    height: int
    deinterlace: str
    options: RowOptions
    max_pixels: int
    damaged: bool
    overwrite: bool
    stale: tuple[str, ...] = ()
    compare: bool = False
    truth: str | None = None
    exact: bool = False
    extras: Extras = NO_EXTRAS


class Draft(BaseModel):
    """What was assembled, and how its parts were made."""

    model_config = ConfigDict(extra="forbid")
    run_id: str
    frames: int
    width: int
    height: int
    size_bytes: int
    sha256: str | None  # None for a folder of pictures
    source_sha256: str | None  # None for a folder, and in an object store, whose version says as much
    parts: list[Part]
    warnings: list[str]
    seconds: dict[str, float]
    devices: list[str]
    dtypes: list[str]
    flows: list[str]
    extras: Delivered = Delivered()


def assemble_video(task: Assembly) -> Draft:
    """Make, check and publish the result of one video whose segments are all there, and leave a draft of its manifest.

    Raises:
        DamagedWork: segments are missing or damaged; their records have been removed, so that they are made again.
        UnfaithfulResult: the result fails its check; nothing was published.
        PipelineError, ActorsError, StorageError: the result cannot be written, or may not replace what is there.
    """
    began = time.perf_counter()
    before = read_draft(task.place, task.run_id)
    if before is not None and is_published(before, task.destination):
        return _completed(task, before)  # the job died, or lost its store, before it could write the manifest
    known = before.extras if before is not None else Delivered()
    if not task.overwrite:
        refuse_foreign(known, task.extras, task.destination)
    require_version(task.source, task.source_version, task.name)
    records = _records(task)
    storage = storage_for(task.destination)
    with scratch(task.destination, task.place) as folder:
        files = _fetch(task, records, folder)
        source = video_source(task.source)
        # As it was presented to the model: with pulldown removed it has another rate.
        info = presented(
            probe(source, limits=Limits(max_pixels=task.max_pixels)),
            task.deinterlace,  # type: ignore[arg-type]  # one of its values, by the plan
        )
        target = Path(task.destination.removeprefix("file://"))
        made = folder / f"result{target.suffix}"
        report = assemble(
            made,
            presented(info, cast(Deinterlace, task.deinterlace)),
            files,
            width=task.width,
            height=task.height,
            options=encoder_options(task.options).model_copy(update={"bit_exact": task.exact}),
            source=source,
            fragmented=task.options.get("fragmented", False),
            frames=sum(task.shots),
        )
        _check(task, made, info, files)
        delivered = Delivered()
        if task.extras:
            delivered = make_extras(made, task.destination, task.extras, folder, preset=task.options["preset"])
        is_folder = made.is_dir()
        sha256 = None if is_folder else hash_at(str(made))
        draft = Draft(
            run_id=task.run_id,
            frames=report.frames,
            width=task.width,
            height=task.height,
            size_bytes=_size_bytes(made),
            sha256=sha256,
            source_sha256=hash_at(task.source) if storage_for(task.source).is_local and not info.is_sequence else None,
            parts=[
                Part(name=one.name, frames=one.frames, size_bytes=one.size_bytes, sha256=one.sha256) for one in records
            ],
            warnings=_unique([*report.warnings, *(text for one in records for text in one.warnings)]),
            seconds=_seconds(records, time.perf_counter() - began),
            devices=_unique(one.device for one in records),
            dtypes=_unique(one.dtype for one in records),
            flows=_unique(one.flow for one in records),
            extras=delivered,
        )
        compared = _compare(task, info, made, folder) if task.compare else []
        _write_draft(task, draft)
        for file in compared:
            storage.publish(file, join(parent(task.destination), file.name))
        for place in task.stale:
            storage.delete(place)
        storage.publish(made, task.destination, if_absent=not task.overwrite)
        publish_extras(folder, task.extras, task.destination)
    return draft


def _completed(task: Assembly, draft: Draft) -> Draft:
    """The draft of a published result, and all that is to be beside it."""
    todo = missing(draft.extras, task.extras, task.destination, certain=True)
    if not todo:
        return draft
    if not task.overwrite:
        refuse_foreign(draft.extras, todo, task.destination)
    with scratch(task.destination, task.place) as folder:
        result = Path(task.destination.removeprefix("file://"))
        storage = storage_for(task.destination)
        if not storage.is_local:
            result = folder / f"result{result.suffix}"
            storage.fetch(task.destination, result)
        made = make_extras(result, task.destination, todo, folder, preset=task.options["preset"])
        draft = draft.model_copy(update={"extras": merged(draft.extras, made, todo)})
        _write_draft(task, draft)
        publish_extras(folder, todo, task.destination)
    return draft


def _write_draft(task: Assembly, draft: Draft) -> None:
    storage_for(task.place).write(join(task.place, DRAFT), draft.model_dump_json(indent=1).encode() + b"\n")


def attempt(task: Assembly) -> dict[str, Any]:
    """Call `assemble_video` and return its draft, or how it failed, as plain values: what a Ray task may return."""
    began = time.perf_counter()
    try:
        return {"draft": assemble_video(task).model_dump()}
    except Exception as error:
        logger.exception("%s could not be assembled", task.name)
        return {
            "failure": describe_failure(error),
            "shots": error.shots if isinstance(error, DamagedWork) else [],
            "seconds": time.perf_counter() - began,
            "host": platform.node(),
        }


def write_checksum(destination: str, draft: Draft) -> None:
    """Write the hash of a result beside it, in the form that `sha256sum -c` reads."""
    if draft.sha256 is not None:
        line = f"{draft.sha256}  {destination.rpartition('/')[2]}\n"
        storage_for(destination).write(f"{destination}{SHA256_SUFFIX}", line.encode())


def read_draft(place: str, run_id: str) -> Draft | None:
    """Return what was assembled for the video at `place` of the work area, if anything was."""
    storage = storage_for(place)
    if storage.stat(join(place, DRAFT)) is None:
        return None
    try:
        draft = Draft.model_validate_json(storage.read(join(place, DRAFT)))
    except ValidationError:
        return None
    return draft if draft.run_id == run_id else None


def is_published(draft: Draft, destination: str) -> bool:
    """Return whether what is at `destination` is the result that the draft describes, to the last bit."""
    there = storage_for(destination).stat(destination)
    if there is None or there.size_bytes != draft.size_bytes:
        return False
    return draft.sha256 is None or hash_at(destination) == draft.sha256


def _records(task: Assembly) -> list[SegmentRecord]:
    """All records of the video in the order of the film."""
    storage = storage_for(task.segments)
    there = {info.place: info.size_bytes for info in storage.list(task.segments)}
    records, missing = [], set()
    for shot, frames in enumerate(task.shots):
        for number in range(-(-frames // task.segment_frames)):
            place = join(task.segments, f"{segment_stem(shot, number)}{RECORD_SUFFIX}")
            try:
                record = SegmentRecord.model_validate_json(storage.read(place)) if place in there else None
            except ValidationError:
                record = None
            if record is None or there.get(join(task.segments, record.name)) != record.size_bytes:
                if place in there:
                    storage.delete(place)
                missing.add(shot)
            else:
                records.append(record)
    if missing:
        raise _damaged(task, missing)
    return records


def _fetch(task: Assembly, records: Sequence[SegmentRecord], folder: Path) -> list[Path]:
    """Local files of all segments, each compared with its hash."""
    storage = storage_for(task.segments)
    files, damaged = [], set()
    for record in records:
        place = join(task.segments, record.name)
        if storage.is_local:
            file = Path(place.removeprefix("file://"))
        else:
            file = folder / record.name
            storage.fetch(place, file)
        files.append(file)
        if hash_at(str(file)) != record.sha256:
            storage.delete(join(task.segments, f"{segment_stem(record.shot, record.number)}{RECORD_SUFFIX}"))
            damaged.add(record.shot)
    if damaged:
        raise _damaged(task, damaged)
    return files


def _damaged(task: Assembly, shots: set[int]) -> DamagedWork:
    return DamagedWork(
        f"{task.name}: segments of {len(shots)} of its shots are missing or damaged.",
        shots=sorted(shots),
        remedy="They are made again.",
    )


def _check(task: Assembly, made: Path, info: VideoInfo, files: Sequence[Path]) -> None:
    """Raise UnfaithfulResult unless every picture decodes, at its time, and everything else is what the source has."""
    result = probe(made, limits=_ANY_SIZE)
    if (result.width, result.height) != (task.width, task.height):
        raise _unfaithful(task, f"its pictures are {result.width}x{result.height}, not {task.width}x{task.height}")
    with VideoReader(made, limits=_ANY_SIZE, info=result, deinterlace="off", threads=1) as reader:
        found = [float(pts * result.time_base) for pts, _ in reader.stamps()]
        if reader.damage:
            raise _unfaithful(task, reader.damage[0])
    if len(found) != sum(task.shots):
        raise _unfaithful(task, f"it has {len(found)} pictures, not {sum(task.shots)}")
    if result.is_sequence or info.is_sequence:
        return
    wanted = [stamp for file in files for stamp in _stamps(file, info)]
    offset_s = found[0] - wanted[0]  # MPEG-TS has no times below zero, and says so in its warnings
    worst = max(abs(b - a - offset_s) for a, b in zip(wanted, found, strict=True))
    if worst > _TIME_TOLERANCE_S:
        raise _unfaithful(task, f"its pictures are up to {1000 * worst:.1f} ms off their times")
    if not task.damaged:
        _check_copies(task, made)


def _stamps(file: Path, info: VideoInfo) -> list[float]:
    with Segment(file, info.time_base) as segment:
        return sorted(float(packet.pts * info.time_base) for packet in segment.packets() if packet.pts is not None)


def _check_copies(task: Assembly, made: Path) -> None:
    muxer = CONTAINERS[made.suffix.lower()]
    left = [(one.kind, one.packets, one.sha256) for one in fingerprint(made)]
    for stream in fingerprint(video_source(task.source), for_muxer=muxer):
        if muxer in stream.refused_by:
            continue
        key = (stream.kind, stream.packets, stream.sha256)
        if key not in left:
            raise _unfaithful(task, f"{stream.describe()} is not in it as the source has it")
        left.remove(key)


def _unfaithful(task: Assembly, what: str) -> UnfaithfulResult:
    return UnfaithfulResult(
        f"The result of {task.name} was not accepted: {what}.",
        code="result-unfaithful",
        remedy="Run the command again; if it comes to the same, write .mkv and report it.",
    )


def _compare(task: Assembly, info: VideoInfo, made: Path, folder: Path) -> list[Path]:
    """Make the side-by-side picture and video; both are named like the result."""
    stem = folder / Path(task.destination).stem
    comparison = Comparison(stem, info, width=task.width, height=task.height, truth=task.truth)
    limits = Limits(max_pixels=task.max_pixels)
    before = VideoReader(
        video_source(task.source), info=info, limits=limits, deinterlace=cast(Deinterlace, task.deinterlace)
    )
    try:
        with before, VideoReader(made, limits=_ANY_SIZE, deinterlace="off") as after:
            for frame, restored in zip_longest(before, after):
                if frame is None or restored is None:
                    break  # a damaged source may give another number of pictures when it is read again
                comparison.write(frame, restored.rgb_HWC)
        return [Path(name) for name in comparison.close()]
    except BaseException:
        comparison.abort()
        raise


def _seconds(records: Sequence[SegmentRecord], assembly_s: float) -> dict[str, float]:
    sums: dict[str, float] = {}
    for record in records:
        for name, value in record.seconds.items():
            sums[name] = sums.get(name, 0.0) + value
    return {"total": sum(sums.values()) + assembly_s, **sums, "assembly": assembly_s}


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))
