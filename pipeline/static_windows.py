"""A step of which only a window is computed: what changed is restored, the previous output stays elsewhere.

Knows: which part of a frame the networks have to see so that the window comes out as in a whole frame, and how it is
blended in. Does not know: why a window is enough; `pipeline.step_policy` chooses it.

Noise, flow and previous output are those of the whole frame. U-Net and ARTG normalise over what they see, which is the
window and its surroundings here: that changes its pixels a little. benchmarks/static-tiles-*.md has the figures.

Shapes: h w input and latent size, H W = 4h 4w output size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from pipeline.engine import StandIn
from pipeline.flow import SCALE
from pipeline.guidance import flow_warp
from pipeline.preconditions import require_inputs
from pipeline.tiling import Window, blend_ramps, decoder_reach

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.state import StreamState
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

BLEND: Final = 4  # half the width of the ramp across the window's border, in input pixels
CONTEXT: Final = 16  # what the U-Net sees beyond what the decoder needs; 40 came out the same


def step_window(pipe: Engine, frame_13hw: Tensor, state: StreamState, steps: int | None, window: Window) -> Tensor:
    """Restore the next frame of one stream inside `window`, and update the state.

    The state's previous input becomes the frame inside the window and stays what it was outside, where the previous
    output stays as well: so the two belong together. Where a window cannot be had (no previous frame, ablations,
    attention, tiles, a stand-in) the whole frame is restored.

    Args:
        frame_13hw: input in [-1, 1].
        window: what changed, in input pixels.

    Returns:
        The whole output (1,3,4h,4w) as fp32, not clamped.

    Raises:
        PipelineError: as `StreamDiffVSRPipeline.step`.
    """
    if isinstance(pipe, StandIn) or not _can_cut(pipe, frame_13hw, state):
        return pipe.step(frame_13hw, [state], steps=steps)
    require_inputs(pipe, frame_13hw, [state], None, None, ("latents",))
    assert state.prev_input_3HW is not None and state.prev_output_3HW is not None
    device, dtype = pipe.device, pipe.unet.dtype
    frame_13hw = frame_13hw.to(device, torch.float32)
    height, width = frame_13hw.shape[2:]
    seen = seen_for(pipe, window, height, width)
    with torch.no_grad():
        previous_13HW = state.prev_output_3HW.to(device, dtype)[None]
        flow_12HW = pipe.flow(frame_13hw, state.prev_input_3HW.to(device, torch.float32)[None]).to(device)
        out = seen.times(SCALE)
        warped = flow_warp(previous_13HW, out.of(flow_12HW), pipe.options.warp, top=out.top, left=out.left)
        latents = seen.of(pipe._initial_latents(frame_13hw, [state], None))
        part = pipe.restore_warped(seen.of(frame_13hw), latents, warped, steps).to(dtype)
        weight = blend_ramps(window.times(SCALE), out, BLEND * SCALE, part.device).to(part.dtype)
        output_13HW = previous_13HW.clone(memory_format=torch.contiguous_format)
        place = out.of(output_13HW)
        place.lerp_(part, weight.expand_as(part))
        input_13hw = state.prev_input_3HW.to(device, torch.float32)[None].clone(memory_format=torch.contiguous_format)
        window.of(input_13hw).copy_(window.of(frame_13hw))
    state.advance(output_13HW[0], input_13hw[0])
    return output_13HW.to(torch.float32)


def seen_for(pipe: StreamDiffVSRPipeline, window: Window, height: int, width: int) -> Window:
    """Return what the networks see for a window, with corners where the U-Net reduces a whole frame alike."""
    multiple = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    wide = window.grown(BLEND + CONTEXT + decoder_reach(pipe.vae), height, width)
    return Window(
        wide.top // multiple * multiple,
        min(height, -(-wide.bottom // multiple) * multiple),
        wide.left // multiple * multiple,
        min(width, -(-wide.right // multiple) * multiple),
    )


def _can_cut(pipe: StreamDiffVSRPipeline, frame_13hw: Tensor, state: StreamState) -> bool:
    guidance = pipe.guidance
    if state.is_first or not (guidance.artg and guidance.tpm and guidance.tpm_warped and pipe.cache_condition):
        return False
    return pipe.memory_limit_bytes is None and pipe.tiling.is_whole and not _attends(pipe.unet)


def _attends(network: nn.Module) -> bool:
    """Whether a pixel may depend on all others beside by normalisation."""
    return any(isinstance(module, Attention) for module in network.modules())
