"""A model with random weights, small enough for any test: 4x larger pictures of no beauty, in milliseconds."""

from __future__ import annotations

from pathlib import Path


def save_random_model(folder: Path, *, flow: str = "dis", seed: int = 0) -> Path:
    """Write a checkpoint in the published layout to `folder` and return it; equal seeds give equal weights."""
    import torch
    from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel

    from pipeline.autoencoder import TemporalAutoencoderTiny
    from pipeline.options import ModelOptions
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=7,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=8,
    )
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8))
    for convolution in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.05)  # as created they are zero: no guidance at all
    vae = TemporalAutoencoderTiny(
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(8, 8, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    options = ModelOptions(flow=flow)  # type: ignore[arg-type]  # any of its names
    StreamDiffVSRPipeline(unet, controlnet, vae, scheduler, options=options).save_pretrained(folder)
    return folder
