"""What U-Net tiles change, with statistics of their own and with those of all tiles, on clips and on a pattern.

    python -m benchmarks.unet_tiles --size 320x240 --tile 128

For every clip: largest and mean difference to whole frames, in levels of 255 before rounding, at its first frame and at
its second. Prints a Markdown table. Small tiles on purpose: larger ones differ less.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline import reference_step as engine
from pipeline.frames import frame_to_tensor
from pipeline.memory import Tiler
from pipeline.tiling import TilePlan, predict_in_tiles
from pipeline.video import VideoReader


class _FixedTiler(Tiler):
    def __init__(self, plan: TilePlan) -> None:
        super().__init__()
        self.plan = plan

    def plan_for(self, pipe: StreamDiffVSRPipeline, shape: object) -> TilePlan:
        return self.plan


def clips(width: int, height: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield name and two frames: of three held-out clips, resized, and of an even pattern that moves."""
    from PIL import Image

    from jobs.assets import fetch
    from jobs.bench_clip import scene

    for path in sorted(fetch(["heldout"])):
        if path.name in ("walk.mp4", "flowers.mp4", "portrait.mp4"):
            with VideoReader(path) as reader:
                pictures = [Image.fromarray(frame.rgb_HWC) for frame, _ in zip(reader, range(2), strict=False)]
            small = [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures]
            yield path.stem, [frame_to_tensor(np.asarray(picture)) for picture in small]
    yield "pattern", [frame_to_tensor(scene(index, width, height)) for index in range(2)]


def restore(pipe: StreamDiffVSRPipeline, frames: list[Tensor], side: int | None) -> list[Tensor]:
    """Return the restored frames, the U-Net in tiles of `side`."""
    pipe._tiler = _FixedTiler(TilePlan(unet=side))
    state = pipe.start()
    return [pipe.step(frame, [state], steps=1) for frame in frames]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="320x240", help="input size")
    parser.add_argument("--tile", type=int, default=128)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    torch.set_num_threads(1)
    pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
    print("| clip | statistics | frame 1: largest | mean | frame 2: largest | mean |\n|---|---|---|---|---|---|")
    for name, frames in clips(width, height):
        whole = restore(pipe, frames, None)
        for shared in (False, True):
            engine.predict_in_tiles = partial(predict_in_tiles, shared_statistics=shared)
            levels = [127.5 * (a - b).abs() for a, b in zip(whole, restore(pipe, frames, options.tile), strict=True)]
            cells = " | ".join(f"{float(x.max()):.1f} | {float(x.mean()):.3f}" for x in levels)
            print(f"| {name} | {'of all tiles' if shared else 'of each tile'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
