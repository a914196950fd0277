"""`upriver bench pipeline`: from file to file without Ray, decoder, model and encoder at the same time.

A clip is decoded in one thread, restored in the main one and encoded in a third, with short queues between them, as a
worker does (`actors.overlap`). The frame rate is set beside that of the model alone, with the same frames in main
memory: their ratio is what decoding and encoding cost.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.settings import Settings, load_settings
from jobs.bench_clip import scene, write_clip
from jobs.bench_model import open_model
from jobs.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.bench import BenchRequest
    from pipeline.flow_ahead import NextFlow
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline
    from pipeline.video import VideoFrame

WARM_UP: Final = 5  # a backend that records frames does so at the third of a kind
DEPTH: Final = 4  # pictures between two threads, at most


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """One size. Rates are in frames per second.

    Attributes:
        model_fps: the model alone: from pictures in main memory to pictures in main memory.
        pipeline_fps: with decoder and encoder beside it, between the first measured frame and the last.
        ratio: pipeline_fps / model_fps.
        whole_fps: all frames over the whole time, with opening the files and emptying the encoder.
        waited_for_decoder: part of the time that the model waited for a picture, and waited_for_encoder for room.
        first_frame_ms: from opening the clip to the first restored picture in main memory.
    """

    size: str
    frames: int
    model_fps: float
    pipeline_fps: float
    ratio: float
    whole_fps: float
    waited_for_decoder: float
    waited_for_encoder: float
    first_frame_ms: float


def pipeline_command(request: BenchRequest) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: an option that has no meaning here. CheckpointError, FlowError, ActorsError: the model cannot be
            set up.
    """
    import torch

    from actors.hardware import choose_device, choose_formats, usable_cores
    from jobs.bench import command_line, input_size, output_sizes
    from jobs.bench_measure import hardware_name
    from jobs.bench_report import aligned, save_record
    from pipeline.backends import choose_backend

    if request.batches or request.against is not None:
        raise UsageError(
            "--batches and --against do not go together with `upriver bench pipeline`.",
            code="bench-options",
            remedy="Leave them away: one clip goes from file to file.",
        )
    settings = load_settings(request.flags, request.config).values
    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(settings.device)
    formats = choose_formats(settings.dtype, device, choose_backend(settings.backend, device))
    pipe = open_model(settings, device, formats)
    sizes = output_sizes(request.sizes) if request.sizes else [input_size(request.size)]
    results = [measure_pipeline(pipe, settings, width, height, request.frames) for width, height in sizes]
    heading = [
        f"{settings.model}, {str(pipe.compute_dtype).removeprefix('torch.')} on {pipe.device}, flow {pipe.flow.name}, "
        f"backend {pipe.backend}, {threads} threads, {hardware_name()}, torch {torch.__version__}",
        f"encoder: {settings.codec or 'h264'}, preset {settings.preset}, {settings.encoder}; decoder on the CPU; "
        f"at most {DEPTH} pictures between two threads; no Ray",
    ]
    document: dict[str, Any] = {
        "command": command_line(request, "pipeline"),
        "told": heading,
        "results": [asdict(result) for result in results],
    }
    cells = [_HEAD, *map(_cells, results)]
    print(json.dumps(document, indent=2) if request.as_json else "\n".join([*heading, aligned(cells)]))
    if request.save is not None:
        lines = [f"- {line}" for line in heading]
        lines += ["", "| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
        lines += ["| " + " | ".join(row) + " |" for row in map(_cells, results)]
        save_record(request.save, "pipeline", hardware_name(), "From file to file, without Ray", lines, document)
    return int(ExitCode.DONE)


def measure_pipeline(
    pipe: StreamDiffVSRPipeline, settings: Settings, width: int, height: int, frames: int
) -> PipelineResult:
    """Restore `frames` frames of width x height, after `WARM_UP` more: first from memory, then from file to file."""
    alone_ms = _model_alone(pipe, settings, width, height, frames)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, width, height, frames + WARM_UP)
        run = _from_file_to_file(pipe, settings, clip, Path(folder) / "restored.mp4")
    model_fps = 1000 / alone_ms
    pipeline_fps = frames / (run.done_s[-1] - run.done_s[WARM_UP - 1])
    return PipelineResult(
        size=f"{width}x{height} -> {4 * width}x{4 * height}",
        frames=frames,
        model_fps=round(model_fps, 3),
        pipeline_fps=round(pipeline_fps, 3),
        ratio=round(pipeline_fps / model_fps, 3),
        whole_fps=round(len(run.done_s) / run.whole_s, 3),
        waited_for_decoder=round(run.waited_for_decoder_s / run.whole_s, 3),
        waited_for_encoder=round(run.waited_for_encoder_s / run.whole_s, 3),
        first_frame_ms=round(1000 * run.done_s[0], 1),
    )


def _model_alone(pipe: StreamDiffVSRPipeline, settings: Settings, width: int, height: int, frames: int) -> float:
    """Return the mean milliseconds per frame; the rate of a whole clip is a mean too."""
    from jobs.bench_measure import restore

    states, times_ms = [pipe.start()], []
    for index in range(frames + WARM_UP):
        picture = scene(index, width, height)
        began = time.perf_counter()
        restore(pipe, picture, states, settings.fixed_steps)
        times_ms.append(1000 * (time.perf_counter() - began))
    return statistics.fmean(times_ms[WARM_UP:])


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds since the clip was opened: when each picture had been handed to the encoder, and at the end."""

    done_s: list[float]
    whole_s: float
    waited_for_decoder_s: float
    waited_for_encoder_s: float


def _from_file_to_file(pipe: StreamDiffVSRPipeline, settings: Settings, clip: Path, result: Path) -> _Run:
    from actors.overlap import ReadAhead, WriteBehind
    from jobs.bench_measure import restore
    from pipeline.flow_ahead import NextFlow, flow_ahead
    from pipeline.video import EncoderOptions, VideoReader, VideoWriter

    searches = flow_ahead(pipe)
    next_flow = None if searches is None else NextFlow(searches)
    options = EncoderOptions(
        codec=settings.codec,
        crf=settings.crf,
        preset=settings.preset,
        pix_fmt=settings.pix_fmt,
        encoder=settings.encoder,
    )
    states, done_s = [pipe.start()], []
    began = time.perf_counter()
    with VideoReader(clip) as reader:
        width, height = 4 * reader.info.width, 4 * reader.info.height
        with VideoWriter(result, reader.info, width=width, height=height, options=options) as writer:
            ahead, behind = ReadAhead(iter(reader), DEPTH), WriteBehind(writer.write, DEPTH)
            try:
                for frame in ahead:
                    flows = None if next_flow is None else [_look_ahead(pipe, next_flow, frame, ahead.peek())]
                    picture = restore(pipe, frame.rgb_HWC, states, settings.fixed_steps, flows)[0]
                    if next_flow is not None:
                        next_flow.done()
                    behind.put(dataclasses.replace(frame, rgb_HWC=picture))
                    done_s.append(time.perf_counter() - began)
                behind.finish()
            finally:
                ahead.close()
                behind.close()
                if searches is not None:
                    searches.close()
            writer.close()
    whole_s = time.perf_counter() - began
    return _Run(done_s, whole_s, ahead.waited_s, behind.waited_s)


def _look_ahead(
    pipe: StreamDiffVSRPipeline, next_flow: NextFlow, frame: VideoFrame, following: VideoFrame | None
) -> Tensor | None:
    """Return the flow of a frame that was looked for before, and begin to look for that of the one after it."""
    search = next_flow.take(frame.rgb_HWC)
    flow_2HW = None if search is None else search.flow(pipe.device)
    next_flow.begin(frame.rgb_HWC)
    if following is not None:
        next_flow.look(following.rgb_HWC)
    return flow_2HW


_HEAD: Final = (
    "output", "frames", "model fps", "pipeline fps", "ratio", "whole fps", "waited for decoder", "for encoder",
    "first frame ms",
)  # fmt: skip


def _cells(row: PipelineResult) -> tuple[str, ...]:
    return (
        row.size.rpartition(" ")[2], str(row.frames), f"{row.model_fps:.2f}", f"{row.pipeline_fps:.2f}",
        f"{row.ratio:.2f}", f"{row.whole_fps:.2f}", f"{100 * row.waited_for_decoder:.0f} %",
        f"{100 * row.waited_for_encoder:.0f} %", f"{row.first_frame_ms:.0f}",
    )  # fmt: skip
