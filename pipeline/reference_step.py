"""One step by its parts, network after network: the reference for everything that runs a frame as a whole.

Knows: the order of operations for unlike streams in one batch, tiles, and callbacks between denoising steps. Does not
know: states, flow estimation, noise.

Shapes: B streams of the batch, L those among them with a previous frame, R those that are still being denoised, h w
input size, H W = 4h 4w output size, C latent channels, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.guidance import Residuals, artg_residuals, embed_condition, flow_warp, reference_residuals
from pipeline.schedule import Schedule, ddim_step
from pipeline.tiling import Past, TilePlan, Window, decode_in_tiles, embed_in_tiles, predict_in_tiles

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

StepCallback = Callable[["StreamDiffVSRPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


class ReferenceStep:
    """Runs the networks of `pipe` as they are when it is called."""

    def __init__(self, pipe: StreamDiffVSRPipeline) -> None:
        self._pipe = pipe

    def run(
        self,
        frames_B3hw: Tensor,
        latents: Tensor,
        schedules: list[Schedule],
        past: Past,
        later: list[int],
        plan: TilePlan,
        callback_on_step_end: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Return the decoder's output (B,3,4h,4w): the reference, for unlike streams, tiles and callbacks."""
        # a. Warp the previous outputs, unless that is done by tiles; embed ARTG's condition, which all steps share
        warped_L3HW = condition_L = None
        if past.flow_L2HW is not None and plan.decoder is None:
            warped_L3HW = flow_warp(torch.stack(list(past.pictures)), past.flow_L2HW, self._pipe.options.warp)
        if self._pipe.guidance.artg and later:
            if plan.decoder is not None:
                condition_L = embed_in_tiles(self._pipe.controlnet, past, frames_B3hw, plan.decoder)
            elif warped_L3HW is not None:
                condition_L = (
                    embed_condition(self._pipe.controlnet, warped_L3HW) if self._pipe.cache_condition else warped_L3HW
                )

        # b. Denoise
        latents = self._denoise(
            frames_B3hw, latents, schedules, condition_L, later, plan, callback_on_step_end, callback_inputs
        )
        del condition_L

        # c. Decode, with TPM where there is a previous output
        latents = (latents / self._pipe.vae.config.scaling_factor).to(self._pipe.unet.dtype)
        with_tpm = later if self._pipe.guidance.tpm else []
        if plan.decoder is not None:
            look = past.warped if self._pipe.guidance.tpm_warped else past.plain
            return decode_in_tiles(self._pipe.vae, latents, look, with_tpm, plan.decoder)
        if not self._pipe.guidance.tpm_warped and later:
            warped_L3HW = torch.stack(list(past.pictures))
        features_L = self._pipe.vae.encode_temporal(warped_L3HW) if with_tpm and warped_L3HW is not None else None
        return self._decode(latents, features_L, later)

    def _denoise(
        self,
        frames_B3hw: Tensor,
        latents: Tensor,
        schedules: list[Schedule],
        condition_L: Tensor | None,
        later: list[int],
        plan: TilePlan,
        callback_on_step_end: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Take the latents (B,C,h,w) through all denoising steps."""
        device, dtype = self._pipe.device, self._pipe.unet.dtype
        estimate_BChw = None
        if self._pipe.vae.lr_projection is not None:
            estimate_BChw = self._pipe.vae.lr_projection(frames_B3hw.to(dtype)).to(torch.float32)
        # streams with fewer steps drop out of the batch when they are done
        for number in range(max(map(len, schedules))):
            rows = [b for b, schedule in enumerate(schedules) if number < len(schedule)]
            timesteps = [schedules[b].timesteps[number] for b in rows]
            timestep_R = torch.tensor(timesteps, device=device)
            x_RChw = torch.cat([latents[rows], frames_B3hw[rows]], dim=1).to(dtype)

            # 4a. One prediction: ARTG for the rows that have a previous output, then the U-Net
            if plan.unet is None:
                model_output = self._predict(x_RChw, timestep_R, condition_L, rows, later).to(torch.float32)
            else:
                model_output = self._predict_in_tiles(x_RChw, timestep_R, condition_L, rows, later, plan.unet)

            # 4b. One DDIM step
            if estimate_BChw is not None:
                model_output = model_output + estimate_BChw[rows]
            arrival = [schedules[b].previous[number] for b in rows]
            latents = latents.clone()
            latents[rows] = ddim_step(self._pipe.scheduler, model_output, latents[rows], timesteps, arrival)

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "model_output": model_output}
                given = {name: tensors[name] for name in callback_inputs}
                latents = (callback_on_step_end(self._pipe, number, timestep_R, given) or {}).get("latents", latents)
        return latents

    def _predict(
        self, x_RChw: Tensor, timestep_R: Tensor, condition_L: Tensor | None, rows: list[int], later: list[int]
    ) -> Tensor:
        """Return the U-Net's prediction (R,C,h,w) for `rows` (numbers of streams), guided by ARTG."""
        prompt_RTD = self._pipe.prompt_embeds_1TD.to(x_RChw.device, x_RChw.dtype).expand(len(rows), -1, -1)
        residuals = None
        if condition_L is not None:
            residuals = self._residuals(x_RChw, timestep_R, prompt_RTD, condition_L, rows, later)
        prediction: Tensor = self._pipe.unet(
            x_RChw,
            timestep_R,
            encoder_hidden_states=prompt_RTD,
            down_block_additional_residuals=None if residuals is None else tuple(residuals.down),
            mid_block_additional_residual=None if residuals is None else residuals.mid,
            return_dict=False,
        )[0]
        return prediction

    def _predict_in_tiles(
        self,
        x_RChw: Tensor,
        timestep_R: Tensor,
        condition_L: Tensor | None,
        rows: list[int],
        later: list[int],
        side: int,
    ) -> Tensor:
        """Return what `_predict` returns, put together from tiles, row by row; fp32."""

        def predict(row: int, window: Window) -> Tensor:
            b, condition = rows[row], None
            if condition_L is not None and b in later:
                at = later.index(b)
                condition = window.of(condition_L[at : at + 1])
            one = slice(row, row + 1)
            return self._predict(window.of(x_RChw[one]), timestep_R[one], condition, [b], [b])

        shape = (len(rows), self._pipe.unet.config.out_channels, *x_RChw.shape[2:])
        multiple = 2 ** (len(self._pipe.unet.config.block_out_channels) - 1)
        networks = (self._pipe.unet,) if condition_L is None else (self._pipe.unet, self._pipe.controlnet)
        return predict_in_tiles(predict, networks, shape, side, multiple, x_RChw.device)

    def _residuals(
        self,
        x_RChw: Tensor,
        timestep_R: Tensor,
        prompt_RTD: Tensor,
        condition_L: Tensor,
        rows: list[int],
        later: list[int],
    ) -> Residuals | None:
        """Run ARTG for those of `rows` (numbers of streams) that are among `later`, whose conditions are given."""
        at = [r for r, b in enumerate(rows) if b in later]
        if not at:
            return None
        condition = condition_L[[later.index(rows[r]) for r in at]]
        run = artg_residuals if self._pipe.cache_condition else reference_residuals
        residuals = run(self._pipe.controlnet, x_RChw[at], timestep_R[at], prompt_RTD[at], condition)
        return residuals if len(at) == len(rows) else residuals.spread(at, len(rows))

    def _decode(self, latents: Tensor, features_L: list[Tensor] | None, later: list[int]) -> Tensor:
        """Decode all latents; those of `later` with their temporal features, if there are any."""
        if features_L is None:
            return self._pipe.vae.decode(latents)
        if len(later) == len(latents):
            return self._pipe.vae.decode(latents, features_L)
        first = [b for b in range(len(latents)) if b not in later]
        alone = self._pipe.vae.decode(latents[first])
        output_B3HW = alone.new_empty((len(latents), *alone.shape[1:]))
        output_B3HW[first] = alone
        output_B3HW[later] = self._pipe.vae.decode(latents[later], features_L)
        return output_B3HW
