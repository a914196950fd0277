"""Backends beside each other on one device: time of a step, and how near each stays to the reference.

    python -m benchmarks.backends --frames 30 --threads 2
    python -m benchmarks.backends --frames 30 --threads 2 --steps 1
    python -m benchmarks.backends --device cuda --backends eager:fp32 graph:bf16 compiled:bf16

All restore the same clip, frame by frame in turn, so that what else the machine does meets all of them. The first of
the list is the reference. The first five frames are not timed: some backends make something for themselves there.
"core ms" is the time that all threads together computed: on a CPU that others use too, it is what can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.bench_measure import hardware_name
from pipeline import StreamDiffVSRPipeline
from pipeline.cuda_backend import psnr_db
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.video import VideoReader

CLIP = Path(__file__).parents[1] / "tests/data/walk_lr.mp4"
ON_A_CPU = ("eager:fp32", "eager:bf16", "compiled:fp32", "openvino:fp32", "openvino:bf16", "openvino:int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
WARM_UP = 5


def compare(model: str, device: str, names: list[str], frames: int, steps: int | None) -> list[dict[str, Any]]:
    """Return one row for each of `names`, written backend:format."""
    pipes = {}
    for name in names:
        backend, _, dtype = name.partition(":")
        pipes[name] = StreamDiffVSRPipeline.from_pretrained(
            model, device=device, backend=backend, torch_dtype=DTYPES[dtype]
        )
    with VideoReader(CLIP) as reader:
        clip = [frame.rgb_HWC for frame, _ in zip(reader, range(frames), strict=False)]
    states = {name: pipe.start() for name, pipe in pipes.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    core_times: dict[str, list[float]] = {name: [] for name in names}
    near: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for picture in clip:
        reference, levels = None, None
        for name, pipe in pipes.items():
            began, began_core = time.perf_counter(), time.process_time()
            output = pipe.step(frame_to_tensor(picture, pipe.device), [states[name]], steps=steps)
            restored = tensor_to_frame(output[0], np.dtype(np.uint8)).astype(np.int16)
            times[name].append(1000 * (time.perf_counter() - began))
            core_times[name].append(1000 * (time.process_time() - began_core))
            if reference is None or levels is None:
                reference, levels = output, restored
            near[name].append((psnr_db(output, reference), float((abs(restored - levels) <= 1).mean())))
    base = statistics.median(times[names[0]][WARM_UP:])
    return [
        {
            "backend": name,
            "ms": round(ms := statistics.median(times[name][WARM_UP:]), 1),
            "core_ms": round(statistics.median(core_times[name][WARM_UP:]), 1),
            "fps": round(1000 / ms, 2),
            "times_faster": round(base / ms, 2),
            "first_frame_ms": round(times[name][0], 1),
            "worst_psnr_db": round(min(psnr for psnr, _ in near[name]), 1),
            "worst_share_within_one_level": round(min(share for _, share in near[name]), 5),
        }
        for name in names
    ]


def main() -> None:
    """Measure and print JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", default=list(ON_A_CPU))
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = compare(chosen.model, chosen.device, chosen.backends, chosen.frames, chosen.steps)
    print(json.dumps({"hardware": hardware_name(), "torch": torch.__version__, "rows": rows}, indent=2))
    print(
        "| backend | ms | core ms | frames/s | times the first | first frame, ms | worst PSNR, dB | within one level |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
