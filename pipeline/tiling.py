"""Tiles: how a frame that is too large for the memory at hand goes through the networks piece by piece.

Knows: where tiles lie, how far each network looks around a pixel, and how pieces are put together again. Does not know:
how much memory anything needs (`pipeline.memory` chooses the plan), streams, the denoising loop.

Two kinds of tiles:
  * ARTG's embedding, the temporal features and the decoder consist of convolutions and have no normalisation. A pixel
    depends on a bounded surrounding; a tile that is computed with that surrounding is exact, and nothing is blended.
    The published form of the TPM ("pooled") counts tokens along rows of the whole frame: its tiles are approximate.
  * U-Net and ARTG normalise over the frame, and may attend over it. Their tiles overlap and are blended by linear ramps
    after each prediction, so that all tiles go through the denoising steps together. The statistics of the
    normalisation are gathered over all tiles in a first pass and shared by all of them in the second.

Noise, latents, flow and state are those of the whole frame, always.

Shapes: B batch, L streams with a previous frame, h w input and latent size, H W = 4h 4w output size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny, TemporalBlock
from pipeline.flow import SCALE, FlowEstimator
from pipeline.guidance import WarpMode, embed_condition, flow_warp

UNET_BLEND: Final = 8  # half the width of the ramp across a border of two U-Net tiles, in latent pixels
UNET_CONTEXT: Final = 40  # what a U-Net tile sees beyond its ramp
FLOW_BLEND: Final = 8  # the same for tiles of flow, in input pixels
FLOW_CONTEXT: Final = 24  # motion beyond about this many input pixels is lost at the borders of flow tiles
SMALLEST_TILE: Final = 32
_POOLED_REACH: Final = 4  # surroundings granted to a pooled TPM; it has no bound


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Largest sides of tiles in input pixels, without surroundings; None runs that part on the whole frame.

    Attributes:
        decoder: of ARTG's embedding, the temporal features and the decoder.
        unet: of U-Net and ARTG. Streams of a batch then run one after the other.
        flow: of the flow estimator.
    """

    decoder: int | None = None
    unet: int | None = None
    flow: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut into tiles."""
        return self == TilePlan()

    def __str__(self) -> str:
        parts = {"decoder": self.decoder, "U-Net": self.unet, "flow": self.flow}
        return ", ".join(f"{name} {side}" for name, side in parts.items() if side is not None) or "whole frames"


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of pixels: rows `top` to `bottom` and columns `left` to `right`, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, margin: int, height: int, width: int) -> Window:
        """Return the window with `margin` more pixels on each side, within a frame of `height` by `width`."""
        return Window(
            max(0, self.top - margin),
            min(height, self.bottom + margin),
            max(0, self.left - margin),
            min(width, self.right + margin),
        )

    def times(self, factor: int) -> Window:
        """Return the same place in a picture that is `factor` times as large."""
        return Window(self.top * factor, self.bottom * factor, self.left * factor, self.right * factor)

    def inside(self, other: Window) -> Window:
        """Return this window in coordinates that start at the corner of `other`."""
        return Window(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)

    def of(self, x: Tensor) -> Tensor:
        """Return the view of `x` (..., H, W) in the window."""
        return x[..., self.top : self.bottom, self.left : self.right]


def tiles(height: int, width: int, side: int, multiple: int = 8) -> list[Window]:
    """Cut a frame into windows of about equal size: sides at most `side`, corners at multiples of `multiple`."""
    rows, columns = _cut(height, side, multiple), _cut(width, side, multiple)
    return [Window(top, bottom, left, right) for top, bottom in rows for left, right in columns]


def _cut(length: int, side: int, multiple: int) -> list[tuple[int, int]]:
    side = max(side // multiple, 1) * multiple
    pieces = -(-length // side)
    step = -(-length // (pieces * multiple)) * multiple
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def decoder_reach(vae: TemporalAutoencoderTiny) -> int:
    """Return how many latent pixels around its own place a pixel of the decoder's output depends on."""
    reach = 0
    for layer in reversed(list(vae.decoder.layers)):
        if isinstance(layer, nn.Upsample):
            reach = -(-reach // 2)
        elif isinstance(layer, nn.Conv2d):
            reach += 1
        elif isinstance(layer, TemporalBlock):
            reach += 4 if layer.fusion == "joint" else 3 + _POOLED_REACH
    return reach


def feature_reach(vae: TemporalAutoencoderTiny) -> int:
    """Return how many latent pixels (of 4 by 4 picture pixels) around its own place a temporal feature depends on."""
    reach = 0
    for layer in reversed(list(vae.encoder.layers)[:-1]):
        if isinstance(layer, nn.Conv2d):
            reach = layer.stride[0] * reach + 1
        elif isinstance(layer, TemporalBlock):
            reach += 3
    return -(-reach // SCALE)


def embedding_reach(controlnet: ControlNetModel) -> int:
    """Return how many latent pixels around its own place ARTG's embedding of the picture depends on."""
    embedding = controlnet.controlnet_cond_embedding
    reach = 0
    for layer in reversed([embedding.conv_in, *embedding.blocks, embedding.conv_out]):
        reach = layer.stride[0] * reach + 1
    return -(-reach // SCALE)


@dataclass(frozen=True, slots=True)
class Past:
    """Previous outputs of the streams that have one, to be looked at through windows.

    Attributes:
        pictures: one (3,H,W) for each of L streams.
        warp: arithmetic of the warp.
        flow_L2HW: to the previous frame; None where nothing is warped.
    """

    pictures: Sequence[Tensor]
    warp: WarpMode
    flow_L2HW: Tensor | None = None

    def warped(self, stream: int, window: Window) -> Tensor:
        """Return the part (1,3,..) of the warped previous output that lies in `window` of the output frame."""
        assert self.flow_L2HW is not None
        flow = window.of(self.flow_L2HW[stream : stream + 1])
        return flow_warp(self.pictures[stream].unsqueeze(0), flow, self.warp, top=window.top, left=window.left)

    def plain(self, stream: int, window: Window) -> Tensor:
        """Return the part (1,3,..) of the previous output as it was."""
        return window.of(self.pictures[stream].unsqueeze(0))


Look = Callable[[int, Window], Tensor]


def embed_in_tiles(controlnet: ControlNetModel, past: Past, frames_B3hw: Tensor, side: int) -> Tensor:
    """Return what `embed_condition` returns for the warped previous outputs (L,C,h,w); equal up to rounding.

    Of `frames_B3hw` the size alone counts.
    """
    height, width = frames_B3hw.shape[2:]
    reach = embedding_reach(controlnet)
    result: Tensor | None = None
    for core in _run(tiles(height, width, side), controlnet.device):
        seen = core.grown(reach, height, width)
        for stream in range(len(past.pictures)):
            part = embed_condition(controlnet, past.warped(stream, seen.times(SCALE)))
            if result is None:
                shape = (len(past.pictures), part.shape[1], height, width)
                result = part.new_empty(shape).to(memory_format=torch.channels_last)
            core.of(result[stream : stream + 1]).copy_(core.inside(seen).of(part))
    assert result is not None
    return result


def decode_in_tiles(
    vae: TemporalAutoencoderTiny, latents_BChw: Tensor, look: Look, later: Sequence[int], side: int
) -> Tensor:
    """Return what `vae.decode` returns (B,3,H,W), tile by tile, those of `later` with temporal features.

    Equal up to rounding for decoders whose TPMs are "joint" or silent; for "pooled" ones see `docs/large_frames.md`.

    Args:
        look: gives the picture for the temporal features of a stream, by its number in `later`, in a window of the
            output frame.
    """
    batch, _, height, width = latents_BChw.shape
    reach = -(-decoder_reach(vae) // 4) * 4  # corners at multiples of 4, where a pooled TPM's windows lie
    features_reach = -(-feature_reach(vae) // 4) * 4
    output = latents_BChw.new_empty((batch, vae.config.out_channels, height * SCALE, width * SCALE))
    for core in _run(tiles(height, width, side), latents_BChw.device):
        seen = core.grown(reach, height, width)
        for b in range(batch):
            features = None
            if b in later:
                wide = seen.grown(features_reach, height, width)
                features = [
                    seen.inside(wide).times(feature.shape[-1] // (wide.right - wide.left)).of(feature)
                    for feature in vae.encode_temporal(look(later.index(b), wide.times(SCALE)))
                ]
            part = vae.decode(seen.of(latents_BChw[b : b + 1]), features)
            core.times(SCALE).of(output[b : b + 1]).copy_(core.inside(seen).times(SCALE).of(part))
    return output


def predict_in_tiles(
    predict: Callable[[int, Window], Tensor],
    networks: Sequence[nn.Module],
    shape: tuple[int, int, int, int],
    side: int,
    multiple: int,
    device: torch.device,
    shared_statistics: bool = True,
) -> Tensor:
    """Return predictions (R,C,h,w), fp32, put together from overlapping tiles by linear ramps.

    Args:
        predict: gives the prediction of one row in a window of the latent.
        networks: whose group normalisations run in `predict`.
        shape: of the result.
        multiple: by which the networks reduce their input; corners of tiles lie at multiples of it.
        shared_statistics: normalise by the statistics of all tiles together, which costs a second pass.
    """
    rows, _, height, width = shape
    cores = tiles(height, width, side, multiple)
    margin = -(-(UNET_BLEND + UNET_CONTEXT) // multiple) * multiple
    total = torch.zeros(shape, device=device)
    for row in range(rows):
        statistics = _Statistics()

        def look(norm: nn.GroupNorm, x: Tensor, statistics: _Statistics = statistics) -> Tensor:
            statistics.add(norm, x)
            return type(norm).forward(norm, x)

        shared = shared_statistics and len(cores) > 1
        if shared:
            with _norms_replaced(networks, look):
                for core in _run(cores, device):
                    seen = core.grown(margin, height, width)
                    statistics.focus = (core, seen)
                    predict(row, seen)
        with _norms_replaced(networks if shared else (), statistics.apply):
            for core in _run(cores, device):
                seen = core.grown(margin, height, width)
                part = predict(row, seen).to(torch.float32) * blend_ramps(core, seen, UNET_BLEND, device)
                seen.of(total[row : row + 1]).add_(part)
    return total


def flow_in_tiles(flow: FlowEstimator, current_B3hw: Tensor, previous_B3hw: Tensor, side: int) -> Tensor:
    """Return the flow (B,2,H,W) put together from overlapping tiles by linear ramps.

    Each tile sees its own place of both frames only, so motion out of it is estimated badly.
    """
    batch, _, height, width = current_B3hw.shape
    total = torch.zeros((batch, 2, height * SCALE, width * SCALE), device=current_B3hw.device)
    for core in _run(tiles(height, width, side), total.device):
        seen = core.grown(FLOW_BLEND + FLOW_CONTEXT, height, width)
        for b in range(batch):
            part = flow(seen.of(current_B3hw[b : b + 1]).contiguous(), seen.of(previous_B3hw[b : b + 1]).contiguous())
            ramps = blend_ramps(core.times(SCALE), seen.times(SCALE), FLOW_BLEND * SCALE, part.device)
            seen.times(SCALE).of(total[b : b + 1]).add_(part * ramps)
    return total


def blend_ramps(core: Window, seen: Window, blend: int, device: torch.device) -> Tensor:
    """Return the weight (h,w) of every pixel of `seen`: one inside `core`, falling linearly to zero across its borders.

    The weights of neighbouring tiles add up to one. There is no ramp where the tile ends with the frame.
    """

    def along(start: int, stop: int, first: int, last: int) -> Tensor:
        at = torch.arange(first, last, device=device, dtype=torch.float32) + 0.5
        rise = ((at - start) / (2 * blend) + 0.5).clamp(0, 1) if start > first else torch.ones_like(at)
        fall = ((stop - at) / (2 * blend) + 0.5).clamp(0, 1) if stop < last else torch.ones_like(at)
        return rise * fall

    rows = along(core.top, core.bottom, seen.top, seen.bottom)
    return rows.unsqueeze(1) * along(core.left, core.right, seen.left, seen.right)


def _run(cores: list[Window], device: torch.device) -> list[Window]:
    """Return the tiles to compute: all of them, or one of the largest where tensors only stand for their sizes."""
    return cores if device.type != "meta" else [cores[len(cores) // 2]]


class _Statistics:
    """Mean and mean square of the groups of every normalisation, over all tiles of a frame."""

    def __init__(self) -> None:
        self.focus: tuple[Window, Window] | None = None  # the part of a tile that is its own, and the tile
        self._sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def add(self, norm: nn.GroupNorm, x: Tensor) -> None:
        """Count one tile's input (1,C,..) of `norm`."""
        if self.focus is not None and x.ndim == 4:
            core, seen = self.focus
            inside, width = core.inside(seen), seen.right - seen.left
            ends = (round(end * x.shape[-1] / width) for end in (inside.top, inside.bottom, inside.left, inside.right))
            x = Window(*ends).of(x)
        count = x[0, 0].numel()
        variance_C, mean_C = torch.var_mean(x[0].to(torch.float32), dim=tuple(range(1, x.ndim - 1)), correction=0)
        mean_G = mean_C.unflatten(0, (norm.num_groups, -1)).mean(1)
        square_G = (variance_C + mean_C * mean_C).unflatten(0, (norm.num_groups, -1)).mean(1)
        before = self._sums.get(norm, (torch.zeros_like(mean_G), torch.zeros_like(mean_G), 0))
        self._sums[norm] = (before[0] + count * mean_G, before[1] + count * square_G, before[2] + count)

    def apply(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Normalise `x` (1,C,..) by the statistics of the frame."""
        mean_sum, square_sum, count = self._sums[norm]
        mean_G = mean_sum / count
        scale_G = torch.rsqrt(square_sum / count - mean_G * mean_G + norm.eps)
        each = norm.num_channels // norm.num_groups
        scale_C = scale_G.repeat_interleave(each) * norm.weight
        offset_C = norm.bias - mean_G.repeat_interleave(each) * scale_C
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        return torch.addcmul(offset_C.to(x.dtype).view(shape), x, scale_C.to(x.dtype).view(shape))


@contextmanager
def _norms_replaced(networks: Sequence[nn.Module], forward: Callable[[nn.GroupNorm, Tensor], Tensor]) -> Iterator[None]:
    """Let every group normalisation of `networks` compute `forward(norm, x)` meanwhile."""
    norms = [module for network in networks for module in network.modules() if isinstance(module, nn.GroupNorm)]
    for norm in norms:
        norm.forward = partial(forward, norm)  # type: ignore[method-assign]  # the instance's, not the class's
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
