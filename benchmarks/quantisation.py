"""What rounding to FP8 (e4m3) or int8 does to the output, by emulation: how near to fp32, frame by frame, and how good.

    python -m benchmarks.quantisation --frames 30
    python -m benchmarks.quantisation --frames 30 --steps 1
    python -m benchmarks.quantisation --model CHECKPOINT --flow zero --size 64x48
    python -m benchmarks.quantisation --heldout --frames 12
    python -m benchmarks.quantisation --layers

Inputs and weights of convolutions and linear layers are rounded to the format and computed with in fp32: what
hardware does that adds up in fp32. Weights have a scale for each output channel, inputs one for the tensor: of the
tensor at hand ("dynamic"), or from the largest value on another clip ("static"). Each variant goes on from its own
previous outputs, with the flow that the reference got. Prints Markdown.

`--layers` rounds one layer at a time. Errors of layers add up in the square, so this tells how much can be rounded.

Shapes: H W output size, h w input size.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.heldout import HELDOUT, read
from pipeline import StreamDiffVSRPipeline
from pipeline.cuda_backend import psnr_db
from pipeline.degrade import BICUBIC, degrade
from pipeline.frames import frame_to_tensor
from pipeline.judge import ClipJudge
from pipeline.perceptual import STLPIPS
from pipeline.video import VideoReader

CLIP: Final = Path(__file__).parents[1] / "tests/data/walk_lr.mp4"
CALIBRATION: Final = ("face", 6)  # excerpt and frames that static scales come from
SHOWN: Final = (1, 2, 5, 10, 20, 30)  # frames whose PSNR is printed
TARGET_DB: Final = 45.0
Format = Literal["fp8", "int8"]
Scale = Literal["dynamic", "static"]
_LARGEST: Final = {"fp8": 448.0, "int8": 127.0}
_ENDS: Final = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "lr_projection")


@dataclass(frozen=True, slots=True)
class Variant:
    """What is rounded.

    Attributes:
        scale: of the inputs; None: inputs are not rounded.
        scope: "all" of U-Net and ARTG; "inner": without first and last convolutions and what depends on the time step
            alone; "decoder": inner, and the autoencoder's likewise.
        dtype: that everything else computes in.
    """

    number: Format | None
    scale: Scale | None = "dynamic"
    scope: Literal["all", "inner", "decoder"] = "inner"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        if self.number is None:
            return "bf16, nothing rounded further"
        inputs = "weights alone" if self.scale is None else f"{self.scale} scale"
        rest = ", the rest in bf16" if self.dtype == torch.bfloat16 else ""
        return f"{self.number}, {self.scope}, {inputs}{rest}"


VARIANTS: Final = (
    Variant(None, dtype=torch.bfloat16),
    Variant("fp8", "dynamic", "all"),
    Variant("fp8", "dynamic", "inner"),
    Variant("fp8", "static", "inner"),
    Variant("fp8", None, "inner"),
    Variant("fp8", "dynamic", "decoder"),
    Variant("fp8", "static", "decoder"),
    Variant("fp8", "dynamic", "inner", torch.bfloat16),
    Variant("int8", "dynamic", "all"),
    Variant("int8", "dynamic", "inner"),
    Variant("int8", "static", "inner"),
    Variant("int8", None, "inner"),
    Variant("int8", "dynamic", "decoder"),
    Variant("int8", "static", "decoder"),
)


def rounded(x: Tensor, number: Format, largest: Tensor) -> Tensor:
    """Return `x` as the format holds it when `largest` (broadcast over `x`) is the largest value that it can hold.

    Larger values become the largest one.
    """
    most = _LARGEST[number]
    scale = most / largest.clamp(min=1e-12).to(torch.float32)
    scaled = (x.to(torch.float32) * scale).clamp(-most, most)
    held = scaled.to(torch.float8_e4m3fn).to(torch.float32) if number == "fp8" else scaled.round()
    return (held / scale).to(x.dtype)


def round_weight(layer: nn.Module, number: Format) -> None:
    """Replace the weight of a layer by what the format holds of it, with a scale for each output channel."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    weight.data = rounded(weight.data, number, largest)


def layers_of(pipe: StreamDiffVSRPipeline) -> dict[str, nn.Module]:
    """Return all convolutions and linear layers by name: "unet.…", "controlnet.…", "vae.…"."""
    found: dict[str, nn.Module] = {}
    for owner in ("unet", "controlnet", "vae"):
        for name, module in getattr(pipe, owner).named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                found[f"{owner}.{name}"] = module
    return found


def chosen(pipe: StreamDiffVSRPipeline, scope: str) -> dict[str, nn.Module]:
    """Return the layers of a scope, see `Variant`."""
    layers = {k: v for k, v in layers_of(pipe).items() if scope == "decoder" or not k.startswith("vae.")}
    if scope == "all":
        return layers
    first_and_last = {"vae.encoder.layers.0", f"vae.decoder.layers.{len(pipe.vae.decoder.layers) - 1}"}
    first_and_last.add("vae.decoder.layers.0")
    return {k: v for k, v in layers.items() if k not in first_and_last and not any(end in k for end in _ENDS)}


def round_layers(layers: Iterable[nn.Module], number: Format, largest: dict[nn.Module, Tensor] | None) -> None:
    """Let layers compute with rounded inputs from now on; their largest inputs are known, or taken as they come."""

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return (rounded(x, number, x.abs().amax() if largest is None else largest[layer]), *rest)

    for layer in layers:
        layer.register_forward_pre_hook(before)


def largest_inputs(pipe: StreamDiffVSRPipeline, steps: int | None) -> dict[nn.Module, Tensor]:
    """Return the largest absolute value of each layer's input on the clip that static scales come from."""
    largest: dict[nn.Module, Tensor] = defaultdict(lambda: torch.zeros(()))

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest[layer] = torch.maximum(largest[layer], args[0].abs().amax().to(torch.float32))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers_of(pipe).values()]
    name, frames = CALIBRATION
    truth = read(next(excerpt for excerpt in HELDOUT if excerpt.name == name), frames).truth_T3HW
    state = pipe.start()
    for frame_3hw in degrade(truth, BICUBIC):
        pipe.step(frame_3hw[None] * 2 - 1, [state], steps=steps)
    for hook in hooks:
        hook.remove()
    return dict(largest)


def open_variant(variant: Variant, load: partial[StreamDiffVSRPipeline], steps: int | None) -> StreamDiffVSRPipeline:
    """Return a model that computes as `variant` says."""
    pipe = load(torch_dtype=variant.dtype)
    if variant.number is not None:
        layers = chosen(pipe, variant.scope)
        static = largest_inputs(pipe, steps) if variant.scale == "static" else None
        for layer in layers.values():
            round_weight(layer, variant.number)
        if variant.scale is not None:
            round_layers(layers.values(), variant.number, static)
    return pipe


def restore_beside(
    reference: StreamDiffVSRPipeline,
    pipes: Sequence[StreamDiffVSRPipeline],
    frames: Iterable[Tensor],
    steps: int | None,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield each frame (1,3,H,W) by the reference and by the others, all with the same flow."""
    known = reference.start()
    states = [pipe.start() for pipe in pipes]
    for frame_13hw in frames:
        flow = None
        if known.prev_input_3HW is not None:
            flow = reference.flow(frame_13hw, known.prev_input_3HW[None])
        wanted = reference.step(frame_13hw, [known], flow_B2HW=flow, steps=steps)
        found = [
            pipe.step(frame_13hw, [state], flow_B2HW=flow, steps=steps)
            for pipe, state in zip(pipes, states, strict=True)
        ]
        yield wanted, found


def clip_frames(count: int, size: tuple[int, int] | None) -> list[Tensor]:
    """Return frames (1,3,h,w) in [-1, 1] of the test clip, reduced to `size` (width, height)."""
    with VideoReader(CLIP) as reader:
        frames = [frame_to_tensor(frame.rgb_HWC) for frame, _ in zip(reader, range(count), strict=False)]
    if size is None:
        return frames
    return [F.interpolate(x, size=size[::-1], mode="area") for x in frames]


def print_nearness(
    load: partial[StreamDiffVSRPipeline], variants: Sequence[Variant], frames: Sequence[Tensor], steps: int | None
) -> None:
    """Print PSNR to fp32 by frame."""
    reference = load()
    pipes = [open_variant(variant, load, steps) for variant in variants]
    near: list[list[float]] = [[] for _ in variants]
    for wanted, found in restore_beside(reference, pipes, frames, steps):
        for row, output in zip(near, found, strict=True):
            row.append(psnr_db(output, wanted))
    shown = [number for number in SHOWN if number <= len(frames)]
    print("| variant | " + " | ".join(f"frame {number}" for number in shown) + " | worst |")
    print("|---" * (len(shown) + 2) + "|")
    for variant, row in zip(variants, near, strict=True):
        print(f"| {variant} | " + " | ".join(f"{row[k - 1]:.1f}" for k in shown) + f" | {min(row):.1f} |", flush=True)


def print_quality(
    load: partial[StreamDiffVSRPipeline],
    variants: Sequence[Variant],
    frames: int,
    steps: int | None,
    only: Sequence[str] | None,
) -> None:
    """Print what the judge says of held-out clips, and the worst PSNR to fp32; of OpenVINO, which rounds, too."""
    reference = load()
    pipes = [open_variant(variant, load, steps) for variant in variants]
    real = {f"OpenVINO, {dtype}": dtype for dtype in (torch.bfloat16, torch.int8)}
    pipes += [load(backend="openvino", torch_dtype=dtype) for dtype in real.values()]
    names = ["fp32", *map(str, variants), *real]
    network = STLPIPS.load("alex")
    print("| clip | variant | PSNR to fp32, worst frame | PSNR | ST-LPIPS | WarpErr | flicker |")
    print("|---|---|---|---|---|---|---|")
    for excerpt in HELDOUT:
        if excerpt.name not in (only or [excerpt.name]):
            continue
        truth = read(excerpt, frames).truth_T3HW
        small = [x[None] * 2 - 1 for x in degrade(truth, BICUBIC)]
        outputs: list[list[Tensor]] = [[] for _ in range(len(pipes) + 1)]
        for wanted, found in restore_beside(reference, pipes, small, steps):
            for row, output in zip(outputs, [wanted, *found], strict=True):
                row.append(output[0])
        judge = ClipJudge(truth, network, vmaf=False)
        for name, row in zip(names, outputs, strict=True):
            scores = judge.score(torch.stack(row) / 2 + 0.5)
            worst = min(psnr_db(x, y) for x, y in zip(row, outputs[0], strict=True))
            print(
                f"| {excerpt.name} | {name} | {worst:.1f} | {scores.psnr:.2f} | {scores.stlpips:.4f} "
                f"| {scores.warp_error:.3f} | {scores.flicker:.2f} |",
                flush=True,
            )


def print_layers(
    load: partial[StreamDiffVSRPipeline], number: Format, frames: Sequence[Tensor], steps: int | None
) -> None:
    """Print PSNR with one layer rounded at a time, and how many FLOPs the least sensitive ones have together."""
    pipe = load()
    outputs = [wanted for wanted, _ in restore_beside(pipe, [], frames, steps)]
    flops = _flops_by_layer(pipe, frames[:2], steps)
    total = sum(flops.values())
    errors = {}
    for name, layer in layers_of(pipe).items():
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        before = weight.data
        round_weight(layer, number)

        def round_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (rounded(args[0], number, args[0].abs().amax()), *args[1:])

        hook = layer.register_forward_pre_hook(round_input)
        found = [output for output, _ in restore_beside(pipe, [], frames, steps)]
        hook.remove()
        weight.data = before
        errors[name] = max(4 * 10 ** (-psnr_db(x, y) / 10) for x, y in zip(found, outputs, strict=True))
    together = share = 0.0
    print("| layer | PSNR alone | share of FLOPs | PSNR of it and those before, expected | their share |")
    print("|---|---|---|---|---|")
    for name, error in sorted(errors.items(), key=lambda entry: entry[1] / max(flops[entry[0]], 1)):
        together += error
        share += flops[name] / total
        alone, joint = (10 * torch.log10(torch.tensor(4 / max(e, 1e-14))).item() for e in (error, together))
        print(f"| {name} | {alone:.1f} | {flops[name] / total:.4f} | {joint:.1f} | {share:.3f} |", flush=True)


def _flops_by_layer(pipe: StreamDiffVSRPipeline, frames: Sequence[Tensor], steps: int | None) -> dict[str, int]:
    """Return the FLOPs of each layer over `frames`."""
    flops: dict[str, int] = defaultdict(int)
    names = {layer: name for name, layer in layers_of(pipe).items()}
    undo = []
    for layer, name in names.items():
        forward = layer.forward

        def counted(*args: Tensor, _forward: object = forward, _name: str = name) -> Tensor:
            assert callable(_forward)
            with FlopCounterMode(display=False) as counter:
                output = _forward(*args)
            flops[_name] += counter.get_total_flops()
            return output

        layer.forward = counted
        undo.append((layer, forward))
    for _ in restore_beside(pipe, [], frames, steps):
        pass
    for layer, forward in undo:
        layer.forward = forward
    return {name: flops[name] for name in names.values()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--flow")
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", help="of the input, as 64x48; not given: that of the clip")
    parser.add_argument("--without-static", action="store_true", help="leave out what needs the held-out clips")
    parser.add_argument("--heldout", action="store_true")
    parser.add_argument("--only", action="append", help="a held-out clip by name; may be repeated")
    parser.add_argument("--layers", choices=("fp8", "int8"), nargs="?", const="fp8")
    options = parser.parse_args()
    size = None
    if options.size:
        width, height = options.size.split("x")
        size = (int(width), int(height))
    load = partial(StreamDiffVSRPipeline.from_pretrained, options.model, flow=options.flow)
    print(f"{options.model}, {options.steps or 'default'} steps, torch {torch.__version__}\n", flush=True)
    if options.layers:
        print_layers(load, options.layers, clip_frames(min(options.frames, 3), size), options.steps)
    elif options.heldout:
        few = [
            v for v in VARIANTS if v.scale == "dynamic" and v.scope != "all" and v.dtype == torch.float32 and v.number
        ]
        print_quality(load, few, options.frames, options.steps, options.only)
    else:
        wanted = [v for v in VARIANTS if v.scale != "static" or not options.without_static]
        print_nearness(load, wanted, clip_frames(options.frames, size), options.steps)


if __name__ == "__main__":
    main()
