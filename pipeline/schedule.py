"""The denoising schedule: which timesteps a frame passes through, and the deterministic DDIM step between two of them.

Knows: a checkpoint's DDIM configuration and its own timesteps for some step counts (``schedules`` in upriver.json).
Does not know: networks, streams, why a stream asks for fewer steps. A policy that chooses the count per frame belongs
here; all that the engine needs of it is the number.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pipeline.errors import ScheduleError

DEFAULT_STEPS: Final = 4
FINAL: Final = -1  # as a "previous" timestep: the end of the chain


@dataclass(frozen=True, slots=True)
class Schedule:
    """The timesteps of one frame, noisiest first, and the timestep that each step arrives at (FINAL after the last)."""

    timesteps: tuple[int, ...]
    previous: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(
    scheduler: DDIMScheduler, steps: int | None = None, own: Mapping[int, Sequence[int]] | None = None
) -> Schedule:
    """Return the schedule for a number of steps.

    The checkpoint's scheduler configuration decides: with trailing spacing 4 steps give (999, 749, 499, 249), 2 give
    (999, 499) and 1 gives (999,). Each step then arrives where ``DDIMScheduler.step`` arrives. A checkpoint that was
    trained on other timesteps for some count says so by `own`; there each step arrives at the next timestep.

    Args:
        scheduler: not changed.
        steps: number of denoising steps; None means 4.
        own: timesteps by step count, from the checkpoint.

    Raises:
        ScheduleError: a count below 1 or above the number of training timesteps, or timesteps that are out of range
            or not decreasing.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    limit = scheduler.config.num_train_timesteps
    if not 1 <= steps <= limit:
        raise ScheduleError(
            f"{steps} denoising steps are outside 1 to {limit}.",
            code="schedule-steps",
            remedy=f"Choose 1, 2 or {DEFAULT_STEPS} steps; built-in models are trained for these.",
        )
    if own is not None and steps in own:
        timesteps = tuple(own[steps])
        previous = (*timesteps[1:], FINAL)
        if len(timesteps) != steps:
            raise _impossible(timesteps, f"{len(timesteps)} timesteps are given for {steps} steps")
    else:
        planner = copy.copy(scheduler)  # set_timesteps writes to the object, which other streams share
        planner.set_timesteps(steps)
        timesteps = tuple(int(t) for t in planner.timesteps)
        previous = tuple(max(t - limit // steps, FINAL) for t in timesteps)
    if not all(0 <= t < limit for t in timesteps):
        raise _impossible(timesteps, f"they must lie in 0 to {limit - 1}")
    if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        raise _impossible(timesteps, "they must decrease")
    return Schedule(timesteps=timesteps, previous=previous)


def ddim_step(
    scheduler: DDIMScheduler, output_BChw: Tensor, latent_BChw: Tensor, timestep: Sequence[int], previous: Sequence[int]
) -> Tensor:
    """Take one DDIM step without added noise (eta 0), each row of the batch from its own timestep to its own next one.

    Song et al., "Denoising diffusion implicit models" (arXiv 2010.02502), equation 12. Gives the numbers of
    ``DDIMScheduler.step``, which serves only one timestep for the whole batch.

    Args:
        scheduler: holds the cumulative alphas, the prediction type and clipping.
        output_BChw: what the U-Net predicted: noise, clean sample, or v (arXiv 2202.00512), by ``prediction_type``.
        latent_BChw: the latent at `timestep`; computed in its dtype promoted with fp32.
        timestep, previous: one integer per row; `previous` is FINAL after the last step.

    Returns:
        The latent at `previous`, (B,C,h,w) in fp32 or wider; differentiable.
    """
    alphas = scheduler.alphas_cumprod
    now = torch.stack([alphas[t] for t in timestep])
    then = torch.stack([alphas[t] if t != FINAL else scheduler.final_alpha_cumprod for t in previous])
    now, then = (x.to(latent_BChw.device).view(-1, 1, 1, 1) for x in (now, then))
    roots = DDIMRoots(now**0.5, (1 - now) ** 0.5, then**0.5, (1 - then) ** 0.5)
    return ddim_update(scheduler, output_BChw, latent_BChw, roots)


Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True, slots=True)
class DDIMRoots(Generic[Number]):
    """Square roots of the cumulative alpha, and of one minus it, at a timestep and at the one it arrives at."""

    signal: Number
    noise: Number
    next_signal: Number
    next_noise: Number


def ddim_roots(scheduler: DDIMScheduler, timestep: int, previous: int) -> DDIMRoots[float]:
    """Return the numbers of one step as plain numbers, for a batch whose rows are all at the same timestep."""
    now = scheduler.alphas_cumprod[timestep]
    then = scheduler.alphas_cumprod[previous] if previous != FINAL else scheduler.final_alpha_cumprod
    return DDIMRoots(*(float(x) for x in (now**0.5, (1 - now) ** 0.5, then**0.5, (1 - then) ** 0.5)))


def ddim_update(
    scheduler: DDIMScheduler, output_BChw: Tensor, latent_BChw: Tensor, roots: DDIMRoots[Tensor] | DDIMRoots[float]
) -> Tensor:
    """Do what `ddim_step` does, with the roots of the alphas at hand."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        clean = roots.signal * latent_BChw - roots.noise * output_BChw
        noise = roots.signal * output_BChw + roots.noise * latent_BChw
    elif kind == "epsilon":
        clean = (latent_BChw - roots.noise * output_BChw) / roots.signal
        noise = output_BChw
    else:  # "sample"; require_supported lets nothing else through
        clean = output_BChw
        noise = (latent_BChw - roots.signal * clean) / roots.noise
    if scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return roots.next_signal * clean + roots.next_noise * noise


def require_supported(scheduler: DDIMScheduler) -> None:
    """Raise ScheduleError for a scheduler configuration that `ddim_step` does not implement."""
    kind = scheduler.config.prediction_type
    if kind not in ("v_prediction", "epsilon", "sample"):
        raise _unsupported("prediction_type", kind, "v_prediction, epsilon or sample")
    if scheduler.config.thresholding:
        raise _unsupported("thresholding", True, "false")


def _impossible(timesteps: tuple[int, ...], reason: str) -> ScheduleError:
    return ScheduleError(
        f"The timesteps {', '.join(map(str, timesteps))} cannot be used: {reason}.",
        code="schedule-timesteps",
        remedy="Correct `schedules` in the checkpoint's upriver.json, or choose another number of steps.",
    )


def _unsupported(name: str, value: object, wanted: str) -> ScheduleError:
    return ScheduleError(
        f"The scheduler's {name} is {value!r}; only {wanted} can be run.",
        code="schedule-unsupported",
        remedy="Use a checkpoint of this method; its scheduler is DDIM with v_prediction.",
    )
