"""The decoder's Temporal Processor Modules: what each form can and cannot take from the previous frame."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny, TemporalBlock, TemporalFusion
from pipeline.restorer import ModelSize, Restorer
from pipeline.training import MODEL_CONFIG

SMALL = ModelSize(unet=(8, 16), groups=4, conditioning=(4, 8, 8), autoencoder=(8, 16, 24), encoder_blocks=(1, 1, 1))


def chequered(sign: float) -> Tensor:
    """A pattern of one pixel that every 4x4 mean hides, (1,8,16,16)."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    return (sign * (1 - 2 * ((x + y) % 2)).float()).expand(1, 8, 16, 16).contiguous()


@pytest.mark.parametrize(("fusion", "sees_detail"), [("pooled", False), ("joint", True)])
def test_only_the_joint_form_sees_detail_of_the_previous_frame(fusion: TemporalFusion, sees_detail: bool) -> None:
    torch.manual_seed(0)
    block = TemporalBlock(8, fusion=fusion)
    current = torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        difference = (block(current, chequered(1.0)) - block(current, chequered(-1.0))).abs().max()
    assert bool(difference > 1e-3) is sees_detail


def test_the_joint_form_can_tell_where_the_previous_frame_does_not_fit() -> None:
    """Its first convolution sees both frames, so what it adds is no sum of a part per frame."""
    torch.manual_seed(0)
    block = TemporalBlock(8, fusion="joint")
    a, b = torch.randn(2, 1, 8, 16, 16)
    zero = torch.zeros_like(a)

    def added(current: Tensor, previous: Tensor) -> Tensor:
        with torch.no_grad():
            return block.temporal_processor(torch.cat([current, previous], dim=1))

    assert (added(a, b) + added(zero, zero) - added(a, zero) - added(zero, b)).abs().max() > 1e-2


@pytest.mark.parametrize("fusion", ["pooled", "joint"])
def test_silent_modules_add_nothing(fusion: TemporalFusion) -> None:
    torch.manual_seed(0)
    vae = Restorer.create(SMALL.model_copy(update={"temporal_fusion": fusion})).vae
    latent, previous = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert not torch.equal(vae.decode(latent, vae.encode_temporal(previous)), vae.decode(latent))
        vae.silence_temporal()
        assert torch.equal(vae.decode(latent, vae.encode_temporal(previous)), vae.decode(latent))


def test_joint_modules_look_around_them_only() -> None:
    """A change of the previous frame's corner leaves the far corner as it is: tiles of a large picture can be exact."""
    torch.manual_seed(0)
    vae = Restorer.create(SMALL).vae
    latent, previous = torch.randn(1, 4, 32, 32), torch.rand(1, 3, 128, 128) * 2 - 1
    changed = previous.clone()
    changed[..., :4, :4] += 1
    with torch.no_grad():
        difference = vae.decode(latent, vae.encode_temporal(changed)) - vae.decode(
            latent, vae.encode_temporal(previous)
        )
    assert difference[..., :8, :8].abs().max() > 0
    assert difference[..., 96:, 96:].abs().max() == 0


def test_replacing_the_modules_keeps_every_other_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    restorer = Restorer.create(SMALL.model_copy(update={"temporal_fusion": "pooled"}))
    restorer.history = {"stage1": 5, "stage2": 7}
    before = {k: v for k, v in restorer.vae.state_dict().items() if "temporal" not in k and "alpha" not in k}
    restorer.replace_temporal("joint")
    after = restorer.vae.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("alpha" in name for name in after)
    assert restorer.history == {"stage1": 5}
    restorer.save(tmp_path / "m", MODEL_CONFIG)
    again = TemporalAutoencoderTiny.from_pretrained(tmp_path / "m" / "vae")
    assert again.config.temporal_fusion == "joint"
    blocks = [module for module in again.decoder.modules() if isinstance(module, TemporalBlock)]
    assert all(isinstance(block.temporal_processor[0], nn.Conv2d) for block in blocks)
