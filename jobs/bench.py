"""`upriver bench`: milliseconds per frame by stage, on this device, with this model.

The stages are timed inside the real code: while it runs, the functions that make up a stage are replaced by themselves
with a clock around them. Imports neither Ray nor OpenCV, so that it runs where only torch, diffusers and av are.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.model_cache import local_model
from infra.settings import Settings, load_settings
from jobs.errors import ExitCode, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

WARM_UP = 2
STAGES = ("decode", "flow", "warp", "unet", "artg", "tpm", "decoder", "other", "encode")
_INSIDE_THE_MODEL = STAGES[1:-1]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Median milliseconds per frame by stage; `step` is the whole model, `model_fps` its rate."""

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


def bench_command(*, flags: Mapping[str, object], config: Path | None, size: str, frames: int, as_json: bool) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: `size` is not WIDTHxHEIGHT. CheckpointError, FlowError, ActorsError: the model cannot be set up.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise UsageError(f"--size {size} is not WIDTHxHEIGHT.", code="bench-size", remedy="Write it like 160x120.")
    result = measure(load_settings(flags, config).values, int(match[1]), int(match[2]), frames)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        _print(result)
    return int(ExitCode.DONE)


def measure(settings: Settings, width: int, height: int, frames: int) -> BenchResult:
    """Restore `frames` synthetic frames of a moving scene, after `WARM_UP` more, and time each stage."""
    import torch

    from actors.hardware import choose_device, choose_dtype, usable_cores
    from pipeline.memory import estimate
    from pipeline.schedule import DEFAULT_STEPS
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(settings.device)
    pipe = StreamDiffVSRPipeline.from_pretrained(
        local_model(settings.model),
        torch_dtype=choose_dtype(settings.dtype, device),
        device=device,
        flow=None if settings.flow == "auto" else settings.flow,
    )
    clock = _Clock(pipe.device)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        _write_clip(clip, width, height, frames + WARM_UP)
        with _clocked(pipe, clock):
            step_ms = _run(pipe, clip, Path(folder) / "restored.mp4", settings.fixed_steps, clock)
    stages = {name: statistics.median(values) for name in STAGES if (values := clock.per_frame(name))}
    typical_step_ms = statistics.median(step_ms[WARM_UP:])
    stages["other"] = max(0.0, typical_step_ms - sum(stages.get(name, 0.0) for name in _INSIDE_THE_MODEL))
    return BenchResult(
        model=settings.model,
        model_sha256=pipe.model_sha256,
        size=f"{width}x{height} -> {4 * width}x{4 * height}",
        steps=settings.fixed_steps or DEFAULT_STEPS,
        frames=frames,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        flow=pipe.flow.name,
        threads=threads,
        stages_ms={name: round(stages.get(name, 0.0), 2) for name in STAGES},
        step_ms=round(typical_step_ms, 2),
        model_fps=round(1000 / typical_step_ms, 3),
        peak_memory_mib=_peak_memory_mib(),
        estimated_memory_mib=estimate(pipe, height, width).total >> 20,
        hardware=hardware_name(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def hardware_name() -> str:
    """Return the accelerator's name, or the processor's with the number of usable cores."""
    import torch

    from actors.hardware import usable_cores

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {usable_cores()} cores"


class _Clock:
    """Adds up time by stage and frame; on a GPU it waits for the work that was started."""

    def __init__(self, device: Any) -> None:
        self._is_cuda = device.type == "cuda"
        self._frames: list[dict[str, float]] = []

    def next_frame(self) -> None:
        self._frames.append({})

    def now(self) -> float:
        if self._is_cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        if self._frames:
            self._frames[-1][stage] = self._frames[-1].get(stage, 0.0) + 1000 * seconds

    def add_to_all(self, stage: str, seconds: float) -> None:
        for frame in self._frames:
            if stage in frame:
                frame[stage] += 1000 * seconds

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(stage, self.now() - began)

        return clocked

    def per_frame(self, stage: str) -> list[float]:
        return [frame[stage] for frame in self._frames[WARM_UP:] if stage in frame]


class _ClockedFlow:
    """A flow estimator with a clock around it."""

    def __init__(self, flow: Any, clock: _Clock) -> None:
        self.name = flow.name
        self._flow = flow
        self._call = clock.around("flow", flow)

    def __call__(self, current_B3hw: Any, previous_B3hw: Any) -> Any:
        return self._call(current_B3hw, previous_B3hw)

    def to(self, device: Any) -> _ClockedFlow:
        self._flow.to(device)
        return self


@contextmanager
def _clocked(pipe: StreamDiffVSRPipeline, clock: _Clock) -> Iterator[None]:
    from pipeline import stream_diffvsr as engine

    places: list[tuple[Any, str, str]] = [
        (engine, "flow_warp", "warp"),
        (engine, "embed_condition", "artg"),
        (engine, "artg_residuals", "artg"),
        (pipe.unet, "forward", "unet"),
        (pipe.vae, "encode_temporal", "tpm"),
        (pipe.vae, "decode", "decoder"),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    flow = pipe.flow
    for (owner, name, stage), function in zip(places, before, strict=True):
        setattr(owner, name, clock.around(stage, function))
    pipe.flow = _ClockedFlow(flow, clock)
    try:
        yield
    finally:
        pipe.flow = flow
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def _run(pipe: StreamDiffVSRPipeline, clip: Path, result: Path, steps: int | None, clock: _Clock) -> list[float]:
    """Decode, restore and encode frame after frame; returns the milliseconds of each step of the model."""
    import dataclasses

    from pipeline.frames import frame_to_tensor, tensor_to_frame
    from pipeline.video import VideoReader, VideoWriter

    step_ms = []
    state = pipe.start()
    with VideoReader(clip) as reader:
        width, height = 4 * reader.info.width, 4 * reader.info.height
        with VideoWriter(result, reader.info, width=width, height=height) as writer:
            frames = iter(reader)
            while True:
                clock.next_frame()
                began = clock.now()
                frame = next(frames, None)
                if frame is None:
                    break
                clock.add("decode", clock.now() - began)
                began = clock.now()
                output_13HW = pipe.step(frame_to_tensor(frame.rgb_HWC), [state], steps=steps)
                picture = tensor_to_frame(output_13HW[0], frame.rgb_HWC.dtype)
                step_ms.append(1000 * (clock.now() - began))
                began = clock.now()
                writer.write(dataclasses.replace(frame, rgb_HWC=picture))
                clock.add("encode", clock.now() - began)
            began = clock.now()
            writer.close()
            clock.add_to_all("encode", (clock.now() - began) / len(step_ms))  # the encoder holds pictures back
    return step_ms


def _write_clip(path: Path, width: int, height: int, frames: int) -> None:
    """Write a scene with texture that moves, as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(_scene(index, width, height), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _scene(index: int, width: int, height: int) -> NDArray[np.uint8]:
    import numpy as np

    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = x + 1.5 * index
    waves = np.sin(x / 5) * np.cos(y / 7) + np.sin((x + y) / 3)
    rgb_HWC = np.stack([128 + 50 * waves, 128 + 60 * np.sin(y / 11 + index / 9), 128 + 40 * np.cos(x / 13)], axis=-1)
    return rgb_HWC.clip(0, 255).astype(np.uint8)


def _peak_memory_mib() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() >> 20)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak >> 20 if platform.system() == "Darwin" else peak >> 10)


def _print(result: BenchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(
        f"{result.model}, {result.size}, {result.steps} steps, {result.dtype} on {result.device}, flow {result.flow}, "
        f"{result.threads} threads, {result.hardware}, torch {result.torch}, {result.date}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("ms per frame", justify="right")
    for name in STAGES:
        table.add_row(name, f"{result.stages_ms[name]:.1f}")
    table.add_row("model alone", f"{result.step_ms:.1f}")
    console.print(table)
    console.print(
        f"{result.model_fps:.2f} frames per second in the model, "
        f"peak memory {result.peak_memory_mib} MiB (estimated for the model: {result.estimated_memory_mib} MiB)"
    )
