"""The flow network as a part of the frame against the same network called before it: time and numbers on a CPU.

    python -m benchmarks.flow_in_frame --threads 2
    python -m benchmarks.flow_in_frame --threads 1 --processor-time    # on a machine that does other things

All variants restore the same frames, step by step in turn, by OpenVINO in its default number format. "beside" is how
it was: the network by torch, its flow given to the frame. Then what bf16 would do to flow: the error against fp32 in
output pixels, and the PSNR of the outputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.hardware import choose_formats
from jobs.bench_clip import scene
from jobs.bench_measure import hardware_name
from pipeline import StreamDiffVSRPipeline
from pipeline.cuda_backend import psnr_db
from pipeline.flow import DISFlow, FlowEstimator, NetFlow, ZeroFlow
from pipeline.frames import frame_to_tensor
from pipeline.openvino_backend import _core, _Parts
from pipeline.video import VideoReader

SIZES = ((160, 120), (320, 180))
CLIP = Path(__file__).parents[1] / "tests/data/walk_lr.mp4"
WARM_UP = 3


class Beside(NetFlow):
    """The same network, but called by itself: a subclass is not taken into the frame."""


class InBf16(NetFlow):
    """The network by OpenVINO in bf16; sizes of frames as they come."""

    def __init__(self, pipe: StreamDiffVSRPipeline) -> None:
        super().__init__()
        self._pipe = pipe
        self._request: Any = None

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        inputs = (current_B3hw, previous_B3hw)
        if self._request is None:
            part = _Parts(self._pipe, torch.bfloat16)._converted("flow", inputs, self.network)
            self._request = _core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
            self._request = self._request.create_infer_request()
        return torch.from_numpy(self._request.infer([x.numpy() for x in inputs])[0].copy())


def milliseconds(
    pipes: dict[str, StreamDiffVSRPipeline],
    size: tuple[int, int],
    steps: int,
    frames: int,
    clock: Callable[[], float],
) -> list[str]:
    """Return a row of median and least milliseconds of a step for each variant."""
    states = {name: pipe.start() for name, pipe in pipes.items()}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for index in range(frames + WARM_UP):
        picture = frame_to_tensor(scene(index, *size))
        for name, pipe in pipes.items():
            began = clock()
            pipe.step(picture, [states[name]], steps=steps)
            times[name].append(1000 * (clock() - began))
    cells = [f"{statistics.median(ms[WARM_UP:]):.1f} ({min(ms[WARM_UP:]):.1f})" for ms in times.values()]
    return [f"{size[0]}x{size[1]}", str(steps), *cells]


def numbers(pipe: StreamDiffVSRPipeline, frames: int) -> list[str]:
    """Return what bf16 would do to flow, and what the part in fp32 does, on the demonstration clip with one step."""
    with VideoReader(CLIP) as reader:
        clip = [frame_to_tensor(frame.rgb_HWC) for frame, _ in zip(reader, range(frames), strict=False)]

    def restored(flow: FlowEstimator) -> list[Tensor]:
        pipe.flow, state = flow, pipe.start()
        return [pipe.step(frame, [state], steps=1) for frame in clip]

    coarse = InBf16(pipe)
    pairs = list(zip(clip[1:], clip, strict=False))
    errors = [(coarse(*pair) - NetFlow()(*pair)).square().sum(dim=1).sqrt() for pair in pairs]
    lengths = [NetFlow()(*pair).square().sum(dim=1).sqrt() for pair in pairs]
    reference = restored(Beside())
    rows = []
    for name, flow in (("in the frame, fp32", NetFlow()), ("bf16", coarse), ("no motion", ZeroFlow())):
        worst = min(psnr_db(a, b) for a, b in zip(restored(flow)[1:], reference[1:], strict=True))
        rows.append(f"output with flow {name}, against that of torch in fp32, worst of {frames - 1}: {worst:.1f} dB")
    mean = statistics.fmean(float(error.mean()) for error in errors)
    most = max(float(error.max()) for error in errors)
    length = statistics.fmean(float(x.mean()) for x in lengths)
    rows.append(f"bf16 flow errs by {mean:.3f} output pixels, at most {most:.2f}; the mean flow is {length:.2f} long")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of the time that passes")
    chosen = parser.parse_args()
    clock = time.process_time if chosen.processor_time else time.perf_counter
    torch.set_num_threads(chosen.threads)
    dtype = choose_formats("auto", "cpu", "openvino")
    estimators: dict[str, FlowEstimator] = {
        "net beside": Beside(), "net in the frame": NetFlow(), "dis": DISFlow(), "zero": ZeroFlow(),
    }  # fmt: skip
    pipes = {
        name: StreamDiffVSRPipeline.from_pretrained("tiny", flow=flow, backend="openvino", torch_dtype=dtype)
        for name, flow in estimators.items()
    }
    heads = ["input", "steps", *(f"{name}, ms" for name in pipes)]
    print(
        f"{hardware_name()}, {chosen.threads} threads, {time.strftime('%Y-%m-%d')}, {pipes['dis'].numerics}, ", end=""
    )
    what = "processor time, " if chosen.processor_time else ""
    print(f"{what}{chosen.frames} frames, median (least)\n")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for size in SIZES:
        for steps in (1, 4):
            print("| " + " | ".join(milliseconds(pipes, size, steps, chosen.frames, clock)) + " |", flush=True)
    print("\n" + "\n".join(f"- {row}" for row in numbers(pipes["dis"], chosen.frames)))


if __name__ == "__main__":
    main()
