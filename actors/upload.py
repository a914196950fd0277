"""One uploaded video, restored while it arrives: out of a pipe, through the model, into a pipe, as fragmented MP4.

Blocking throughout; it runs in a thread of its own and has three more: decoder, encoder, and what the model does. The
first fragment leaves about a second of film after the first picture came, whether or not the rest is there yet. Knows
no HTTP: `restore_api` does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from actors.byte_pipe import BytePipe, Gone
from actors.output import output_size
from actors.overlap import ReadAhead, WriteBehind
from actors.pictures import Picture, resize
from actors.uploaded_video import Beginning, SpooledVideo, StreamedVideo
from infra.refusals import BadMessage, FrameTooLarge, Refusal, ServiceFailure
from pipeline.encoder_options import EncoderOptions, Preset
from pipeline.errors import InputError, SizeError
from pipeline.picture_encoder import PictureEncoder
from pipeline.piped_output import MUXER, PipedOutput, Sounds, sounds
from pipeline.shots import CutDetector
from pipeline.step_policy import StepPolicy, choose
from pipeline.video import EncodeError, Limits, VideoError, VideoFrame, VideoInfo, VideoReader, probe
from pipeline.video import FrameTooLarge as VideoTooLarge

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.state import StreamState

logger = logging.getLogger(__name__)

QUEUE_DEPTH = 4  # frames between decoder and model, and between model and encoder


# What comes from the query of an address is text.
_AS_NUMBER = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value)


class UploadOptions(BaseModel):
    """What the sender of a video may choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Annotated[Literal[2, 3, 4], _AS_NUMBER] = Field(
        default=4, description="output size over input size; 2 and 3 are made from 4"
    )
    model: str | None = Field(default=None, max_length=200, description="see /v1/models; none: the service's own")
    steps: Annotated[Literal[1, 2, 4, "auto"] | None, _AS_NUMBER] = Field(
        default=None, description="denoising steps; auto: by what each frame shows; none: the model's own"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the noise; equal seeds give equal pictures")
    codec: Literal["h264", "hevc", "av1", "vp9"] | None = Field(
        default=None, description="none: H.264, or H.265 for sources deeper than 8 bits"
    )
    crf: int | None = Field(default=None, ge=0, le=63, description="quality of the codec, lower is better")
    cuts: bool = Field(default=True, description="start the stream's memory afresh at each cut")


class UploadSettings(BaseModel):
    """How much one upload may be and take. Sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int = Field(default=4 << 30, ge=1, description="of the upload")
    max_pixels: int = Field(default=1920 * 1080, ge=256, description="of one picture")
    max_frames: int = Field(default=200_000, ge=1, description="pictures of one upload")
    max_seconds: float = Field(default=7200.0, gt=0, description="film time of one upload")
    max_streams: int = Field(default=16, ge=1, le=128, description="pictures, sounds, subtitles in one container")
    max_uploads: int = Field(default=4, ge=1, description="restored at a time by one replica")
    beginning_bytes: int = Field(default=16 << 20, ge=1 << 16, description="of a video, looked at to know what it is")
    buffer_bytes: int = Field(default=4 << 20, ge=1 << 16, description="of memory, for each direction")
    spool_bytes: int = Field(default=4 << 30, ge=0, description="of disk, for each direction")
    spool_folder: str | None = Field(default=None, description="where; none: the system's folder for temporary files")
    idle_s: float = Field(default=30.0, gt=0, description="nothing comes, or nothing is taken, for so long: the end")
    preset: Preset = Field(default="veryfast", description="speed of the encoder")
    threads: int = Field(default=2, ge=1, le=64, description="of decoder and encoder each")


class StepLease(Protocol):
    """A stream's place in the model, lent to one upload. Its methods are called from the upload's thread."""

    def start(self, seed: int) -> StreamState:
        """Return the state of a new stream."""

    def step(self, frame_13HW: Tensor, state: StreamState, steps: int | None) -> Tensor:
        """Return the restored frame (1,3,4h,4w), as `StreamDiffVSRPipeline.step` does; blocks. May raise a refusal."""

    def close(self) -> None:
        """Give the place back; called once, from any thread."""


class _Restored(NamedTuple):
    frame: VideoFrame
    picture: Picture


class RestoreUpload:
    """The restoration of one upload: `open`, then `run`, then `close`, all of which block.

    Args:
        body: where the video comes from. Aborting it ends everything.

    Attributes:
        info: the probed video. width, height: of the result. All are there after `open`.
        streamed: it is read as it comes, not from a file.
        left_out: streams that the result will not have, and why, in words.
    """

    info: VideoInfo
    _sounds: Sounds

    def __init__(self, body: BytePipe, options: UploadOptions, settings: UploadSettings) -> None:
        self._body, self._options, self._settings = body, options, settings
        self._limits = Limits(max_pixels=settings.max_pixels)
        self._video: StreamedVideo | SpooledVideo | None = None
        self._encoder: PictureEncoder | None = None
        self.left_out: list[str] = []
        self.width = self.height = 0

    @property
    def streamed(self) -> bool:
        return isinstance(self._video, StreamedVideo)

    def open(self) -> None:
        """Look at the video: as much of it as is needed, all of it if it cannot be read as it comes.

        Raises:
            Refusal: it is not accepted, or too much of something. Whatever the body was aborted with.
        """
        try:
            self._open()
        except Gone:
            raise
        except Exception as error:
            raise as_refusal(error) from error

    def _open(self) -> None:
        settings = self._settings
        beginning = Beginning(self._body, settings.beginning_bytes)
        container = beginning.sniff()
        if container.streamable:
            self._video = StreamedVideo(beginning, container.demuxer)
            self._look()
            if container.demuxer == "mov" and self._sounds.silent:
                # The index says that there is sound, but it lies behind the pictures.
                self._video = None
        if self._video is None:
            self._video = SpooledVideo(
                beginning, container.demuxer, limit_bytes=settings.spool_bytes, folder=settings.spool_folder
            )
            self._look()
        options = EncoderOptions(
            codec=self._options.codec, crf=self._options.crf, preset=settings.preset, threads=settings.threads
        )
        self.width, self.height = output_size(self.info, self._options.scale, None)
        self._encoder = PictureEncoder(self.info, MUXER, width=self.width, height=self.height, options=options)
        self.left_out += self._encoder.warnings

    def _look(self) -> None:
        assert self._video is not None
        settings = self._settings
        self.info = info = probe(self._video, limits=self._limits)
        if len(info.streams) > settings.max_streams:
            raise _too_much("upload-streams", len(info.streams), "streams", settings.max_streams)
        if info.frames and info.duration_s and info.frames > settings.max_frames:
            raise _too_much("upload-frames", info.frames, "pictures", settings.max_frames)
        if info.duration_s and info.duration_s > settings.max_seconds:
            raise _too_much("upload-seconds", round(info.duration_s), "seconds", settings.max_seconds)
        self._sounds = sounds(self._video, self._limits)
        self.left_out = list(self._sounds.left_out)

    def run(self, lease: StepLease, out: BytePipe) -> None:
        """Restore everything into `out`, and end it: with the error, if there is one, after what was restored.

        The MP4 ends with a `uuid` box (`pipeline.piped_output.END_BOX`) of JSON: `frames`, `cuts`, `damage` (what of
        the video could not be read, in words) and `left_out`. Without that box it is not whole.
        """
        try:
            self._run(lease, out)
        except Gone as error:
            out.end(error)
        except BaseException as error:
            out.end(as_refusal(error))
        else:
            out.end()

    def _run(self, lease: StepLease, out: BytePipe) -> None:
        assert self._video is not None and self._encoder is not None
        encoder = self._encoder
        output = PipedOutput(out, encoder, self.info, copied=self._sounds.copied)
        reader = VideoReader(
            self._video,
            limits=self._limits,
            threads=self._settings.threads,
            info=self.info,
            packets=output.packets,
        )
        if isinstance(self._video, StreamedVideo):
            self._video.keep_no_more()

        def encode(item: _Restored) -> None:
            picture = resize(item.picture, self.width, self.height)
            output.mux(encoder.encode(dataclasses.replace(item.frame, rgb_HWC=picture)))

        frames = ReadAhead(iter(reader), QUEUE_DEPTH)
        results: WriteBehind[_Restored] = WriteBehind(encode, QUEUE_DEPTH)
        try:
            counts = self._restore(frames, lease, results.put)
            results.finish()
            output.finish({**counts, "damage": reader.damage, "left_out": [*self.left_out, *encoder.found]})
        except BaseException as error:
            self._body.abort(error)  # the decoder may be waiting for it
            raise
        finally:
            frames.close()
            results.close()
            output.abort()
            reader.close()

    def _restore(
        self, frames: ReadAhead[VideoFrame], lease: StepLease, put: Callable[[_Restored], None]
    ) -> dict[str, object]:
        from pipeline.frames import frame_to_tensor, tensor_to_frame

        state = lease.start(self._options.seed)
        policy = StepPolicy() if self._options.steps == "auto" else None
        steps = None if self._options.steps == "auto" else self._options.steps
        detector = CutDetector() if self._options.cuts else None
        first_pts: int | None = None
        count = cuts = 0
        for frame in frames:
            first_pts = frame.pts if first_pts is None else first_pts
            if count >= self._settings.max_frames:
                raise _too_much("upload-frames", count + 1, "pictures", self._settings.max_frames)
            if (frame.pts - first_pts) * frame.time_base > self._settings.max_seconds:
                raise _too_much("upload-seconds", None, "seconds", self._settings.max_seconds)
            if detector is not None and detector.update(frame.rgb_HWC):
                state.reset()
                cuts += 1
            choice = None if policy is None else choose(policy, frame.rgb_HWC, state)
            if choice is not None and choice.level == 0:
                output_3HW = state.hold()
            else:
                level = steps if choice is None else choice.level
                output_3HW = lease.step(frame_to_tensor(frame.rgb_HWC), state, level)[0]
            if choice is not None:
                state.policy = choice.memory
            picture: Any = tensor_to_frame(output_3HW, frame.rgb_HWC.dtype)
            put(_Restored(frame, picture))
            count += 1
        return {"frames": count, "cuts": cuts}

    def close(self) -> None:
        """Release what is left; nobody may be in `open` or `run` any more."""
        if isinstance(self._video, SpooledVideo):
            self._video.close()
        self._video = self._encoder = None


def as_refusal(error: BaseException) -> Refusal:
    """Return what the sender is told of an error; what is not the sender's matter is logged and told in general."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, VideoTooLarge | SizeError):
        return FrameTooLarge(error.message, code=error.code, remedy=error.remedy)
    if isinstance(error, VideoError | InputError) and not isinstance(error, EncodeError):
        return BadMessage(error.message, code=error.code, remedy=error.remedy)
    logger.error("a restoration failed", exc_info=error)
    return ServiceFailure("The restoration failed.", remedy="Try again; if it lasts, tell the operator the time.")


def _too_much(code: str, found: float | None, what: str, limit: float) -> FrameTooLarge:
    has = f"{found:g} {what}" if found is not None else f"more {what}"
    return FrameTooLarge(
        f"The video has {has}; the limit is {limit:g}.",
        code=code,
        limit=f"{limit:g} {what}",
        remedy="Send it in parts, or restore it as a job (POST /v1/jobs).",
    )
