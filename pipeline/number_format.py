"""Which number format a model bears: the fastest in which its pictures stay near to those of fp32.

How much a format changes is the model's doing: bf16 keeps 54 dB and more with the built-in model, and 41 to 45 with
random weights of the published form, where fp16 keeps 61 (`benchmarks/quantisation-*.md`). So nothing is taken for
granted: a few frames of a made-up clip are restored in fp32 and in the format, and what was found is kept on disk.

fp16 is the nearer of the two, but its largest value is 65504. It counts as near only where no layer comes within
`HEADROOM` of that.

Knows: the comparison, and where its results lie. Does not know: which formats a device is fast in
(`actors.hardware`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import diffusers
import torch
from torch import Tensor, nn

from pipeline.backends import Backend, make_backend, openvino_version, processor_flags
from pipeline.code_hash import pipeline_code_sha256
from pipeline.cuda_backend import psnr_db
from pipeline.frame_core import CoreInputs, CoreKind, FrameCore
from pipeline.made_up_clip import made_up_clip
from pipeline.notes import Notes
from pipeline.options import Guidance
from pipeline.schedule import make_schedule

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

logger = logging.getLogger(__name__)

# 45 dB are what every faster way owes the reference; another clip may lose a decibel more than the made-up one.
LEAST_PSNR_DB: Final = 46.0
HEADROOM: Final = 8.0
FRAMES: Final = 3
_SIDE: Final = 32  # input pixels of its frames
Run = Callable[[CoreKind, CoreInputs], Tensor]


def settle_format(
    pipe: StreamDiffVSRPipeline, formats: Sequence[torch.dtype], *, backend: str, device: torch.device | str
) -> tuple[torch.dtype, Backend | None]:
    """Return the first of `formats` in which the model's pictures stay near to those of fp32.

    Args:
        pipe: networks in fp32, in main memory.
        formats: fastest first; fp32, and the last one, are taken without a comparison.
        backend: that will run the networks, as `pipeline.backends.choose_backend` returned it.
        device: where it will.

    Returns:
        The format, and OpenVINO's backend in it, where that was made for the comparison.
    """
    for dtype in formats:
        if dtype == torch.float32 or dtype == formats[-1]:
            return dtype, None
        made = make_backend(backend, pipe, dtype) if backend == "openvino" else None
        try:
            reached = nearness_db(pipe, dtype, backend=backend, device=device, run=made.run if made else None)
        except RuntimeError as error:  # so are all of torch's and of the device's, too little memory among them
            logger.warning("%s is used without a comparison with float32: %s", _name(dtype), str(error).splitlines()[0])
            return dtype, made
        if reached >= LEAST_PSNR_DB:
            return dtype, made
        logger.warning(
            "%s is not used: this model's pictures in it are %s, and %.0f dB to those in float32 are wanted; --dtype "
            "chooses it all the same",
            _name(dtype),
            f"{reached:.1f} dB" if math.isfinite(reached) else "not finite, or near to where they would not be",
            LEAST_PSNR_DB,
        )
    raise ValueError("no number format was named")


def nearness_db(
    pipe: StreamDiffVSRPipeline,
    dtype: torch.dtype,
    *,
    backend: str,
    device: torch.device | str,
    run: Run | None = None,
) -> float:
    """Return the PSNR in dB of the clip's worst frame, restored in `dtype`, to that in fp32; as it was found before.

    Takes memory for the networks in fp32 on the device, for as long as it takes.

    Args:
        pipe: networks in fp32, in main memory.
        backend, device: see `settle_format`. OpenVINO computes by itself; for all others the networks are cast.
        run: OpenVINO's, where it is made already.

    Returns:
        -inf where a picture is not finite, or where values come too near to the format's largest.

    Raises:
        ValueError: the networks are not in fp32. RuntimeError: too little memory.
    """
    if pipe.unet.dtype != torch.float32:
        raise ValueError(f"the networks are in {_name(pipe.unet.dtype)}: there is nothing to compare with")
    if backend == "openvino" and run is None:
        made = make_backend(backend, pipe, dtype)
        assert made is not None
        run = made.run
    notes = _notes(pipe, backend, str(device))
    known = notes.get(_name(dtype))
    if isinstance(known, int | float):
        return float(known)
    trial = _Trial(pipe, torch.device(device))
    reached = trial.compare_cast(dtype) if run is None else trial.compare(run)
    del trial
    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()
    notes.put(_name(dtype), reached)
    return reached


class _Trial:
    """The clip and what the model makes of it in fp32."""

    def __init__(self, pipe: StreamDiffVSRPipeline, device: torch.device) -> None:
        schedule = make_schedule(pipe.scheduler, None, pipe.options.schedules)
        self._kinds = [CoreKind(guided, schedule, Guidance()) for guided in (False, True)]
        self._device = device
        self._channels = int(pipe.vae.config.latent_channels)
        self._cores = nn.ModuleList(FrameCore(pipe, kind) for kind in self._kinds).eval()
        self._largest = 0.0
        there = self._cores_there()
        with self._watched(there):
            self._reference = self._restore(lambda kind, inputs: self._core_of(there, kind)(*inputs.tensors))

    def compare(self, run: Run) -> float:
        """Return the PSNR in dB of the worst frame; -inf where one is not finite."""
        return min(psnr_db(x, wanted) for x, wanted in zip(self._restore(run), self._reference, strict=True))

    def compare_cast(self, dtype: torch.dtype) -> float:
        """Return the same for the networks themselves, cast; -inf as well where values come too near to the largest."""
        if self._largest > torch.finfo(dtype).max / HEADROOM:
            return -math.inf
        there = self._cores_there().to(dtype)
        return self.compare(lambda kind, inputs: self._core_of(there, kind)(*inputs.tensors))

    def _cores_there(self) -> nn.ModuleList:
        there = copy.deepcopy(self._cores).to(self._device)
        # as the pipeline has it: three times as fast for few channels (`StreamDiffVSRPipeline.to`)
        return there.to(memory_format=torch.channels_last) if self._device.type == "cpu" else there  # type: ignore[call-overload]

    def _core_of(self, cores: nn.ModuleList, kind: CoreKind) -> nn.Module:
        return cores[self._kinds.index(kind)]

    @torch.no_grad()
    def _restore(self, run: Run) -> list[Tensor]:
        outputs: list[Tensor] = []
        for frame_13hw, latents_1Chw, flow_12HW in made_up_clip(0, FRAMES, self._channels, _SIDE):
            inputs = CoreInputs(frame_13hw.to(self._device), latents_1Chw.to(self._device))
            if outputs:
                inputs = replace(inputs, previous_B3HW=outputs[-1], motion=flow_12HW.to(self._device))
            outputs.append(run(self._kinds[bool(outputs)], inputs).to(torch.float32))
        return outputs

    @contextlib.contextmanager
    def _watched(self, cores: nn.ModuleList) -> Iterator[None]:
        """Remember the largest value that any layer takes or makes."""

        def look(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            for x in (*inputs, output):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self._largest = max(self._largest, float(x.abs().max()))

        layers = {module for module in cores.modules() if next(module.children(), None) is None}
        hooks = [module.register_forward_hook(look) for module in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _notes(pipe: StreamDiffVSRPipeline, backend: str, device: str) -> Notes:
    """Return what was found before for this model, by this code, on such a device."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else " ".join(sorted(processor_flags()))
    versions = (torch.__version__, diffusers.__version__, openvino_version() if backend == "openvino" else "")
    return Notes(pipe.model_sha256, backend, device.partition(":")[0], hardware, *versions, pipeline_code_sha256())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
