"""Training: the same arithmetic as inference, exact resumption, and each stage moves only its own weights."""

import itertools
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline import StreamDiffVSRPipeline
from pipeline.closed_form import initialise
from pipeline.dataset import DatasetError, TrainingData, change_tone
from pipeline.objectives import TrainConfig
from pipeline.restorer import SCHEDULES, ModelSize, Restorer, warp_previous
from pipeline.training import MODEL_CONFIG, Trainer, TrainingError, learning_rate_factor

SMALL = ModelSize(unet=(8, 16), groups=4, conditioning=(4, 8, 8), autoencoder=(8, 16, 48), encoder_blocks=(1, 1, 1))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three textured pictures, one of them twice."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(3):
        y, x = np.mgrid[0:220, 0:260]
        waves = sum(np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.02, 0.6, (6, 3)))
        picture = np.clip(128 + 30 * np.stack([waves, np.roll(waves, 9), waves.T.repeat(2, 1)[:220, :260]], -1), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.png")
    Image.open(folder / "0.png").save(folder / "copy.png")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    restorer = Restorer.create(SMALL)
    restorer.save(tmp_path / "model0", MODEL_CONFIG)
    return tmp_path / "model0"


def config(stage: str, data: Path, out: Path, **more: object) -> TrainConfig:
    values: dict[str, object] = {
        "stage": stage, "data": [data], "out": out, "batch": 2, "crop": 64, "perceptual": 0.0, "gan": 0.0, "holdout": 0,
        "iterations": 4, "warmup": 1, "validate_every": 1000, "device": "cpu", "frames": 2, "ema": 0.5,
    }  # fmt: skip
    return TrainConfig.model_validate(values | more)


def no_validation(trainer: Trainer) -> Trainer:
    trainer._validate = lambda: None  # type: ignore[method-assign]  # needs the judge's weights, which are fetched
    return trainer


def test_rollout_is_what_the_engine_computes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    restorer = Restorer.create(SMALL)
    restorer.add_guidance(SMALL.conditioning)
    assert restorer.controlnet is not None
    for parameter in restorer.controlnet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    restorer.history["stage3"] = 1
    restorer.save(tmp_path / "m", MODEL_CONFIG)
    pipe = StreamDiffVSRPipeline.from_pretrained(tmp_path / "m", flow="zero")
    frames = torch.rand(2, 1, 3, 24, 20) * 2 - 1
    noise, flow = torch.randn(1, 4, 24, 20), torch.randn(1, 2, 96, 80)
    for steps, timesteps in SCHEDULES.items():
        state = pipe.start()
        first = pipe.step(frames[0], [state], noise_B4HW=noise, steps=steps)
        second = pipe.step(frames[1], [state], noise_B4HW=noise, flow_B2HW=flow, steps=steps)
        with torch.no_grad():
            mine = restorer.rollout(frames[0], noise, timesteps).output_B3HW
            guided = restorer.rollout(frames[1], noise, timesteps, warp_previous(mine, flow)).output_B3HW
        assert torch.allclose(first, mine, atol=1e-5)
        assert torch.allclose(second, guided, atol=1e-4)
        assert (second - restorer.rollout(frames[1], noise, timesteps).output_B3HW).abs().max() > 1e-3


def test_closed_form_start_reconstructs(photographs: Path) -> None:
    data = TrainingData([photographs])
    pictures = next(data.batches(0, batch=8, frames=1, side=96, severity=0, clip_share=0))[0][:, 0]
    vae = Restorer.create(SMALL).vae
    with torch.no_grad():
        before = float((vae(pictures) - pictures).square().mean())
        initialise(vae, pictures)
        after = float((vae(pictures) - pictures).square().mean())
        latent = vae.encode(pictures)
    assert after < before / 20
    assert torch.allclose(latent.std((0, 2, 3)), torch.ones(4), atol=0.1)


def test_duplicates_are_read_once_and_samples_depend_on_seed_and_number_alone(photographs: Path) -> None:
    data = TrainingData([photographs])
    assert len(data.pictures) == 3
    options: dict[str, Any] = {"batch": 2, "frames": 3, "side": 64, "severity": 1.0, "clip_share": 0.5}
    stream = data.batches(5, **options)
    next(stream)
    second = next(stream)
    again = next(data.batches(5, start=1, **options))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    ahead = next(data.batches(5, start=1, workers=1, **options))
    assert all(torch.equal(a, b) for a, b in zip(second, ahead, strict=True))
    assert (
        second[0].shape == (2, 3, 3, 64, 64)
        and second[1].shape == (2, 3, 3, 16, 16)
        and second[2].shape == (2, 2, 2, 64, 64)
    )
    assert not torch.equal(second[0], next(data.batches(6, start=1, **options))[0])


def test_missing_data_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no picture or video"):
        TrainingData([tmp_path])
    with pytest.raises(DatasetError, match="does not exist"):
        TrainingData([tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("stage", "moves"),
    [
        ("autoencoder", ("vae.encoder", "vae.decoder")),
        ("stage1", ("unet", "vae.decoder", "lr_projection")),
        ("stage2", ("temporal_processor", "alpha")),
        ("stage3", ("controlnet",)),
    ],
)
def test_a_stage_moves_only_its_own_weights(
    stage: str, moves: tuple[str, ...], photographs: Path, model: Path, tmp_path: Path
) -> None:
    trainer = no_validation(Trainer(config(stage, photographs, tmp_path / "run", init=model)))
    before = {name: value.clone() for name, value in trainer.restorer.named_parameters()}
    trainer.run()
    changed = {name for name, value in trainer.restorer.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(any(part in name for part in moves) for name in changed), sorted(changed)
    if stage in ("autoencoder", "stage1"):
        assert not any("temporal_processor" in name for name in changed)


def test_stage_two_feeds_the_decoder_its_own_previous_outputs(photographs: Path, model: Path, tmp_path: Path) -> None:
    """How the second frame is restored changes the third: TPMs meet in training what they meet at work."""
    run = config(
        "stage2", photographs, tmp_path / "run", init=model, frames=3, truth_share=0.0, temporal_fusion="joint"
    )
    objective = Trainer(run).objective
    hr, lr, flow = next(TrainingData([photographs]).batches(0, batch=1, frames=3, side=64, severity=0, clip_share=0))
    weight = objective.restorer.vae.get_parameter("decoder.layers.8.temporal_processor.2.weight")
    torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))

    def last(lr_BT3ss: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return objective.losses(hr, lr_BT3ss, flow, 0.0, np.random.default_rng(0))[1]

    changed = lr.clone()
    changed[:, 1] += 0.5
    assert (last(changed) - last(lr)).abs().max() > 1e-3
    objective.config.truth_share = 1.0  # then only ground truth is looked at, and the low-resolution frames are not
    assert torch.equal(last(changed), last(lr))


def test_disturbed_flow_is_smooth_repeatable_and_bounded(photographs: Path, model: Path, tmp_path: Path) -> None:
    trainer = Trainer(config("stage2", photographs, tmp_path / "run", init=model, flow_jitter=2.0))
    flow = torch.zeros(2, 2, 64, 64)
    first = trainer.objective.disturb(flow, np.random.default_rng(1))
    assert torch.equal(first, trainer.objective.disturb(flow, np.random.default_rng(1)))
    assert 0 < first.std() < 2.5
    assert first.diff(dim=3).abs().max() < 0.6 * first.abs().max()
    still = Trainer(config("stage2", photographs, tmp_path / "still", init=model))
    assert still.objective.disturb(flow, np.random.default_rng(1)) is flow


def test_stills_do_not_move_and_other_batches_stay_as_they_were(photographs: Path) -> None:
    data = TrainingData([photographs])
    options: dict[str, Any] = {"batch": 2, "frames": 3, "side": 64, "severity": 0.0, "clip_share": 0.0}
    hr, lr, flow = next(data.batches(0, still_share=1.0, **options))
    assert hr.shape == (2, 3, 3, 64, 64) and not flow.any()
    assert torch.equal(hr[:, 0], hr[:, 2]) and torch.equal(lr[:, 0], lr[:, 2])
    batches = data.batches(0, still_share=0.5, **options)
    shares = np.mean([not bool(next(batches)[2].any()) for _ in range(40)])
    assert 0.2 < shares < 0.8
    without, none = (next(data.batches(3, **more, **options)) for more in ({}, {"still_share": 0.0, "tone_share": 0.0}))
    assert all(torch.equal(a, b) for a, b in zip(without, none, strict=True))
    held = [next(data.batches(seed, still_share=1.0, **options))[0][0, 0] for seed in range(24)]
    detail = [float(one.diff(dim=2).abs().mean()) for one in held]
    assert min(detail) < 0.3 * max(detail)  # some are out of focus


def test_other_exposures_reach_white_and_black_and_stay_in_range() -> None:
    picture = torch.linspace(0, 1, 48).expand(2, 3, 16, 48)
    exposed = [change_tone(picture, np.random.default_rng(seed)) for seed in range(60)]
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in exposed)
    means = [float(one.mean()) for one in exposed]
    assert min(means) < 0.15 and max(means) > 0.85
    assert any(float((one == 1).float().mean()) > 0.3 for one in exposed)  # overexposed
    assert all(bool((one.diff(dim=3) >= 0).all()) for one in exposed)  # no order is turned round


def test_the_loss_on_tones_sees_levels_and_not_detail(photographs: Path, model: Path, tmp_path: Path) -> None:
    objective = Trainer(config("stage1", photographs, tmp_path / "run", init=model, tone=1.0)).objective
    target = torch.zeros(1, 3, 64, 64)
    detail = target.clone()
    detail[..., ::2] += 0.1
    detail[..., 1::2] -= 0.1
    assert float(objective.picture_losses(detail, target, 0.0)["tone"]) == pytest.approx(0, abs=1e-6)
    assert float(objective.picture_losses(target + 0.02, target, 0.0)["tone"]) == pytest.approx(0.02, abs=1e-5)


def test_a_still_gets_a_long_past_and_clips_that_move_do_not(photographs: Path, model: Path, tmp_path: Path) -> None:
    """What the model made of a still after many frames stands in the input of the frames that train."""
    options: dict[str, object] = {"init": model, "frames": 3, "longest_past": 20, "drift": 2.0}
    trainer = Trainer(config("stage3", photographs, tmp_path / "run", **options))
    objective, past = trainer.objective, trainer.objective.live_through
    lived: list[int] = []

    def live_through(lr: torch.Tensor, noise: torch.Tensor, output: torch.Tensor, frames: int) -> torch.Tensor:
        lived.append(frames)
        return past(lr, noise, output, frames)

    objective.live_through = live_through  # type: ignore[method-assign]
    draw: dict[str, Any] = {"batch": 1, "frames": 3, "side": 64, "severity": 0.0, "clip_share": 0.0}
    still, moving = (next(trainer.data.batches(0, still_share=share, **draw)) for share in (1.0, 0.0))
    losses, _ = objective.losses(*still, 0.0, np.random.default_rng(4))
    assert len(lived) == 1
    assert "drift" in losses and losses["drift"].requires_grad
    moved, _ = objective.losses(*moving, 0.0, np.random.default_rng(4))
    assert len(lived) == 1 and "drift" not in moved
    pasts = [objective.draw_past(np.random.default_rng(seed)) for seed in range(300)]
    assert min(pasts) == 0 and 15 < max(pasts) <= 20 and np.median(pasts) < 8


def test_a_long_past_is_what_the_engine_would_have_made(photographs: Path, model: Path, tmp_path: Path) -> None:
    trainer = Trainer(config("stage3", photographs, tmp_path / "run", init=model, frames=3))
    controlnet = trainer.restorer.controlnet
    assert controlnet is not None
    for parameter in controlnet.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    lr, noise = torch.rand(1, 3, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 16, 16)
    trainer.restorer.history["stage3"] = 1
    trainer.restorer.save(tmp_path / "m", MODEL_CONFIG)
    pipe = StreamDiffVSRPipeline.from_pretrained(tmp_path / "m", flow="zero")
    state = pipe.start()
    outputs = [
        pipe.step(lr[:, n], [state], noise_B4HW=noise, flow_B2HW=torch.zeros(1, 2, 64, 64), steps=1)
        for n in (0, 0, 1, 2, 0)
    ]
    lived = trainer.objective.live_through(lr, noise, outputs[0], 4)
    assert torch.allclose(lived, outputs[-1], atol=1e-4)
    assert (lived - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("stage", "option", "joins"),
    [
        ("stage2", {"finetune_decoder": 0.5}, "vae.decoder"),
        ("stage3", {"finetune_unet": 0.5}, "unet"),
        ("stage3", {"finetune_decoder": 0.5}, "vae.decoder"),
    ],
)
def test_fine_tuning_joins_a_network_and_the_first_frame(
    stage: str, option: dict[str, float], joins: str, photographs: Path, model: Path, tmp_path: Path
) -> None:
    """The first frame's loss must join: it is restored without guidance, and would be forgotten."""
    plain = Trainer(config(stage, photographs, tmp_path / "plain", init=model, truth_share=0.0))
    trainer = Trainer(config(stage, photographs, tmp_path / "run", init=model, truth_share=0.0, **option))
    batch = next(trainer.data.batches(3, batch=1, frames=2, side=64, severity=0, clip_share=0))
    before = {name: value.clone() for name, value in trainer.restorer.named_parameters()}
    with torch.no_grad():
        pixel = [
            float(one.objective.losses(*batch, 0.0, np.random.default_rng(0))[0]["pixel"]) for one in (plain, trainer)
        ]
    assert pixel[1] > 1.3 * pixel[0]
    trainer._validate = lambda: None  # type: ignore[method-assign]
    trainer.run()
    after = dict(trainer.restorer.named_parameters())
    assert any(name.startswith(joins) and not torch.equal(value, after[name]) for name, value in before.items())


def test_random_timestep_objective_trains_the_unet(photographs: Path, model: Path, tmp_path: Path) -> None:
    run = config("stage1", photographs, tmp_path / "run", init=model, objective="random-timestep", train_decoder=False)
    trainer = no_validation(Trainer(run))
    before = {name: value.clone() for name, value in trainer.restorer.named_parameters()}
    trainer.run()
    changed = {
        name.split(".")[0]
        for name, value in trainer.restorer.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == {"unet", "vae"}  # of the autoencoder only the linear estimate


def test_training_lowers_the_loss(photographs: Path, model: Path, tmp_path: Path) -> None:
    run = config(
        "stage1",
        photographs,
        tmp_path / "run",
        init=model,
        iterations=40,
        learning_rate=2e-3,
        crop=48,
        gan=0.01,
        gan_from=0.2,
    )
    trainer = no_validation(Trainer(run))
    batches = trainer.data.batches(0, batch=2, frames=1, side=48, severity=0, clip_share=0)
    losses = []
    for _ in range(40):
        losses.append(trainer.step(batches)["pixel"])
        trainer.iteration += 1
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_an_interrupted_run_ends_as_an_uninterrupted_one(photographs: Path, model: Path, tmp_path: Path) -> None:
    whole = config("stage1", photographs, tmp_path / "whole", init=model, iterations=6, gan=0.05, gan_from=0.0)
    no_validation(Trainer(whole)).run()

    part = whole.model_copy(update={"out": tmp_path / "part"})
    first = no_validation(Trainer(part))
    batches = first.data.batches(
        part.seed, batch=2, frames=2, side=64, severity=part.severity, clip_share=part.clip_share
    )
    for _ in range(3):
        first.step(batches)
        first.iteration += 1
    first.save()
    no_validation(Trainer(part)).run()

    a, b = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "part"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-6) for key in a)


def test_snapshot_is_small_and_starts_a_new_run(photographs: Path, model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "m.safetensors"
    run = config("stage1", photographs, tmp_path / "run", init=model, snapshot=snapshot, gan=0.05)
    trainer = no_validation(Trainer(run))
    trainer.run()
    assert snapshot.stat().st_size < 15 * 2**20
    tensors = load_file(snapshot)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    follower = Trainer(run.model_copy(update={"out": tmp_path / "next", "init": snapshot}))
    assert follower.iteration == 0
    for name, value in follower.restorer.named_parameters():
        assert torch.allclose(value.half(), tensors[f"model.{name}"]), name
    for name, mean in follower.average.values.items():
        assert torch.allclose(mean.half(), tensors[f"average.{name}"]), name
    assert follower.objective.discriminator is not None
    follower.save()
    assert json.loads((tmp_path / "next" / "model" / "training.json").read_text()) == {"stage1": 4}

    fewer = Trainer(run.model_copy(update={"out": tmp_path / "fewer", "init": snapshot, "train_decoder": False}))
    frozen = "vae.decoder.layers.0.weight"
    assert frozen not in fewer.average.values
    assert torch.allclose(fewer.restorer.get_parameter(frozen).half(), tensors[f"average.{frozen}"])

    other = Trainer(config("stage3", photographs, tmp_path / "third", init=snapshot))
    assert other.restorer.controlnet is not None
    assert torch.allclose(other.restorer.unet.conv_in.weight.half(), tensors["average.unet.conv_in.weight"])


def test_a_run_folder_of_another_stage_is_refused(photographs: Path, model: Path, tmp_path: Path) -> None:
    run = config("stage1", photographs, tmp_path / "run", init=model, iterations=1)
    no_validation(Trainer(run)).run()
    with pytest.raises(TrainingError, match="is a run of stage1, not of stage2"):
        Trainer(run.model_copy(update={"stage": "stage2"}))
    with pytest.raises(TrainingError, match="starts from a model"):
        Trainer(config("stage1", photographs, tmp_path / "other"))


def test_a_saved_model_does_not_tell_where_it_was_made(model: Path, tmp_path: Path) -> None:
    Restorer.load(model).save(tmp_path / "again", MODEL_CONFIG)
    texts = [file.read_text() for file in (tmp_path / "again").rglob("*.json")]
    assert len(texts) > 5
    assert not any(str(tmp_path) in text for text in texts)


def test_what_a_run_writes_follows_the_umask(photographs: Path, model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot.safetensors"
    previous = os.umask(0o027)
    try:
        run = config("stage3", photographs, tmp_path / "run", init=model, iterations=1, snapshot=snapshot)
        no_validation(Trainer(run)).run()
        StreamDiffVSRPipeline.from_pretrained(tmp_path / "run" / "model", flow="zero").save_pretrained(tmp_path / "out")
    finally:
        os.umask(previous)
    written = [snapshot, *(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "out").rglob("*.safetensors")]
    assert len(written) == 1 + 1 + 4 + 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in written} == {0o640}
    assert not list(tmp_path.rglob("*.mode"))


def test_untrained_guidance_is_not_taken_for_trained(model: Path) -> None:
    assert Restorer.load(model).controlnet is None
    (model / "training.json").write_text(json.dumps({"stage1": 5, "stage3": 2}))
    assert Restorer.load(model).controlnet is not None


def test_learning_rate_warms_up_and_ends_low() -> None:
    factors = [learning_rate_factor(i, 100, 10, 0.05) for i in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.05) and all(a >= b for a, b in itertools.pairwise(factors[10:]))
