"""A model with random weights, small enough for any test: 4x larger pictures of no beauty, in milliseconds."""

from __future__ import annotations

from pathlib import Path


def save_random_model(folder: Path, *, flow: str = "dis", seed: int = 0) -> Path:
    """Write a checkpoint in the published layout to `folder` and return it; equal seeds give equal weights."""
    import torch
    from diffusers import ControlNetModel, DDIMScheduler

    from pipeline.options import ModelOptions
    from pipeline.restorer import ModelSize, Restorer
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    torch.manual_seed(seed)
    size = ModelSize(
        unet=(8, 16),
        groups=4,
        conditioning=(4, 4, 8),
        autoencoder=(4, 8, 8),
        encoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    parts = Restorer.create(size)
    controlnet = ControlNetModel.from_unet(parts.unet, conditioning_embedding_out_channels=size.conditioning)
    for convolution in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.05)  # as created they are zero: no guidance at all
    pipe = StreamDiffVSRPipeline(
        parts.unet,
        controlnet,
        parts.vae,
        DDIMScheduler.from_config(parts.scheduler_config),
        options=ModelOptions(flow=flow),
    )
    pipe.save_pretrained(folder)
    return folder
