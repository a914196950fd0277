"""Memory, time and seams of large frames in tiles against the same frames untiled.

    python -m benchmarks.large_frames --size 960x540 --memory-gb 0 3 2 1.5 --picture seams.png

The frames are those of a held-out clip, resized. Each limit (0: none) runs in a process of its own, whose peak memory
is given. Prints a Markdown table; the picture shows where the last frame differs from the first limit's, amplified.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

AMPLIFY = 40


def restore(clip: str, width: int, height: int, limit_gb: float, frames: int, target: Path) -> None:
    """Restore the clip's first frames at that size, print what it took, leave the last result as `target`."""
    from PIL import Image

    from pipeline import StreamDiffVSRPipeline
    from pipeline.frames import frame_to_tensor, tensor_to_frame
    from pipeline.memory import WORKER_BYTES, estimate
    from pipeline.video import VideoReader

    torch.set_num_threads(1)
    pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
    pipe.memory_limit_bytes = int(limit_gb * 1e9) or None
    pipe.set_aside(WORKER_BYTES)  # for the reader and the pictures here
    state = pipe.start()
    picture_HWC: np.ndarray = np.empty(0)
    taken_s = []
    with VideoReader(clip) as reader:
        for frame, _ in zip(reader, range(frames), strict=False):
            resized = Image.fromarray(frame.rgb_HWC).resize((width, height), Image.Resampling.BICUBIC)
            began = time.process_time()
            output_13HW = pipe.step(frame_to_tensor(np.asarray(resized)), [state], steps=1)
            picture_HWC = tensor_to_frame(output_13HW[0], np.dtype(np.uint8))
            del output_13HW
            taken_s.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.save(target, picture_HWC)
    estimated = estimate(pipe, height, width, plan=pipe.tiling).total
    print(f"{pipe.tiling} | {peak / 1e9:.2f} | {estimated / 1e9:.2f} | {taken_s[-1]:.1f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="960x540", help="input size")
    parser.add_argument("--memory-gb", type=float, nargs="+", default=[0, 3, 2, 1.5])
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--clip", default=None, help="a video; by default a held-out clip")
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--target", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    if options.target is not None:
        restore(options.clip, width, height, options.memory_gb[0], options.frames, options.target)
        return
    clip = options.clip
    if clip is None:
        from jobs.assets import fetch

        clip = str(next(path for path in fetch(["heldout"], names={"sports2d"}) if path.name == "walk.mp4"))
    print("| limit GB | tiles | peak GB | estimated GB | CPU s per frame | largest difference | mean difference |")
    print("|---|---|---|---|---|---|---|")
    reference: np.ndarray | None = None
    amplified = []
    with tempfile.TemporaryDirectory() as folder:
        for limit in options.memory_gb:
            target = Path(folder, "picture.npy")
            command = [sys.executable, "-m", "benchmarks.large_frames", "--size", options.size, "--clip", clip]
            command += ["--memory-gb", str(limit), "--frames", str(options.frames), "--target", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {limit or 'none'} | {done.stderr.strip().splitlines()[-1]} | | | | | |", flush=True)
                continue
            picture = np.load(target).astype(np.int16)
            reference = picture if reference is None else reference
            difference = np.abs(picture - reference)
            amplified.append((difference * AMPLIFY).clip(0, 255).astype(np.uint8))
            print(
                f"| {limit or 'none'} | {done.stdout.strip()} | {difference.max()} | {difference.mean():.4f} |",
                flush=True,
            )
    if options.picture is not None and reference is not None:
        from PIL import Image

        columns = [reference.astype(np.uint8), *amplified[1:]]
        small = [Image.fromarray(picture).resize((width, height), Image.Resampling.BOX) for picture in columns]
        sheet = Image.new("RGB", (width, height * len(small)))
        for row, image in enumerate(small):
            sheet.paste(image, (0, row * height))
        sheet.save(options.picture)


if __name__ == "__main__":
    main()
