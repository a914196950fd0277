"""How `upriver bench` measures: sizes, numbers of streams, first frames, stages, floor and memory.

Imports neither Ray nor OpenCV.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.settings import Settings
from jobs.bench_clip import scene, write_clip
from jobs.bench_model import PREFIX, open_model
from jobs.bench_stages import INSIDE, STAGES, StageClock, flops_by_stage, metered, with_rest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.state import StreamState
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    Restored = NDArray[np.integer[Any]]

WARM_UP: Final = 5  # a backend that records frames does so at the third of a kind
SCALE: Final = 4
FIRST_FRAMES: Final = 5  # new streams on a warm engine, of which the median counts
FLOOR_DTYPES: Final = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One size and number of streams. Times are medians, in milliseconds of a step, which takes a frame of each stream.

    Attributes:
        stages_ms: by stage; of a backend that runs the whole step at once, only flow and model can be told apart.
        stages_tflop: of a step, for frames with a past; stages without convolutions or matrix products are left out.
        step_ms: the whole model: from frames in main memory to restored frames in main memory.
        model_fps: restored frames per second, of all streams together.
        peak_tflops: of a large matrix product in the model's number format on this device, measured.
        floor_ms: the step's FLOPs at that speed. of_floor: floor_ms / step_ms.
        load_ms: from nothing to a model on its device.
        first_frame_cold_ms: loading, and the first frame of this size. In a run with several sizes only the first
            includes the start of the device's libraries.
        first_frame_warm_ms: the first frame of a new stream, when others were restored before.
        peak_memory_mib: on a GPU what torch allocated, otherwise the largest that the process ever was.
    """

    model: str
    model_sha256: str
    size: str
    steps: int
    frames: int
    device: str
    dtype: str
    flow: str
    threads: int
    stages_ms: dict[str, float]
    step_ms: float
    model_fps: float
    peak_memory_mib: int
    estimated_memory_mib: int
    hardware: str
    torch: str
    date: str
    batch: int = 1
    backend: str = "eager"
    stages_tflop: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_tflops: float = 0.0
    floor_ms: float = 0.0
    of_floor: float = 0.0
    load_ms: float = 0.0
    first_frame_cold_ms: float = 0.0
    first_frame_warm_ms: float = 0.0

    def fraction_of_floor(self, stage: str) -> float | None:
        """Return how near a stage is to the floor, 1 being the speed of a matrix product; None where unknown."""
        tflop, milliseconds = self.stages_tflop.get(stage), self.stages_ms.get(stage)
        if not tflop or not milliseconds or not self.peak_tflops:
            return None
        return 1000 * tflop / self.peak_tflops / milliseconds


def measure_all(
    settings: Settings, sizes: Sequence[tuple[int, int]], batches: Sequence[int], frames: int, *, video: bool
) -> tuple[list[BenchResult], dict[str, float]]:
    """Measure every size with every number of streams.

    Args:
        sizes: input (width, height).
        video: also decode the frames from a file and encode the results.

    Returns:
        The results, and TFLOP/s of matrix products by number format.
    """
    import torch

    from actors.hardware import choose_device, choose_formats, usable_cores
    from jobs.bench_peak import measured_tflops
    from pipeline.backends import choose_backend

    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(settings.device)
    formats = choose_formats(settings.dtype, device, choose_backend(settings.backend, device))
    began = time.perf_counter()
    pipe = open_model(settings, device, formats)
    _wait_for(pipe.device)
    load_ms = 1000 * (time.perf_counter() - began)
    results = [
        _measure_one(pipe, settings, width, height, batch, frames, load_ms=load_ms, video=video)
        for width, height in sizes
        for batch in batches
    ]
    # last, because it would warm the device up for the first frame
    computed = str(pipe.compute_dtype).removeprefix("torch.")
    product = "bfloat16" if computed == "int8" else computed  # torch has no fast product of int8 on every device
    products = {product, *FLOOR_DTYPES} if pipe.device.type == "cuda" else {product}
    peaks = {name: measured_tflops(pipe.device, getattr(torch, name)) for name in sorted(products)}
    return [_with_floor(result, peaks[product], computed) for result in results], peaks


def _measure_one(
    pipe: StreamDiffVSRPipeline,
    settings: Settings,
    width: int,
    height: int,
    batch: int,
    frames: int,
    *,
    load_ms: float,
    video: bool,
) -> BenchResult:
    import torch

    from pipeline.memory import estimate
    from pipeline.schedule import DEFAULT_STEPS

    fused = pipe.backend != "eager"
    clock = StageClock(pipe.device)
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first_ms = _first_frame_ms(pipe, width, height, batch, settings.fixed_steps)
    with metered(pipe, clock, fused=fused):
        if video:
            step_ms = _from_file_to_file(pipe, width, height, batch, frames + WARM_UP, settings.fixed_steps, clock)
        else:
            pictures = iter([scene(index, width, height) for index in range(frames + WARM_UP)])
            step_ms = _run(pipe, pictures, batch, settings.fixed_steps, clock)
    warm_ms = [_first_frame_ms(pipe, width, height, batch, settings.fixed_steps) for _ in range(FIRST_FRAMES)]
    typical_ms = statistics.median(step_ms[WARM_UP:])
    stages = with_rest(clock.milliseconds(skip=WARM_UP), typical_ms, fused=fused)
    if not video:
        stages = {name: value for name, value in stages.items() if name in INSIDE or name not in STAGES}
    flops = flops_by_stage(pipe, height, width, batch=batch, steps=settings.fixed_steps)
    if fused:
        beside = {} if pipe.flow_runs_in_the_frame else {name: n for name, n in flops.items() if name == "flow"}
        flops = beside | {"model": sum(flops.values()) - sum(beside.values())}
    return BenchResult(
        model=settings.model,
        model_sha256="" if settings.model.startswith(PREFIX) else pipe.model_sha256,
        size=f"{width}x{height} -> {SCALE * width}x{SCALE * height}",
        steps=settings.fixed_steps or DEFAULT_STEPS,
        frames=frames,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        flow=pipe.flow.name,
        threads=torch.get_num_threads(),
        stages_ms={name: round(value, 2) for name, value in stages.items()},
        step_ms=round(typical_ms, 2),
        model_fps=round(1000 * batch / typical_ms, 3),
        peak_memory_mib=_peak_memory_mib(pipe.device),
        estimated_memory_mib=estimate(pipe, height, width, batch=batch).total >> 20,
        hardware=hardware_name(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        batch=batch,
        backend=pipe.backend,
        stages_tflop={name: float(f"{count / 1e12:.4g}") for name, count in flops.items()},
        load_ms=round(load_ms, 1),
        first_frame_cold_ms=round(load_ms + first_ms, 1),
        first_frame_warm_ms=round(statistics.median(warm_ms), 2),
    )


def _with_floor(result: BenchResult, peak_tflops: float, computed: str) -> BenchResult:
    floor_ms = 1000 * sum(result.stages_tflop.values()) / peak_tflops
    return dataclasses.replace(
        result,
        dtype=computed,
        peak_tflops=round(peak_tflops, 4),
        floor_ms=round(floor_ms, 3),
        of_floor=round(floor_ms / result.step_ms, 4),
    )


def _first_frame_ms(pipe: StreamDiffVSRPipeline, width: int, height: int, batch: int, steps: int | None) -> float:
    """Return milliseconds from the first frames of new streams to their restored frames in main memory."""
    picture = scene(0, width, height)
    began = time.perf_counter()
    restore(pipe, picture, [pipe.start() for _ in range(batch)], steps)
    return 1000 * (time.perf_counter() - began)


def restore(
    pipe: StreamDiffVSRPipeline,
    picture_HWC: Restored,
    states: Sequence[StreamState],
    steps: int | None,
    flows: Sequence[Tensor | None] | None = None,
) -> list[Restored]:
    """Take one picture of each stream through the model, from main memory to main memory.

    Args:
        flows: of each stream (2,4h,4w), where it is known.
    """
    import torch

    from pipeline.frames import frame_to_tensor, tensor_to_frame

    frames_B3hw = torch.cat([frame_to_tensor(picture_HWC) for _ in states])
    if flows is None:
        output_B3HW = pipe.step(frames_B3hw, states, steps=steps)
    else:
        output_B3HW = pipe.step(frames_B3hw, states, steps=steps, flow_B2HW=flows)
    return [tensor_to_frame(output_3HW, picture_HWC.dtype) for output_3HW in output_B3HW]


def _run(
    pipe: StreamDiffVSRPipeline,
    pictures: Iterator[Restored],
    batch: int,
    steps: int | None,
    clock: StageClock,
    write: Callable[[Restored], None] | None = None,
) -> list[float]:
    """Restore picture after picture, each for `batch` streams; returns the milliseconds of each step of the model."""
    step_ms = []
    states = [pipe.start() for _ in range(batch)]
    while True:
        clock.next_frame()
        began = time.perf_counter()
        picture = next(pictures, None)
        if picture is None:
            break
        clock.add("decode", time.perf_counter() - began)
        began = time.perf_counter()
        restored = restore(pipe, picture, states, steps)
        step_ms.append(1000 * (time.perf_counter() - began))
        if write is not None:
            began = time.perf_counter()
            write(restored[0])
            clock.add("encode", time.perf_counter() - began)
    return step_ms


def _from_file_to_file(
    pipe: StreamDiffVSRPipeline,
    width: int,
    height: int,
    batch: int,
    frames: int,
    steps: int | None,
    clock: StageClock,
) -> list[float]:
    """Decode, restore and encode frame after frame; returns the milliseconds of each step of the model."""
    from pipeline.video import VideoFrame, VideoReader, VideoWriter

    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, width, height, frames)
        with VideoReader(clip) as reader:
            wide, high = SCALE * reader.info.width, SCALE * reader.info.height
            latest: list[VideoFrame] = []

            def pictures() -> Iterator[Restored]:
                for frame in reader:
                    latest[:] = [frame]
                    yield frame.rgb_HWC

            with VideoWriter(Path(folder) / "restored.mp4", reader.info, width=wide, height=high) as writer:
                step_ms = _run(
                    pipe,
                    pictures(),
                    batch,
                    steps,
                    clock,
                    lambda picture: writer.write(dataclasses.replace(latest[0], rgb_HWC=picture)),
                )
                began = time.perf_counter()
                writer.close()
                # the encoder holds pictures back
                clock.add_to_all("encode", (time.perf_counter() - began) / len(step_ms))
    return step_ms


def hardware_name() -> str:
    """Return the accelerator's name, or the processor's with the number of usable cores."""
    import torch

    from actors.hardware import usable_cores

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {usable_cores()} cores"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_memory_mib(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated() >> 20)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak >> 20 if platform.system() == "Darwin" else peak >> 10)
