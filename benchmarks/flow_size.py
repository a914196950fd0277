"""Does flow have to be estimated at output size? DIS at input size against DIS at output size, on the held-out clips.

    python -m benchmarks.flow_size --frames 12

For every clip: the error that remains when the true previous frame is warped by the flow (what ARTG and TPM are given
in the best case), the PSNR of the restored clip, the milliseconds of the estimation alone. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from jobs.heldout import HELDOUT, read
from pipeline import FlowEstimator, StreamDiffVSRPipeline, make_flow
from pipeline.degrade import downscale
from pipeline.guidance import flow_warp

BORDER = 16  # output pixels left out of the warped error: what enters the picture cannot be predicted


def measure(pipe: StreamDiffVSRPipeline, flow: FlowEstimator, truth_T3HW: Tensor) -> tuple[float, float, float]:
    """Return (mean absolute error of the warped truth in 8-bit levels, PSNR in dB, milliseconds per estimation)."""
    pipe.flow = flow
    lr_T3hw = downscale(truth_T3HW) * 2 - 1
    state = pipe.start()
    error, mse, spent = 0.0, 0.0, 0.0
    inside = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    for k in range(len(truth_T3HW)):
        given = None
        if k:
            begin = time.perf_counter()
            given = flow(lr_T3hw[k : k + 1], lr_T3hw[k - 1 : k])
            spent += time.perf_counter() - begin
            warped = flow_warp(truth_T3HW[k - 1 : k], given, "exact")
            error += float((warped - truth_T3HW[k : k + 1])[inside].abs().mean()) * 255
        output = pipe.step(lr_T3hw[k : k + 1], [state], flow_B2HW=given)
        mse += float(((output / 2 + 0.5).clamp(0, 1) - truth_T3HW[k]).square().mean())
    pairs = len(truth_T3HW) - 1
    psnr = -10 * torch.log10(torch.tensor(mse / len(truth_T3HW)))
    return error / pairs, float(psnr), spent / pairs * 1000


def main() -> None:
    """Measure all held-out clips and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=12)
    options = parser.parse_args()
    pipe = StreamDiffVSRPipeline.from_pretrained(options.model)
    estimators = {"input": make_flow("dis"), "output": make_flow("dis", size="output"), "zero": make_flow("zero")}
    print(f"Model {pipe.model_sha256[:12]}, {options.frames} frames per clip, {torch.get_num_threads()} threads\n")
    print("| clip | DIS at | warped truth, error in levels | PSNR dB | ms per flow |\n|---|---|---|---|---|")
    for excerpt in HELDOUT:
        truth_T3HW = read(excerpt, options.frames).truth_T3HW
        for name, flow in estimators.items():
            error, psnr, ms = measure(pipe, flow, truth_T3HW)
            print(f"| {excerpt.name} | {name} | {error:.3f} | {psnr:.3f} | {ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
