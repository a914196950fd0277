"""What grows on a picture that does not move, and how white a model's whites are.

    python -m benchmarks.stills --models tiny out/s4/model --pictures strips/

Stills: each frame takes up what the one before made up. The distance of the n-th output to the first one tells how much
that comes to. Whites: flat fields, which nothing but the network's own response can darken, and those pixels of the
held-out clips that a plain enlargement already shows brighter than 85 % of full scale. (Chosen by the original, they
would hold small lights that no enlargement of so small a picture can know.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.heldout import HELDOUT, read
from pipeline import StreamDiffVSRPipeline
from pipeline.degrade import BICUBIC, Degradation, degrade, gaussian_blur
from pipeline.frames import tensor_to_frame

AFTER = (1, 5, 25, 100)  # frames after the first one
BRIGHT = 0.85
LEVELS = (230, 242, 250, 255)  # of flat fields
SIDE = 48  # of flat fields, in input pixels


def truths() -> dict[str, Tensor]:
    """Return the stills (1,3,H,W) in [0, 1]: a speaker before a dark, blurred wall; pictures out of focus, dimmed."""
    frames = {e.name: read(e, 2).truth_T3HW[:1] for e in HELDOUT if e.name in ("portrait", "flowers", "campus")}
    portrait = F.interpolate(frames["portrait"][..., :288, :], size=(180, 320), mode="bicubic", antialias=True)
    return {
        "portrait": portrait.clamp(0, 1),
        "dark, soft flowers": gaussian_blur(frames["flowers"][..., 96:288, 96:352], 6.0) * 0.25,
        "dark, soft campus": gaussian_blur(frames["campus"][..., 96:288, 96:352], 3.0) * 0.4,
    }


def inputs(truth_13HW: Tensor, how: Degradation) -> Tensor:
    """Return the input (T,3,h,w) in [-1, 1] of a still that is held for as long as is measured."""
    return degrade(truth_13HW.expand(AFTER[-1] + 1, -1, -1, -1), how) * 2 - 1


def levels(output_3HW: Tensor) -> np.ndarray:
    """Return an output as 8-bit levels (H,W,3), for arithmetic."""
    return np.asarray(tensor_to_frame(output_3HW, np.dtype(np.uint8))).astype(np.float32)


def drift(pipe: StreamDiffVSRPipeline, lr_T3hw: Tensor, steps: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Return the mean distance in levels to the first output at `AFTER`, and the first and the last output."""
    state, found = pipe.start(), []
    still_12HW = torch.zeros(1, 2, 4 * lr_T3hw.shape[2], 4 * lr_T3hw.shape[3])
    for number, frame_3hw in enumerate(lr_T3hw):
        output = levels(pipe.step(frame_3hw[None], [state], flow_B2HW=still_12HW, steps=steps)[0])
        if number == 0:
            first = output
        if number in AFTER:
            found.append(float(np.abs(output - first).mean()))
    return found, first, output


def flat_error(pipe: StreamDiffVSRPipeline, level: int) -> float:
    """Return how much brighter, in levels, the third output of a flat field is than the field."""
    state = pipe.start()
    lr_13hw = torch.full((1, 3, SIDE, SIDE), level / 127.5 - 1)
    still_12HW = torch.zeros(1, 2, 4 * SIDE, 4 * SIDE)
    for _ in range(3):
        output = pipe.step(lr_13hw, [state], flow_B2HW=still_12HW, steps=1)[0]
    return float(levels(output)[SIDE:-SIDE, SIDE:-SIDE].mean()) - level


def bright_error(pipe: StreamDiffVSRPipeline) -> list[tuple[str, int, float, float]]:
    """Return per clip with bright parts: name, pixels, the output's and bicubic's mean error there, in levels."""
    rows = []
    for excerpt in HELDOUT:
        truth = read(excerpt, 2).truth_T3HW
        lr_T3hw = degrade(truth, BICUBIC) * 2 - 1
        state = pipe.start()
        for frame_3hw in lr_T3hw:
            output = levels(pipe.step(frame_3hw[None], [state], steps=1)[0])
        plain = levels(F.interpolate(lr_T3hw[1:], scale_factor=4, mode="bicubic")[0])
        bright = plain.mean(axis=2) > 255 * BRIGHT
        if bright.sum() >= 100:
            true = levels(truth[1] * 2 - 1)
            ours, bicubic = (float((one - true)[bright].mean()) for one in (output, plain))
            rows.append((excerpt.name, int(bright.sum()), ours, bicubic))
    return rows


def strip(columns: list[np.ndarray], target: Path) -> None:
    """Write pictures beside each other, twice as large, with brightness doubled: what grows is dark."""
    from PIL import Image

    sheet = np.concatenate(columns, axis=1)
    picture = Image.fromarray((sheet * 2).clip(0, 255).astype(np.uint8))
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(target)


def measure_stills(pipes: dict[str, StreamDiffVSRPipeline], folder: Path | None) -> list[str]:
    """Return the rows of the first table; write a strip of each: input, then each model's first and last output."""
    rows = []
    cases = [(name, BICUBIC, steps) for name in truths() for steps in (1, 4)]
    cases.append(("portrait", Degradation(h264_crf=28), 1))
    for name, how, steps in cases:
        truth = truths()[name]
        lr_T3hw = inputs(truth, how)
        columns = [levels(F.interpolate(lr_T3hw[:1], scale_factor=4, mode="bicubic")[0])]
        for model, pipe in pipes.items():
            found, first, last = drift(pipe, lr_T3hw, steps)
            error = [float(np.abs(one - levels(truth[0] * 2 - 1)).mean()) for one in (first, last)]
            cells = [f"{value:.2f}" for value in (*found, *error)]
            label = name if how is BICUBIC else f"{name}, H.264 CRF {how.h264_crf}"
            rows.append(f"| {label} | {steps} | {model} | " + " | ".join(cells) + " |")
            columns += [first, last]
        if folder is not None and steps == 1:
            kind = "" if how is BICUBIC else "-h264"
            strip(columns, folder / f"{name.replace(', ', '-').replace(' ', '-')}{kind}.png")
    return rows


def main() -> None:
    """Measure all models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"])
    parser.add_argument("--pictures", type=Path, default=None, help="folder for strips of the stills")
    options = parser.parse_args()
    pipes = {name: StreamDiffVSRPipeline.from_pretrained(name) for name in options.models}
    for name, pipe in pipes.items():
        print(f"- `{name}`: fingerprint {pipe.model_sha256[:12]}")
    print(
        "\nMean distance to the first output, in levels, after so many frames; error of the first and the last output\n"
    )
    print("| still | steps | model | " + " | ".join(map(str, AFTER)) + " | error, first | error, last |")
    print("|---" * (5 + len(AFTER)) + "|", *measure_stills(pipes, options.pictures), sep="\n")
    print("\nFlat fields: error in levels\n")
    print("| model | " + " | ".join(map(str, LEVELS)) + " |\n" + "|---" * (1 + len(LEVELS)) + "|")
    for name, pipe in pipes.items():
        print(f"| {name} | " + " | ".join(f"{flat_error(pipe, level):+.1f}" for level in LEVELS) + " |")
    print(f"\nHeld-out pixels that bicubic shows brighter than {BRIGHT:.0%}: mean error in levels\n")
    print("| model | clip | pixels | output | bicubic |\n|---|---|---|---|---|")
    for name, pipe in pipes.items():
        for clip, count, ours, plain in bright_error(pipe):
            print(f"| {name} | {clip} | {count} | {ours:+.1f} | {plain:+.1f} |")


if __name__ == "__main__":
    main()
