"""What splitting a shot changes: a part that starts in the middle of it, after a warm-up, against the whole shot.

    python -m benchmarks.shot_splitting --warm-up 0 1 2 4 8 16 32 --pictures strips/

Each clip is one shot. It is restored in one go, and again from the seam on: with a fresh state, and as many frames
before the seam restored and thrown away as the warm-up has. Prints Markdown tables: how near both are at the seam and
after it, and whether the seam is a jump. A strip of each clip shows the frames around the seam, enlarged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.heldout import HELDOUT, Excerpt, read
from pipeline import StreamDiffVSRPipeline
from pipeline.degrade import downscale
from pipeline.frames import tensor_to_frame
from pipeline.guidance import flow_warp

# Whole stretches without a cut: a walker, a fixed camera over a campus, a face that talks, a flight over a street.
CLIPS = tuple(
    replace(excerpt, start=start, stride=1)
    for name, start in (("walk", 0), ("campus", 120), ("portrait", 24), ("crossing", 20))
    for excerpt in HELDOUT
    if excerpt.name == name
)
AFTER = (0, 1, 5, 10, 30)  # frames after the seam's first one
FILM_RATE, PART_SECONDS = 25, 60  # what the cost is told for
SIDE, AROUND, AMPLIFY = 96, 2, 10  # of strips: pixels of the detail, frames on either side of the seam, of differences

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Nearness:
    """Two pictures compared in 8 bits: PSNR in dB, share of values within one level, largest difference in levels."""

    psnr_db: float
    within_one: float
    largest: int


@dataclass(frozen=True, slots=True)
class Jump:
    """The mean difference in levels from a frame to the next: as they are, and with the former moved by the flow."""

    plain: float
    warped: float


def nearness(ours_HWC: Picture, theirs_HWC: Picture) -> Nearness:
    """Compare two pictures of equal size."""
    difference = np.abs(ours_HWC.astype(np.int16) - theirs_HWC)
    mse = float(np.square(difference.astype(np.float64)).mean())
    psnr = float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))
    return Nearness(psnr, float((difference <= 1).mean()), int(difference.max()))


def jump(before_HWC: Picture, after_HWC: Picture, flow_12HW: Tensor) -> Jump:
    """Measure the step from one restored frame to the next; `flow_12HW` leads from the latter to the former."""
    before, after = (torch.from_numpy(one).permute(2, 0, 1)[None].float() for one in (before_HWC, after_HWC))
    warped = flow_warp(before, flow_12HW, "exact")
    inside = (..., slice(16, -16), slice(16, -16))  # what enters the picture cannot be predicted
    return Jump(float((before - after)[inside].abs().mean()), float((warped - after)[inside].abs().mean()))


def restore(pipe: StreamDiffVSRPipeline, lr_T3hw: Tensor, first: int, steps: int | None) -> list[Picture]:
    """Restore the frames from number `first` on with a fresh state."""
    state = pipe.start(index=first)
    outputs = (pipe.step(frame_3hw[None], [state], steps=steps) for frame_3hw in lr_T3hw[first:])
    return [np.asarray(tensor_to_frame(output[0], np.dtype(np.uint8))) for output in outputs]


def strip(whole: Sequence[Picture], parts: dict[int, Sequence[Picture]], seam: int, target: Path) -> None:
    """Write the frames around the seam where the parts differ most: one row each, the last column their difference."""
    from PIL import Image, ImageDraw

    difference_HW = np.abs(parts[min(parts)][0].astype(np.int16) - whole[seam]).sum(axis=2)
    sums = difference_HW[: difference_HW.shape[0] // SIDE * SIDE, : difference_HW.shape[1] // SIDE * SIDE]
    tiles = sums.reshape(sums.shape[0] // SIDE, SIDE, -1, SIDE).sum(axis=(1, 3))
    top, left = (SIDE * int(at) for at in np.unravel_index(int(tiles.argmax()), tiles.shape))
    columns = range(seam - AROUND, seam + AROUND + 1)
    sheet = Image.new("RGB", (2 * SIDE * (len(columns) + 1), (2 * SIDE + 14) * (len(parts) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, after) in enumerate([("whole", whole[seam:]), *((f"warm-up {n}", p) for n, p in parts.items())]):
        y = row * (2 * SIDE + 14)
        draw.text((2, y + 1), f"{name}; the seam lies before the middle frame", fill="black")
        frames = [whole[k] if k < seam else after[k - seam] for k in columns]
        amplified = np.abs(after[0].astype(np.int16) - whole[seam]) * AMPLIFY
        for column, picture in enumerate([*frames, amplified.clip(0, 255).astype(np.uint8)]):
            detail = Image.fromarray(picture[top : top + SIDE, left : left + SIDE])
            sheet.paste(detail.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), (2 * SIDE * column, y + 14))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def measure(
    pipe: StreamDiffVSRPipeline,
    excerpt: Excerpt,
    seam: int,
    warm_ups: Sequence[int],
    steps: int | None,
    folder: Path | None,
) -> tuple[list[str], list[str]]:
    """Return the rows of both tables for one clip."""
    truth_T3HW = read(excerpt, seam + AFTER[-1] + 1).truth_T3HW
    lr_T3hw = downscale(truth_T3HW) * 2 - 1
    truth = [np.asarray(tensor_to_frame(one * 2 - 1, np.dtype(np.uint8))) for one in truth_T3HW]
    whole = restore(pipe, lr_T3hw, 0, steps)
    flows = {k: pipe.flow(lr_T3hw[k : k + 1], lr_T3hw[k - 1 : k]) for k in range(seam - 3, seam + 4)}
    usual = [jump(whole[k - 1], whole[k], flows[k]) for k in flows]
    near_rows, jump_rows = [], []
    parts = {}
    for warm_up in warm_ups:
        part = parts[warm_up] = restore(pipe, lr_T3hw, seam - warm_up, steps)[warm_up:]
        found = [nearness(part[k], whole[seam + k]) for k in AFTER]
        near_rows.append(
            f"| {excerpt.name} | {warm_up} | "
            + " | ".join(f"{one.psnr_db:.1f} / {100 * one.within_one:.1f} / {one.largest}" for one in found)
            + " |"
        )
        here = jump(whole[seam - 1], part[0], flows[seam])
        plain, warped = (
            (getattr(here, kind), getattr(usual[3], kind), np.mean([getattr(one, kind) for one in usual]))
            for kind in ("plain", "warped")
        )
        ours, theirs = (nearness(one, truth[seam]).psnr_db for one in (part[0], whole[seam]))
        jump_rows.append(
            f"| {excerpt.name} | {warm_up} | {plain[0]:.2f} | {plain[0] / plain[1]:.3f} | {plain[0] / plain[2]:.3f} | "
            f"{warped[0]:.2f} | {warped[0] / warped[1]:.3f} | {warped[0] / warped[2]:.3f} | {ours - theirs:+.2f} | "
            f"{100 * warm_up / (FILM_RATE * PART_SECONDS):.2f} |"
        )
    if folder is not None:
        strip(whole, parts, seam, folder / f"{excerpt.name}.png")
    return near_rows, jump_rows


def main() -> None:
    """Measure all clips and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's default without")
    parser.add_argument("--seam", type=int, default=50, help="number of the part's first frame in the clip")
    parser.add_argument("--warm-up", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32], help="frames")
    parser.add_argument("--clips", nargs="+", default=[clip.name for clip in CLIPS])
    parser.add_argument("--pictures", type=Path, default=None, help="folder for the strips")
    options = parser.parse_args()
    pipe = StreamDiffVSRPipeline.from_pretrained(options.model)
    near, jumps = [], []
    for clip in (clip for clip in CLIPS if clip.name in options.clips):
        rows = measure(pipe, clip, options.seam, options.warm_up, options.steps, options.pictures)
        near += rows[0]
        jumps += rows[1]
    print(f"Model {pipe.model_sha256[:12]}, seam before frame {options.seam}, {torch.get_num_threads()} threads\n")
    print("PSNR in dB / % of values within one level / largest difference in levels, to the whole shot\n")
    print("| clip | warm-up | first frame | " + " | ".join(f"{k} after" for k in AFTER[1:]) + " |")
    print("|---" * (2 + len(AFTER)) + "|", *near, sep="\n")
    print("\nThe step over the seam, in levels; to the same step unsplit; to the mean of seven steps around, unsplit\n")
    columns = ("clip", "warm-up", *("plain", "to unsplit", "to mean"), *("warped", "to unsplit", "to mean"))
    print("|", " | ".join([*columns, "PSNR to the truth, dB", "cost %"]), "|")
    print("|---" * 10 + "|", *jumps, sep="\n")


if __name__ == "__main__":
    main()
