"""ST-LPIPS against numbers of the authors' own package (stlpips-pytorch 0.0.2, fp32 on a CPU)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.assets import fetch
from pipeline.errors import CheckpointError, InputError
from pipeline.perceptual import STLPIPS, Trunk, pack, weights_file


@pytest.fixture(scope="module")
def networks() -> dict[Trunk, STLPIPS]:
    fetch(["nets"])
    return {"alex": STLPIPS.load("alex"), "vgg": STLPIPS.load("vgg")}


def pictures(height: int, width: int) -> dict[str, Tensor]:
    """A pattern, and the same with noise, shifted by a pixel (wrapping), and with less contrast; (1, 3, H, W)."""
    y, x = np.mgrid[0:height, 0:width].astype("float64")
    plain = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5 - y / 13), np.sin(x * y / 400)]) * 0.8
    noise = np.random.default_rng(7).random((3, height, width))
    variants = {
        "plain": plain,
        "noise": np.clip(plain + (noise - 0.5) * 0.4, -1, 1),
        "shift": np.roll(plain, 1, axis=2),
        "contrast": plain * 0.7 + 0.1,
    }
    return {name: torch.tensor(value, dtype=torch.float32)[None] for name, value in variants.items()}


# Printed by the authors' network for the pictures above; odd sizes exercise the borders of the halvings.
REFERENCE: dict[tuple[Trunk, int, int], dict[str, float]] = {
    ("alex", 64, 96): {"noise": 0.061237, "shift": 0.006415, "contrast": 0.047680},
    ("alex", 61, 77): {"noise": 0.057403, "shift": 0.010175, "contrast": 0.051666},
    ("vgg", 64, 96): {"noise": 0.431681, "shift": 0.035045, "contrast": 0.126829},
    ("vgg", 61, 77): {"noise": 0.423436, "shift": 0.046551, "contrast": 0.142660},
}


@pytest.mark.parametrize(("trunk", "height", "width"), list(REFERENCE))
def test_equals_the_published_network(networks: dict[Trunk, STLPIPS], trunk: Trunk, height: int, width: int) -> None:
    shown = pictures(height, width)
    for name, expected in REFERENCE[trunk, height, width].items():
        # 1e-5: the references have six decimals, and fp32 convolutions differ by their order of summation.
        assert networks[trunk](shown["plain"], shown[name]).item() == pytest.approx(expected, abs=1e-5), name
    assert networks[trunk](shown["plain"], shown["plain"]).item() == 0.0


def test_bfloat16_stays_close(networks: dict[Trunk, STLPIPS]) -> None:
    shown = pictures(64, 96)
    half = STLPIPS.load("vgg").to(torch.bfloat16)
    # bf16 keeps 8 bits: one per cent of the distance is what its rounding leaves.
    assert half(shown["plain"], shown["noise"]).item() == pytest.approx(0.431681, rel=0.01)


def test_gradient_flows_to_the_picture_and_never_to_the_network(networks: dict[Trunk, STLPIPS]) -> None:
    shown = pictures(64, 96)
    for network in networks.values():
        start = shown["noise"].clone().requires_grad_()
        before = network(start, shown["plain"])
        before.sum().backward()
        assert start.grad is not None and bool(start.grad.isfinite().all())
        moved = start.detach() - 0.05 * start.grad / start.grad.abs().max()
        assert network(moved, shown["plain"]).item() < before.item()
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_gradient_is_finite_on_a_flat_picture(networks: dict[Trunk, STLPIPS]) -> None:
    # Many features of a flat picture are all zero, where the length of a vector has no derivative.
    for network in networks.values():
        flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
        network(flat, torch.full((1, 3, 64, 64), 0.1)).sum().backward()
        assert flat.grad is not None and bool(flat.grad.isfinite().all())


def test_kept_features_and_fewer_layers(networks: dict[Trunk, STLPIPS]) -> None:
    shown = pictures(64, 96)
    network = networks["vgg"]
    kept = network.features(shown["plain"])
    assert [f.shape[1] for f in kept] == [64, 128, 256, 512, 512]
    whole = network.distance(network.features(shown["noise"]), kept).item()
    assert whole == pytest.approx(REFERENCE["vgg", 64, 96]["noise"], abs=1e-5)
    shallow = network.distance(network.features(shown["noise"], layers=2), kept[:2]).item()
    assert 0 < shallow < whole
    batch = network(torch.cat([shown["noise"], shown["shift"]]), torch.cat([shown["plain"]] * 2))
    assert batch.tolist() == pytest.approx([0.431681, 0.035045], abs=1e-5)


def test_refuses_what_it_cannot_compare(networks: dict[Trunk, STLPIPS], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(1, 1, 64, 64\)"):
        networks["alex"].features(torch.zeros(1, 1, 64, 64))
    with pytest.raises(InputError, match="layers is 6"):
        networks["alex"].features(torch.zeros(1, 3, 64, 64), layers=6)
    with pytest.raises(CheckpointError, match="upriver assets fetch nets"):
        STLPIPS.load("alex", tmp_path)
    tensors = load_file(weights_file("alex"))
    tensors["heads.0"] = torch.zeros(3)
    save_file(tensors, weights_file("alex", tmp_path))
    with pytest.raises(CheckpointError, match=r"heads\.0"):
        STLPIPS.load("alex", tmp_path)


def test_packed_networks_are_half_the_size_and_say_the_same(networks: dict[Trunk, STLPIPS], tmp_path: Path) -> None:
    size = pack(tmp_path)
    assert size == sum(path.stat().st_size for path in (tmp_path / "nets").iterdir()) < 36e6
    shown = pictures(64, 96)
    for trunk, network in networks.items():
        packed = STLPIPS.load(trunk, tmp_path / "nets")
        wanted = network(shown["plain"], shown["noise"]).item()
        assert packed(shown["plain"], shown["noise"]).item() == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(CheckpointError, match="do not exist"):
        pack(tmp_path / "again", tmp_path / "nowhere")
