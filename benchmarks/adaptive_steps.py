"""What fewer steps cost where they do not show: always 4, 2, 1 against steps chosen per frame, and held frames.

    python -m benchmarks.adaptive_steps --frames 12

The held-out clips, and three times as long a camera that stands still (`benchmarks.fixed_camera`). All methods restore
frame k before any restores frame k + 1, so that a busy machine is busy for all of them alike. `--pictures FOLDER`
writes the frame of each clip that is farthest from that of 4 steps: truth, 4 steps, adaptive, their difference times 8.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.restoration import step_alone
from benchmarks.fixed_camera import fixed_camera, noisy_input
from jobs.heldout import HELDOUT, read
from pipeline import StreamDiffVSRPipeline
from pipeline.degrade import BICUBIC, Degradation, degrade
from pipeline.frames import frame_to_tensor
from pipeline.judge import ClipJudge
from pipeline.perceptual import STLPIPS
from pipeline.state import StreamState
from pipeline.step_policy import StepPolicy, choose
from pipeline.tiling import Window

POLICIES: dict[str, StepPolicy | int] = {
    "4 steps": 4,
    "2 steps": 2,
    "1 step": 1,
    "adaptive": StepPolicy(),
    "adaptive, held or 1": StepPolicy(levels=(1,), shares=()),
    "the same, with windows": StepPolicy(levels=(1,), shares=(), window_share=0.3),
}


@dataclass(slots=True)
class Run:
    """One method on one clip."""

    state: StreamState
    outputs: list[Tensor] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    spent_ms: list[float] = field(default_factory=list)
    policy_ms: list[float] = field(default_factory=list)
    windows: int = 0

    def take(self, pipe: StreamDiffVSRPipeline, method: StepPolicy | int, rgb_HWC: np.ndarray) -> None:
        """Restore the next frame."""
        begin = time.perf_counter()
        if isinstance(method, int):
            level, output_3HW = method, pipe.step(frame_to_tensor(rgb_HWC), [self.state], steps=method)[0]
        else:
            choice = choose(method, rgb_HWC, self.state)
            level = choice.level
            self.policy_ms.append(1e3 * (time.perf_counter() - begin))
            if level:
                window = None if choice.window is None else Window(*choice.window)
                output_3HW = step_alone(pipe, frame_to_tensor(rgb_HWC), self.state, level, window)[0]
                self.windows += window is not None
            else:
                output_3HW = self.state.hold()
            self.state.policy = choice.memory
        self.spent_ms.append(1e3 * (time.perf_counter() - begin))
        self.levels.append(level)
        self.outputs.append((output_3HW / 2 + 0.5).clamp(0, 1))


def clips(frames: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, truth (T,3,H,W) and input (T,3,h,w)."""
    still = fixed_camera(3 * frames, appears=3 * frames // 2, leaves=2 * frames)
    yield "fixed camera, noise", still, noisy_input(still)
    yield "fixed camera, H.264", still, degrade(still, Degradation(h264_crf=28))
    for excerpt in HELDOUT:
        truth = read(excerpt, frames).truth_T3HW
        yield excerpt.name, truth, degrade(truth, BICUBIC)


def psnr(a_3HW: Tensor, b_3HW: Tensor) -> float:
    """Return dB of two pictures in [0, 1]; 99 where they are equal."""
    mse = float((a_3HW - b_3HW).square().mean())
    return 99.0 if mse == 0 else min(99.0, -10 * float(torch.log10(torch.tensor(mse))))


def measure(
    pipe: StreamDiffVSRPipeline, name: str, truth: Tensor, small: Tensor, network: STLPIPS, pictures: Path | None
) -> list[tuple[str, list[float]]]:
    """Restore a clip by all methods; returns a row of figures for each."""
    runs = {method: Run(pipe.start()) for method in POLICIES}
    for frame_3HW in small:
        rgb_HWC = (frame_3HW.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        for method, policy in POLICIES.items():
            runs[method].take(pipe, policy, rgb_HWC)
    judge = ClipJudge(truth, network, vmaf=False)
    best = runs["4 steps"]
    rows = []
    for method, run in runs.items():
        scores = judge.score(torch.stack(run.outputs))
        near = [psnr(a, b) for a, b in zip(run.outputs, best.outputs, strict=True)]
        rows.append(
            (
                method,
                [
                    statistics.mean(run.levels),
                    run.levels.count(0) / len(run.levels),
                    run.windows / len(run.levels),
                    statistics.mean(run.spent_ms[1:]),
                    statistics.median(run.policy_ms) if run.policy_ms else 0.0,
                    psnr(torch.stack(run.outputs), torch.stack(best.outputs)),
                    min(near),
                    scores.psnr,
                    scores.stlpips,
                    scores.warp_error,
                    scores.flicker,
                ],
            )
        )
        if pictures is not None and method not in ("4 steps", "2 steps", "1 step"):
            write_worst(pictures / f"{name} {method}.png".replace(" ", "-").replace(",", ""), truth, best, run, near)
    return rows


def write_worst(path: Path, truth: Tensor, best: Run, run: Run, near: list[float]) -> None:
    """Write the frame that is farthest from that of 4 steps."""
    from PIL import Image

    k = near.index(min(near))
    a, b = best.outputs[k], run.outputs[k]
    strip = torch.cat([truth[k], a, b, ((b - a) * 8 + 0.5).clamp(0, 1)], dim=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((strip.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()).save(path)
    print(f"<!-- {path.name}: frame {k}, level {run.levels[k]}, {near[k]:.1f} dB; levels {run.levels} -->")


def line(clip: str, method: str, row: list[float]) -> str:
    """Return a row of the table."""
    steps, held, windows, ms, policy_ms, near, worst, fidelity, stlpips, warp, flicker = row
    close = "equal | equal" if near == 99.0 else f"{near:.1f} | {worst:.1f}"
    return (
        f"| {clip} | {method} | {steps:.2f} | {100 * held:.0f} | {100 * windows:.0f} | {ms:.0f} | {policy_ms:.2f} "
        f"| {close} | {fidelity:.2f} | {stlpips:.4f} | {warp:.3f} | {flicker:.2f} |"
    )


def main() -> None:
    """Measure all clips and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--only", action="append", help="a clip by name; may be repeated")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    pipe = StreamDiffVSRPipeline.from_pretrained(options.model)
    network = STLPIPS.load("alex")
    print(f"Model {pipe.model_sha256[:12]}, {options.frames} frames per clip, {torch.get_num_threads()} threads\n")
    print(
        "| clip | method | mean steps | held % | windows % | ms per frame | policy ms | PSNR to 4 steps | worst frame "
        "| PSNR | ST-LPIPS | WarpErr | flicker |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    real: dict[str, list[list[float]]] = {method: [] for method in POLICIES}
    for name, truth, small in clips(options.frames):
        if options.only and name not in options.only:
            continue
        for method, row in measure(pipe, name, truth, small, network, options.pictures):
            print(line(name, method, row), flush=True)
            if not name.startswith("fixed camera"):
                real[method].append(row)
    for method, rows in real.items():
        if len(rows) > 1:
            means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
            means[6] = min(row[6] for row in rows)
            print(line("mean of the held-out clips", method, means))


if __name__ == "__main__":
    main()
