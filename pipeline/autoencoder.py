"""Tiny autoencoder whose decoder can look at the previous output (Stream-DiffVSR, section 3.3).

Knows: how pixels become latents and back, and how the Temporal Processor Modules (TPM) of the decoder mix in features
of the flow-warped previous output. Does not know: flow, streams, diffusion.

Shapes: B batch, H W output size in pixels, h w latent size (H/4, W/4), C channels.

Numerical traps, each of which the parity tests notice:
  * The decoder squashes its input with ``3 tanh(z / 3)``; the encoder maps [-1, 1] to [0, 1] first.
  * The temporal path of the published checkpoints skips that mapping: it feeds [-1, 1] (``temporal_input="raw"``).
  * The 4x4 pooling of a TPM drops trailing rows and columns; its 1-D convolution runs across row ends on purpose.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

TPM_POOL = 4  # a TPM sees its features averaged over 4x4 windows
TPM_STRENGTH = 0.1  # fixed weight of the fused features in the block's sum

TemporalFusion = Literal["pooled", "joint"]


class TemporalBlock(nn.Module):
    """Residual block of three convolutions with a Temporal Processor Module.

    The names ``conv``, ``alpha`` and ``temporal_processor`` are those of the published weights. Blocks of the encoder
    carry a TPM there as well, although it is never used; `temporal=False` leaves it out.

    Args:
        channels: width of the block.
        temporal: whether it has a TPM.
        fusion: ``"pooled"`` is the published TPM: 4x4 means of both frames' features, mixed by 1-D convolutions that
            see each frame alone (except at one seam). It can move colours, not detail. ``"joint"`` looks at both
            frames' features of every place at full size, so that it can take the detail that was there before and
            can tell where the previous frame does not fit.
    """

    def __init__(self, channels: int, temporal: bool = True, fusion: TemporalFusion = "pooled") -> None:
        super().__init__()
        self.fusion = fusion
        # in place: at output size, every new tensor costs as much in fresh memory as in arithmetic
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        if temporal and fusion == "joint":
            self.temporal_processor = nn.Sequential(
                nn.Conv2d(2 * channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)
            )
        elif temporal:
            self.alpha = nn.Parameter(torch.tensor(0.5))
            first, second = (nn.Conv1d(channels, channels, 3, padding=1) for _ in range(2))
            for convolution in (first, second):
                nn.init.xavier_uniform_(convolution.weight)
                nn.init.zeros_(cast(nn.Parameter, convolution.bias))
            self.temporal_processor = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x_BCHW: Tensor, previous_BCHW: Tensor | None = None) -> Tensor:
        """Return the block's output; `previous_BCHW` are the same block's features of the warped previous output."""
        y_BCHW = self.conv(x_BCHW)
        if previous_BCHW is not None and self.fusion == "joint":
            y_BCHW = y_BCHW + self.temporal_processor(torch.cat([y_BCHW + x_BCHW, previous_BCHW], dim=1))
        elif previous_BCHW is not None:
            y_BCHW = torch.add(y_BCHW, self.fuse(y_BCHW, previous_BCHW), alpha=TPM_STRENGTH)
        return F.relu(y_BCHW.add_(x_BCHW), inplace=True)

    def fuse(self, current_BCHW: Tensor, previous_BCHW: Tensor) -> Tensor:
        """Published TPM: mix pooled features of both frames as one token sequence; returned at the current size."""
        current = F.avg_pool2d(current_BCHW, TPM_POOL)
        previous = F.avg_pool2d(previous_BCHW, TPM_POOL)
        tokens_BCL = torch.cat([current.flatten(2), previous.flatten(2)], dim=2)
        mixed_BCL = self.temporal_processor(tokens_BCL)
        count = current.shape[2] * current.shape[3]
        fused = self.alpha * mixed_BCL[..., :count] + (1 - self.alpha) * mixed_BCL[..., count:]
        return F.interpolate(fused.reshape(current.shape), size=current_BCHW.shape[2:], mode="bilinear")


class _Layers(nn.Module):
    """Holder that gives a sequence the published key prefix ``layers.``."""

    layers: nn.Sequential

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)


class TemporalAutoencoderTiny(ModelMixin, ConfigMixin):
    """Autoencoder with 4x spatial compression and a decoder with Temporal Processor Modules.

    Args:
        encoder_block_out_channels: widths at full, half and quarter resolution.
        decoder_block_out_channels: widths at quarter, half and full resolution. For TPM they mirror the encoder's.
        num_encoder_blocks, num_decoder_blocks: residual blocks per resolution, mirrored likewise.
        latent_channels: channels of the latent.
        temporal_input: ``"raw"`` feeds the warped previous output as [-1, 1] into the encoder (published checkpoints),
            ``"unit"`` maps it to [0, 1] as `encode` does.
        lr_skip: whether a linear estimate of the latent from the low-resolution frame joins the U-Net's prediction
            (a "sample" prediction). A small U-Net then learns only what a convolution cannot know. Off in published
            checkpoints.
        encoder_temporal: whether encoder blocks carry (unused) TPM weights, as the published files do.
        temporal_fusion: form of the decoder's TPMs, see `TemporalBlock`; published checkpoints have ``"pooled"``.

    The remaining fields are those of the published ``vae/config.json``. Raises ValueError where encoder and decoder do
    not mirror each other.
    """

    _supports_gradient_checkpointing = False
    encoder: _Layers
    decoder: _Layers

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64),
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 1),
        latent_channels: int = 4,
        act_fn: str = "relu",
        upsampling_scaling_factor: int = 2,
        upsample_fn: str = "nearest",
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
        temporal_input: Literal["raw", "unit"] = "raw",
        encoder_temporal: bool = True,
        lr_skip: bool = False,
        temporal_fusion: TemporalFusion = "pooled",
    ) -> None:
        super().__init__()
        widths = tuple(reversed(decoder_block_out_channels))
        if tuple(encoder_block_out_channels) != widths or tuple(num_encoder_blocks) != tuple(
            reversed(num_decoder_blocks)
        ):
            raise ValueError(
                f"encoder {tuple(encoder_block_out_channels)} x {tuple(num_encoder_blocks)} and decoder "
                f"{tuple(decoder_block_out_channels)} x {tuple(num_decoder_blocks)} do not mirror each other; "
                "the temporal modules need equal widths and counts in reversed order"
            )
        if act_fn != "relu" or upsample_fn != "nearest" or upsampling_scaling_factor != 2:
            raise ValueError(
                f"act_fn={act_fn!r}, upsample_fn={upsample_fn!r}, "
                f"upsampling_scaling_factor={upsampling_scaling_factor}: "
                "only 'relu', 'nearest' and 2 exist in checkpoints of this method"
            )

        encoder: list[nn.Module] = []
        for stage, (width, blocks) in enumerate(zip(encoder_block_out_channels, num_encoder_blocks, strict=True)):
            if stage == 0:
                encoder.append(nn.Conv2d(in_channels, width, 3, padding=1))
            else:
                below = encoder_block_out_channels[stage - 1]
                encoder.append(nn.Conv2d(below, width, 3, stride=2, padding=1, bias=False))
            encoder += [TemporalBlock(width, temporal=encoder_temporal) for _ in range(blocks)]
        encoder.append(nn.Conv2d(encoder_block_out_channels[-1], latent_channels, 3, padding=1))

        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, decoder_block_out_channels[0], 3, padding=1), nn.ReLU()]
        last = len(decoder_block_out_channels) - 1
        for stage, (width, blocks) in enumerate(zip(decoder_block_out_channels, num_decoder_blocks, strict=True)):
            decoder += [TemporalBlock(width, fusion=temporal_fusion) for _ in range(blocks)]
            if stage < last:
                decoder.append(nn.Upsample(scale_factor=2, mode="nearest"))
                decoder.append(nn.Conv2d(width, decoder_block_out_channels[stage + 1], 3, padding=1, bias=False))
        decoder.append(nn.Conv2d(decoder_block_out_channels[-1], out_channels, 3, padding=1))

        self.encoder = _Layers(encoder)
        self.decoder = _Layers(decoder)
        self.lr_projection: nn.Conv2d | None = None
        if lr_skip:
            self.lr_projection = nn.Conv2d(in_channels, latent_channels, 5, padding=2, padding_mode="replicate")

    def encode(self, x_B3HW: Tensor) -> Tensor:
        """Return the latent (B, C, ceil(H/4), ceil(W/4)) of pictures in [-1, 1]; not divided by the scaling factor."""
        return self.encoder.layers((x_B3HW + 1) / 2)

    def decode(self, latent_BChw: Tensor, temporal_features: list[Tensor] | None = None) -> Tensor:
        """Return pictures (B,3,4h,4w), nominal range [-1, 1], not clamped.

        `temporal_features`: what `encode_temporal` returned for the warped previous output; None decodes the frame
        alone.
        """
        x = torch.tanh(latent_BChw / self.config.latent_magnitude) * self.config.latent_magnitude
        remaining = iter(temporal_features) if temporal_features is not None else None
        for layer in self.decoder.layers:
            if isinstance(layer, TemporalBlock) and remaining is not None:
                x = layer(x, next(remaining))
            else:
                x = layer(x)
        return x * 2 - 1

    def encode_temporal(self, warped_B3HW: Tensor) -> list[Tensor]:
        """Return the features of every encoder block for the warped previous output, in the order of decoder blocks.

        Input in nominal [-1, 1]. The last convolution of the encoder is not run.
        """
        x = (warped_B3HW + 1) / 2 if self.config.temporal_input == "unit" else warped_B3HW
        features: list[Tensor] = []
        for layer in list(self.encoder.layers)[:-1]:
            x = layer(x)
            if isinstance(layer, TemporalBlock):
                features.append(x)
        return features[::-1]

    @torch.no_grad()
    def silence_temporal(self) -> None:
        """Make every TPM add exactly nothing, as ARTG's zero convolutions do: stage 2 then starts from no harm."""
        for module in self.decoder.modules():
            if isinstance(module, TemporalBlock):
                last = cast(nn.Conv1d | nn.Conv2d, module.temporal_processor[2])
                last.weight.zero_()
                cast(nn.Parameter, last.bias).zero_()

    def temporal_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the decoder's TPMs: what stage 2 trains."""
        return [p for name, p in self.decoder.named_parameters() if "alpha" in name or "temporal_processor" in name]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Encode and decode pictures in [-1, 1]; same shape for sides divisible by 4."""
        return self.decode(self.encode(x_B3HW))
