"""What passes between a restore job and its actors, and what they leave in the work area: plain values.

Knows no files and no cluster. A *place* is a local path or an `s3://` URL; a *segment* is a closed piece of encoded
video that starts with a key frame; a *record* is the small JSON file beside a segment that makes it count: it is
written last, so a segment without one does not exist.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

# What the names of a result's extras end with, after the result's whole name. A ladder is a folder.
FRAMEMD5_SUFFIX, LADDER_SUFFIX = ".framemd5", ".hls"


class RowOptions(TypedDict):
    """How one video is to be restored. What is new is not required: a run keeps its id where it is not asked for."""

    steps: int | Literal["auto"] | None
    scale: int
    height: int | None
    codec: str | None
    crf: int | None
    preset: str
    pix_fmt: str
    encoder: NotRequired[str]
    fragmented: NotRequired[bool]  # an MP4 or MOV in fragments
    step_policy: NotRequired[dict[str, Any]]  # of `pipeline.step_policy`, all of it, with steps "auto"


class Row(TypedDict):
    """One causal task as it travels to an actor: one shot of one video, or a part of a long shot.

    The stream's state is fresh at its first frame, or where its warm-up begins, so that it needs nothing from the tasks
    before it.
    """

    row_id: str  # f"{video_id}-{shot:05d}"
    video_id: str  # the video's run id: 16 hexadecimal digits of source, model and options
    name: str  # of the video, for people
    source: str  # place
    source_version: str
    destination: str  # place of the result; its ending names the container
    segments: str  # place below which this video's segments and their records lie
    states: str  # place below which its stream states lie
    shot: int  # number of the shot in the video; parts are numbered like shots
    first_index: int  # zero-based number of its first frame in the video
    frames: int  # exact number of frames
    start_pts: int  # first time stamp, in units of the stream's time base
    stop_pts: int  # time stamp to stop before; -1 to the end of the video
    warm_up: int  # frames before them, of the same shot, that are restored first and thrown away
    warm_up_pts: int  # time stamp of the first of those; without any, start_pts
    deinterlace: str  # as `pipeline.video.VideoReader` takes it: decided by the plan
    segment_frames: int  # frames of every segment but the shot's last one
    width: int  # of the source
    height: int
    seed: int
    cost: float  # frames x pixels: only its order counts
    options: str  # JSON of RowOptions


class SegmentRecord(BaseModel):
    """A finished segment. `first_index` counts frames of the video; time stamps are in its stream's time base.

    Attributes:
        name: of the segment's file, below the video's `segments`.
        state: name of the StreamState to go on from after this segment, below `states`; None after a shot's last one.
        damage, warnings: sentences for people about this stretch.
        seconds: where the time went: waiting for the decoder, model, waiting for encoder and storage, and the model's
            warm-up before a part's first segment. Together they are the time that the segment took.
        device, dtype, flow: what the model ran on and with.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    shot: int
    number: int
    first_index: int
    frames: int
    first_pts: int
    last_pts: int
    width: int
    height: int
    size_bytes: int
    sha256: str
    state: str | None
    state_sha256: str | None
    damage: list[str]
    warnings: list[str]
    seconds: dict[str, float]
    device: str
    dtype: str
    flow: str
    host: str
    finished_at: str


class Part(BaseModel):
    """One segment of a result."""

    model_config = ConfigDict(extra="forbid")
    name: str
    frames: int
    size_bytes: int
    sha256: str


class ExtraFile(BaseModel):
    """One file beside a result; `name` is its path from the result's folder, with slashes."""

    model_config = ConfigDict(extra="forbid")
    name: str
    size_bytes: int
    sha256: str


class Delivered(BaseModel):
    """What was made of a finished result, beside it.

    Attributes:
        hls: heights that the ladder was asked for; empty without one.
        warnings: sentences for people.
    """

    model_config = ConfigDict(extra="forbid")
    files: list[ExtraFile] = []
    hls: list[int] = []
    warnings: list[str] = []


def segment_stem(shot: int, number: int) -> str:
    """Return the name, without ending, of a segment; sorted by name they are in the order of the film."""
    return f"{shot:05d}-{number:06d}"
