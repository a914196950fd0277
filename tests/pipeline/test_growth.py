"""A model that grew restores as before, and everything that was added can learn."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.cli import main
from pipeline.cuda_backend import psnr_db
from pipeline.growth import GrowthError, grow
from pipeline.model_source import WEIGHTS
from pipeline.restorer import SCHEDULES, SIZES, ModelSize, Restorer
from pipeline.stream_diffvsr import StreamDiffVSRPipeline


@pytest.fixture(scope="module")
def tiny(repository: Path) -> Restorer:
    return Restorer.load(repository / "pipeline" / "models" / "tiny").eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    lr_B3hw = torch.rand(2, 3, 24, 32, generator=draw) * 2 - 1
    return lr_B3hw, torch.randn(2, 4, 24, 32, generator=draw), torch.rand(2, 3, 96, 128, generator=draw) * 2 - 1


@pytest.mark.parametrize(
    "size",
    [
        SIZES["small"],
        ModelSize(layers=3),
        ModelSize(autoencoder=(16, 40, 48)),
        ModelSize(encoder_blocks=(3, 1, 2)),
    ],
    ids=["small", "deeper U-Net", "wider autoencoder", "deeper autoencoder"],
)
@torch.no_grad()
def test_it_restores_as_before(tiny: Restorer, size: ModelSize) -> None:
    torch.manual_seed(1)  # of the fresh weights that must not matter
    grown = grow(tiny, size).eval()
    assert grown.size == size and grown.history == tiny.history
    lr_B3hw, noise_BChw, warped_B3HW = inputs()
    for timesteps in SCHEDULES.values():
        for previous in (None, warped_B3HW):
            before = tiny.rollout(lr_B3hw, noise_BChw, timesteps, previous)
            after = grown.rollout(lr_B3hw, noise_BChw, timesteps, previous)
            torch.testing.assert_close(after.output_B3HW, before.output_B3HW, atol=1e-5, rtol=0)
            torch.testing.assert_close(after.latent_BChw, before.latent_BChw, atol=1e-5, rtol=0)


def test_a_model_without_guidance_grows_too() -> None:
    torch.manual_seed(2)
    model = Restorer.create(SIZES["tiny"])
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    grown = grow(model, SIZES["small"])
    assert grown.controlnet is None
    lr_B3hw, noise_BChw, _ = inputs()
    with torch.no_grad():
        before = model.rollout(lr_B3hw, noise_BChw, (999, 499)).output_B3HW
        torch.testing.assert_close(
            grown.rollout(lr_B3hw, noise_BChw, (999, 499)).output_B3HW, before, atol=1e-5, rtol=0
        )


def test_all_that_is_new_can_learn(tiny: Restorer) -> None:
    """Gradients reach every weight: those behind weights that are zero from the second step on."""
    torch.manual_seed(3)
    grown = grow(tiny, SIZES["small"])
    optimiser = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    lr_B3hw, noise_BChw, warped_B3HW = inputs()
    reached: set[str] = set()
    for _ in range(3):
        optimiser.zero_grad()
        output_B3HW = grown.rollout(lr_B3hw, noise_BChw, (999,), warped_B3HW).output_B3HW
        loss = (output_B3HW - warped_B3HW).square().mean() + grown.vae.encode(warped_B3HW).square().mean()
        loss.backward()
        reached |= {name for name, p in grown.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    assert [name for name, _ in grown.named_parameters() if name not in reached] == []


@pytest.mark.parametrize(
    "size", [ModelSize(unet=(48, 96, 128)), ModelSize(encoder_blocks=(1, 1, 1)), ModelSize(autoencoder=(16, 24, 48))]
)
def test_what_cannot_grow_is_refused(tiny: Restorer, size: ModelSize) -> None:
    with pytest.raises(GrowthError) as refused:
        grow(tiny, size)
    assert refused.value.remedy


def test_the_command_writes_a_model_that_every_command_opens(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "grow", "tiny", "--out", str(tmp_path / "small")]) == 0
    assert "small" in capsys.readouterr().out
    before = StreamDiffVSRPipeline.from_pretrained("tiny", device="cpu")
    after = StreamDiffVSRPipeline.from_pretrained(str(tmp_path / "small"), device="cpu")
    assert after.options == before.options
    frames = [torch.roll(inputs()[0][:1], moment, dims=3) for moment in range(3)]
    states = [before.start(), after.start()]
    for frame in frames:
        outputs = [pipe.step(frame, [state]) for pipe, state in zip((before, after), states, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)
    assert main(["train", "grow", "tiny", "--size", "huge", "--out", str(tmp_path / "huge")]) == 2
    assert "huge" in capsys.readouterr().err


def test_a_model_in_half_precision_is_half_the_size_and_restores_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    assert main(["train", "export", "tiny", "--out", str(half)]) == 0
    assert "5.0 MB" in capsys.readouterr().out
    pipes = [StreamDiffVSRPipeline.from_pretrained(source, flow="zero") for source in ("tiny", str(half))]
    assert pipes[1].dtype == torch.float32 and pipes[1].options == pipes[0].options
    states = [pipe.start() for pipe in pipes]
    for moment in range(3):
        frame = torch.roll(inputs()[0][:1], moment, dims=3)
        outputs = [pipe.step(frame, [state]) for pipe, state in zip(pipes, states, strict=True)]
        assert 70 < psnr_db(outputs[1], outputs[0]) < 100


def test_in_half_precision_everything_else_stays_as_it_is(parity_folder: Path, tmp_path: Path) -> None:
    """The prompt's embedding above all: the published checkpoint attends to it."""
    assert main(["train", "export", str(parity_folder), "--out", str(tmp_path / "half")]) == 0
    names = {path.relative_to(parity_folder) for path in parity_folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "half") for path in (tmp_path / "half").rglob("*") if path.is_file()}
    changed = {name for name in names if (parity_folder / name).read_bytes() != (tmp_path / "half" / name).read_bytes()}
    assert changed == {Path(part, WEIGHTS) for part in ("unet", "vae", "controlnet")}
    assert main(["train", "export", str(parity_folder), "--out", str(tmp_path / "half")]) != 0, "it exists"


def test_weights_that_half_precision_cannot_hold_are_refused(
    tiny: Restorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = copy.deepcopy(tiny)
    next(large.unet.parameters()).data.fill_(1e6)
    large.save(tmp_path / "large", {})
    assert main(["train", "export", str(tmp_path / "large"), "--out", str(tmp_path / "half")]) == 7
    assert "65504" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
