"""A larger model that restores exactly as a smaller one does, to be trained on from there.

Depth: new residual layers add nothing, because their last convolution is zero. Width: new channels of the autoencoder
are computed, but nothing reads them, because the weights that would are zero (Chen et al., Net2Net, 2016, in the form
without noise). In both cases the first gradients already reach the weights that are zero.

The U-Net is not widened: its group normalisations mix channels, and new ones would change the old.

Knows: the layout of the networks. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipeline.autoencoder import TemporalBlock
from pipeline.errors import PipelineError
from pipeline.restorer import ModelSize, Restorer

Module = TypeVar("Module", bound=nn.Module)


class GrowthError(PipelineError):
    """A model cannot grow to the size that was asked for."""


@torch.no_grad()
def grow(model: Restorer, size: ModelSize) -> Restorer:
    """Return a new model of `size` whose outputs are those of `model`, but for rounding.

    Args:
        model: with or without ARTG; it is not changed.
        size: at least as large everywhere; U-Net widths, groups, latents, ARTG's embedding and the form of the TPMs
            must be those of `model`.

    Raises:
        GrowthError: `size` is smaller somewhere, or differs where nothing can grow.
    """
    _require_larger(model.size, size)
    grown = Restorer.create(size)
    if model.controlnet is not None:
        grown.add_guidance(size.conditioning)
    grown.scheduler.register_to_config(**model.scheduler.config)
    grown.history = dict(model.history)
    _grow_unet(model, grown)
    _grow_autoencoder(model, grown)
    return grown


def _require_larger(old: ModelSize, new: ModelSize) -> None:
    for name in ("unet", "groups", "conditioning", "latent_channels", "temporal_fusion"):
        if getattr(old, name) != getattr(new, name):
            raise GrowthError(
                f"{name} is {getattr(old, name)}, and would become {getattr(new, name)}; it cannot change by growing.",
                code="growth-size",
                remedy="Choose a size that differs in layers, widths of the autoencoder or its blocks alone.",
            )
    pairs = [
        ("layers", (old.layers,), (new.layers,)),
        ("autoencoder", old.autoencoder, new.autoencoder),
        ("encoder_blocks", old.encoder_blocks, new.encoder_blocks),
    ]
    for name, before, after in pairs:
        if any(b > a for b, a in zip(before, after, strict=True)):
            raise GrowthError(
                f"{name} would shrink from {before} to {after}.",
                code="growth-size",
                remedy="Choose a size that is larger everywhere, or train one from nothing.",
            )


def _grow_unet(model: Restorer, grown: Restorer) -> None:
    """Give U-Net and ARTG more layers; skip connections go where what they carried went."""
    old, new = model.size.layers, grown.size.layers
    networks = [(model.unet, grown.unet)]
    if model.controlnet is not None and grown.controlnet is not None:
        networks.append((model.controlnet, grown.controlnet))
    for before, after in networks:
        replaced = ("down_blocks", "up_blocks", "controlnet_down_blocks")
        for name, module in after.named_children():
            if name not in replaced:
                module.load_state_dict(before.get_submodule(name).state_dict())
        for block, source in _pairs(after.down_blocks, before.down_blocks):
            _grow_layers(block, source, range(old))
            _copy(block.downsamplers, source.downsamplers)
    # Up blocks take the skips of a level from its last layer back. The new layers of the way down come last and repeat
    # what the last old one gave, so the first layer of the way up stays first, and the new ones follow it.
    places = [0, *range(1 + new - old, new + 1)]
    for block, source in _pairs(grown.unet.up_blocks, model.unet.up_blocks):
        _grow_layers(block, source, places)
        _copy(block.upsamplers, source.upsamplers)
    if model.controlnet is not None:
        _grow_residuals(model, grown)


def _grow_layers(block: nn.Module, source_block: nn.Module, places: Sequence[int]) -> None:
    """Put each layer of the source into its place; the others pass on what they get, but nothing from a skip."""
    resnets = [cast(ResnetBlock2D, one) for one in cast(nn.ModuleList, block.resnets)]
    for place, source in zip(places, cast(nn.ModuleList, source_block.resnets), strict=True):
        resnets[place].load_state_dict(source.state_dict())
    for number, resnet in enumerate(resnets):
        if number in places:
            continue
        _zero(resnet.conv2)
        if resnet.conv_shortcut is not None:
            shortcut = resnet.conv_shortcut
            _zero(shortcut)
            nn.init.eye_(shortcut.weight[:, : shortcut.out_channels, 0, 0])


def _grow_residuals(model: Restorer, grown: Restorer) -> None:
    """Move the zero convolutions, one for each skip: that of a level's last layer goes to its last layer now."""
    old, new, levels = model.size.layers, grown.size.layers, len(model.size.unet)
    assert model.controlnet is not None and grown.controlnet is not None
    sources, targets = model.controlnet.controlnet_down_blocks, grown.controlnet.controlnet_down_blocks
    targets[0].load_state_dict(sources[0].state_dict())
    for level in range(levels):
        sampled = int(level < levels - 1)  # the last level has no downsampler, and so no skip of one
        first_old, first_new = 1 + level * (old + 1), 1 + level * (new + 1)
        moved = {first_old + n: first_new + n for n in range(old - 1)} | {first_old + old - 1: first_new + new - 1}
        if sampled:
            moved[first_old + old] = first_new + new
        for source, target in moved.items():
            targets[target].load_state_dict(sources[source].state_dict())


def _grow_autoencoder(model: Restorer, grown: Restorer) -> None:
    """Widen and deepen encoder and decoder, stage by stage."""
    old, new = model.size, grown.size
    for before, after, blocks_before, blocks_after in (
        (model.vae.encoder, grown.vae.encoder, old.encoder_blocks, new.encoder_blocks),
        (model.vae.decoder, grown.vae.decoder, old.encoder_blocks[::-1], new.encoder_blocks[::-1]),
    ):
        sources, targets = iter(before.layers), iter(after.layers)
        for few, many in zip(blocks_before, blocks_after, strict=True):
            while True:  # convolutions and resizing before the blocks of a stage
                source, target = next(sources), next(targets)
                if isinstance(source, TemporalBlock):
                    break
                _widen(target, source)
            _widen_block(cast(TemporalBlock, target), source)
            for _ in range(few - 1):
                _widen_block(cast(TemporalBlock, next(targets)), cast(TemporalBlock, next(sources)))
            for _ in range(many - few):  # behind another block, where nothing is negative, so that ReLU passes it on
                _pass_on(cast(TemporalBlock, next(targets)))
        for source, target in zip(sources, targets, strict=True):
            _widen(target, source)
    _copy(grown.vae.lr_projection, model.vae.lr_projection)


def _widen_block(block: TemporalBlock, source: TemporalBlock) -> None:
    for target, one in zip(block.conv, source.conv, strict=True):
        _widen(target, one)
    if not hasattr(block, "temporal_processor") or not hasattr(source, "temporal_processor"):
        return
    first, second = block.temporal_processor[0], block.temporal_processor[2]
    if block.fusion != "joint":
        _widen(first, source.temporal_processor[0])
        _widen(second, source.temporal_processor[2])
        block.alpha.copy_(source.alpha)
        return
    _widen(first, source.temporal_processor[0], parts=2)  # both frames' features, one behind the other
    _widen(second, source.temporal_processor[2])


def _pass_on(block: TemporalBlock) -> None:
    """Make a new block add nothing to what it gets, and nothing from the previous frame."""
    _zero(cast(nn.Conv2d, block.conv[4]))
    if hasattr(block, "temporal_processor"):
        _zero(cast(nn.Conv2d, block.temporal_processor[2]))


def _widen(module: nn.Module, source: nn.Module, parts: int = 1) -> None:
    """Copy a convolution into a wider one.

    What is new among its outputs keeps its fresh weights; the old outputs read nothing of what is new among the inputs.
    """
    if not isinstance(source, nn.Conv1d | nn.Conv2d):
        return
    target = cast(nn.Conv2d, module)
    outputs = source.out_channels
    target.weight[:outputs] = 0
    for part in range(parts):
        old, new = source.in_channels // parts, target.in_channels // parts
        target.weight[:outputs, part * new : part * new + old] = source.weight[:, part * old : (part + 1) * old]
    if source.bias is not None:
        cast(Tensor, target.bias)[:outputs] = source.bias


def _zero(convolution: nn.Module) -> None:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)


def _copy(target: object, source: object) -> None:
    if isinstance(target, nn.Module) and isinstance(source, nn.Module):
        target.load_state_dict(source.state_dict())


def _pairs(targets: Iterable[nn.Module], sources: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, nn.Module]]:
    return zip(targets, sources, strict=True)
