"""Which videos a job restores, and into which files: everything between what was typed and a list of items.

Reads names, sizes and versions, and list files; never the content of a video. Nothing is written. A place is a local
path or an `s3://` URL; what holds for files and folders holds for objects and prefixes.
"""

from __future__ import annotations

import glob
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from actors.records import LADDER_SUFFIX
from infra.errors import StorageError
from infra.storage import FileInfo, storage_for
from jobs.errors import NoInputError, UsageError
from jobs.list_files import Entry, is_list, read_list
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
_WILDCARDS = re.compile(r"[*?\[]")
_STATS_AT_ONCE = 16  # a list may name thousands of objects, and each is asked for by itself


@dataclass(frozen=True, slots=True)
class Item:
    """One source and where its result goes; `name` is the path below SRC, or the file's name.

    `version` changes when the source may have changed (for a folder of pictures it covers all of them); it is empty
    where there is no such source, which planning then finds. `overrides` are options of this video alone, by the names
    of `infra.settings.Settings`. Items of a higher `priority` start first.
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


def select(
    src: str, dst: str, *, limit: int | None = None, shuffle: int | None = None, priority: Sequence[str] = ()
) -> Selection:
    """Find the sources that `src` stands for and name their destinations under `dst`.

    - A file, or a folder that holds pictures and no videos, is one source.
    - Another folder or prefix stands for all videos under it, at any depth, and its structure is kept.
    - A pattern (`tapes/**/*.mov`) stands for the videos that match it; the structure below its fixed part is kept.
    - A list file (see `jobs/list_files.py`) names its videos; relative names are seen from the list's folder.

    A container that is not written becomes Matroska.

    Args:
        limit: take only so many, after ordering.
        shuffle: seed of a random order, for a sample.
        priority: patterns of names that go before all others, the first pattern first.

    Raises:
        NoInputError: `src` does not exist or stands for no video.
        UsageError: `dst` is `src`, two sources would become the same file, or a list is wrong.
        UnsupportedOutput: `dst` names a container that is not written.
        StorageError: a place cannot be read, or is of an unsupported kind.
    """
    src, dst = (_plain(place) for place in (src, dst))
    for place in (src, dst):
        storage_for(place).check_reachable(place)  # a wrong endpoint is said at once, not after patient retries
    selection = _select(src, dst)
    _check_results(selection)
    items = [replace(item, source=_full(item.source), destination=_full(item.destination)) for item in selection.items]
    return replace(selection, items=_ordered(tuple(items), limit, shuffle, priority), root=_full(selection.root))


def _select(src: str, dst: str) -> Selection:
    source, target = _normal(src), _normal(dst)
    if not _exists_locally(source) and _WILDCARDS.search(source):
        base, found = _matching(source)
        if _is_same(base or ".", target):
            raise _same(base)
        videos = [info for info in found if _is_video(info.place, base, target)]
        if not videos:
            raise NoInputError(f"No video matches {src}.", code="source-empty", remedy="Check the pattern.")
        return _folder(base, videos, target, dst)
    if is_list(source):
        return _listed(source, target, dst)
    if _is_same(source, target):
        raise _same(src)
    if is_remote(source):
        info = None if src.endswith("/") else storage_for(source).stat(source)
        if info is not None and PurePosixPath(source).suffix.lower() in VIDEO_SUFFIXES:
            return _single(info, target, dst)
        found = list(storage_for(source).list(f"{source}/"))
        if not found and info is None:
            raise NoInputError(f"{src} does not exist.", code="source-missing", remedy="Check bucket and key.")
        if not found and info is not None:
            return _single(info, target, dst)
    else:
        if not Path(source).exists():
            raise NoInputError(f"{src} does not exist.", code="source-missing", remedy="Check the path.")
        found = list(storage_for(source).list(source)) if Path(source).is_dir() else []
    videos = [info for info in found if _is_video(info.place, source, target)]
    if videos:
        return _folder(source, videos, target, dst)
    if not is_remote(source) and (Path(source).is_file() or _has_pictures(Path(source))):
        known = storage_for(source).stat(source)
        return _single(known or FileInfo(source, 0, ""), target, dst)
    raise NoInputError(
        f"The folder {src} has no video under it.",
        code="source-empty",
        remedy=f"Known endings: {' '.join(sorted(VIDEO_SUFFIXES))}; or give the file itself.",
    )


def is_remote(place: str) -> bool:
    """Whether `place` is in an object store."""
    return "://" in place


def _plain(place: str) -> str:
    return place.removeprefix("file://")


def _normal(place: str) -> str:
    return place.rstrip("/") if is_remote(place) else str(Path(place))


def _full(place: str) -> str:
    """The place as it is called from any folder: workers are started in others."""
    return place if is_remote(place) else os.path.abspath(place)


def _exists_locally(place: str) -> bool:
    return not is_remote(place) and Path(place).exists()


def _below(folder: str, relative: str) -> str:
    return f"{folder.rstrip('/')}/{relative}"


def _is_same(source: str, target: str) -> bool:
    """Whether both places are one file, by symbolic or hard links too."""
    if is_remote(source) or is_remote(target):
        return source == target
    here, there = Path(source), Path(target)
    return here.resolve() == there.resolve() or (here.exists() and there.exists() and here.samefile(there))


def _same(place: str) -> UsageError:
    return UsageError(
        f"Source and destination are the same: {place}.",
        code="destination-is-source",
        remedy="Write to another file or folder; a source is never replaced.",
    )


def _is_video(place: str, base: str, target: str) -> bool:
    """Whether a file below `base` is a source: a video, and neither unfinished work nor an earlier run's."""
    relative = PurePosixPath(place[len(base) :].lstrip("/"))
    if relative.suffix.lower() not in VIDEO_SUFFIXES or relative.name.startswith("._"):
        return False
    if any(part.endswith(WORK_SUFFIX) for part in relative.parts):
        return False
    if any(_is_ladder(part) for part in relative.parts[:-1]):
        return False
    if is_remote(place) or is_remote(target):
        return not place.startswith(f"{target}/")
    return Path(target).resolve() not in Path(place).resolve().parents


def _is_ladder(folder: str) -> bool:
    """Whether a folder has the name of a result's HLS ladder, `film.mp4.hls`."""
    name = PurePosixPath(folder)
    return name.suffix == LADDER_SUFFIX and PurePosixPath(name.stem).suffix.lower() in VIDEO_SUFFIXES


def _matching(pattern: str) -> tuple[str, list[FileInfo]]:
    """The fixed part of a pattern, and the files that match the whole."""
    fixed = pattern[: _first_wildcard(pattern)].rpartition("/")[0]
    if not is_remote(pattern):
        names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        found = (storage_for(name).stat(name) for name in names)
        return fixed or ("/" if pattern.startswith("/") else ""), [info for info in found if info is not None]
    wanted = re.compile(_expression(pattern))
    return fixed, [info for info in storage_for(fixed).list(f"{fixed}/") if wanted.fullmatch(info.place)]


def _first_wildcard(pattern: str) -> int:
    found = _WILDCARDS.search(pattern)
    return found.start() if found else len(pattern)


def _expression(pattern: str) -> str:
    """A shell pattern as a regular expression: `*` and `?` stay inside a name, `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(part) or (part.replace("[!", "[^") if part.startswith("[") and len(part) > 1 else re.escape(part))
        for part in parts
    )


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())


def _single(info: FileInfo, target: str, dst: str) -> Selection:
    from pipeline.video import container_for

    name = PurePosixPath(info.place).name
    if dst.endswith("/") or _is_filled_folder(target):
        is_file = is_remote(info.place) or Path(info.place).is_file()
        target = _below(target, str(_result_name(PurePosixPath(name if is_file else f"{name}{FALLBACK_SUFFIX}"))))
    elif PurePosixPath(target).suffix:  # without one it becomes a folder of pictures
        container_for(PurePosixPath(target).suffix)
    return Selection((Item(info.place, target, name, info.size_bytes, info.version),), target, False)


def _is_filled_folder(target: str) -> bool:
    """Whether results go into `target`; pictures that an earlier run wrote there are a result themselves."""
    if is_remote(target):
        filled = next(iter(storage_for(target).list(f"{target}/")), None) is not None
    else:
        filled = Path(target).is_dir() and any(Path(target).iterdir())
    return filled and storage_for(target).stat(manifest_place(target)) is None


def _folder(base: str, videos: Sequence[FileInfo], target: str, dst: str) -> Selection:
    _require_folder(target, dst)
    by_result: dict[PurePosixPath, list[tuple[FileInfo, PurePosixPath]]] = {}
    for info in videos:
        relative = PurePosixPath(info.place[len(base) :].lstrip("/"))
        by_result.setdefault(_result_name(relative), []).append((info, relative))
    items = []
    for result, sharing in by_result.items():
        for info, relative in sharing:
            here = result
            if len(sharing) > 1 and relative != result:  # a.avi and a.mpg would both become a.mkv
                here = relative.with_name(f"{relative.name}{FALLBACK_SUFFIX}")
            items.append(Item(info.place, _below(target, str(here)), str(relative), info.size_bytes, info.version))
    return Selection(tuple(sorted(items, key=lambda item: item.name)), target, True)


def _require_folder(target: str, dst: str) -> None:
    if not is_remote(target) and Path(target).is_file():
        raise UsageError(
            f"The source stands for many videos, but the destination {dst} is a file.",
            code="destination-not-a-folder",
            remedy="Name a folder to write to.",
        )


def _result_name(source: PurePosixPath) -> PurePosixPath:
    from pipeline.video import CONTAINERS

    return source if source.suffix.lower() in CONTAINERS else source.with_suffix(FALLBACK_SUFFIX)


def _listed(place: str, target: str, dst: str) -> Selection:
    if not is_remote(place) and not Path(place).exists():
        raise NoInputError(f"{place} does not exist.", code="source-missing", remedy="Check the path.")
    entries = read_list(place)
    if not entries:
        raise NoInputError(f"The list {place} has no rows.", code="source-empty", remedy="Name at least one source.")
    _require_folder(target, dst)
    folder = place.rpartition("/")[0] or ("/" if place.startswith("/") else ".")
    sources = [_absolute(entry.source, folder) for entry in entries]
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        infos = list(pool.map(_stat, sources))
    names = _entry_names(entries, sources)
    items = tuple(
        Item(
            source=source,
            destination=_absolute(entry.destination or str(_result_name(PurePosixPath(name))), target),
            name=name,
            size_bytes=info.size_bytes if info else 0,
            version=info.version if info else "",
            priority=entry.priority,
            overrides=entry.overrides,
        )
        for entry, source, name, info in zip(entries, sources, names, infos, strict=True)
    )
    return Selection(items, target, True)


def _absolute(place: str, folder: str) -> str:
    place = _normal(_plain(place))
    if is_remote(place) or place.startswith("/"):
        return place
    return place if folder == "." else _below(folder, place)


def _stat(place: str) -> FileInfo | None:
    """What is known of a source; one that cannot be looked at is a failure of that video, not of the job."""
    try:
        return storage_for(place).stat(place)
    except StorageError:
        return None


def _entry_names(entries: Sequence[Entry], sources: Sequence[str]) -> list[str]:
    """A name for each row: the shortest kind under which no two rows have the same one."""
    inside = [re.sub(r"^(\.{0,2}/)+", "", entry.source.partition("://")[2] or entry.source) for entry in entries]
    last = [
        text if not is_remote(entry.source) and not entry.source.startswith("/") else PurePosixPath(text).name
        for entry, text in zip(entries, inside, strict=True)
    ]
    for names in (last, inside):
        if len(set(names)) == len(names):
            return names
    # One source may stand in several rows, with other options.
    return [
        name if count == 1 else f"{name} to {entry.destination or 'DST'}"
        for entry, name, count in zip(entries, inside, _counts(inside), strict=True)
    ]


def _counts(names: Iterable[str]) -> list[int]:
    names = list(names)
    counter = Counter(names)
    return [counter[name] for name in names]


def _check_results(selection: Selection) -> None:
    """Raise where two sources would become one file, or a source would be replaced."""
    for item, count in zip(selection.items, _counts(item.destination for item in selection.items), strict=True):
        if count > 1:
            raise UsageError(
                f"Two sources would become {item.destination}.",
                code="destination-collision",
                remedy="Rename one of the sources.",
            )
        if _is_same(item.source, item.destination):
            raise _same(item.destination)


def _ordered(
    items: tuple[Item, ...], limit: int | None, shuffle: int | None, priority: Sequence[str]
) -> tuple[Item, ...]:
    chosen = list(items)
    if shuffle is not None:
        random.Random(shuffle).shuffle(chosen)
    if priority:
        highest = max(item.priority for item in chosen)
        for place, item in enumerate(chosen):
            at = next((at for at, pattern in enumerate(priority) if fnmatchcase(item.name, pattern)), None)
            if at is not None:
                chosen[place] = replace(item, priority=highest + len(priority) - at)
    chosen.sort(key=lambda item: -item.priority)
    return tuple(chosen[:limit])
