"""The engine computes what the published code computes; tolerances and their reasons are in README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import StreamDiffVSRPipeline, StreamState
from pipeline.checkpoint import load_checkpoint
from pipeline.flow import upscale_frames
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.guidance import Residuals, artg_residuals, embed_condition, flow_warp, reference_residuals
from pipeline.prompt import encode_empty_prompt
from pipeline.schedule import make_schedule

TOLERANCE = 1e-4
Recording = dict[str, Tensor]


def assert_close(found: Tensor, recorded: Tensor) -> None:
    assert found.shape == recorded.shape
    assert (found - recorded).abs().max() <= TOLERANCE


def assert_sums(found: Tensor, recorded: Tensor) -> None:
    """Compare float64 per-channel sums of a tensor (1,C,H,W)."""
    torch.testing.assert_close(found.double().sum(dim=(0, 2, 3)), recorded, rtol=1e-5, atol=0.02)


def run(pipe: StreamDiffVSRPipeline, recording: Recording, frames: int, state: StreamState | None = None) -> list[dict]:
    """Restore the first frames of a recording; return output and what the callback saw, frame by frame."""
    state = state or pipe.start()
    results = []
    for k in range(frames):
        latents: list[Tensor] = []
        outputs: list[Tensor] = []

        def note(_: object, number: int, timestep: Tensor, given: dict[str, Tensor], z=latents, v=outputs) -> None:
            z.append(given["latents"].clone())
            v.append(given["model_output"].clone())

        output = pipe.step(
            frame_to_tensor(recording["lr_u8"][k].numpy()),
            [state],
            recording["latents_init"][k : k + 1],
            recording["flows"][k - 1 : k] if k else None,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=("latents", "model_output"),
        )
        results.append({"rgb": output, "latents": torch.cat(latents), "unet": torch.cat(outputs)})
    return results


@pytest.fixture(scope="module")
def results(pipe: StreamDiffVSRPipeline, clip: Recording) -> list[dict]:
    """The whole clip, restored once."""
    return run(pipe, clip, 6)


@pytest.fixture(scope="module")
def warped(clip: Recording) -> Tensor:
    """The recorded output of frame 0, warped onto frame 1."""
    return flow_warp(clip["rgb_float"][:1], clip["flows"][:1])


def test_prompt(checkpoint: Path, clip: Recording) -> None:
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")("", padding="max_length").input_ids
    assert ids == clip["input_ids"][0].tolist()
    assert_close(encode_empty_prompt(checkpoint), clip["prompt_embeds"])


def test_prompt_is_stored_and_read_back(pipe: StreamDiffVSRPipeline, checkpoint: Path) -> None:
    assert (checkpoint / "prompt_embeds.safetensors").is_file()
    again = load_checkpoint(checkpoint).prompt_embeds_1TD
    assert again is not None and torch.equal(again, pipe.prompt_embeds_1TD)


def test_timesteps(pipe: StreamDiffVSRPipeline, clip: Recording) -> None:
    assert list(make_schedule(pipe.scheduler).timesteps) == clip["timesteps"].tolist() == [751, 501, 251, 1]


def test_flow_input(clip: Recording) -> None:
    """What a flow estimator at output size sees."""
    upscaled = torch.cat([upscale_frames(frame_to_tensor(frame.numpy())) for frame in clip["lr_u8"]])
    torch.testing.assert_close(upscaled.double().sum(dim=(1, 2, 3)), clip["bicubic_sum_f64"], rtol=1e-5, atol=0.02)
    assert_close(torch.stack([upscaled.amin((1, 2, 3)), upscaled.amax((1, 2, 3))], dim=1), clip["bicubic_minmax"])
    assert_close(upscaled[0, :, :64, :64], clip["bicubic0_crop"])


def test_warp(warped: Tensor, clip: Recording) -> None:
    assert_close(warped[..., :96, :128], clip["warp_f1_crop_tl"])
    assert_close(warped[..., -64:, -64:], clip["warp_f1_crop_br"])
    assert_sums(warped, clip["warp_f1_chsum"])


def test_temporal_features(pipe: StreamDiffVSRPipeline, warped: Tensor, clip: Recording) -> None:
    with torch.no_grad():
        blocks = pipe.vae.encode_temporal(warped)[::-1]
    assert len(blocks) == 7
    for number, features in enumerate(blocks):
        assert_sums(features, clip[f"enc{number}_chsum_f1"])
    for number in (0, 1, 3):
        assert_close(blocks[number][..., :32, :32], clip[f"enc{number}_crop_f1"])
    assert_close(blocks[6], clip["enc6_f1"])


def residuals(pipe: StreamDiffVSRPipeline, clip: Recording, warped: Tensor, step: int, *, cached: bool) -> Residuals:
    """ARTG's residuals at one step of frame 1, from the recorded latent."""
    latent = clip["latents_init"][1:2] if step == 0 else clip["step_prev_f1"][step - 1 : step]
    x = torch.cat([latent, frame_to_tensor(clip["lr_u8"][1].numpy())], dim=1)
    timestep = clip["timesteps"][step : step + 1]
    with torch.no_grad():
        if cached:
            condition = embed_condition(pipe.controlnet, warped)
            return artg_residuals(pipe.controlnet, x, timestep, pipe.prompt_embeds_1TD, condition)
        return reference_residuals(pipe.controlnet, x, timestep, pipe.prompt_embeds_1TD, warped)


@pytest.mark.parametrize("cached", [True, False])
def test_artg(pipe: StreamDiffVSRPipeline, clip: Recording, warped: Tensor, cached: bool) -> None:
    first = residuals(pipe, clip, warped, 0, cached=cached)
    assert len(first.down) == int(clip["cn_count"][0])
    for number in (0, 1, 3, 6, 9, 11):
        assert_close(first.down[number], clip[f"cn_step0_down{number:02d}_f1"])
    assert_close(first.mid, clip["cn_step0_mid_f1"])
    assert_close(residuals(pipe, clip, warped, 3, cached=cached).mid, clip["cn_step3_mid_f1"])


def test_caching_the_condition_changes_no_bit(pipe: StreamDiffVSRPipeline, clip: Recording, warped: Tensor) -> None:
    for step in (0, 3):
        ours = residuals(pipe, clip, warped, step, cached=True)
        reference = residuals(pipe, clip, warped, step, cached=False)
        assert all(
            torch.equal(a, b) for a, b in zip([*ours.down, ours.mid], [*reference.down, reference.mid], strict=True)
        )


def test_denoising(results: list[dict], clip: Recording) -> None:
    assert_close(results[0]["latents"], clip["step_prev_f0"])
    assert_close(results[1]["latents"], clip["step_prev_f1"])
    assert_close(results[1]["unet"], clip["step_unet_out_f1"])


@pytest.mark.parametrize("frame", range(6))
def test_every_frame(results: list[dict], clip: Recording, frame: int) -> None:
    assert_close(results[frame]["latents"][-1], clip["latents_final"][frame])
    assert_close(results[frame]["rgb"][0], clip["rgb_float"][frame])
    levels = tensor_to_frame(results[frame]["rgb"][0], np.dtype(np.uint8)).astype(int)
    difference = np.abs(levels - clip["rgb_u8"][frame].numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_single_frame(pipe: StreamDiffVSRPipeline, still: Recording) -> None:
    result = run(pipe, still, 1)[0]
    assert_close(result["latents"], still["step_prev_f0"])
    assert_close(result["rgb"][0], still["rgb_float"][0])


def test_the_tolerance_tells_right_from_wrong(pipe: StreamDiffVSRPipeline, clip: Recording) -> None:
    """Clamping the previous output before the warp, the mildest known mistake, is far outside the tolerance."""
    state = pipe.start()
    run(pipe, clip, 1, state)
    assert state.prev_output_3HW is not None
    state.prev_output_3HW.clamp_(-1, 1)
    output = pipe.step(frame_to_tensor(clip["lr_u8"][1].numpy()), [state], clip["latents_init"][1:2], clip["flows"][:1])
    assert (output[0] - clip["rgb_float"][1]).abs().max() > 100 * TOLERANCE
