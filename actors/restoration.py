"""The restoration of one shot, segment by segment: a reader, the model, an encoder and an uploader, a thread for each.

What an earlier attempt finished is taken over, and the stream goes on from the state saved after it. Knows one shot
and no cluster. Where the cuts are is the plan's matter: a shot has none inside. A part of a shot is restored like a
shot, after the frames of its warm-up.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, cast

from actors.errors import DecodeMismatch
from actors.output import encoder_options, output_size
from actors.overlap import ReadAhead, WriteBehind
from actors.pictures import Picture, resize
from actors.records import Row, RowOptions, SegmentRecord, segment_stem
from actors.shot_store import ShotStore
from actors.step_batch import step_with_flow
from infra.storage import storage_for, video_source
from pipeline.flow_ahead import NextFlow, flow_ahead
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.segments import SegmentReport, SegmentWriter, segment_suffix
from pipeline.state import StreamState
from pipeline.step_policy import StepPolicy, choose
from pipeline.video import Deinterlace, Limits, VideoFrame, VideoReader

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.engine import Engine
    from pipeline.tiling import Window

logger = logging.getLogger(__name__)

QUEUE_DEPTH = 4  # frames between decoder and model, and between model and encoder
Step = Callable[..., "Tensor"]  # (frame, state, steps), and a window or a flow where there is one: `step_alone`


class Advance(NamedTuple):
    """How far a shot is: frames finished or under way, and the segment that has just been finished, if any.

    `replayed`: an earlier attempt finished it.
    """

    frames: int
    record: SegmentRecord | None = None
    replayed: bool = False


class _Restored(NamedTuple):
    frame: VideoFrame
    picture: Picture
    end: _SegmentEnd | None


class _SegmentEnd(NamedTuple):
    """Goes with the last frame of a segment: the state after it, None at the end of the shot."""

    state: StreamState | None
    seconds: dict[str, float]


class _Closed(NamedTuple):
    report: SegmentReport
    first_index: int
    end: _SegmentEnd
    damage: list[str]


class Restoration:
    """A context manager around the restoration of one shot. However it is left, what is finished stays.

    Args:
        row: the shot.
        threads: CPU threads that the decoder may use.
        step: one step of the model for one stream; the default is the pipeline's own.
        look_ahead: whether to look for the flow of the next frame while the model has this one; None: where it helps.
        from_start: decode the source from its beginning, where it cannot be entered at any place.

    Attributes:
        width, height: of the result. resumed: frames taken over from an earlier attempt.

    Raises:
        PipelineError, ActorsError, StorageError: the source cannot be read, the options do not go together, or the
            work area cannot be used.
    """

    def __init__(
        self,
        pipe: Engine,
        row: Row,
        *,
        threads: int,
        max_pixels: int,
        step: Step | None = None,
        from_start: bool = False,
        look_ahead: bool | None = None,
    ) -> None:
        self._pipe, self._row = pipe, row
        self._step_model: Step = step or partial(step_alone, pipe)
        self._options: RowOptions = json.loads(row["options"])
        steps = self._options["steps"]
        self._policy = StepPolicy.of(self._options["step_policy"]) if steps == "auto" else None
        self._steps = None if steps == "auto" else steps
        self._encoder_options = encoder_options(self._options)
        self._store = ShotStore(row["segments"], row["states"], row["shot"], row["frames"], row["segment_frames"])
        saved = self._store.look()
        self._replayed = tuple(self._store.records)
        self.resumed = self._store.frames_done
        self._finished = self.resumed == row["frames"]
        self._warm_up = 0 if self.resumed else row["warm_up"]  # a saved state is as warm as can be
        self._state = self._first_state(saved)
        self._reader = self._open_reader(threads, max_pixels, from_start)
        info = self._reader.info
        self.width, self.height = output_size(info, self._options["scale"], self._options["height"])
        self._suffix = segment_suffix(self._encoder_options, info, Path(row["destination"]).suffix)
        self._told_damage = 0
        self._done: deque[SegmentRecord] = deque()
        self._seconds = {"model": 0.0, **({"warm_up": 0.0} if self._warm_up else {})}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._writer: SegmentWriter | None = None
        if self._finished:
            return
        self._folder = self._make_folder()
        frames = self._frames_from_start() if from_start else iter(self._reader)
        self._frames = ReadAhead(frames, QUEUE_DEPTH)
        self._ahead = None if look_ahead is False else flow_ahead(pipe, always=bool(look_ahead))
        self._next = None if self._ahead is None else NextFlow(self._ahead)
        self._results = WriteBehind(self._encode, QUEUE_DEPTH)
        self._uploads = WriteBehind(self._upload, 1)

    @property
    def beside_bytes(self) -> int:
        """Main memory that this shot needs outside the model: pictures that wait, and the encoder."""
        from pipeline.memory import beside_the_step

        restored = 16 * self._reader.info.width * self._reader.info.height
        written = self.width * self.height
        return beside_the_step(restored_pixels=restored, written_pixels=written, waiting=QUEUE_DEPTH + 2)

    @property
    def _first_read(self) -> int:
        """Number in the video of the first frame that is still to be read."""
        return self._row["first_index"] + self.resumed - self._warm_up

    def _first_state(self, saved: bytes | None) -> StreamState:
        if saved is None:
            return self._pipe.start(seed=self._row["seed"], index=self._first_read)
        return StreamState.load(io.BytesIO(saved), self._pipe.device, model_sha256=self._pipe.model_sha256)

    def _open_reader(self, threads: int, max_pixels: int, from_start: bool) -> VideoReader:
        row = self._row
        start_pts = self._replayed[-1].last_pts + 1 if self._replayed else row["warm_up_pts"]
        at_start = from_start or self._first_read == 0
        return VideoReader(
            video_source(row["source"]),
            deinterlace=cast(Deinterlace, row["deinterlace"]),
            limits=Limits(max_pixels=max_pixels),
            threads=threads,
            start_pts=None if at_start else start_pts,
            stop_pts=row["stop_pts"] if row["stop_pts"] != -1 and not from_start else None,
            first_index=0 if from_start else self._first_read,
        )

    def _frames_from_start(self) -> Iterator[VideoFrame]:
        return islice(self._reader, self._first_read, self._row["first_index"] + self._row["frames"])

    def _make_folder(self) -> Path:
        """Where segments grow: beside their place if that is local, so that they get it by a rename."""
        segments = self._row["segments"]
        storage = storage_for(segments)
        if storage.is_local:
            storage.make_folder(segments)
            return Path(segments.removeprefix("file://"))
        self._scratch = tempfile.TemporaryDirectory(prefix="upriver-")
        return Path(self._scratch.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._finished:
            self._frames.close()
            if self._ahead is not None:
                self._ahead.close()
            self._results.close()
            try:
                self._uploads.finish()  # closed segments are worth keeping, whatever happened to the next one
            except BaseException as second:
                if error is None:
                    raise
                logger.warning("a closed segment could not be saved either: %s", second)
            finally:
                if self._writer is not None:
                    self._writer.abort()
                self._reader.close()
                if self._scratch is not None:
                    self._scratch.cleanup()
        self._reader.close()

    def forget(self) -> None:
        """Remove everything that is finished of this shot. For use after the context has been left."""
        self._store.forget()

    def run(self) -> Iterator[Advance]:
        """Restore frame after frame; yields the finished segments, first those taken over, and how far the shot is.

        Raises:
            DecodeMismatch: the source has not the frames that the plan found there.
        """
        done = 0
        for record in self._replayed:
            done += record.frames
            yield Advance(done, record, replayed=True)
        if self._finished:
            return
        known = {-self._warm_up: self._row["warm_up_pts"], 0: self._row["start_pts"]}
        for number, frame in enumerate(self._frames, done - self._warm_up):
            if number == self._row["frames"] or frame.pts != known.get(number, frame.pts):
                raise self._mismatch(f"a picture at {float(frame.pts * frame.time_base):.3f} s was not expected there")
            began = time.perf_counter()
            picture = self._step(frame.rgb_HWC)
            self._seconds["model" if number >= 0 else "warm_up"] += time.perf_counter() - began
            if number < 0:
                yield Advance(done)
                continue
            done += 1
            self._results.put(_Restored(frame, picture, self._segment_end(done)))
            yield Advance(done, self._done.popleft() if self._done else None)
        if done < self._row["frames"]:
            raise self._mismatch(f"it has {done} pictures, not {self._row['frames']}")
        self._results.finish()
        self._uploads.finish()
        while self._done:
            yield Advance(done, self._done.popleft())

    def _step(self, rgb_HWC: Picture) -> Picture:
        choice = None if self._policy is None else choose(self._policy, rgb_HWC, self._state)
        if choice is not None and choice.level == 0:
            output_3HW = self._state.hold()
        else:
            steps = self._steps if choice is None else choice.level
            window = None if choice is None or choice.window is None else _window(choice.window)
            flow_2HW = self._look_ahead(rgb_HWC, is_whole=window is None)
            known = {} if flow_2HW is None else {"flow_2HW": flow_2HW}
            frame_13HW = frame_to_tensor(rgb_HWC, self._pipe.device)
            where = () if window is None else (window,)
            output_3HW = self._step_model(frame_13HW, self._state, steps, *where, **known)[0]
            if self._next is not None:
                self._next.done()
        if choice is not None:
            self._state.policy = choice.memory
        picture: Picture = tensor_to_frame(output_3HW, rgb_HWC.dtype)  # type: ignore[assignment]  # its own type
        return picture

    def _look_ahead(self, rgb_HWC: Picture, *, is_whole: bool) -> Tensor | None:
        """Return the flow (2,4h,4w) to the previous input if it was looked for; begin to look for the next frame's.

        Where a window alone is restored none is wanted, and the next flow will lead to a picture of two frames.
        """
        if self._next is None:
            return None
        search = self._next.take(rgb_HWC)
        flow_2HW = search.flow(self._pipe.device) if search is not None and is_whole else None
        self._next.begin(rgb_HWC if is_whole else None)
        following = self._frames.peek()
        if following is not None:
            self._next.look(following.rgb_HWC)
        return flow_2HW

    def _segment_end(self, done: int) -> _SegmentEnd | None:
        """What belongs to the frame that was just restored if it is the last one of its segment."""
        is_last = done == self._row["frames"]
        if done % self._row["segment_frames"] and not is_last:
            return None
        spent = {**self._seconds, "decode": self._frames.waited_s, "encode": self._results.waited_s}
        self._seconds = {"model": 0.0}
        self._frames.waited_s = self._results.waited_s = 0.0
        # A step replaces the tensors and leaves the old ones as they are: the encoder's thread may write them later.
        return _SegmentEnd(None if is_last else dataclasses.replace(self._state), spent)

    def _encode(self, item: _Restored) -> None:
        if self._writer is None:
            stem = segment_stem(self._row["shot"], item.frame.index)
            path = self._folder / f".{stem}.{secrets.token_hex(4)}{self._suffix}"
            self._writer = SegmentWriter(
                path,
                self._reader.info,
                width=self.width,
                height=self.height,
                options=self._encoder_options,
                container_suffix=Path(self._row["destination"]).suffix,
            )
        picture = resize(item.picture, self.width, self.height)
        self._writer.write(dataclasses.replace(item.frame, rgb_HWC=picture))
        if item.end is not None:
            report = self._writer.close()
            self._writer = None
            damage = self._reader.damage[self._told_damage :]
            self._told_damage += len(damage)
            self._uploads.put(_Closed(report, item.frame.index + 1 - report.frames, item.end, damage))

    def _upload(self, closed: _Closed) -> None:
        state = closed.end.state
        record = self._store.put(
            closed.report,
            first_index=closed.first_index,
            width=self.width,
            height=self.height,
            state=None if state is None else state.to_bytes(),
            damage=closed.damage,
            seconds=closed.end.seconds,
            device=str(self._pipe.device),
            dtype=self._pipe.numerics,
            flow=self._pipe.flow.name,
        )
        self._done.append(record)

    def _mismatch(self, what: str) -> DecodeMismatch:
        return DecodeMismatch(
            f"{self._row['name']}, shot {self._row['shot']}: {what}.",
            code="decode-mismatch",
            remedy="The source may be damaged, or may have been changed: copy it again.",
        )


# Both import diffusers only for windows: it takes seconds, and a stand-in has no use for it.
def step_alone(
    pipe: Engine,
    frame_13HW: Tensor,
    state: StreamState,
    steps: int | None,
    window: Window | None = None,
    flow_2HW: Tensor | None = None,
) -> Tensor:
    """Restore the next frame (1,3,h,w) of one stream, whole or in a window, without a batch -> (1,3,4h,4w).

    Args:
        flow_2HW: to the previous frame, where it is known already; not for windows.
    """
    if window is None:
        return step_with_flow(pipe, frame_13HW, [state], [steps], [flow_2HW])
    from pipeline.static_windows import step_window

    return step_window(pipe, frame_13HW, state, steps, window)


def _window(corners: tuple[int, int, int, int]) -> Window:
    from pipeline.tiling import Window

    return Window(*corners)
