"""One frame through all networks as one function of tensors: what can be captured, exported and compiled as a whole.

Knows: the arithmetic of a step for streams that are alike: all with a previous output or all without, on one schedule;
and flow, where the network of our own estimates it (`pipeline.flow_net`). Does not know: states, other estimators of
flow, noise, tiles, or what runs the function (`pipeline.backends`).

`StreamDiffVSRPipeline` has the same arithmetic for batches of unlike streams, with callbacks and tiles; tests hold the
two together. Nothing in here depends on values of tensors, and sizes come from shapes alone.

Shapes: B streams, h w input size, H W = 4h 4w output size, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.flow import upscale_flow
from pipeline.guidance import artg_residuals, embed_condition, flow_warp
from pipeline.options import Guidance
from pipeline.schedule import Schedule, ddim_roots, ddim_update

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline


@dataclass(frozen=True, slots=True)
class CoreKind:
    """Which function: for streams with a previous output or without, on which schedule, and how guidance is used.

    Attributes:
        flow_network: estimates the flow as a part of the function (`pipeline.flow.NetFlow.network`); None: the flow is
            given to it, or nothing is warped.
    """

    guided: bool
    schedule: Schedule
    guidance: Guidance
    flow_network: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class CoreInputs:
    """What the function takes, on one device.

    Attributes:
        frames_B3hw: input frames in [-1, 1], fp32.
        latents_BChw: initial latents, fp32.
        previous_B3HW: previous outputs as the decoder gave them; None without guidance.
        motion: the flow (B,2,H,W) to the previous frame in output pixels, fp32; for a function that estimates it the
            previous input frames (B,3,h,w), fp32; None without guidance, and where nothing is warped.
    """

    frames_B3hw: Tensor
    latents_BChw: Tensor
    previous_B3HW: Tensor | None = None
    motion: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there, in the order of `FrameCore.forward`."""
        given = (self.frames_B3hw, self.latents_BChw, self.previous_B3HW, self.motion)
        return tuple(x for x in given if x is not None)


class FrameCore(nn.Module):
    """The function itself; it shares the networks of `pipe` and follows their dtype and device.

    Args:
        pipe: its options are read now.
        kind: see `CoreKind`.
    """

    timesteps: Tensor
    prompt_embeds_1TD: Tensor

    def __init__(self, pipe: StreamDiffVSRPipeline, kind: CoreKind) -> None:
        super().__init__()
        self.unet, self.controlnet, self.vae = pipe.unet, pipe.controlnet, pipe.vae
        self.flow_network = kind.flow_network
        self.scheduler = pipe.scheduler
        self.kind = kind
        self.uses_artg = kind.guided and kind.guidance.artg
        self.uses_tpm = kind.guided and kind.guidance.tpm
        self.warps_for_tpm = kind.guidance.tpm_warped
        self.warp = pipe.options.warp
        schedule = kind.schedule
        self.roots = [
            ddim_roots(pipe.scheduler, *pair) for pair in zip(schedule.timesteps, schedule.previous, strict=True)
        ]
        self.register_buffer("timesteps", torch.tensor(schedule.timesteps, device=pipe.device), persistent=False)
        self.register_buffer("prompt_embeds_1TD", pipe.prompt_embeds_1TD.to(pipe.device), persistent=False)

    def forward(
        self,
        frames_B3hw: Tensor,
        latents_BChw: Tensor,
        previous_B3HW: Tensor | None = None,
        motion: Tensor | None = None,
    ) -> Tensor:
        """Return the decoder's output (B,3,H,W) in the dtype of the networks; arguments as in `CoreInputs`."""
        flow_B2HW = motion
        if self.flow_network is not None and motion is not None:
            flow_B2HW = self.estimate(frames_B3hw, motion)
        return self.restore(frames_B3hw, latents_BChw, *self.look_back(previous_B3HW, flow_B2HW))

    def look_back(self, previous_B3HW: Tensor | None, flow_B2HW: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what ARTG sees of the previous output and what the temporal modules see (B,3,H,W); None: nothing."""
        if previous_B3HW is None:
            return None, None
        previous_B3HW = previous_B3HW.to(self.unet.dtype)
        warped_B3HW = None if flow_B2HW is None else flow_warp(previous_B3HW, flow_B2HW, self.warp)
        seen_B3HW = warped_B3HW if self.warps_for_tpm else previous_B3HW
        return (warped_B3HW if self.uses_artg else None), (seen_B3HW if self.uses_tpm else None)

    def restore(
        self, frames_B3hw: Tensor, latents_BChw: Tensor, warped_B3HW: Tensor | None, seen_B3HW: Tensor | None
    ) -> Tensor:
        """Return the decoder's output; the last two arguments are what `look_back` returned."""
        dtype = self.unet.dtype
        condition_BChw = None if warped_B3HW is None else self.embed(warped_B3HW)
        estimate_BChw = None
        if self.vae.lr_projection is not None:
            estimate_BChw = self.vae.lr_projection(frames_B3hw.to(dtype)).to(torch.float32)
        for number, roots in enumerate(self.roots):
            x_BChw = torch.cat([latents_BChw, frames_B3hw], dim=1).to(dtype)
            timestep_B = self.timesteps.narrow(0, number, 1).expand(frames_B3hw.shape[0])
            output_BChw = self.predict(x_BChw, timestep_B, condition_BChw).to(torch.float32)
            if estimate_BChw is not None:
                output_BChw = output_BChw + estimate_BChw
            latents_BChw = ddim_update(self.scheduler, output_BChw, latents_BChw, roots)
        return self.decode((latents_BChw / self.vae.config.scaling_factor).to(dtype), seen_B3HW)

    def estimate(self, frames_B3hw: Tensor, before_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,H,W) to the input frames before, in fp32 whatever the networks compute in."""
        assert self.flow_network is not None
        return upscale_flow(self.flow_network(frames_B3hw, before_B3hw))

    def embed(self, warped_B3HW: Tensor) -> Tensor:
        """Return ARTG's embedding (B,C,h,w) of the warped previous output."""
        return embed_condition(self.controlnet, warped_B3HW)

    def predict(self, x_BChw: Tensor, timestep_B: Tensor, condition_BChw: Tensor | None) -> Tensor:
        """Return the U-Net's prediction (B,C,h,w) for latents and frames, guided by ARTG if there is a condition."""
        prompt_BTD = self.prompt_embeds_1TD.to(x_BChw.dtype).expand(x_BChw.shape[0], -1, -1)
        down = mid = None
        if condition_BChw is not None:
            residuals = artg_residuals(self.controlnet, x_BChw, timestep_B, prompt_BTD, condition_BChw)
            down, mid = tuple(residuals.down), residuals.mid
        prediction: Tensor = self.unet(
            x_BChw,
            timestep_B,
            encoder_hidden_states=prompt_BTD,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return prediction

    def decode(self, latents_BChw: Tensor, seen_B3HW: Tensor | None) -> Tensor:
        """Return the decoder's output (B,3,H,W), with temporal features of `seen_B3HW` if that is given."""
        features = None if seen_B3HW is None else self.vae.encode_temporal(seen_B3HW)
        return self.vae.decode(latents_BChw, features)
