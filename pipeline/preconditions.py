"""What must hold before a model is run: networks that fit together, and arguments of a step that fit the networks.

Knows: the rules and the messages. Computes nothing and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from pipeline.autoencoder import TemporalAutoencoderTiny
from pipeline.errors import CheckpointError, InputError, SizeError
from pipeline.flow import SCALE
from pipeline.schedule import require_supported

if TYPE_CHECKING:
    from pipeline.state import StreamState
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

MINIMUM_SIDE: Final = 16
CALLBACK_TENSORS: Final = ("latents", "model_output")


def require_fit(
    unet: UNet2DConditionModel, controlnet: ControlNetModel, vae: TemporalAutoencoderTiny, scheduler: DDIMScheduler
) -> None:
    """Check that networks and scheduler belong together.

    Raises:
        CheckpointError: the networks do not fit together. ScheduleError: the scheduler cannot be run.
    """
    latent = vae.config.latent_channels
    wanted = {
        "unet.in_channels": (unet.config.in_channels, latent + 3),
        "unet.out_channels": (unet.config.out_channels, latent),
        "controlnet.in_channels": (controlnet.config.in_channels, latent + 3),
        "controlnet.cross_attention_dim": (controlnet.config.cross_attention_dim, unet.config.cross_attention_dim),
    }
    for name, (found, needed) in wanted.items():
        if found != needed:
            raise CheckpointError(
                f"{name} is {found}, but with {latent} latent channels and this U-Net it must be {needed}.",
                code="checkpoint-misfit",
                remedy="Take the U-Net, the ControlNet and the autoencoder from one checkpoint.",
            )
    require_supported(scheduler)
    if vae.lr_projection is not None and scheduler.config.prediction_type != "sample":
        raise CheckpointError(
            f"The autoencoder adds a linear estimate of the clean latent (lr_skip), but the scheduler's "
            f"prediction_type is {scheduler.config.prediction_type!r}.",
            code="checkpoint-misfit",
            remedy="Use prediction_type 'sample', or an autoencoder without lr_skip.",
        )


def require_inputs(
    pipe: StreamDiffVSRPipeline,
    frames_B3HW: Tensor,
    states: Sequence[StreamState],
    noise_B4HW: Tensor | None,
    flow_B2HW: Tensor | Sequence[Tensor | None] | None,
    callback_inputs: Sequence[str],
) -> None:
    """Check the arguments of `StreamDiffVSRPipeline.step`.

    Raises:
        InputError, SizeError, StateError: an argument is wrong.
    """
    if frames_B3HW.ndim != 4 or frames_B3HW.shape[1] != 3 or not frames_B3HW.is_floating_point():
        raise InputError(
            f"frames_B3HW has shape {tuple(frames_B3HW.shape)} and type {frames_B3HW.dtype}; "
            "(streams, 3, height, width) of floating point numbers in [-1, 1] is needed.",
            code="frames-shape",
            remedy="Convert 8-bit frames by x / 255 * 2 - 1, or hand them to the pipeline's generator.",
        )
    batch, _, height, width = frames_B3HW.shape
    different = len({id(state) for state in states})
    if not batch == len(states) == different or batch == 0:
        raise InputError(
            f"{batch} frames came with {len(states)} states, {different} of them different.",
            code="states-count",
            remedy="Give one state of its own for every frame, and at least one frame.",
        )
    if min(height, width) < MINIMUM_SIDE:
        raise SizeError(
            f"A frame of {width}x{height} is too small: each side must have at least {MINIMUM_SIDE} pixels.",
            code="frame-too-small",
            remedy="Enlarge the video first, or leave it out.",
        )
    if height * width > pipe.max_pixels:
        raise SizeError(
            f"A frame of {width}x{height} has {height * width} pixels; the limit is {pipe.max_pixels}.",
            code="frame-too-large",
            remedy="Reduce the video first, or load the model with a larger max_pixels if memory allows it.",
        )
    for state in states:
        state.require_model(pipe.model_sha256)
        if not state.is_first and (state.height, state.width) != (height, width):
            raise SizeError(
                f"Frame {state.index} is {width}x{height}; the frame before it was {state.width}x{state.height}.",
                code="frame-size-changed",
                remedy="Call reset() on the state where the size changes; the next frame then starts anew.",
            )
    latent = (batch, pipe.vae.config.latent_channels, height, width)
    if noise_B4HW is not None and tuple(noise_B4HW.shape) != latent:
        raise _wrong_shape("noise_B4HW", noise_B4HW, latent)
    field = (batch, 2, height * SCALE, width * SCALE)
    if isinstance(flow_B2HW, Tensor) and tuple(flow_B2HW.shape) != field:
        raise _wrong_shape("flow_B2HW", flow_B2HW, field)
    if flow_B2HW is not None and not isinstance(flow_B2HW, Tensor):
        if len(flow_B2HW) != batch:
            raise InputError(
                f"flow_B2HW has {len(flow_B2HW)} entries for {batch} streams.",
                code="flow-count",
                remedy="Give one tensor for all streams, or one entry for each: its flow, or None.",
            )
        for flow_2HW in flow_B2HW:
            if flow_2HW is not None and tuple(flow_2HW.shape) != field[1:]:
                raise _wrong_shape("an entry of flow_B2HW", flow_2HW, field[1:])
    unknown = sorted(set(callback_inputs) - set(CALLBACK_TENSORS))
    if unknown:
        raise InputError(
            f"A callback cannot be given {', '.join(unknown)}.",
            code="callback-inputs",
            remedy=f"Choose from {', '.join(CALLBACK_TENSORS)}.",
        )


def _wrong_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> InputError:
    return InputError(
        f"{name} has shape {tuple(tensor.shape)}; {wanted} is needed.",
        code="tensor-shape",
        remedy="Give one row per stream, also for streams at their first frame.",
    )
