"""Which videos a job restores, and into which files: everything between what was typed and a list of items.

Reads names, sizes and versions, never the content of a video; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class Item:
    """One source and where its result goes; `name` is the path below SRC, or the file's name.

    `version` changes when the source may have changed; for a folder of pictures it covers all of them. `overrides` are
    options of this video alone, by the names of `infra.settings.Settings`. Items of a higher `priority` start first.
    """

    source: str
    destination: str
    name: str
    size_bytes: int
    version: str
    priority: int = 0
    overrides: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """All sources of a job. `root` is the place of the file, folder or prefix that the job writes."""

    items: tuple[Item, ...]
    root: str
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
    return Selection(tuple(_name_results(source, videos, target)), str(target), True)


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
    return Selection((_item(source, target, source.name),), str(target), False)


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
