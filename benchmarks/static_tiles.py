"""Could only what changed be restored? U-Net and decoder on a window around it, the previous output kept elsewhere.

    python -m benchmarks.static_tiles --frames 6

A camera that stands still (a frame of the held-out clip `crossing` at 320x180, with noise), a thing that moves. After
some whole frames one stream goes on in whole frames, others restore the window alone: what changed, grown by what the
U-Net looks around, noise and latents of the whole frame, blended at the border, with the normalisations' statistics of
the window or of the last whole frame; and as `pipeline.static_windows` does it, which grows it by less. Prints, against
the stream of whole frames: PSNR inside what changed, in the ring around its border, and in what was kept; and
milliseconds. `--pictures FOLDER` writes the last frame of each.
"""

from __future__ import annotations

import argparse
import io
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.adaptive_steps import psnr
from benchmarks.fixed_camera import noisy_input
from jobs.heldout import HELDOUT, read
from pipeline import StreamDiffVSRPipeline
from pipeline.guidance import embed_condition, flow_warp
from pipeline.state import StreamState
from pipeline.static_windows import step_window
from pipeline.tiling import UNET_BLEND, UNET_CONTEXT, TilePlan, Window, _norms_replaced, _Statistics, blend_ramps

HEIGHT, WIDTH = 720, 1280  # of the truth
SETTLE = 6  # whole frames before
CHANGED_LEVELS = 3.0  # mean difference of 8 by 8 input pixels


def clip(frames: int) -> Tensor:
    """Return the truth (T,3,720,1280): scenery that stands still, a disc that moves across it 4 pixels a frame."""
    excerpts = {excerpt.name: excerpt for excerpt in HELDOUT}
    wide = replace(excerpts["crossing"], width=WIDTH, box=(0, 0, WIDTH, HEIGHT))
    scenery = read(wide, 2).truth_T3HW[0]
    texture = read(excerpts["walk"], 2).truth_T3HW[0]
    rows, columns = torch.arange(HEIGHT).view(-1, 1).float(), torch.arange(WIDTH).view(1, -1).float()
    result = []
    for k in range(frames):
        x, y = 500 + 4 * k, 360
        mask = ((48 - ((columns - x).square() + (rows - y).square()).sqrt()) / 1.5 + 0.5).clamp(0, 1)
        shown = scenery.clone()
        patch = (slice(None), slice(y - 60, y + 60), slice(x - 60, x + 60))
        shown[patch] = mask[patch[1:]] * texture[:, 130:250, 320:440] + (1 - mask[patch[1:]]) * scenery[patch]
        result.append(shown)
    return torch.stack(result)


def changed(current_13hw: Tensor, reference_3hw: Tensor) -> Window:
    """Return the window of the blocks that differ."""
    difference = (current_13hw - reference_3hw[None]).abs().mean(1, keepdim=True) * 127.5
    blocks = F.avg_pool2d(difference, 8, ceil_mode=True)[0, 0] > CHANGED_LEVELS
    rows, columns = torch.nonzero(blocks.any(1)).flatten(), torch.nonzero(blocks.any(0)).flatten()
    height, width = current_13hw.shape[2:]
    return Window(int(rows[0]) * 8, int(rows[-1]) * 8 + 8, int(columns[0]) * 8, int(columns[-1]) * 8 + 8).grown(
        0, height, width
    )


@dataclass(slots=True)
class Partial:
    """A stream of which only the window is restored."""

    pipe: StreamDiffVSRPipeline
    state: StreamState
    statistics: _Statistics | None  # of the last whole frame
    context: int = UNET_CONTEXT

    def step(self, frame_13hw: Tensor) -> tuple[Tensor, Window]:
        """Return the output (1,3,H,W) and the window (input pixels) that was restored."""
        pipe, state = self.pipe, self.state
        assert state.prev_input_3HW is not None and state.prev_output_3HW is not None
        height, width = frame_13hw.shape[2:]
        core = changed(frame_13hw, state.prev_input_3HW).grown(4, height, width)
        seen = core.grown(UNET_BLEND + self.context, height, width)
        seen = Window(
            seen.top // 8 * 8, min(height, -(-seen.bottom // 8) * 8), seen.left // 8 * 8, -(-seen.right // 8) * 8
        )
        flow = pipe.flow(frame_13hw, state.prev_input_3HW[None])
        warped = flow_warp(
            state.prev_output_3HW[None], seen.times(4).of(flow), "exact", top=seen.top * 4, left=seen.left * 4
        )
        latents = seen.of(pipe._initial_latents(frame_13hw, [state], None))
        stored = (
            _norms_replaced((pipe.unet, pipe.controlnet), self.statistics.apply) if self.statistics else nullcontext()
        )
        with torch.no_grad(), stored:
            condition = embed_condition(pipe.controlnet, warped)
            schedules = pipe._schedules(1, 1)
            latents = pipe._denoise(seen.of(frame_13hw), latents, schedules, condition, [0], TilePlan(), None, ())
            part = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, pipe.vae.encode_temporal(warped))
        ramps = blend_ramps(core.times(4), seen.times(4), UNET_BLEND * 2, part.device)
        output = state.prev_output_3HW[None].clone()
        place = seen.times(4).of(output)
        place.copy_(ramps * part + (1 - ramps) * place)
        kept = state.prev_input_3HW[None].clone()
        core.of(kept).copy_(core.of(frame_13hw))
        state.advance(output[0].contiguous(), kept[0].contiguous())
        return output, core


@dataclass(slots=True)
class Product:
    """The same through `pipeline.static_windows`."""

    pipe: StreamDiffVSRPipeline
    state: StreamState

    def step(self, frame_13hw: Tensor) -> tuple[Tensor, Window]:
        """Return the output (1,3,H,W) and the window (input pixels) that was restored."""
        assert self.state.prev_input_3HW is not None
        core = changed(frame_13hw, self.state.prev_input_3HW).grown(4, *frame_13hw.shape[2:])
        return step_window(self.pipe, frame_13hw, self.state, 1, core), core


def measure(pipe: StreamDiffVSRPipeline, frames: int, pictures: Path | None) -> None:
    """Print one table."""
    truth = clip(SETTLE + frames)
    small = noisy_input(truth) * 2 - 1
    whole = pipe.start()
    statistics = _Statistics()

    def look(norm: torch.nn.GroupNorm, x: Tensor) -> Tensor:
        statistics.add(norm, x)
        return type(norm).forward(norm, x)

    for k in range(SETTLE):
        last = k == SETTLE - 1
        with _norms_replaced((pipe.unet, pipe.controlnet), look) if last else nullcontext():
            pipe.step(small[k : k + 1], [whole], steps=1)
    saved = whole.to_bytes()

    def fresh() -> StreamState:
        return StreamState.load(io.BytesIO(saved))

    streams: dict[str, Partial | Product] = {
        "statistics of the window": Partial(pipe, fresh(), None),
        "statistics of the last whole frame": Partial(pipe, fresh(), statistics),
        "as in the product": Product(pipe, fresh()),
    }
    rows: dict[str, list[list[float]]] = {name: [] for name in streams}
    whole_ms = []
    shown = {}
    for k in range(SETTLE, SETTLE + frames):
        begin = time.perf_counter()
        full = pipe.step(small[k : k + 1], [whole], steps=1) / 2 + 0.5
        whole_ms.append(1e3 * (time.perf_counter() - begin))
        shown["whole"] = full
        for name, stream in streams.items():
            begin = time.perf_counter()
            output, core = stream.step(small[k : k + 1])
            ms = 1e3 * (time.perf_counter() - begin)
            output = output / 2 + 0.5
            shown[name] = output
            inside = core.times(4)
            ring = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.bool)
            inside.grown(16, HEIGHT, WIDTH).of(ring).fill_(True)
            Window(inside.top + 16, inside.bottom - 16, inside.left + 16, inside.right - 16).of(ring).fill_(False)
            outside = torch.ones_like(ring)
            inside.grown(16, HEIGHT, WIDTH).of(outside).fill_(False)
            differences = (output.clamp(0, 1) - full.clamp(0, 1)).abs()
            area = (inside.bottom - inside.top) * (inside.right - inside.left) / HEIGHT / WIDTH
            rows[name].append(
                [
                    100 * area,
                    psnr(inside.of(output.clamp(0, 1)), inside.of(full.clamp(0, 1))),
                    psnr(output.clamp(0, 1)[ring.expand_as(output)], full.clamp(0, 1)[ring.expand_as(full)]),
                    psnr(output.clamp(0, 1)[outside.expand_as(output)], full.clamp(0, 1)[outside.expand_as(full)]),
                    float(differences[ring.expand_as(output)].max()) * 255,
                    ms,
                ]
            )
    print(
        f"Model {pipe.model_sha256[:12]}, {frames} frames of {WIDTH}x{HEIGHT}, 1 step; "
        f"whole: {np.median(whole_ms):.0f} ms\n"
    )
    print("| window | frame | changed % | inside dB | ring dB | kept dB | ring, largest difference in levels | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        for number, row in enumerate(found):
            print(f"| {name} | {number + 1} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
    if pictures is not None:
        from PIL import Image

        pictures.mkdir(parents=True, exist_ok=True)
        box = Window(200, 520, 360, 760)
        strip = [box.of(truth[-1:]), *(box.of(output).clamp(0, 1) for output in shown.values())]
        strip += [((box.of(shown[name]) - box.of(shown["whole"])) * 8 + 0.5).clamp(0, 1) for name in streams]
        picture = torch.cat([torch.cat(strip[:4], 3), torch.cat(strip[4:], 3)[..., : 4 * 400]], 2)
        Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(pictures / "static-tiles.png")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    measure(StreamDiffVSRPipeline.from_pretrained(options.model), options.frames, options.pictures)


if __name__ == "__main__":
    main()
