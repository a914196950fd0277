"""Plans of whole videos, until the restore job has moved to `jobs/plan.py` and `jobs/sources.py`.

A row is one causal task. For now that is one whole video, from its first frame; the row already names its place in the
source (`first_index`, `frames`, time stamps), so that a shot of a video can become a row without changing its readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from actors.errors import Failure, describe_failure
from infra.settings import Settings
from infra.storage import storage_for
from jobs.errors import NoInputError, UsageError
from jobs.manifest import manifest_place

VIDEO_SUFFIXES = frozenset(
    {
        *(".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4"),
        *(".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    }
)
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
FALLBACK_SUFFIX = ".mkv"  # for sources in a container that is not written; it carries nearly everything
WORK_SUFFIX = ".upriver"


class Row(TypedDict):
    """One causal task as it travels to an actor: plain values only."""

    row_id: str
    source: str
    destination: str
    work_file: str
    first_index: int  # zero-based number of the first frame in the source
    frames: int  # estimate of the number of frames; -1 when the container does not say
    pts_start: int  # first time stamp in units of the stream's time base; -1 from the beginning
    pts_end: int  # time stamp to stop before; -1 to the end
    width: int
    height: int
    size_bytes: int
    source_version: str
    seed: int
    options: str  # JSON of RowOptions


class RowOptions(TypedDict):
    """How one row is to be restored."""

    steps: int | None
    scale: int
    height: int | None
    codec: str | None
    crf: int | None
    preset: str
    pix_fmt: str
    deinterlace: str
    cuts: bool
    compare: bool
    truth: str | None


@dataclass(frozen=True, slots=True)
class Item:
    """One source and where its result goes; `name` is the path below SRC, or the file's name.

    `version` changes when the source may have changed; for a folder of pictures it covers all of them.
    """

    source: str
    destination: str
    name: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Probed:
    """What the container says of an item, or why nothing can be restored from it. `frames` is -1 when unknown."""

    name: str
    width: int = 0
    height: int = 0
    frames: int = -1
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """All sources of a job. `root` is the file or folder that the job writes."""

    items: tuple[Item, ...]
    root: Path
    is_folder: bool


def select(src: str, dst: str) -> Selection:
    """Find the sources under `src` and name their destinations under `dst`.

    A file, or a folder that holds pictures and no videos, is one source; another folder stands for all videos under it,
    at any depth, and its structure is kept. A container that is not written becomes Matroska.

    Raises:
        NoInputError: `src` does not exist or has no video under it.
        UsageError: `dst` is `src`, or two sources would become the same file.
        UnsupportedOutput: `dst` names a container that is not written.
        StorageError: a place cannot be read, or is of an unsupported kind.
    """
    for place in (src, dst):
        storage_for(place)
    source, target = Path(src.removeprefix("file://")), Path(dst.removeprefix("file://"))
    if not source.exists():
        raise NoInputError(f"{src} does not exist.", code="source-missing", remedy="Check the path.")
    if _is_same(source, target):
        raise UsageError(
            f"Source and destination are the same: {src}.",
            code="destination-is-source",
            remedy="Write to another file or folder; a source is never replaced.",
        )
    videos = _videos_under(source, target) if source.is_dir() else []
    if source.is_dir() and not videos and not _has_pictures(source):
        raise NoInputError(
            f"The folder {src} has no video under it.",
            code="source-empty",
            remedy=f"Known endings: {' '.join(sorted(VIDEO_SUFFIXES))}; or give the file itself.",
        )
    if not videos:
        return _select_one(source, target, dst)
    if target.is_file():
        raise UsageError(
            f"The source is a folder, but the destination {dst} is a file.",
            code="destination-not-a-folder",
            remedy="Name a folder to write to.",
        )
    return Selection(tuple(_name_results(source, videos, target)), target, True)


def _is_same(source: Path, target: Path) -> bool:
    """Whether both names lead to one file, by symbolic or hard links too."""
    return source.resolve() == target.resolve() or (target.exists() and source.samefile(target))


def _select_one(source: Path, target: Path, dst: str) -> Selection:
    from pipeline.video import container_for

    is_result = storage_for(dst).stat(manifest_place(str(target))) is not None  # pictures that an earlier run wrote
    if dst.endswith("/") or (target.is_dir() and any(target.iterdir()) and not is_result):
        target = target / _result_name(Path(source.name if source.is_file() else f"{source.name}{FALLBACK_SUFFIX}"))
    elif target.suffix:  # without one it becomes a folder of pictures
        container_for(target.suffix)
    if _is_same(source, target):
        raise UsageError(
            f"Source and destination are the same: {target}.",
            code="destination-is-source",
            remedy="Write to another file or folder; a source is never replaced.",
        )
    return Selection((_item(source, target, source.name),), target, False)


def _item(source: Path, destination: Path, name: str) -> Item:
    info = storage_for(str(source)).stat(str(source))
    return Item(str(source), str(destination), name, info.size_bytes if info else 0, info.version if info else "")


def _videos_under(source: Path, target: Path) -> list[Path]:
    excluded = target.resolve()
    found = []
    for info in storage_for(str(source)).list(str(source)):
        path = Path(info.place)
        if path.suffix.lower() not in VIDEO_SUFFIXES or _is_work_file(path.relative_to(source)):
            continue
        if excluded in path.resolve().parents:  # results of an earlier run below SRC
            continue
        found.append(path)
    return found


def _is_work_file(relative: Path) -> bool:
    return any(part.endswith(WORK_SUFFIX) for part in relative.parts) or relative.name.startswith("._")


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())


def _result_name(source: Path) -> Path:
    from pipeline.video import CONTAINERS

    return source if source.suffix.lower() in CONTAINERS else source.with_suffix(FALLBACK_SUFFIX)


def _name_results(source: Path, videos: Sequence[Path], target: Path) -> list[Item]:
    by_result: dict[Path, list[Path]] = {}
    for video in videos:
        by_result.setdefault(_result_name(video.relative_to(source)), []).append(video)
    items = []
    for result, sharing in by_result.items():
        for video in sharing:
            relative = video.relative_to(source)
            if len(sharing) > 1 and relative != result:  # a.avi and a.mpg would both become a.mkv
                result_here = relative.with_name(f"{relative.name}{FALLBACK_SUFFIX}")
            else:
                result_here = result
            items.append(_item(video, target / result_here, str(relative)))
    names = [item.destination for item in items]
    for item in items:
        if names.count(item.destination) > 1:
            raise UsageError(
                f"Two sources would become {item.destination}.",
                code="destination-collision",
                remedy="Rename one of the sources.",
            )
    return sorted(items, key=lambda item: item.name)


def row_options(settings: Settings, *, compare: bool, truth: Path | None) -> RowOptions:
    """Return the options of a row that the settings and flags ask for."""
    return RowOptions(
        steps=settings.steps,
        scale=settings.scale,
        height=settings.height,
        codec=settings.codec,
        crf=settings.crf,
        preset=settings.preset,
        pix_fmt=settings.pix_fmt,
        deinterlace=settings.deinterlace,
        cuts=settings.cuts,
        compare=compare,
        truth=None if truth is None else str(truth),
    )


def run_id(source_version: str, model_sha256: str, seed: int, numerics: str, options: RowOptions) -> str:
    """Return the name of one video's run: equal for equal source, model and options, different otherwise.

    `numerics` names what else changes pixels: number format and motion estimator.
    """
    identity = {
        "source": source_version,
        "model": model_sha256,
        "seed": seed,
        "numerics": numerics,
        "options": dict(options),
        "plan": 1,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def plan_row(item: Item, probed: Probed, number: int, work_file: Path, seed: int, options: RowOptions) -> Row:
    """Return the row that restores the whole of `item`."""
    return Row(
        row_id=f"{number:06d}",
        source=item.source,
        destination=item.destination,
        work_file=str(work_file),
        first_index=0,
        frames=probed.frames,
        pts_start=-1,
        pts_end=-1,
        width=probed.width,
        height=probed.height,
        size_bytes=item.size_bytes,
        source_version=item.version,
        seed=seed,
        options=json.dumps(options),
    )


def probe_item(item: Item, max_pixels: int, options: RowOptions) -> Probed:
    """Return what the container of `item` says; an error, or an output that is impossible, becomes a failure in it."""
    from actors.output import check_output
    from pipeline.video import Limits, probe

    try:
        info = probe(item.source, limits=Limits(max_pixels=max_pixels))
        check_output(info, item.destination, options)
    except Exception as error:
        return Probed(item.name, failure=describe_failure(error))
    return Probed(item.name, info.width, info.height, -1 if info.frames is None else info.frames)


def probe_all(items: Sequence[Item], max_pixels: int, options: RowOptions) -> dict[str, Probed]:
    """Probe every item and return the answers by name: one here, several by Ray Data tasks on CPUs."""
    if len(items) == 1:
        return {items[0].name: probe_item(items[0], max_pixels, options)}
    import ray.data

    from infra.cluster import quiet_data

    def probe_row(row: dict[str, Any]) -> dict[str, Any]:
        item = Item(row["source"], row["destination"], row["name"], 0, "")
        return {"name": row["name"], "probed": json.dumps(asdict(probe_item(item, max_pixels, options)))}

    rows = [{"source": item.source, "destination": item.destination, "name": item.name} for item in items]
    blocks = min(len(rows), 4 * max(1, int(ray.cluster_resources().get("CPU", 1))))
    with quiet_data():
        answers = ray.data.from_items(rows, override_num_blocks=blocks).map(probe_row).take_all()
    return {answer["name"]: Probed(**json.loads(answer["probed"])) for answer in answers}
