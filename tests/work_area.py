"""A restore job's work area as the job leaves it at some moment, written by hand from the records it consists of.

`Job(dst)` names the videos; each `write_*` puts one kind of record where `jobs/records.py` says it lies. With it the
tools that look at jobs from outside are tested without waiting for a job to be at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from actors.records import RowOptions, SegmentRecord, segment_stem
from infra.job_records import JobRecord, Progress
from infra.storage import storage_for
from jobs.manifest import Manifest, ModelRecord, OutputRecord, SourceRecord, write_manifest
from jobs.records import LedgerRecord, Shot, VideoPlan

OPTIONS = RowOptions(steps=1, scale=4, height=None, codec=None, crf=None, preset="ultrafast", pix_fmt="auto")


def stamp(ago_s: float = 0.0) -> str:
    """The time `ago_s` seconds ago as records have it."""
    return (datetime.now(UTC) - timedelta(seconds=ago_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Job:
    """A job over `videos`: name -> frames of each of its shots."""

    dst: str
    videos: dict[str, list[int]]
    source: str = "tapes"
    segment_frames: int = 10
    size: tuple[int, int] = (96, 64)
    job_id: str = "0123456789abcdef"
    is_folder: bool = True
    started_ago_s: float = 600.0
    area: str = field(init=False)

    def __post_init__(self) -> None:
        top = f"{self.dst}/.upriver" if self.is_folder else f"{self.dst}.upriver"
        self.area = f"{top}/{self.job_id}"

    def run_id(self, name: str) -> str:
        return f"{list(self.videos).index(name):016x}"

    def destination(self, name: str) -> str:
        return f"{self.dst}/{name}" if self.is_folder else self.dst

    def put(self, name: str, content: str) -> None:
        storage_for(self.area).write(f"{self.area}/{name}", content.encode())

    def write_job(self, state: str = "running", **changes: Any) -> None:
        over = state not in ("planning", "running")
        values: dict[str, Any] = {
            "job_id": self.job_id,
            "source": self.source,
            "destination": self.dst,
            "state": state,
            "model": "tiny",
            "model_sha256": "ab" * 32,
            "settings": {},
            "videos": {name: self.run_id(name) for name in self.videos},
            "skipped": [],
            "started_at": stamp(self.started_ago_s),
            "ended_at": stamp() if over else None,
            "exit_code": 0 if over else None,
            "host": "tape-robot",
            "pid": 4711,
            "versions": {"upriver": "0.1.0"},
        }
        self.put("job.json", JobRecord(**{**values, **changes}).model_dump_json())

    def write_progress(self, *, ago_s: float = 2.0, **changes: Any) -> None:
        total = sum(sum(shots) for shots in self.videos.values())
        values: dict[str, Any] = {
            "updated_at": stamp(ago_s),
            "elapsed_s": self.started_ago_s - ago_s,
            "actors": 2,
            "videos_total": len(self.videos),
            "done": [],
            "failed": [],
            "running": {},
            "frames_total": total,
            "frames_left": total,
            "frames_done": 0,
            "history": [],
        }
        self.put("progress.json", Progress(**{**values, **changes}).model_dump_json())

    def plan(self, name: str, **changes: Any) -> VideoPlan:
        shots, first = [], 0
        for number, frames in enumerate(self.videos[name]):
            last = number + 1 == len(self.videos[name])
            stop = -1 if last else first + frames
            shots.append(Shot(number=number, first_index=first, frames=frames, start_pts=first, stop_pts=stop))
            first += frames
        width, height = self.size
        values: dict[str, Any] = {
            "run_id": self.run_id(name),
            "name": name,
            "source": f"{self.source}/{name}",
            "source_version": "1-1",
            "size_bytes": 1000,
            "destination": self.destination(name),
            "width": width,
            "height": height,
            "out_width": 4 * width,
            "out_height": 4 * height,
            "frames": first,
            "duration_s": first / 25,
            "average_rate": "25/1",
            "time_base": "1/25",
            "codec": "h264",
            "deinterlace": "off",
            "segment_frames": self.segment_frames,
            "shots": shots,
            "seed": 0,
            "priority": 0,
            "options": OPTIONS,
            "damage": [],
            "warnings": [],
        }
        return VideoPlan(**{**values, **changes})

    def write_plan(self, name: str, **changes: Any) -> None:
        self.put(f"videos/{self.run_id(name)}/plan.json", self.plan(name, **changes).model_dump_json())

    def write_segment(self, name: str, shot: int, number: int, *, ago_s: float = 5.0, seconds: float = 2.0) -> None:
        """Write a segment, its state and its record; the first two are stand-ins that nobody opens."""
        stem = segment_stem(shot, number)
        before = sum(self.videos[name][:shot]) + number * self.segment_frames
        frames = min(self.segment_frames, self.videos[name][shot] - number * self.segment_frames)
        folder = f"videos/{self.run_id(name)}"
        self.put(f"{folder}/segments/{stem}.mp4", "segment")
        self.put(f"{folder}/states/{stem}.safetensors", "state")
        record = SegmentRecord(
            name=f"{stem}.mp4",
            shot=shot,
            number=number,
            first_index=before,
            frames=frames,
            first_pts=before,
            last_pts=before + frames - 1,
            width=4 * self.size[0],
            height=4 * self.size[1],
            size_bytes=7,
            sha256="cd" * 32,
            state=f"{stem}.safetensors",
            state_sha256="ef" * 32,
            damage=[],
            warnings=[],
            seconds={"model": seconds * 0.75, "decode": seconds * 0.25},
            device="cpu",
            dtype="fp32",
            flow="dis",
            host="worker-1",
            finished_at=stamp(ago_s),
        )
        self.put(f"{folder}/segments/{stem}.json", record.model_dump_json())

    def write_failure(
        self,
        name: str,
        *,
        attempt: int = 1,
        final: bool = True,
        failure_class: str = "source-unreadable",
        **changes: Any,
    ) -> None:
        """Add a line to the ledger."""
        values: dict[str, Any] = {
            "time": stamp(30),
            "name": name,
            "run_id": self.run_id(name),
            "shot": None,
            "attempt": attempt,
            "final": final,
            "host": "worker-1",
            "seconds": 1.5,
            "failure_class": failure_class,
            "code": "video-unreadable",
            "message": f"{name} is empty (0 bytes).",
            "remedy": "Copy or download it again.",
        }
        place = f"{self.area}/ledger.jsonl"
        storage = storage_for(place)
        before = storage.read(place).decode() if storage.stat(place) is not None else ""
        storage.write(place, f"{before}{LedgerRecord(**{**values, **changes}).model_dump_json()}\n".encode())

    def write_result(
        self, name: str, *, content: bytes | None = b"result", ago_s: float = 60.0, **changes: Any
    ) -> None:
        """Write a result (unless `content` is None: it is there already) and its manifest."""
        place, frames = self.destination(name), sum(self.videos[name])
        if content is not None:
            storage_for(place).write(place, content)
        there = storage_for(place).stat(place)
        values: dict[str, Any] = {
            "run_id": self.run_id(name),
            "source": SourceRecord(path=f"{self.source}/{name}", size_bytes=1000, version="1-1", sha256=None),
            "output": OutputRecord(
                path=place,
                size_bytes=there.size_bytes if there else 0,
                sha256=None,
                frames=frames,
                width=4 * self.size[0],
                height=4 * self.size[1],
            ),
            "model": ModelRecord(name="tiny", sha256="ab" * 32, device="cpu", dtype="fp32", flow="dis"),
            "seed": 0,
            "options": dict(OPTIONS),
            "damage": [],
            "warnings": [],
            "cuts": [],
            "seconds": {"total": frames / 4, "model": frames / 5},
            "versions": {"upriver": "0.1.0"},
            "finished_at": stamp(ago_s),
        }
        write_manifest(place, Manifest(**{**values, **changes}))
