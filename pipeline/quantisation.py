"""Eight-bit convolutions for OpenVINO: which values their inputs take, and the marks that OpenVINO compiles them by.

Knows: how ranges are measured on a made-up clip, and how a converted network is marked. Does not know: how networks are
converted, kept and run (`pipeline.openvino_backend`).

Weights are rounded to 8 bits with a scale for each output channel, inputs with one scale for the tensor that does not
depend on the frame at hand. The clip is made up so that any model can be rounded without data, and the same everywhere;
on the built-in model the ranges of real clips are no better (`benchmarks/quantisation-*.md`).

Left as they are: convolutions that take or make pictures or latents, and matrix products.

Shapes: h w input size, H W = 4h 4w output size, C latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backends import import_openvino
from pipeline.noise import frame_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.frame_core import FrameCore

SIDE: Final = 64  # of the clip's frames in pixels
SCENES: Final = 3
FRAMES: Final = 3  # of a scene
_SHAPES: Final = 160  # in a scene
_SCALE: Final = 4
_LARGEST: Final = 127
_FEWEST: Final = 8  # channels; fewer have pictures and latents
# OpenVINO's names of traced layers: "__module._owner.unet.conv_in/aten::_convolution/Convolution"
_NAME: Final = re.compile(r"_owner\.((?:unet|controlnet|vae)\.[\w.]+)/")
_NO_BIAS: Final = np.float32(1e-12)


class Range(NamedTuple):
    """Smallest and largest value of a layer's input; the smallest is at most 0."""

    low: float
    high: float


def scene(number: int) -> NDArray[np.float32]:
    """Return the first frame (h,w,3) of a scene in [0, 1]: rectangles of all sizes, plain and striped.

    Black and white are among their colours, so that values get as large as pictures can make them.
    """
    generator = np.random.default_rng(number)
    side = _SCALE * SIDE
    picture_HW3 = np.full((side, side, 3), 0.5, np.float32)
    for _ in range(_SHAPES):
        height, width = np.maximum(generator.exponential(side / 10, 2).astype(int), 2)
        top, left = generator.integers(0, side, 2)
        colour = generator.random(3) if generator.random() < 0.7 else np.full(3, generator.integers(0, 2))
        part_hw3 = picture_HW3[top : top + height, left : left + width]
        y_hw, x_hw = np.mgrid[: part_hw3.shape[0], : part_hw3.shape[1]]
        down, across = generator.uniform(0.1, 1.5, 2)
        stripes_hw = 0.25 * generator.random() * np.sin(down * y_hw + across * x_hw)
        part_hw3[:] = np.clip(colour + stripes_hw[..., None], 0, 1)
    return picture_HW3.reshape(SIDE, _SCALE, SIDE, _SCALE, 3).mean((1, 3))


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

    hooks = [module.register_forward_pre_hook(look) for module in names]
    try:
        for number in range(SCENES):
            previous_13HW: Tensor | None = None
            for frame_13hw, latents_1Chw, flow_12HW in _frames(number, int(guided.vae.config.latent_channels)):
                if previous_13HW is None:
                    previous_13HW = alone(frame_13hw, latents_1Chw)
                else:
                    previous_13HW = guided(frame_13hw, latents_1Chw, previous_13HW, flow_12HW)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def _frames(number: int, channels: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield frame (1,3,h,w) in [-1, 1], latents (1,C,h,w) and flow (1,2,H,W) of a scene that moves to the left."""
    first_13hw = torch.from_numpy(scene(number)).permute(2, 0, 1)[None] * 2 - 1
    flow_12HW = torch.zeros(1, 2, _SCALE * SIDE, _SCALE * SIDE)
    flow_12HW[:, 0] = _SCALE
    for index in range(FRAMES):
        latents = frame_noise((channels, SIDE, SIDE), seed=number, index=index, device=torch.device("cpu"))
        yield torch.roll(first_13hw, -index, dims=3), latents[None], flow_12HW


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
    high = max(-known.low, known.high, 1e-8)
    low = -high * (_LARGEST + 1) / _LARGEST if known.low < 0 else 0.0
    bounds = (np.float32(low), np.float32(high))
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
