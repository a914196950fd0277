"""Timesteps by the checkpoint's configuration, and a DDIM step that equals diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from pipeline import ScheduleError
from pipeline.schedule import FINAL, Schedule, ddim_step, make_schedule, require_supported


def scheduler(**changes: object) -> DDIMScheduler:
    """The scheduler of the published checkpoint."""
    config = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
    return DDIMScheduler(**(config | changes))


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [(None, (999, 749, 499, 249)), (4, (999, 749, 499, 249)), (2, (999, 499)), (1, (999,)), (3, (999, 666, 332))],
)
def test_published_timesteps(steps: int | None, timesteps: tuple[int, ...]) -> None:
    assert make_schedule(scheduler(), steps).timesteps == timesteps


def test_arrivals() -> None:
    assert make_schedule(scheduler()) == Schedule((999, 749, 499, 249), (749, 499, 249, FINAL))
    leading = scheduler(timestep_spacing="leading")
    assert make_schedule(leading) == Schedule((751, 501, 251, 1), (501, 251, 1, FINAL))
    assert make_schedule(scheduler(), 3).previous == (666, 333, FINAL)  # by diffusers' rule, not the next timestep


def test_the_checkpoints_own_timesteps() -> None:
    own = {2: (999, 300)}
    assert make_schedule(scheduler(), 2, own) == Schedule((999, 300), (300, FINAL))
    assert make_schedule(scheduler(), 1, own).timesteps == (999,)


def test_planning_leaves_the_shared_scheduler_alone() -> None:
    shared = scheduler()
    before = shared.timesteps.clone()
    make_schedule(shared, 2)
    assert torch.equal(shared.timesteps, before)
    assert shared.num_inference_steps is None


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_counts(steps: int) -> None:
    with pytest.raises(ScheduleError, match=f"{steps} denoising steps.* 1 to 1000") as caught:
        make_schedule(scheduler(), steps)
    assert caught.value.code == "schedule-steps"


@pytest.mark.parametrize("timesteps", [(499, 999), (999, 999), (1000, 5), (999,), (999, -2)])
def test_impossible_timesteps(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError) as caught:
        make_schedule(scheduler(), 2, {2: timesteps})
    assert caught.value.code == "schedule-timesteps"


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_step_equals_diffusers(kind: str, clip_sample: bool, set_alpha_to_one: bool, steps: int) -> None:
    ours = scheduler(prediction_type=kind, clip_sample=clip_sample, set_alpha_to_one=set_alpha_to_one)
    theirs = DDIMScheduler.from_config(ours.config)
    theirs.set_timesteps(steps)
    torch.manual_seed(0)
    z = reference = torch.randn(1, 4, 9, 11)
    schedule = make_schedule(ours, steps)
    assert schedule.timesteps == tuple(theirs.timesteps.tolist())
    for t, previous in zip(schedule.timesteps, schedule.previous, strict=True):
        v = torch.randn(1, 4, 9, 11)
        # Thresholded predictions: diffusers keeps the unclipped noise, and so does the step
        reference = theirs.step(v, t, reference).prev_sample
        z = ddim_step(ours, v, z, [t], [previous])
        assert torch.equal(z, reference)


def test_rows_step_from_their_own_timesteps() -> None:
    torch.manual_seed(1)
    z, v = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    timesteps, previous = [999, 749, 499], [499, 499, FINAL]
    batch = ddim_step(scheduler(), v, z, timesteps, previous)
    for row in range(3):
        alone = ddim_step(scheduler(), v[row : row + 1], z[row : row + 1], [timesteps[row]], [previous[row]])
        assert torch.equal(batch[row], alone[0])


def test_unsupported_schedulers() -> None:
    require_supported(scheduler())
    with pytest.raises(ScheduleError, match="thresholding"):
        require_supported(scheduler(thresholding=True))
