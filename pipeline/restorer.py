"""The networks of one checkpoint as training sees them: a differentiable rollout of the whole restoration of one frame.

Inference (`stream_diffvsr.py`) is the reference; this repeats its arithmetic with gradients, any batch and any
schedule. A test holds the two together.

Shapes: B batch, C latent channels, H W output size, h w = H/4, W/4.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny, TemporalFusion
from pipeline.file_modes import follow_umask
from pipeline.guidance import flow_warp
from pipeline.schedule import FINAL, ddim_step

SCHEDULES = {4: (999, 749, 499, 249), 2: (999, 499), 1: (999,)}
PROMPT_WIDTH = 8  # the built-in models have no attention; the constant prompt only fills the U-Net's interface


class ModelSize(BaseModel):
    """Widths of a model without attention.

    Attributes:
        unet: U-Net widths per level, from latent size down.
        layers: residual layers per level.
        groups: GroupNorm groups.
        conditioning: widths of ARTG's embedding; every entry after the first halves the size, so 4x needs three.
        autoencoder: widths at full, half and quarter resolution.
        encoder_blocks: residual blocks at these resolutions; the decoder mirrors them.
        temporal_fusion: form of the decoder's TPMs, see `pipeline.autoencoder.TemporalBlock`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    unet: tuple[int, ...] = (32, 64, 96)
    layers: int = 1
    groups: int = 8
    conditioning: tuple[int, ...] = (16, 24, 32)
    autoencoder: tuple[int, int, int] = (16, 32, 48)
    encoder_blocks: tuple[int, int, int] = (1, 1, 2)
    latent_channels: int = 4
    temporal_fusion: TemporalFusion = "joint"


SIZES = {
    "tiny": ModelSize(),
    # `tiny` can grow to it (`pipeline.growth`); 4.4 million weights: a snapshot with averages stays below 20 MB
    "small": ModelSize(layers=2, autoencoder=(24, 48, 64), encoder_blocks=(1, 2, 3)),
}


@dataclass
class RolloutResult:
    """Final latent (B,C,h,w) before scaling and the decoded picture (B,3,H,W), nominal [-1, 1]."""

    latent_BChw: Tensor
    output_B3HW: Tensor


class Restorer(nn.Module):
    """U-Net, autoencoder and (from stage 3 on) ARTG, with the DDIM arithmetic of the checkpoint's scheduler."""

    alphas: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: TemporalAutoencoderTiny,
        scheduler: DDIMScheduler,
        controlnet: ControlNetModel | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.controlnet = unet, vae, controlnet
        self.scheduler = scheduler
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)
        self.size = _size_of(unet, vae)
        self.history: dict[str, int] = {}  # stage -> iterations, kept in the model folder's training.json

    @classmethod
    def create(cls, size: ModelSize) -> Restorer:
        """Build a model with fresh weights.

        The U-Net predicts the clean latent, not v: with few steps and few weights, carrying the noise through the
        network only to subtract it again costs more than the restoration itself. Nor does it predict what a linear
        map of the low-resolution frame already knows (`lr_skip`). The configurations say so, and DDIM is the same
        otherwise.
        """
        levels = len(size.unet)
        unet = UNet2DConditionModel(
            in_channels=size.latent_channels + 3,
            out_channels=size.latent_channels,
            block_out_channels=size.unet,
            layers_per_block=size.layers,
            down_block_types=("DownBlock2D",) * levels,
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=size.groups,
            cross_attention_dim=PROMPT_WIDTH,
            attention_head_dim=8,
        )
        vae = TemporalAutoencoderTiny(
            encoder_block_out_channels=size.autoencoder,
            decoder_block_out_channels=size.autoencoder[::-1],
            num_encoder_blocks=size.encoder_blocks,
            num_decoder_blocks=size.encoder_blocks[::-1],
            latent_channels=size.latent_channels,
            temporal_input="unit",
            lr_skip=True,
            encoder_temporal=False,
            temporal_fusion=size.temporal_fusion,
        )
        nn.init.zeros_(unet.conv_out.weight)  # the first prediction is the linear estimate alone
        nn.init.zeros_(unet.conv_out.bias)
        scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="sample",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        )
        return cls(unet, vae, scheduler)

    def add_guidance(self, conditioning: tuple[int, ...]) -> None:
        """Add ARTG as a ControlNet copied from the U-Net's encoder; its zero convolutions make it a no-op at first.

        Only those at its outputs are zero. The one at the end of its conditioning embedding, zero as well in the usual
        start, would keep every gradient from the embedding until the others have moved.
        """
        self.controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=conditioning)
        nn.init.kaiming_normal_(self.controlnet.controlnet_cond_embedding.conv_out.weight, nonlinearity="linear")

    def replace_temporal(self, fusion: TemporalFusion) -> None:
        """Give the decoder fresh TPMs of another form; every other weight stays, and stage 2 begins anew."""
        old = self.vae
        self.vae = TemporalAutoencoderTiny.from_config(old.config, temporal_fusion=fusion)
        kept = {k: v for k, v in old.state_dict().items() if "temporal_processor" not in k and "alpha" not in k}
        self.vae.load_state_dict(self.vae.state_dict() | kept)
        self.size = _size_of(self.unet, self.vae)
        self.history.pop("stage2", None)

    def denoise(
        self, lr_B3hw: Tensor, noise_BChw: Tensor, timesteps: tuple[int, ...], warped_B3HW: Tensor | None = None
    ) -> Tensor:
        """Denoise `noise_BChw` over `timesteps`, guided by ARTG where it and `warped_B3HW` are there -> (B,C,h,w)."""
        z = noise_BChw
        prompt = z.new_zeros(len(z), 1, self.unet.config.cross_attention_dim)
        embedding = None
        skip = self.vae.lr_projection
        estimate = skip(lr_B3hw) if skip is not None else None
        if warped_B3HW is not None and self.controlnet is not None:
            embedding = self.controlnet.controlnet_cond_embedding(warped_B3HW)
        for index, t in enumerate(timesteps):
            x = torch.cat([z, lr_B3hw], dim=1)
            down, mid = None, None
            if embedding is not None:
                down, mid = self._residuals(x, t, embedding)
            prediction = self.unet(
                x, t, prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
            )[0]
            if estimate is not None:
                prediction = prediction + estimate
            following = timesteps[index + 1] if index + 1 < len(timesteps) else FINAL
            z = ddim_step(self.scheduler, prediction, z, [t] * len(z), [following] * len(z))
        return z / self.vae.config.scaling_factor

    def rollout(
        self,
        lr_B3hw: Tensor,
        noise_BChw: Tensor,
        timesteps: tuple[int, ...],
        warped_B3HW: Tensor | None = None,
        *,
        artg: bool = True,
        tpm: bool = True,
    ) -> RolloutResult:
        """Denoise and decode, with guidance by the warped previous output if given."""
        latent = self.denoise(lr_B3hw, noise_BChw, timesteps, warped_B3HW if artg else None)
        features = self.vae.encode_temporal(warped_B3HW) if warped_B3HW is not None and tpm else None
        return RolloutResult(latent, self.vae.decode(latent, features))

    def _residuals(self, x: Tensor, t: int, embedding: Tensor) -> tuple[list[Tensor], Tensor]:
        net = self.controlnet
        assert net is not None
        time = net.time_embedding(net.time_proj(torch.full((len(x),), t, device=x.device)).to(x.dtype))
        sample = net.conv_in(x) + embedding
        skips = [sample]
        for block in net.down_blocks:
            sample, more = block(hidden_states=sample, temb=time)
            skips += more
        sample = net.mid_block(sample, time)
        down = [conv(skip) for skip, conv in zip(skips, net.controlnet_down_blocks, strict=True)]
        return down, net.controlnet_mid_block(sample)

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Return (latent, output) of `rollout`; the entry that distributed wrappers can intercept."""
        result = self.rollout(*args, **kwargs)  # type: ignore[arg-type]
        return result.latent_BChw, result.output_B3HW

    def save(self, folder: Path, extra: dict[str, object]) -> None:
        """Write the published folder layout, with `extra` merged into ``upriver.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[str | None]] = {
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["pipeline", "TemporalAutoencoderTiny"],
            "controlnet": ["diffusers", "ControlNetModel"],
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        }
        self.unet.save_pretrained(folder / "unet")
        self.vae.save_pretrained(folder / "vae")
        if self.controlnet is None:  # the model still loads everywhere: this guidance is the zero-initialised no-op
            guidance = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=self.size.conditioning)
            guidance.save_pretrained(folder / "controlnet")
        else:
            self.controlnet.save_pretrained(folder / "controlnet")
        self.scheduler.save_pretrained(folder / "scheduler")
        for part in ("unet", "vae", "controlnet"):
            _forget_origin(folder / part / "config.json")
        index = {"_class_name": "StreamDiffVSRPipeline", **parts}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        prompt = torch.zeros(1, 1, self.unet.config.cross_attention_dim)
        save_file({"prompt_embeds": prompt}, folder / "prompt_embeds.safetensors")
        follow_umask(sorted(folder.rglob("*.safetensors")))
        (folder / "upriver.json").write_text(json.dumps(extra, indent=2) + "\n")
        (folder / "training.json").write_text(json.dumps(self.history, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Restorer:
        """Read a folder in the published layout for training.

        ARTG of a model that never went through stage 3 is only a placeholder, and is left out.
        """
        record = folder / "training.json"
        history = json.loads(record.read_text()) if record.exists() else {"stage3": 0}
        controlnet = ControlNetModel.from_pretrained(folder / "controlnet") if "stage3" in history else None
        restorer = cls(
            UNet2DConditionModel.from_pretrained(folder / "unet"),
            TemporalAutoencoderTiny.from_pretrained(folder / "vae"),
            DDIMScheduler.from_pretrained(folder / "scheduler"),
            controlnet,
        )
        restorer.history = history
        return restorer


def _forget_origin(config: Path) -> None:
    """Take out the path from which the weights were once read: models are given away, names of folders are not."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def _size_of(unet: UNet2DConditionModel, vae: TemporalAutoencoderTiny) -> ModelSize:
    """Read the widths back from the networks; ARTG's embedding is that of the named size with this U-Net."""
    return ModelSize(
        unet=tuple(unet.config.block_out_channels),
        layers=unet.config.layers_per_block,
        groups=unet.config.norm_num_groups,
        conditioning=next(
            (s.conditioning for s in SIZES.values() if s.unet == tuple(unet.config.block_out_channels)), (16, 24, 32)
        ),
        autoencoder=tuple(vae.config.encoder_block_out_channels),
        encoder_blocks=tuple(vae.config.num_encoder_blocks),
        latent_channels=vae.config.latent_channels,
        temporal_fusion=vae.config.temporal_fusion,
    )


def add_noise(latent_BChw: Tensor, noise_BChw: Tensor, alpha: Tensor) -> Tensor:
    """Diffuse a latent to cumulative alpha `alpha` (scalar or (B,1,1,1))."""
    return alpha.sqrt() * latent_BChw + (1 - alpha).sqrt() * noise_BChw


def warp_previous(previous_B3HW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """Warp as the built-in models do at inference (exact mode)."""
    return flow_warp(previous_B3HW, flow_B2HW, mode="exact")
