"""What a restore job keeps in its work area, so that anybody who can read it knows how far the job is.

    <work area>/job.json                         infra.job_records.JobRecord
    <work area>/progress.json                    infra.job_records.Progress
    <work area>/ledger.jsonl                     LedgerRecord, one a line: every failed attempt
    <work area>/videos/<run id>/plan.json        VideoPlan
    <work area>/videos/<run id>/segments/        segments and their records (actors.records.SegmentRecord)
    <work area>/videos/<run id>/states/          stream states to go on from

The work area is `DST.upriver/<job id>/` beside a file, and `DST/.upriver/<job id>/` inside a folder or prefix. The job
id is a hash of model and options, the run id of one video's source besides: the same command finds what it left.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from actors.records import RowOptions

LEDGER, PLAN = "ledger.jsonl", "plan.json"
VIDEOS, SEGMENTS, STATES = "videos", "segments", "states"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Shot(_Record):
    """One task: a shot, or a part of a long one. Parts are numbered like shots, and wherever a shot is named.

    It has `frames` frames from number `first_index` on, with start_pts <= pts < stop_pts (-1: to the end).

    Attributes:
        continues: there is no cut at its beginning: it goes on with the shot that the task before it is of.
        warm_up: frames right before it, of the same shot, that are restored first and thrown away.
        warm_up_pts: time stamp of the first of them; None without.
    """

    number: int
    first_index: int
    frames: int
    start_pts: int
    stop_pts: int
    continues: bool = False
    warm_up: int = 0
    warm_up_pts: int | None = None


class VideoPlan(_Record):
    """What will be done to one video.

    Attributes:
        run_id: of this video. name: path below SRC, or the file's name.
        source_version: etag, or size and modification time.
        width, height: of the source as coded. out_width, out_height: of the result.
        frames: exact number. duration_s: last time stamp plus one frame, less the first.
        average_rate, time_base: as fractions, "25/1".
        deinterlace: as it was asked for; "off" where `auto` found nothing to do.
        damage: what was noticed while every picture was decoded once.
        priority: videos of a higher one start first.
        shots: the tasks, in the order of the film.
    """

    run_id: str
    name: str
    source: str
    source_version: str
    size_bytes: int
    destination: str
    width: int
    height: int
    out_width: int
    out_height: int
    frames: int
    duration_s: float
    average_rate: str
    time_base: str
    codec: str
    deinterlace: Literal["auto", "on", "off", "pulldown"]
    segment_frames: int
    shots: list[Shot]
    seed: int
    priority: int
    options: RowOptions
    damage: list[str]
    warnings: list[str]


class LedgerRecord(_Record):
    """One failed attempt. `failure_class` is one of actors.errors.FailureClass; `shot` None: the video as a whole."""

    time: str
    name: str
    run_id: str | None
    shot: int | None
    attempt: int
    final: bool
    host: str
    seconds: float
    failure_class: str
    code: str
    message: str
    remedy: str
