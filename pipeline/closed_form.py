"""Closed-form start of the tiny autoencoder: exact space-to-depth, PCA latents, least-squares decoder.

Training from random weights spends most of its time finding what a linear map already knows. Here the encoder's strided
convolutions are set to rearrange pixels without loss, its last convolution to the principal components of 4x4 patches,
and each decoder convolution to the ridge regression of what it should produce. Residual blocks start as the identity.

Knows: the layout of `TemporalAutoencoderTiny`. Does not know: training.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny, TemporalBlock

MAX_ROWS = 60_000  # rows of the regression; more changes nothing at these widths


def _fit(
    features_BCHW: Tensor, target_BDHW: Tensor, bias: bool, ridge: float = 1e-3, side: int = 3
) -> tuple[Tensor, Tensor]:
    """Return weight (D,C,side,side) and bias (D,) of the convolution that best maps features to the target."""
    channels = features_BCHW.shape[1]
    taps = channels * side**2
    rows = F.unfold(features_BCHW, side, padding=side // 2).transpose(1, 2).reshape(-1, taps).double()
    target = target_BDHW.flatten(2).transpose(1, 2).reshape(-1, target_BDHW.shape[1]).double()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_ROWS]
    rows, target = rows[chosen], target[chosen]
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    gram = rows.T @ rows / len(rows)
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + penalty, rows.T @ target / len(rows)).float()
    weight = solution[:taps].T.reshape(-1, channels, side, side)
    return weight, solution[-1] if bias else torch.zeros(len(weight))


def _rearrange(conv: nn.Conv2d, inputs: int) -> None:
    """Make the first 4*inputs outputs of a strided convolution the 2x2 pixels of its first `inputs` channels."""
    conv.weight.mul_(0.5)
    conv.weight[: 4 * inputs].zero_()
    for row in range(2):
        for column in range(2):
            for channel in range(inputs):
                conv.weight[(row * 2 + column) * inputs + channel, channel, 1 + row, 1 + column] = 1


@torch.no_grad()
def initialise(vae: TemporalAutoencoderTiny, pictures_B3HW: Tensor) -> None:
    """Set the weights of `vae` in place from sample pictures in [-1, 1] with sides divisible by 4.

    Raises ValueError when the widths cannot hold the rearranged pixels (12 at half, 48 at quarter resolution).
    """
    full, half, quarter = vae.config.encoder_block_out_channels
    if full < 3 or half < 12 or quarter < 48:
        raise ValueError(f"widths {(full, half, quarter)} are below (3, 12, 48), which exact space-to-depth needs")
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, TemporalBlock):
            last = cast(nn.Conv2d, module.conv[4])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(nn.Parameter, last.bias))

    unit = (pictures_B3HW + 1) / 2
    encoder, decoder = vae.encoder.layers, vae.decoder.layers
    first, to_latent = cast(nn.Conv2d, encoder[0]), cast(nn.Conv2d, encoder[-1])
    to_pixels = cast(nn.Conv2d, decoder[-1])
    first.weight[:3].zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    strided = [layer for layer in encoder if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    for conv, inputs in zip(strided, (3, 12), strict=True):
        _rearrange(conv, inputs)

    patches = nn.Sequential(*list(encoder)[:-1])(unit)[:, :48]
    rows = patches.permute(0, 2, 3, 1).reshape(-1, 48)
    mean = rows.mean(0)
    components = torch.linalg.svd((rows - mean)[:MAX_ROWS], full_matrices=False).Vh[: vae.config.latent_channels]
    deviation = ((rows - mean) @ components.T).std(0)
    to_latent.weight.zero_()
    to_latent.weight[:, :48, 1, 1] = components / deviation[:, None]
    cast(nn.Parameter, to_latent.bias).copy_(-(components @ mean) / deviation)

    x = torch.tanh(encoder(unit) / vae.config.latent_magnitude) * vae.config.latent_magnitude
    targets = iter([patches, F.pixel_unshuffle(unit, 2), unit])
    for layer in decoder:
        if isinstance(layer, nn.Conv2d) and layer is not to_pixels:
            target = next(targets)
            weight, bias = _fit(x, target, bias=layer.bias is not None)
            layer.weight.mul_(0.5)
            layer.weight[: len(weight)].copy_(weight)
            if layer.bias is not None:
                layer.bias[: len(bias)].copy_(bias)
        elif layer is to_pixels:
            weight, bias = _fit(x, unit, bias=True)
            to_pixels.weight.copy_(weight)
            cast(nn.Parameter, to_pixels.bias).copy_(bias)
        x = layer(x)


@torch.no_grad()
def fit_projection(projection: nn.Conv2d, lr_B3hw: Tensor, latent_BChw: Tensor) -> None:
    """Set `projection` to the linear map from low-resolution frames in [-1, 1] that best predicts the latents."""
    weight, bias = _fit(lr_B3hw, latent_BChw, bias=True, ridge=1e-5, side=projection.kernel_size[0])
    projection.weight.copy_(weight)
    cast(nn.Parameter, projection.bias).copy_(bias)
