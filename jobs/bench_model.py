"""The engine that `upriver bench` measures: a model as every command opens it, or one with random weights.

``random:published`` has the sizes of the published checkpoint (U-Net 472 million parameters, ARTG 208, autoencoder 2;
its configurations are those of the x4 upscaler and of the published ``vae/config.json``), ``random:small`` and
``random:tiny`` those of `pipeline.restorer.SIZES`. Speed does not depend on weights, so nothing is read or written: the
tensors come into being on the device, in the number format that is measured. Only `upriver bench` knows these names:
what such a model restores is noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from infra.model_cache import local_model
from infra.settings import Settings
from jobs.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    Network = TypeVar("Network", bound=nn.Module)

PREFIX: Final = "random:"
NAMES: Final = ("published", "small", "tiny")
SEED: Final = 0

_UNET: Final[dict[str, Any]] = {
    "in_channels": 7,
    "out_channels": 4,
    "sample_size": 128,
    "block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_CONDITIONING: Final = (64, 128, 256)
_PROMPT_TOKENS: Final = 77
_SCHEDULER: Final[dict[str, Any]] = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def open_model(settings: Settings, device: str, formats: Sequence[torch.dtype]) -> StreamDiffVSRPipeline:
    """Return the engine that `settings` name, on `device`, with the backend that they ask for.

    Args:
        formats: number formats to try, fastest first, as `actors.hardware.choose_formats` returned them. A random model
            takes the first.

    Raises:
        UsageError: a random model of no known size. CheckpointError, FlowError, BackendError: the model cannot be set
            up.
    """
    import torch

    from pipeline.backends import choose_backend, require_dtype
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # events and figures of memory are those of the current device
    backend = choose_backend(settings.backend, device)
    flow = None if settings.flow == "auto" else settings.flow
    if not settings.model.startswith(PREFIX):
        return StreamDiffVSRPipeline.from_pretrained(
            local_model(settings.model), torch_dtype=formats, device=device, flow=flow, backend=backend
        )
    require_dtype(backend, dtype := formats[0])  # speed alone is asked for: noise is near to nothing
    networks = torch.float32 if backend == "openvino" else dtype  # networks and states; it computes in `dtype`
    pipe = random_model(settings.model.removeprefix(PREFIX), device=device, dtype=networks, flow=flow)
    pipe.use_backend(backend, dtype)
    return pipe


def random_model(name: str, *, device: str, dtype: torch.dtype, flow: str | None = None) -> StreamDiffVSRPipeline:
    """Return an engine with random weights of a known size; equal on every call.

    Args:
        name: one of `NAMES`.
        device: "meta" makes tensors that have sizes but no data, to count FLOPs and memory.
        flow: estimator; None takes the published code's (RAFT), or that of the built-in models.

    Raises:
        UsageError: another name. FlowError: the estimator is not installed.
    """
    import torch
    from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel

    from pipeline import model_source
    from pipeline.autoencoder import TemporalAutoencoderTiny
    from pipeline.flow import make_flow
    from pipeline.options import ModelOptions
    from pipeline.restorer import SIZES, Restorer
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

    if name not in NAMES:
        raise UsageError(
            f"There is no random model {name!r}.", code="bench-model", remedy=f"Choose one of {', '.join(NAMES)}."
        )
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(SEED)
    if name == "published":
        with torch.device("meta"):
            unet = UNet2DConditionModel(**_UNET)
            controlnet = ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=_CONDITIONING, load_weights_from_unet=False
            )
            vae = TemporalAutoencoderTiny()
        scheduler = DDIMScheduler(**_SCHEDULER)
        options = ModelOptions()
        prompt_embeds_1TD = torch.randn(
            1, _PROMPT_TOKENS, unet.config.cross_attention_dim, generator=generator, device=generator.device
        )
    else:
        restorer = Restorer.create(SIZES[name])
        restorer.add_guidance(SIZES[name].conditioning)
        assert restorer.controlnet is not None
        unet, controlnet, vae, scheduler = restorer.unet, restorer.controlnet, restorer.vae, restorer.scheduler
        built_in = Path(model_source.__file__).parent / "models" / "tiny" / model_source.OPTIONS
        options = ModelOptions.model_validate(json.loads(built_in.read_text()))
        prompt_embeds_1TD = None
    pipe = StreamDiffVSRPipeline(
        _filled(unet, device, dtype, generator),
        _filled(controlnet, device, dtype, generator),
        _filled(vae, device, dtype, generator),
        scheduler,
        prompt_embeds_1TD=prompt_embeds_1TD,
        options=options,
        flow=make_flow(flow or options.flow, size=options.flow_size),
        model_sha256=f"{PREFIX}{name}",
    )
    return pipe.to(device, dtype)


def _filled(network: Network, device: str, dtype: torch.dtype, generator: torch.Generator) -> Network:
    """Give `network` room on `device` and weights that keep the size of what passes through, so that all stays finite.

    Weights are normal with variance 1 / fan-in, scales of normalisation 1, all other vectors 0, scalars one half.
    """
    import torch
    from torch import nn

    nn.Module.to(network, dtype).to_empty(device=device)
    if device == "meta":
        return network.eval().requires_grad_(False)
    with torch.no_grad():
        for module in network.modules():
            normalises = isinstance(module, nn.GroupNorm | nn.LayerNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                elif parameter.ndim == 0:
                    parameter.fill_(0.5)
                else:
                    parameter.fill_(1.0 if normalises and name == "weight" else 0.0)
    return network.eval().requires_grad_(False)
