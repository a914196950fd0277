"""The engine's contract: streaming, batches, states, sizes, guidance switches, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import (
    Guidance,
    InputError,
    ModelOptions,
    PipelineError,
    ScheduleError,
    SizeError,
    StateError,
    StreamDiffVSRPipeline,
    StreamState,
)
from pipeline.flow import GivenFlow, ZeroFlow
from pipeline.frames import frame_to_tensor, shrink_to_multiple_of_4, tensor_to_frame
from pipeline.noise import frame_noise
from tests.moving_texture import make_clip

ALONE = 1e-5  # largest difference between a stream in a batch and the same stream alone, fp32 on a CPU


def tensors(count: int, height: int = 20, width: int = 28, seed: int = 0) -> list[Tensor]:
    return [frame_to_tensor(frame) for frame in make_clip(count, height, width, seed=seed)]


def restore(pipe: StreamDiffVSRPipeline, frames: list[Tensor], state: StreamState, **options: object) -> list[Tensor]:
    return [pipe.step(frame, [state], **options) for frame in frames]  # type: ignore[arg-type]


def snapshot(state: StreamState) -> bytes:
    return state.to_bytes()


# Streaming


def test_a_frame_is_out_before_the_next_is_read(pipe: StreamDiffVSRPipeline) -> None:
    received: list[int] = []

    def source() -> Iterator[NDArray[np.uint8]]:
        for k, frame in enumerate(make_clip(4, 16, 20)):
            assert len(received) == k, f"frame {k} was read before frame {k - 1} was given out"
            yield frame

    for k, frame in enumerate(pipe(source(), steps=1)):
        assert frame.shape == (64, 80, 3)
        received.append(k)
    assert received == [0, 1, 2, 3]


def test_nothing_is_read_before_it_is_asked_for(pipe: StreamDiffVSRPipeline) -> None:
    def source() -> Iterator[NDArray[np.uint8]]:
        yield make_clip(1, 16, 16)[0]
        raise RuntimeError("read ahead")

    stream = pipe(source(), steps=1)
    assert next(stream).shape == (64, 64, 3)
    with pytest.raises(RuntimeError, match="read ahead"):
        next(stream)


def test_the_future_changes_nothing(pipe: StreamDiffVSRPipeline) -> None:
    """Equal beginnings give equal bits, whatever follows."""
    clip, other = tensors(4), tensors(4, seed=9)
    one = restore(pipe, clip, pipe.start(seed=3))
    two = restore(pipe, [*clip[:2], *other[2:]], pipe.start(seed=3))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[2], two[2])


def test_the_generator_gives_what_step_gives(pipe: StreamDiffVSRPipeline) -> None:
    clip = make_clip(3, 17, 22)
    outputs = restore(pipe, [frame_to_tensor(frame) for frame in clip], pipe.start())
    for frame, output in zip(pipe(clip), outputs, strict=True):
        assert frame.dtype == np.uint8 and np.array_equal(frame, tensor_to_frame(output[0], np.dtype(np.uint8)))


def test_the_generator_goes_on_with_a_state(pipe: StreamDiffVSRPipeline) -> None:
    clip = make_clip(4, 16, 20)
    whole = list(pipe(clip))
    state = pipe.start()
    halves = [*pipe(clip[:2], state), *pipe(clip[2:], state)]
    assert state.index == 4
    assert all(np.array_equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_sixteen_bit_frames(pipe: StreamDiffVSRPipeline) -> None:
    """The same picture in 16 bit at full scale gives the same restoration, in finer levels."""
    clip = make_clip(2, 16, 20)
    deep = [frame.astype(np.uint16) * 257 for frame in clip]
    for eight, sixteen in zip(pipe(clip), pipe(deep), strict=True):
        assert sixteen.dtype == np.uint16
        assert np.abs(sixteen / 257 - eight).max() <= 0.51
    assert len(np.unique(sixteen)) > 256


# Batches


def test_streams_in_one_batch_get_what_they_get_alone(pipe: StreamDiffVSRPipeline) -> None:
    """Two streams, one of them at its first frame while the other is at its third."""
    old, new = tensors(4, seed=1), tensors(2, seed=2)
    alone_old = restore(pipe, old, pipe.start(seed=5))
    alone_new = restore(pipe, new, pipe.start(seed=6, index=100))

    state_old, state_new = pipe.start(seed=5), pipe.start(seed=6, index=100)
    restore(pipe, old[:2], state_old)
    for k in range(2):
        batch = pipe.step(torch.cat([new[k], old[2 + k]]), [state_new, state_old])
        assert (batch[0] - alone_new[k][0]).abs().max() <= ALONE
        assert (batch[1] - alone_old[2 + k][0]).abs().max() <= ALONE
    assert (state_old.index, state_new.index) == (4, 102)


def test_batches_of_the_recorded_checkpoint(parity_folder: Path) -> None:
    """The same with attention, as in the published model."""
    pipe = StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="dis")
    clip = tensors(2, 24, 32)
    state = pipe.start()
    alone = restore(pipe, clip, state)
    fresh, later = pipe.start(seed=8), pipe.start()
    expected = pipe.step(clip[0], [pipe.start(seed=8)])
    restore(pipe, clip[:1], later)
    batch = pipe.step(torch.cat([clip[0], clip[1]]), [fresh, later])
    assert (batch[:1] - expected).abs().max() <= ALONE
    assert (batch[1:] - alone[1]).abs().max() <= ALONE


@pytest.mark.parametrize("steps", [(4, 1, 2), (1, None, 1)])
def test_every_stream_has_its_own_number_of_steps(pipe: StreamDiffVSRPipeline, steps: tuple[int | None, ...]) -> None:
    clips = [tensors(2, seed=seed) for seed in range(3)]
    alone = [
        restore(pipe, clip, pipe.start(seed=s), steps=n) for s, (clip, n) in enumerate(zip(clips, steps, strict=True))
    ]
    states = [pipe.start(seed=seed) for seed in range(3)]
    for k in range(2):
        batch = pipe.step(torch.cat([clip[k] for clip in clips]), states, steps=steps)
        for row in range(3):
            assert (batch[row] - alone[row][k][0]).abs().max() <= ALONE


def test_steps_change_the_output(pipe: StreamDiffVSRPipeline) -> None:
    frame = tensors(1)[0]
    one, two, four, default = (pipe.step(frame, [pipe.start()], steps=n) for n in (1, 2, 4, None))
    assert torch.equal(four, default)
    assert not torch.allclose(one, two, atol=1e-3) and not torch.allclose(two, four, atol=1e-3)


# States


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(model_folder: Path, dtype: torch.dtype) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, torch_dtype=dtype)
    clip = tensors(5)
    whole = restore(pipe, clip, pipe.start(seed=4))
    state = pipe.start(seed=4)
    restore(pipe, clip[:3], state)
    file = io.BytesIO()
    state.save(file)
    file.seek(0)
    loaded = StreamState.load(file, model_sha256=pipe.model_sha256)
    assert loaded.prev_output_3HW is not None and loaded.prev_output_3HW.dtype == dtype
    rest = restore(pipe, clip[3:], loaded)
    assert torch.equal(rest[0], whole[3]) and torch.equal(rest[1], whole[4])


def test_a_cut_makes_the_next_frame_a_first_frame(pipe: StreamDiffVSRPipeline) -> None:
    """That is why a video splits at its cuts without changing a bit."""
    clip = tensors(3)
    state = pipe.start(seed=2)
    restore(pipe, clip[:2], state)
    state.reset()
    after_cut = pipe.step(clip[2], [state])
    assert torch.equal(after_cut, pipe.step(clip[2], [pipe.start(seed=2, index=2)]))


def test_results_live_apart_from_states_and_inputs(pipe: StreamDiffVSRPipeline) -> None:
    frames, states = torch.cat([tensors(1)[0], tensors(1, seed=3)[0]]), [pipe.start(), pipe.start(seed=1)]
    output = pipe.step(frames, states)
    before = [snapshot(state) for state in states]
    output.zero_()
    frames.zero_()
    states[0].prev_output_3HW.add_(1)  # type: ignore[union-attr]
    assert snapshot(states[1]) == before[1]
    states[0].prev_output_3HW.sub_(1)  # type: ignore[union-attr]
    for state in states:
        tensor = state.prev_output_3HW
        assert tensor is not None and tensor.any() and tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_pipeline_keeps_nothing_of_a_stream(pipe: StreamDiffVSRPipeline) -> None:
    clip = tensors(2)
    first = restore(pipe, clip, pipe.start())
    restore(pipe, tensors(3, 32, 16, seed=7), pipe.start(seed=9), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first, restore(pipe, clip, pipe.start()), strict=True))


class Broken(Exception):
    """What a test makes a part of the engine raise."""


@pytest.mark.parametrize("part", ["flow", "callback", "decoder"])
def test_a_failed_step_changes_no_state(
    pipe: StreamDiffVSRPipeline, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tensors(3)
    states = [pipe.start(), pipe.start(seed=1)]
    for frame in clip[:2]:
        pipe.step(torch.cat([frame, frame]), states)
    before = [snapshot(state) for state in states]

    def fail(*_: object, **__: object) -> None:
        raise Broken

    callback = None
    if part == "flow":
        monkeypatch.setattr(pipe, "flow", fail)
    elif part == "decoder":
        monkeypatch.setattr(pipe.vae, "decode", fail)
    else:
        callback = fail
    with pytest.raises(Broken):
        pipe.step(torch.cat([clip[2], clip[2]]), states, callback_on_step_end=callback)
    assert [snapshot(state) for state in states] == before
    monkeypatch.undo()
    whole = restore(pipe, clip, pipe.start())
    assert (pipe.step(torch.cat([clip[2], clip[2]]), states)[0] - whole[2][0]).abs().max() <= ALONE


# Noise, flow, guidance


def test_noise_is_keyed_by_seed_and_index(pipe: StreamDiffVSRPipeline) -> None:
    frame = tensors(1)[0]
    expected = pipe.step(frame, [pipe.start()], frame_noise((4, 20, 28), seed=12, index=34).unsqueeze(0))
    assert torch.equal(pipe.step(frame, [pipe.start(seed=12, index=34)]), expected)
    assert not torch.equal(pipe.step(frame, [pipe.start(seed=12, index=35)]), expected)


def test_fixed_noise_is_that_of_frame_zero(model_folder: Path) -> None:
    from pipeline.checkpoint import load_checkpoint

    parts = load_checkpoint(model_folder)
    pipe = StreamDiffVSRPipeline(
        parts.unet, parts.controlnet, parts.vae, parts.scheduler, options=ModelOptions(noise="fixed", flow="zero")
    )
    frame = tensors(1)[0]
    outputs = [pipe.step(frame, [pipe.start(seed=1, index=index)]) for index in (0, 7)]
    assert torch.equal(*outputs)


def test_noise_in_the_callers_hands_is_not_changed(pipe: StreamDiffVSRPipeline) -> None:
    noise = frame_noise((4, 20, 28), seed=0, index=0).unsqueeze(0)
    before = noise.clone()
    pipe.step(tensors(1)[0], [pipe.start()], noise)
    assert torch.equal(noise, before)


def test_given_flow_replaces_the_estimator(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tensors(2)
    estimated = restore(pipe, clip, pipe.start())[1]
    flow = pipe.flow(clip[1], clip[0])
    monkeypatch.setattr(pipe, "flow", GivenFlow())
    state = pipe.start()
    pipe.step(clip[0], [state])
    before = snapshot(state)
    with pytest.raises(PipelineError, match="No flow was given"):
        pipe.step(clip[1], [state])
    assert snapshot(state) == before
    assert torch.equal(pipe.step(clip[1], [state], flow_B2HW=flow), estimated)


def test_flow_of_first_frames_is_ignored(pipe: StreamDiffVSRPipeline) -> None:
    frame = tensors(1)[0]
    nonsense = torch.full((1, 2, 80, 112), float("nan"))
    assert torch.equal(pipe.step(frame, [pipe.start()], flow_B2HW=nonsense), pipe.step(frame, [pipe.start()]))


def test_every_guidance_switch_has_its_effect(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tensors(2)
    firsts, seconds = [], {}
    for name, switches in {
        "all": Guidance(),
        "no artg": Guidance(artg=False),
        "no tpm": Guidance(tpm=False),
        "tpm unwarped": Guidance(tpm_warped=False),
        "none": Guidance(artg=False, tpm=False),
    }.items():
        monkeypatch.setattr(pipe, "guidance", switches)
        outputs = restore(pipe, clip, pipe.start())
        firsts.append(outputs[0])
        seconds[name] = outputs[1]
    assert all(torch.equal(first, firsts[0]) for first in firsts)
    results = list(seconds.values())
    for a in range(len(results)):
        for b in range(a):
            assert (results[a] - results[b]).abs().max() > 1e-3, (list(seconds)[a], list(seconds)[b])
    alone = pipe.step(clip[1], [pipe.start(index=1)])
    assert torch.equal(seconds["none"], alone)


def test_no_flow_is_estimated_where_none_is_used(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "flow", GivenFlow())
    for switches in (Guidance(artg=False, tpm=False), Guidance(artg=False, tpm_warped=False)):
        monkeypatch.setattr(pipe, "guidance", switches)
        restore(pipe, tensors(2), pipe.start())


def test_caching_the_condition_changes_no_bit(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tensors(2)
    cached = restore(pipe, clip, pipe.start())
    monkeypatch.setattr(pipe, "cache_condition", False)
    reference = restore(pipe, clip, pipe.start())
    assert torch.equal(cached[1], reference[1])


# The callback


def test_the_callback_sees_and_may_replace_the_latents(pipe: StreamDiffVSRPipeline) -> None:
    frame, seen = tensors(1)[0], []

    def look(caller: object, number: int, timestep: Tensor, given: dict[str, Tensor]) -> None:
        seen.append((number, timestep.tolist(), given["latents"].shape, given["model_output"].shape))

    names = ("latents", "model_output")
    watched = pipe.step(frame, [pipe.start()], callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    shape = torch.Size([1, 4, 20, 28])
    assert seen == [(k, [t], shape, shape) for k, t in enumerate((999, 749, 499, 249))]
    assert torch.equal(watched, pipe.step(frame, [pipe.start()]))

    def blank(caller: object, number: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(given["latents"])}

    with torch.no_grad():
        grey = pipe.vae.decode(torch.zeros(1, 4, 20, 28))
    assert torch.equal(pipe.step(frame, [pipe.start()], callback_on_step_end=blank), grey)


# Sizes, types, devices


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 33), (16, 50), (38, 50), (19, 16)])
def test_any_size_runs_natively(pipe: StreamDiffVSRPipeline, height: int, width: int) -> None:
    outputs = restore(pipe, tensors(2, height, width), pipe.start())
    assert all(output.shape == (1, 3, 4 * height, 4 * width) and output.isfinite().all() for output in outputs)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 33)])
def test_any_size_runs_natively_with_attention(parity_folder: Path, height: int, width: int) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="zero")
    outputs = restore(pipe, tensors(2, height, width), pipe.start(), steps=1)
    assert all(output.shape == (1, 3, 4 * height, 4 * width) and output.isfinite().all() for output in outputs)


def test_the_originals_resizing_is_an_option(pipe: StreamDiffVSRPipeline) -> None:
    from PIL import Image

    frame = make_clip(1, 38, 50)[0]
    small = np.asarray(Image.fromarray(frame).resize((48, 36), Image.Resampling.LANCZOS))
    assert np.array_equal(shrink_to_multiple_of_4(frame), small)
    (shrunk,) = pipe([frame], shrink_like_original=True, steps=1)
    (expected,) = pipe([small], steps=1)
    assert shrunk.shape == (144, 192, 3) and np.array_equal(shrunk, expected)


@pytest.mark.parametrize(("height", "width"), [(15, 64), (64, 15), (8, 8), (1, 1)])
def test_too_small_frames_are_refused(pipe: StreamDiffVSRPipeline, height: int, width: int) -> None:
    with pytest.raises(SizeError, match=f"{width}x{height}.* 16 pixels") as caught:
        pipe.step(torch.zeros(1, 3, height, width), [pipe.start()])
    assert caught.value.code == "frame-too-small"


def test_the_limit_can_be_set(model_folder: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, flow="zero", max_pixels=16 * 20)
    pipe.step(torch.zeros(1, 3, 16, 20), [pipe.start()], steps=1)
    with pytest.raises(SizeError, match="17x20 has 340 pixels; the limit is 320") as caught:
        pipe.step(torch.zeros(1, 3, 20, 17), [pipe.start()], steps=1)
    assert caught.value.code == "frame-too-large"


def test_a_new_size_needs_a_reset(pipe: StreamDiffVSRPipeline) -> None:
    state = pipe.start()
    pipe.step(torch.zeros(1, 3, 16, 20), [state], steps=1)
    before = snapshot(state)
    with pytest.raises(SizeError, match="24x16; the frame before it was 20x16") as caught:
        pipe.step(torch.zeros(1, 3, 16, 24), [state], steps=1)
    assert caught.value.code == "frame-size-changed"
    assert snapshot(state) == before
    state.reset()
    assert pipe.step(torch.zeros(1, 3, 16, 24), [state], steps=1).shape == (1, 3, 64, 96)


@pytest.mark.parametrize(
    ("frames", "count", "code"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 1, "frames-shape"),
        (torch.zeros(3, 16, 16), 1, "frames-shape"),
        (torch.zeros(1, 1, 16, 16), 1, "frames-shape"),
        (torch.zeros(2, 3, 16, 16), 1, "states-count"),
        (torch.zeros(0, 3, 16, 16), 0, "states-count"),
    ],
)
def test_wrong_frames_are_refused(pipe: StreamDiffVSRPipeline, frames: Tensor, count: int, code: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe.step(frames, [pipe.start() for _ in range(count)])
    assert caught.value.code == code


def test_wrong_arguments_are_refused(pipe: StreamDiffVSRPipeline) -> None:
    frames, state = torch.zeros(2, 3, 16, 16), pipe.start()
    with pytest.raises(InputError, match="1 of them different"):
        pipe.step(frames, [state, state])
    states = [pipe.start(), pipe.start()]
    for options, message in (
        ({"noise_B4HW": torch.zeros(2, 3, 16, 16)}, r"noise_B4HW has shape \(2, 3, 16, 16\); \(2, 4, 16, 16\)"),
        ({"flow_B2HW": torch.zeros(1, 2, 64, 64)}, r"flow_B2HW has shape \(1, 2, 64, 64\); \(2, 2, 64, 64\)"),
        ({"steps": [4]}, "steps has 1 entries for 2 streams"),
        ({"callback_on_step_end_tensor_inputs": ("weights",)}, "cannot be given weights"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.step(frames, states, **options)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError):
        pipe.step(frames, states, steps=0)
    with pytest.raises(StateError, match="belongs to the model"):
        pipe.step(frames, [pipe.start(), StreamState(model_sha256="f" * 64)])
    assert all(state.index == 0 and state.is_first for state in states)


@pytest.mark.parametrize(
    "frame", [np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32), np.zeros((16, 16, 4), np.uint8)]
)
def test_wrong_arrays_are_refused(pipe: StreamDiffVSRPipeline, frame: NDArray[np.generic]) -> None:
    with pytest.raises(InputError, match=r"\(height, width, 3\) of uint8 or uint16"):
        list(pipe([frame]))  # type: ignore[list-item]


def test_output_is_fp32_unclamped_and_without_gradients(
    pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = tensors(1)[0].double().requires_grad_()
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *arguments: decode(*arguments) * 100)
    output = pipe.step(frame, [pipe.start()])
    assert output.dtype == torch.float32 and not output.requires_grad
    assert output.abs().max() > 1


def test_bfloat16_is_close_to_fp32(pipe: StreamDiffVSRPipeline, model_folder: Path) -> None:
    half = StreamDiffVSRPipeline.from_pretrained(model_folder, torch_dtype=torch.bfloat16)
    assert half.model_sha256 == pipe.model_sha256
    clip = tensors(3)
    for a, b in zip(restore(half, clip, half.start()), restore(pipe, clip, pipe.start()), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().mean() < 0.02 * b.abs().mean() + 0.01


@pytest.mark.gpu
def test_the_gpu_is_close_to_the_cpu(model_folder: Path, pipe: StreamDiffVSRPipeline) -> None:
    gpu = StreamDiffVSRPipeline.from_pretrained(model_folder, device="cuda", flow=ZeroFlow())
    cpu = StreamDiffVSRPipeline.from_pretrained(model_folder, flow=ZeroFlow())
    clip = tensors(3)
    for a, b in zip(restore(gpu, clip, gpu.start()), restore(cpu, clip, cpu.start()), strict=True):
        assert a.device.type == "cuda"
        assert (a.cpu() - b).abs().max() < 1e-2


def test_moving_and_casting_keeps_the_model(model_folder: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, flow="zero")
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.controlnet.dtype == torch.bfloat16
    state = pipe.start()
    pipe.step(torch.zeros(1, 3, 16, 16), [state], steps=1)
    assert state.prev_output_3HW is not None and state.prev_output_3HW.dtype == torch.bfloat16
    assert state.prev_input_3HW is not None and state.prev_input_3HW.dtype == torch.float32
