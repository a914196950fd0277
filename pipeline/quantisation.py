"""Eight-bit convolutions for OpenVINO: which are worth it, which values their inputs take, and the marks.

Knows: how ranges and errors are measured on a made-up clip, and how a converted network is marked. Does not know: how
networks are converted, kept and run (`pipeline.openvino_backend`).

Weights are rounded to 8 bits with a scale for each output channel, inputs with one scale for the tensor that does not
depend on the frame at hand. The clip is made up so that any model can be rounded without data, and the same everywhere;
on the built-in model the ranges of real clips are no better (`benchmarks/quantisation-*.md`).

Left as they are: convolutions that take or make pictures or latents, matrix products, and blocks whose rounding the
model does not bear. Errors of blocks add up in the square (to 0.1 dB on the built-in model), so each block is rounded
by itself, and those of most error for their arithmetic are left out until the sum is small enough.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backends import import_openvino
from pipeline.made_up_clip import made_up_clip

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.frame_core import FrameCore

SCENES: Final = 3
FRAMES: Final = 3  # of a scene
_SIDE: Final = 32  # input pixels of the frames on which blocks are tried
_BLOCK_DEPTH: Final = 4  # parts of a block's name: "unet.up_blocks.2.resnets", "vae.decoder.layers.6"
_LARGEST: Final = 127
_FEWEST: Final = 8  # channels; fewer have pictures and latents
# OpenVINO's names of traced layers: "__module._owner.unet.conv_in/aten::_convolution/Convolution"
_NAME: Final = re.compile(r"_owner\.((?:unet|controlnet|vae)\.[\w.]+)/")
_NO_BIAS: Final = np.float32(1e-12)


class Range(NamedTuple):
    """Smallest and largest value of a layer's input; the smallest is at most 0."""

    low: float
    high: float


@torch.no_grad()
def measure_ranges(alone: FrameCore, guided: FrameCore) -> dict[str, Range]:
    """Return the range of the input of each convolution that the clip reached, by name: "unet.mid_block…".

    Args:
        alone: restores frames without a previous output, with networks in fp32 on the CPU.
        guided: restores the others, with the same networks.
    """
    ranges: dict[str, Range] = {}
    names: dict[nn.Module, str] = {m: name for name, m in guided.named_modules() if isinstance(m, nn.Conv2d)}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = (float(x) for x in inputs[0].aminmax())
        known = ranges.get(names[module], Range(0.0, 0.0))
        ranges[names[module]] = Range(min(low, known.low), max(high, known.high))

    channels = int(guided.vae.config.latent_channels)
    hooks = [module.register_forward_pre_hook(look) for module in names]
    try:
        for number in range(SCENES):
            previous_13HW: Tensor | None = None
            for frame_13hw, latents_1Chw, flow_12HW in made_up_clip(number, FRAMES, channels):
                if previous_13HW is None:
                    previous_13HW = alone(frame_13hw, latents_1Chw)
                else:
                    previous_13HW = guided(frame_13hw, latents_1Chw, previous_13HW, flow_12HW)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


@dataclass(slots=True)
class Block:
    """Convolutions that are rounded together or not at all.

    Attributes:
        error: mean squared error of the worst picture when these alone are rounded; pictures have range 2.
        work: multiplications of a picture, as far as a share of all matters.
    """

    names: list[str]
    error: float = 0.0
    work: int = 0


@torch.no_grad()
def measure_blocks(alone: FrameCore, guided: FrameCore, ranges: dict[str, Range]) -> list[Block]:
    """Return the blocks of those convolutions that can be rounded, each with its error; see `measure_ranges`."""
    layers = {
        name: module
        for name, module in guided.named_modules()
        if isinstance(module, nn.Conv2d) and name in ranges and min(module.weight.shape[:2]) >= _FEWEST
    }
    blocks: dict[str, Block] = {}
    for name in layers:
        blocks.setdefault(".".join(name.split(".")[:_BLOCK_DEPTH]), Block([])).names.append(name)
    work = dict.fromkeys(layers, 0)
    names = {module: name for name, module in layers.items()}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        work[names[module]] += module.weight[0].numel() * output.numel()

    hooks = [module.register_forward_hook(count) for module in names]
    wanted = _restore(alone, guided)
    for hook in hooks:
        hook.remove()
    for block in blocks.values():
        with _rounded({layers[name]: ranges[name] for name in block.names}):
            found = _restore(alone, guided)
        block.error = max(float((x - y).square().mean()) for x, y in zip(found, wanted, strict=True))
        block.work = sum(work[name] for name in block.names)
    return list(blocks.values())


def bearable(blocks: Iterable[Block], most_error: float) -> list[Block]:
    """Return the blocks to round, so that their errors together stay below `most_error`."""
    kept = sorted(blocks, key=lambda block: block.error / max(block.work, 1))
    while kept and sum(block.error for block in kept) > most_error:
        kept.pop()
    return kept


def _restore(alone: FrameCore, guided: FrameCore) -> list[Tensor]:
    outputs: list[Tensor] = []
    for frame_13hw, latents_1Chw, flow_12HW in made_up_clip(0, FRAMES, int(guided.vae.config.latent_channels), _SIDE):
        given = (outputs[-1], flow_12HW) if outputs else ()
        outputs.append((guided if outputs else alone)(frame_13hw, latents_1Chw, *given))
    return outputs


@contextlib.contextmanager
def _rounded(layers: dict[nn.Conv2d, Range]) -> Iterator[None]:
    """Round inputs and weights of `layers` as OpenVINO does where they are marked."""
    weights = {layer: layer.weight.data for layer in layers}

    def round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(layer, nn.Conv2d)
        low, high = _bounds(layers[layer])
        step = (high - low) / (2 * _LARGEST + 1)
        return ((inputs[0].clamp(low, high) - low) / step).round() * step + low

    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    try:
        for layer, weight in weights.items():
            step = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8) / _LARGEST
            layer.weight.data = (weight / step).round() * step
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, weight in weights.items():
            layer.weight.data = weight


def _bounds(known: Range) -> tuple[float, float]:
    high = max(-known.low, known.high, 1e-8)
    return (-high * (_LARGEST + 1) / _LARGEST if known.low < 0 else 0.0), high


def mark_int8(model: Any, ranges: dict[str, Range]) -> list[str]:
    """Mark the convolutions of a converted network whose ranges are known, in place; returns their names."""
    marked = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        found = _NAME.search(node.get_friendly_name())  # nodes that were folded together have lost their names
        name = found.group(1) if found else ""
        weight = node.input_value(1).get_node()
        if name not in ranges or weight.get_type_name() != "Constant" or min(weight.data.shape[:2]) < _FEWEST:
            continue
        _mark_input(node, ranges[name])
        _mark_weight(node, weight.data)
        _give_bias(node)
        marked.append(name)
    model.validate_nodes_and_infer_types()
    return marked


def _mark_input(node: Any, known: Range) -> None:
    operations = import_openvino().opset13
    bounds = tuple(np.float32(bound) for bound in _bounds(known))
    mark = operations.fake_quantize(node.input_value(0), *bounds, *bounds, 2 * _LARGEST + 2)
    node.input(0).replace_source_output(mark.output(0))


def _mark_weight(node: Any, weight: NDArray[np.float32]) -> None:
    operations = import_openvino().opset13
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True).astype(np.float32).clip(min=1e-8)
    mark = operations.fake_quantize(node.input_value(1), -largest, largest, -largest, largest, 2 * _LARGEST + 1)
    node.input(1).replace_source_output(mark.output(0))


def _give_bias(node: Any) -> None:
    """Add nothing to the output of a convolution without bias: OpenVINO 2026.4 loses the scale of such a one."""
    operations = import_openvino().opset13
    readers = list(node.output(0).get_target_inputs())
    for reader in readers:
        sources = [value.get_node().get_type_name() for value in reader.get_node().input_values()]
        if reader.get_node().get_type_name() == "Add" and "Constant" in sources:
            return
    channels = node.input_value(1).get_partial_shape()[0].get_length()
    summed = operations.add(node, operations.constant(np.full((1, channels, 1, 1), _NO_BIAS)))
    for reader in readers:
        reader.replace_source_output(summed.output(0))
