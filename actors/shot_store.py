"""What is finished of one shot, in the work area: its segments, the states to go on from, and the records.

A segment is there when its record is: segment, state and record are written in this order, each whole or not at all.
Names carry the beginning of the content's hash, and a record is never replaced. So a worker that was given up and lives
on can neither change what its successor builds on, nor mix its own work with it. Knows no model and no pictures.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path

from pydantic import ValidationError

from actors.errors import RowTaken
from actors.records import SegmentRecord, segment_stem
from infra.errors import StorageError
from infra.storage import join, storage_for
from pipeline.segments import SegmentReport

RECORD_SUFFIX, STATE_SUFFIX = ".json", ".safetensors"
# The newest one may turn out to be damaged, and then the one before it is needed.
_STATES_KEPT = 2


class ShotStore:
    """The finished part of one shot.

    Args:
        segments, states: places of the video in the work area.
        shot: number of the shot. frames: how many it has.
        segment_frames: of every segment but its last one.

    Attributes:
        records: of the finished segments, from the shot's first one on without a gap; complete after `look`.
    """

    def __init__(self, segments: str, states: str, shot: int, frames: int, segment_frames: int) -> None:
        self.records: list[SegmentRecord] = []
        self._segments, self._states = segments, states
        self._shot, self._frames, self._segment_frames = shot, frames, segment_frames
        self._storage = storage_for(segments)

    @property
    def frames_done(self) -> int:
        """How many frames of the shot are finished."""
        return sum(record.frames for record in self.records)

    def look(self) -> bytes | None:
        """Find what is finished and can be trusted, remove the rest of the shot, and return the state to go on from.

        The newest segment and its state are read and compared with their hashes; of older segments the size must be
        right. (Before segments become a result, each is read and compared.) None: from the beginning, or finished.
        """
        sizes = self._sizes()
        self.records = []
        while (record := self._record(len(self.records), sizes)) is not None:
            self.records.append(record)
        state: bytes | None = None
        while self.records:
            last = self.records[-1]
            if hash_at(join(self._segments, last.name)) == last.sha256:
                if self.frames_done == self._frames:
                    break
                state = self._state(last)
                if state is not None:
                    break
            self.records.pop()
        self._remove_all_but(self.records, sizes)
        return state

    def forget(self) -> None:
        """Remove everything of the shot."""
        self.records = []
        self._remove_all_but([], self._sizes())

    def put(
        self,
        report: SegmentReport,
        *,
        first_index: int,
        width: int,
        height: int,
        state: bytes | None,
        damage: list[str],
        seconds: dict[str, float],
        device: str,
        dtype: str,
        flow: str,
    ) -> SegmentRecord:
        """Make the closed segment of `report` count; its local file is moved or removed.

        Args:
            first_index: number of its first frame in the video.
            state: what the stream goes on from; None after the shot's last segment.

        Raises:
            RowTaken: another worker finished this segment meanwhile, with another outcome.
            StorageError: the work area cannot be written.
        """
        number = len(self.records)
        stem = segment_stem(self._shot, number)
        state_sha256 = None if state is None else hashlib.sha256(state).hexdigest()
        record = SegmentRecord(
            name=f"{stem}.{report.sha256[:8]}{report.path.suffix}",
            shot=self._shot,
            number=number,
            first_index=first_index,
            frames=report.frames,
            first_pts=report.first_pts,
            last_pts=report.last_pts,
            width=width,
            height=height,
            size_bytes=report.size_bytes,
            sha256=report.sha256,
            state=None if state_sha256 is None else f"{stem}.{state_sha256[:8]}{STATE_SUFFIX}",
            state_sha256=state_sha256,
            damage=damage,
            warnings=list(report.warnings),
            seconds={name: round(value, 3) for name, value in seconds.items()},
            device=device,
            dtype=dtype,
            flow=flow,
            host=platform.node(),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        if self._storage.is_local:
            _sync(report.path)
        self._storage.publish(report.path, join(self._segments, record.name))
        if state is not None and record.state is not None:
            self._storage.write(join(self._states, record.state), state)
        self._write_record(stem, record)
        self.records.append(record)
        if number >= _STATES_KEPT and (old := self.records[number - _STATES_KEPT].state):
            self._storage.delete(join(self._states, old))
        return record

    def _write_record(self, stem: str, record: SegmentRecord) -> None:
        place = join(self._segments, f"{stem}{RECORD_SUFFIX}")
        try:
            self._storage.write(place, record.model_dump_json(indent=1).encode() + b"\n", if_absent=True)
        except StorageError as error:
            if error.code != "destination-exists":
                raise
            theirs = SegmentRecord.model_validate_json(self._storage.read(place))
            if (theirs.sha256, theirs.state_sha256) != (record.sha256, record.state_sha256):
                raise RowTaken(
                    f"Segment {stem} was finished by another worker on {theirs.host}.",
                    code="row-taken",
                    remedy="Nothing is to be done: the row goes on from there.",
                ) from error

    def _sizes(self) -> dict[str, int]:
        """Size in bytes of everything of this shot, by place."""
        begins = f"{self._shot:05d}-"
        return {
            info.place: info.size_bytes
            for place in (self._segments, self._states)
            for info in self._storage.list(place)
            if info.place.rpartition("/")[2].startswith(begins)
        }

    def _record(self, number: int, sizes: dict[str, int]) -> SegmentRecord | None:
        """The record of segment `number`, if it and its segment are there and fit."""
        place = join(self._segments, f"{segment_stem(self._shot, number)}{RECORD_SUFFIX}")
        if place not in sizes:
            return None
        try:
            record = SegmentRecord.model_validate_json(self._storage.read(place))
        except ValidationError:
            return None
        left = self._frames - number * self._segment_frames
        fits = (record.shot, record.number, record.frames) == (self._shot, number, min(left, self._segment_frames))
        whole = sizes.get(join(self._segments, record.name)) == record.size_bytes
        return record if fits and whole else None

    def _state(self, record: SegmentRecord) -> bytes | None:
        if record.state is None:
            return None
        try:
            content = self._storage.read(join(self._states, record.state))
        except StorageError as error:
            if self._storage.stat(join(self._states, record.state)) is None:
                return None
            raise error
        return content if hashlib.sha256(content).hexdigest() == record.state_sha256 else None

    def _remove_all_but(self, records: list[SegmentRecord], sizes: dict[str, int]) -> None:
        kept = {join(self._states, record.state) for record in records[-_STATES_KEPT:] if record.state}
        for record in records:
            stem = segment_stem(record.shot, record.number)
            kept |= {join(self._segments, f"{stem}{RECORD_SUFFIX}"), join(self._segments, record.name)}
        # Records first: what they name must never be gone before them. Later ones before earlier ones, for the same
        # reason that they were written in order.
        unwanted = sorted((place for place in sizes if place not in kept), reverse=True)
        for place in sorted(unwanted, key=lambda place: not place.endswith(RECORD_SUFFIX)):
            self._storage.delete(place)


def hash_at(place: str) -> str:
    """Return the SHA-256 of the file at `place` in hexadecimal.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage_for(place).open(place) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Put a file on the disk: a power cut must not leave a record of something empty."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
