"""StreamDiffVSRPipeline: one frame in, one restored frame out, four times as large; the past in, never the future.

Knows: the order of operations of Stream-DiffVSR (arXiv 2512.23709, section 3) for a batch of streams, and what is
checked before. Does not know: files, videos, cuts, clusters. Nothing about a stream is kept here: it is in its
StreamState.

Shapes: B streams of the batch, L those among them with a previous frame, R those that are still being denoised, h w
input size, H W = 4h 4w output size, C latent channels, T tokens, D token width.

Numerical traps, each of which the parity tests notice:
  * The previous output is warped as the decoder gave it: neither clamped nor rounded.
  * A first frame runs without ARTG and without TPM; a zero condition would be another thing.
  * The flow warp of the published checkpoints is half a pixel off (`guidance.flow_warp`).
  * The latent is kept in fp32 between steps: bfloat16 would lose it to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny
from pipeline.backends import Backend, choose_backend, make_backend, require_dtype, run_groups, take_rows
from pipeline.checkpoint import fingerprint, load_checkpoint, save_extras
from pipeline.errors import InputError
from pipeline.file_modes import follow_umask
from pipeline.flow import FlowEstimator, FlowName, FlowSize, NetFlow, make_flow
from pipeline.frame_core import CoreKind, FrameCore
from pipeline.frames import frame_to_tensor, shrink_to_multiple_of_4, tensor_to_frame
from pipeline.memory import Tiler
from pipeline.noise import NoiseCache, frame_noise
from pipeline.number_format import settle_format
from pipeline.options import Guidance, ModelOptions
from pipeline.preconditions import CALLBACK_TENSORS, MINIMUM_SIDE, require_fit, require_inputs
from pipeline.prompt_attention import attend_to_constant_prompt
from pipeline.reference_step import ReferenceStep, StepCallback
from pipeline.schedule import Schedule, make_schedule
from pipeline.state import StreamState
from pipeline.tiling import Past, TilePlan, flow_in_tiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MAX_PIXELS: Final = 4096 * 2304


class StreamDiffVSRPipeline(DiffusionPipeline):
    """Causal diffusion video super-resolution, 4x, for any number of streams at once.

    Args:
        unet: predicts from [latent, low-resolution frame]; its text conditioning is a constant.
        controlnet: ARTG, conditioned on the warped previous output at output size.
        vae: the autoencoder whose decoder has temporal modules.
        scheduler: DDIM.
        prompt_embeds_1TD: embedding of the empty prompt; None for networks without cross-attention.
        options: how the checkpoint wants to be run; None means as published.
        flow: estimator; None takes the one that `options` names.
        model_sha256: fingerprint of the weights; None computes it when it is first needed.
        max_pixels: input frames with more pixels are refused.

    Attributes:
        flow: the flow estimator, `flow(current_B3hw, previous_B3hw) -> flow_B2HW`. It may be replaced between steps.
        guidance: which uses of the previous output are on; replace it for ablations.
        cache_condition: embed ARTG's condition once per frame instead of once per step. The numbers are equal; False
            takes the published path through ``ControlNetModel.forward``.
        backend: name of what runs whole frames, see `pipeline.backends`; change it by `use_backend`.

    Raises:
        CheckpointError: the networks do not fit together. ScheduleError: the scheduler cannot be run. FlowError: the
            flow estimator is not installed.
    """

    _callback_tensor_inputs: Final = CALLBACK_TENSORS

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: TemporalAutoencoderTiny
    scheduler: DDIMScheduler

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        vae: TemporalAutoencoderTiny,
        scheduler: DDIMScheduler,
        prompt_embeds_1TD: Tensor | None = None,
        options: ModelOptions | None = None,
        flow: FlowEstimator | None = None,
        model_sha256: str | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        super().__init__()
        self.options = options if options is not None else ModelOptions()
        require_fit(unet, controlnet, vae, scheduler)
        self.register_modules(unet=unet, controlnet=controlnet, vae=vae, scheduler=scheduler)
        if prompt_embeds_1TD is None:
            prompt_embeds_1TD = torch.zeros(1, 1, unet.config.cross_attention_dim)
        self.prompt_embeds_1TD = prompt_embeds_1TD
        self.flow = flow if flow is not None else make_flow(self.options.flow, size=self.options.flow_size)
        self.guidance = self.options.guidance
        self.cache_condition = True
        self.max_pixels = max_pixels
        self._model_sha256 = model_sha256
        self._tiler = Tiler()
        self._backend: Backend | None = None
        self._reference = ReferenceStep(self)
        self._noise = NoiseCache()
        self._known_schedules: dict[int | None, Schedule] = {}
        self._prompt_attention = attend_to_constant_prompt((unet, controlnet))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
        device: torch.device | str | None = None,
        flow: FlowName | FlowEstimator | None = None,
        flow_size: FlowSize | None = None,
        guidance: Guidance | Mapping[str, bool] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        backend: str = "eager",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model: a built-in name (``"tiny"``), a folder in the published layout, or a hub id (``"owner/name"``).

        Args:
            source: tried in this order. Write ``./tiny`` for a folder that has the name of a built-in model.
            torch_dtype: of the networks. State and noise do not depend on it. ``torch.int8`` with OpenVINO alone. Of
                several the first that this model bears, see `pipeline.number_format`.
            device: where the networks go; None leaves them in main memory.
            flow: estimator or its name, instead of the checkpoint's own.
            flow_size: where RAFT or DIS estimates (``"input"`` or ``"output"``), instead of the checkpoint's choice.
            guidance: switches for ablations, instead of the checkpoint's.
            max_pixels: input frames with more pixels are refused.
            backend: what runs whole frames, see `pipeline.backends`: ``"eager"`` is the reference, ``"auto"`` the
                fastest for the device. OpenVINO computes in `torch_dtype` while networks and states stay in fp32.
            revision, cache_dir, local_files_only: as in ``huggingface_hub``, for hub ids.

        Raises:
            CheckpointError: nothing is there, a file is missing, not safetensors, or does not fit its configuration.
            FlowError: an unknown estimator, or one whose library is not installed.
            BackendError: an unknown backend, one that is not installed, or not for this device or number format.
        """
        chosen = choose_backend(backend, str(device or "cpu"))
        formats = (torch_dtype,) if isinstance(torch_dtype, torch.dtype) else tuple(torch_dtype)
        for each in formats:
            require_dtype(chosen, each)
        checkpoint = load_checkpoint(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        options = checkpoint.options
        if guidance is not None:
            options = options.model_copy(update={"guidance": Guidance.model_validate(guidance)})
        if flow is None or isinstance(flow, str):
            flow = make_flow(
                flow or options.flow, size=flow_size or options.flow_size, raft_weights=checkpoint.raft_weights
            )
        pipe = cls(
            checkpoint.unet,
            checkpoint.controlnet,
            checkpoint.vae,
            checkpoint.scheduler,
            prompt_embeds_1TD=checkpoint.prompt_embeds_1TD,
            options=options,
            flow=flow,
            model_sha256=checkpoint.model_sha256,
            max_pixels=max_pixels,
        )
        dtype, made = settle_format(pipe, formats, backend=chosen, device=device or "cpu")
        pipe.to(device or "cpu", torch.float32 if chosen == "openvino" else dtype)
        pipe._backend = made or make_backend(chosen, pipe, dtype)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the published layout: the networks, ``prompt_embeds.safetensors`` and ``upriver.json``; no pickles.

        Args:
            save_directory: is created.
            kwargs: as in diffusers. The text encoder is not written: its one embedding is.
        """
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        save_extras(save_directory, self.prompt_embeds_1TD, self.options)
        follow_umask(sorted(Path(save_directory).rglob("*.safetensors")))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast the networks, as in diffusers: ``pipe.to(device, dtype)``."""
        before = self.device.type
        for network in (self.unet, self.controlnet, self.vae):
            nn.Module.to(network, *args, **kwargs)  # diffusers' own `to` warns of a cast that these networks bear
            if self.device.type == "cpu":
                # convolutions of few channels on large pictures run up to three times as fast this way
                network.to(memory_format=torch.channels_last)
        self.prompt_embeds_1TD = self.prompt_embeds_1TD.to(self.device)
        for attention in self._prompt_attention:
            attention.forget()
        self.flow.to(self.device)
        if self._backend is not None:
            if self.device.type != before:
                choose_backend(self._backend.name, str(self.device))
            self._backend.forget()
        return self

    @property
    def backend(self) -> str:
        """Name of what runs whole frames: "eager", "openvino", "graph" or "compiled"."""
        return "eager" if self._backend is None else self._backend.name

    @property
    def numerics(self) -> str:
        """What the networks compute in and by, for people: "float32", "bfloat16 by openvino"."""
        name = str(self.compute_dtype).removeprefix("torch.")
        return name if self._backend is None else f"{name} by {self._backend.name}"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The number format in which most of the arithmetic is done; networks and states may be in another."""
        return self.dtype if self._backend is None else self._backend.dtype

    def use_backend(self, name: str, dtype: torch.dtype | None = None) -> None:
        """Let another backend run whole frames; ``"auto"`` takes the fastest for the device.

        Args:
            dtype: in which OpenVINO computes; None: that of the networks.

        Raises:
            BackendError: an unknown name, a backend that is not installed, or not for this device or number format.
        """
        if self._backend is not None:
            self._backend.close()
        self._backend = make_backend(choose_backend(name, str(self.device)), self, dtype or self.unet.dtype)

    def warm_up(self) -> None:
        """Have the backend make what it needs for frames of any size, if it can, before anybody waits for a frame."""
        if self._backend is not None and self._backend.serves_every_size:
            state, side = self.start(), MINIMUM_SIDE
            still = None if self.flow_runs_in_the_frame else torch.zeros(1, 2, 4 * side, 4 * side)
            for _ in range(2):  # a first frame, and one with a past
                self.step(torch.zeros(1, 3, side, side), [state], flow_B2HW=still, steps=1)

    @property
    def flow_runs_in_the_frame(self) -> bool:
        """Whether the backend estimates flow as a part of the frame, so that `flow` is not called by itself."""
        return self._backend is not None and self._flow_in_frame is not None

    @property
    def _flow_in_frame(self) -> nn.Module | None:
        # not a subclass: it may do something else when it is called
        return self.flow.network if type(self.flow) is NetFlow else None

    @property
    def model_sha256(self) -> str:
        """Fingerprint of weights and options: the name by which a state knows its model."""
        if self._model_sha256 is None:
            self._model_sha256 = fingerprint(self.unet, self.controlnet, self.vae, self.scheduler, self.options)
        return self._model_sha256

    @property
    def memory_limit_bytes(self) -> int | None:
        """How much memory the process (on a GPU: its allocations) may need; None: no limit, no tiles."""
        return self._tiler.limit_bytes

    @memory_limit_bytes.setter
    def memory_limit_bytes(self, limit_bytes: int | None) -> None:
        self._tiler = Tiler(limit_bytes)

    def set_aside(self, beside_bytes: int) -> None:
        """Leave so much of the limit to what others hold: queues of pictures, an encoder; 0 or more."""
        self._tiler.beside_bytes = beside_bytes

    @property
    def tiling(self) -> TilePlan:
        """The tiles of the latest step."""
        return self._tiler.plan

    def halve_tiles(self) -> bool:
        """Make the tiles of further steps smaller, after memory ran out; False where they cannot be."""
        return self._tiler.halve(self)

    def start(self, seed: int = 0, index: int = 0) -> StreamState:
        """Return the state of a new stream.

        Args:
            seed: key of the stream's noise, 0 <= seed < 2**64.
            index: number of the first frame that will be presented.

        Raises:
            StateError: seed or index out of range.
        """
        return StreamState(model_sha256=self.model_sha256, seed=seed, index=index)

    @torch.no_grad()
    def step(
        self,
        frames_B3HW: Tensor,
        states: Sequence[StreamState],
        noise_B4HW: Tensor | None = None,
        flow_B2HW: Tensor | Sequence[Tensor | None] | None = None,
        steps: int | Sequence[int | None] | None = None,
        *,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Restore the next frame of each of B streams, and update their states.

        Each stream gets what it would get alone, up to rounding. First frames and later frames may share a batch. If
        this raises, no state has changed.

        Args:
            frames_B3HW: input frames in [-1, 1], floating point, on any device; any equal size of at least 16 by 16.
            states: B different states in the order of the frames.
            noise_B4HW: initial latents (B,C,h,w) instead of the noise of (seed, index).
            flow_B2HW: flow (B,2,4h,4w) in output pixels to the previous frame instead of `self.flow`'s; or one entry
                for each stream, (2,4h,4w), or None to have it estimated. Those of streams without a previous frame
                are ignored.
            steps: number of denoising steps, for all or per stream; None means 4.
            callback_on_step_end: called as ``callback(pipe, number, timestep, tensors)`` after every denoising step,
                as in diffusers; `timestep` (R,) holds those of the streams that took the step. It may return a dict
                whose ``latents`` replace the latents (B,C,h,w, fp32).
            callback_on_step_end_tensor_inputs: which tensors it is given: ``latents``, ``model_output`` (R,C,h,w).

        Returns:
            The decoder's output (B,3,4h,4w) as fp32, nominal range [-1, 1], not clamped.

        Raises:
            InputError, SizeError, StateError, ScheduleError: an argument is wrong, or the frame needs more memory than
                `memory_limit_bytes` even in tiles; nothing was computed.
            FlowError: flow is needed and cannot be had.
        """
        # 1. Check everything that can be wrong, before anything is computed
        require_inputs(self, frames_B3HW, states, noise_B4HW, flow_B2HW, callback_on_step_end_tensor_inputs)
        if flow_B2HW is not None and not isinstance(flow_B2HW, Tensor) and all(flow is None for flow in flow_B2HW):
            flow_B2HW = None
        schedules = self._schedules(steps, len(states))
        device, dtype = self.device, self.unet.dtype
        frames_B3hw = frames_B3HW.to(device, torch.float32)

        # 2. Find where the previous outputs of the streams that have one went
        plan = self._tiler.plan_for(self, frames_B3hw.shape)
        later = [b for b, state in enumerate(states) if not state.is_first] if self.guidance.needs_previous else []
        previous = [states[b].prev_output_3HW for b in later]
        past = Past([x.to(device, dtype) for x in previous if x is not None], self.options.warp)
        # What a backend needs is not in the estimate that keeps a limit.
        is_free = plan.is_whole and self.memory_limit_bytes is None and callback_on_step_end is None
        backend = self._backend if is_free else None
        flow_network: nn.Module | None = None
        motion_L: Tensor | None = None
        if later and self.guidance.needs_warp:
            if flow_B2HW is None and backend is not None and self._flow_in_frame is not None:
                # the backend takes the network into the frame, and is given what that looks at
                flow_network = self._flow_in_frame.to(device)  # an estimator may have been put in place later
                motion_L = self._previous_inputs(states, later)
            else:
                motion_L = self._flow_of(frames_B3hw, states, later, flow_B2HW, plan.flow)

        # 3. Draw the initial latents
        latents = self._initial_latents(frames_B3hw, states, noise_B4HW)

        # 4. Denoise and decode: all networks as one function where that can be, otherwise one after the other
        if backend is not None:
            frame = (frames_B3hw, latents, schedules, past.pictures, motion_L, later, flow_network)
            output_B3HW = run_groups(backend.run, self.guidance, *frame)
        else:
            past = Past(past.pictures, self.options.warp, motion_L)
            seen_by_caller = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            output_B3HW = self._reference.run(frames_B3hw, latents, schedules, past, later, plan, *seen_by_caller)
        del past, previous, motion_L, latents  # the new state needs their room

        # 5. Only now, when nothing can fail any more, hand the outcome to the states. They own their memory: neither
        # the caller's tensors nor a neighbour in the batch.
        outputs = [row.clone(memory_format=torch.contiguous_format) for row in output_B3HW]
        own_inputs = [row.clone(memory_format=torch.contiguous_format) for row in frames_B3hw]
        result = output_B3HW.to(torch.float32).contiguous()
        for state, output_3HW, input_3HW in zip(states, outputs, own_inputs, strict=True):
            state.advance(output_3HW, input_3HW)
        return result

    @torch.no_grad()
    def restore_warped(
        self, frames_B3hw: Tensor, latents_BChw: Tensor, warped_B3HW: Tensor, steps: int | None
    ) -> Tensor:
        """Return the decoder's output (B,3,4h,4w) for frames whose previous outputs were warped by the caller.

        No state is read or changed: this is for parts of frames (`pipeline.static_windows`).

        Raises:
            ScheduleError: an impossible number of steps.
        """
        kind = CoreKind(True, self._schedule(steps), self.guidance)
        inputs = (frames_B3hw, latents_BChw, warped_B3HW, warped_B3HW)
        return FrameCore(self, kind).restore(*inputs) if self._backend is None else self._backend.restore(kind, *inputs)

    def __call__(
        self,
        frames: Iterable[NDArray[np.integer]],
        state: StreamState | None = None,
        *,
        steps: int | None = None,
        shrink_like_original: bool = False,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[NDArray[np.integer]]:
        """Restore a stream of frames, one by one: frame k is given out before frame k + 1 is asked for.

        Args:
            frames: RGB frames (h,w,3), uint8, or uint16 at full scale.
            state: the stream to go on with, updated after each frame; None starts a new one with seed 0.
            steps: number of denoising steps; None means 4.
            shrink_like_original: first resize frames whose sides are no multiples of 4 as the original code does. For
                comparisons only: the output is then smaller than 4x.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see `step`.

        Yields:
            Frames (4h,4w,3) in the type of the input.

        Raises:
            InputError, SizeError, StateError, ScheduleError, FlowError: as `step`.
        """
        state = self.start() if state is None else state
        for frame_HWC in frames:
            if shrink_like_original:
                frame_HWC = shrink_to_multiple_of_4(frame_HWC)
            output_B3HW = self.step(
                frame_to_tensor(frame_HWC, self.device),
                [state],
                steps=steps,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
            picture_HWC = tensor_to_frame(output_B3HW[0], frame_HWC.dtype)
            del output_B3HW  # not held while the caller works, nor during the next step
            yield picture_HWC

    def _schedules(self, steps: int | Sequence[int | None] | None, batch: int) -> list[Schedule]:
        per_stream = list(steps) if isinstance(steps, Sequence) else [steps] * batch
        if len(per_stream) != batch:
            raise InputError(
                f"steps has {len(per_stream)} entries for {batch} streams.",
                code="steps-count",
                remedy="Give one number for all streams, or one for each.",
            )
        return [self._schedule(count) for count in per_stream]

    def _schedule(self, steps: int | None) -> Schedule:
        if steps not in self._known_schedules:
            self._known_schedules[steps] = make_schedule(self.scheduler, steps, self.options.schedules)
        return self._known_schedules[steps]

    def _flow_of(
        self,
        frames_B3hw: Tensor,
        states: Sequence[StreamState],
        later: list[int],
        given: Tensor | Sequence[Tensor | None] | None,
        side: int | None,
    ) -> Tensor:
        """Return the flow (L,2,H,W) of streams with a previous frame: as given, or estimated in tiles of `side`."""
        if isinstance(given, Tensor):
            return take_rows(given, later).to(self.device, torch.float32)
        rows = [b for b in later if given is None or given[b] is None]
        found: dict[int, Tensor] = {}
        if rows:
            estimate = self.flow if side is None else partial(flow_in_tiles, self.flow, side=side)
            estimated = estimate(take_rows(frames_B3hw, rows), self._previous_inputs(states, rows)).to(self.device)
            if given is None or rows == later:
                return estimated
            found = dict(zip(rows, estimated, strict=True))
        for b, flow_2HW in enumerate(given or ()):
            if flow_2HW is not None:
                found[b] = flow_2HW.to(self.device, torch.float32)
        return torch.stack([found[b] for b in later])

    def _previous_inputs(self, states: Sequence[StreamState], later: Sequence[int]) -> Tensor:
        """Return the previous input frames (L,3,h,w) of streams that have one, fp32."""
        inputs = [states[b].prev_input_3HW for b in later]
        return torch.stack([x.to(self.device, torch.float32) for x in inputs if x is not None])

    def _initial_latents(self, frames_B3hw: Tensor, states: Sequence[StreamState], noise_B4HW: Tensor | None) -> Tensor:
        """Return the latents (B,C,h,w) that denoising starts from, fp32."""
        if noise_B4HW is not None:
            return noise_B4HW.to(frames_B3hw.device, torch.float32)
        shape = (self.vae.config.latent_channels, *frames_B3hw.shape[2:])
        fixed = self.options.noise == "fixed"
        draw = self._noise.draw if fixed else frame_noise
        device = frames_B3hw.device
        return torch.stack(
            [draw(shape, seed=state.seed, index=0 if fixed else state.index, device=device) for state in states]
        )
