"""Guidance by the previous output: the flow warp, and ARTG, the ControlNet that is conditioned on the warped picture.

Knows: how a previous output is moved onto the current frame, and how its residuals for the U-Net are computed (paper
section 3.2, "auto-regressive temporal guidance"). Does not know: where flow comes from, streams, the denoising loop.

Shapes: B batch, C channels, H W output size in pixels, h w input and latent size (H/4, W/4), T tokens, D token width.
Units: flow in output pixels, channel 0 = dx (to the right), 1 = dy (down), from the current frame to the previous one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor

WarpMode = Literal["published", "exact"]


def flow_warp(
    image_BCHW: Tensor, flow_B2HW: Tensor, mode: WarpMode = "published", *, top: int = 0, left: int = 0
) -> Tensor:
    """Fetch, for every pixel, the value of `image_BCHW` at the place that the flow points to; bilinear.

    Args:
        image_BCHW: picture of the previous frame, any range.
        flow_B2HW: displacement in pixels, channel 0 = dx, 1 = dy; same height and width, or those of a part.
        mode: ``"published"`` repeats the arithmetic with which the published weights were trained: positions are
            normalised as if corners were aligned, and sampled as if they were not. A flow of zero then samples at
            ``x W/(W-1) - 0.5`` (a shift by up to half a pixel) and the outermost pixels mix with zero. ``"exact"``
            samples at ``x + dx`` and repeats the border outside, so that a flow of zero is the identity.
        top, left: where in the frame the flow's first pixel lies, when it is that of a part.

    Returns:
        (B,C,..) of the flow's size in the image's dtype; differentiable with respect to image and flow. Positions are
        computed in fp32 whatever the dtype: bfloat16 cannot count beyond 256 pixels.

    Raises:
        ValueError: an unknown `mode`.
    """
    if mode not in ("published", "exact"):
        raise ValueError(f"warp mode {mode!r} is neither 'published' nor 'exact'")
    height, width = image_BCHW.shape[-2:]
    rows, columns = flow_B2HW.shape[-2:]
    flow_B2HW = flow_B2HW.to(torch.float32)
    x_W = torch.arange(left, left + columns, device=flow_B2HW.device, dtype=torch.float32)
    y_H1 = torch.arange(top, top + rows, device=flow_B2HW.device, dtype=torch.float32).unsqueeze(1)
    grid_x_BHW = 2.0 * (x_W + flow_B2HW[:, 0]) / max(width - 1, 1) - 1.0
    grid_y_BHW = 2.0 * (y_H1 + flow_B2HW[:, 1]) / max(height - 1, 1) - 1.0
    exact = mode == "exact"
    warped = F.grid_sample(
        image_BCHW.to(torch.float32),
        torch.stack((grid_x_BHW, grid_y_BHW), dim=3),
        mode="bilinear",
        padding_mode="border" if exact else "zeros",
        align_corners=exact,
    )
    return warped.to(image_BCHW.dtype)


@dataclass(frozen=True, slots=True)
class Residuals:
    """What ARTG adds inside the U-Net: one tensor per skip connection, and one for the middle block."""

    down: list[Tensor]
    mid: Tensor

    def spread(self, rows: list[int], batch: int) -> Residuals:
        """Place the rows of this object at `rows` of a batch of `batch`; zeros elsewhere change nothing when added."""

        def place(x: Tensor) -> Tensor:
            full = x.new_zeros((batch, *x.shape[1:]))
            full[rows] = x
            return full

        return Residuals(down=[place(x) for x in self.down], mid=place(self.mid))


def embed_condition(controlnet: ControlNetModel, warped_B3HW: Tensor) -> Tensor:
    """Return ARTG's embedding of the warped previous output (B,C,h,w).

    It does not depend on the timestep, so one call serves all steps of a frame.
    """
    if controlnet.config.controlnet_conditioning_channel_order == "bgr":
        warped_B3HW = warped_B3HW.flip(1)
    return controlnet.controlnet_cond_embedding(warped_B3HW)


def artg_residuals(
    controlnet: ControlNetModel, x_BChw: Tensor, timestep_B: Tensor, prompt_BTD: Tensor, condition_BChw: Tensor
) -> Residuals:
    """Run ARTG for one denoising step with a condition that was embedded before.

    Gives the numbers of ``ControlNetModel.forward`` with scale 1 and no guess mode, without embedding the picture
    again: at 4x size that embedding costs as much as the rest of a small ControlNet.

    Args:
        x_BChw: latent and low-resolution frame, concatenated.
        timestep_B: integer timesteps.
        prompt_BTD: text embedding.
        condition_BChw: from `embed_condition`.
    """
    t_emb = controlnet.time_embedding(controlnet.time_proj(timestep_B).to(x_BChw.dtype))
    x = controlnet.conv_in(x_BChw) + condition_BChw
    skips: tuple[Tensor, ...] = (x,)
    for block in controlnet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            x, outputs = block(hidden_states=x, temb=t_emb, encoder_hidden_states=prompt_BTD)
        else:
            x, outputs = block(hidden_states=x, temb=t_emb)
        skips += outputs
    if getattr(controlnet.mid_block, "has_cross_attention", False):
        x = controlnet.mid_block(x, t_emb, encoder_hidden_states=prompt_BTD)
    else:
        x = controlnet.mid_block(x, t_emb)
    down = [conv(skip) for conv, skip in zip(controlnet.controlnet_down_blocks, skips, strict=True)]
    return Residuals(down=down, mid=controlnet.controlnet_mid_block(x))


def reference_residuals(
    controlnet: ControlNetModel, x_BChw: Tensor, timestep_B: Tensor, prompt_BTD: Tensor, warped_B3HW: Tensor
) -> Residuals:
    """Run ARTG for one denoising step by ``ControlNetModel.forward``: the published path, for comparison."""
    down, mid = controlnet(
        x_BChw, timestep_B, encoder_hidden_states=prompt_BTD, controlnet_cond=warped_B3HW, return_dict=False
    )
    return Residuals(down=list(down), mid=mid)
