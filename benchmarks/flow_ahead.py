"""Flow ahead of its step: frames a second of an archive with it and without, on this machine.

    python -m benchmarks.flow_ahead --threads 2
    python -m benchmarks.flow_ahead --device cuda --model random:small     # where it is meant to help

A clip is decoded, restored by DIS and the model, and given away; both ways in turn, some rounds of them. The least
time of a frame is that with least of what else the machine does. Outputs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from actors.hardware import choose_formats
from actors.overlap import ReadAhead
from infra.settings import Settings
from jobs.bench_clip import scene
from jobs.bench_measure import hardware_name
from jobs.bench_model import open_model
from pipeline.backends import choose_backend
from pipeline.flow_ahead import NextFlow, flow_ahead
from pipeline.frames import frame_to_tensor
from pipeline.stream_diffvsr import StreamDiffVSRPipeline

WARM_UP = 5


def restore(
    pipe: StreamDiffVSRPipeline, size: tuple[int, int], frames: int, steps: int, *, ahead: bool
) -> tuple[float, float, list[Tensor]]:
    """Return median and least milliseconds of a frame, and the outputs, small ones of them."""
    state, outputs, times = pipe.start(), [], []
    search = flow_ahead(pipe, always=True) if ahead else None
    following = None if search is None else NextFlow(search)
    reader = ReadAhead((scene(index, *size) for index in range(frames + WARM_UP)), 4)
    try:
        for picture in reader:
            began = time.perf_counter()
            flow = None
            if following is not None:
                found, there = following.take(picture), reader.peek()
                flow = None if found is None else [found.flow(pipe.device)]
                following.begin(picture)
                if there is not None:
                    following.look(there)
            output = pipe.step(frame_to_tensor(picture, pipe.device), [state], steps=steps, flow_B2HW=flow)
            outputs.append(output[0, :, ::4, ::4].cpu())  # waits for the device
            if following is not None:
                following.done()
            times.append(1000 * (time.perf_counter() - began))
    finally:
        reader.close()
        if search is not None:
            search.close()
    return statistics.median(times[WARM_UP:]), min(times[WARM_UP:]), outputs


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", nargs="+", default=["160x120", "320x180"], help="of the input")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    backend = choose_backend("auto", chosen.device)
    settings = Settings(model=chosen.model, flow="dis", device=chosen.device)
    pipe = open_model(settings, chosen.device, choose_formats("auto", chosen.device, backend))
    print(f"{chosen.model}, {pipe.numerics} on {pipe.device}, {hardware_name()}, {chosen.threads} threads, ", end="")
    print(f"{time.strftime('%Y-%m-%d')}, {chosen.rounds} rounds of {chosen.frames} frames, median (least)\n")
    print("| input | steps | flow in the step, ms | flow ahead, ms | same bits |\n|---|---|---|---|---|")
    for size in (tuple(map(int, name.split("x"))) for name in chosen.sizes):
        for steps in (1, 4):
            runs: dict[bool, list[tuple[float, float, list[Tensor]]]] = {False: [], True: []}
            for _ in range(chosen.rounds):
                for ahead in runs:
                    runs[ahead].append(restore(pipe, (size[0], size[1]), chosen.frames, steps, ahead=ahead))
            cells = [
                f"{statistics.median(run[0] for run in found):.1f} ({min(run[1] for run in found):.1f})"
                for found in runs.values()
            ]
            pairs = zip(runs[False][0][2], runs[True][0][2], strict=True)
            same = "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"
            print("| " + " | ".join([f"{size[0]}x{size[1]}", str(steps), *cells, same]) + " |", flush=True)


if __name__ == "__main__":
    main()
