"""The flow network learns from simulated cameras and real clips, and a run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from pipeline.dataset import DatasetError, TrainingData
from pipeline.flow import NetFlow
from pipeline.flow_clips import real, simulated
from pipeline.flow_net import FlowNet, warp
from pipeline.flow_training import FlowTrainConfig, FlowTrainer, photometric_loss
from pipeline.training import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        coarse.resize((250, 200), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    picture = np.asarray(Image.open(folder / "0.png"))
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        for k in range(4):
            frame = np.ascontiguousarray(picture[20 : 20 + 128, 10 + 2 * k : 170 + 2 * k])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def config(data: Path, out: Path, iterations: int) -> FlowTrainConfig:
    return FlowTrainConfig(data=[data], out=out, iterations=iterations, batch=2, crop=32, clip_share=0.5, holdout=0)


def test_the_flow_of_a_simulated_clip_is_exact(data: Path) -> None:
    """Warping the previous frame by it gives the current one, but for what is hidden and for interpolation."""
    clips = TrainingData([data], flow=False)
    moved, errors, stills = 0, [], []
    for seed in range(12):
        pairs = simulated(clips, np.random.default_rng(seed), side=64, severity=0)
        assert pairs.flow_N2ss is not None and pairs.flow_N2ss.shape == (2, 2, 64, 64)
        inside = (..., slice(16, -16), slice(16, -16))
        error = (warp(pairs.clean_previous, pairs.flow_N2ss) - pairs.clean_current)[inside].abs()
        still = (pairs.clean_previous - pairs.clean_current)[inside].abs()
        if still.mean() > 0.02:
            moved += 1
            errors.append(float(error.median()))
            stills.append(float(still.median()))
    assert moved >= 4
    assert np.mean(errors) < 0.3 * np.mean(stills)


def test_what_the_network_sees_is_degraded_and_what_judges_it_is_not(data: Path) -> None:
    clips = TrainingData([data], flow=False)
    differ = 0
    for seed in range(8):
        pairs = real(clips, np.random.default_rng(seed), side=32, severity=1)
        assert pairs.flow_N2ss is None and pairs.current.shape == (2, 3, 32, 32)
        differ += bool((pairs.current - pairs.clean_current).abs().max() > 0.02)
    assert 1 <= differ <= 7


def test_the_photometric_loss_prefers_the_true_flow(data: Path) -> None:
    class Fixed(FlowNet):
        def __init__(self, x: float) -> None:
            super().__init__()
            self.x = x

        def forward(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
            flow = torch.zeros_like(current_B3hw[:, :2])
            flow[:, 0] = self.x
            return flow

    clips = TrainingData([data], flow=False)
    # the clip pans by two pixels to the right, so the past lies two to the right, halved by the reduction
    pairs = real(clips, np.random.default_rng(1), side=64, severity=0)
    losses = {x: float(photometric_loss(Fixed(x), pairs)[0]) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)}
    assert min(losses, key=lambda x: losses[x]) in (-2.0, -1.0, 1.0, 2.0)
    assert min(losses.values()) < 0.6 * losses[0.0]


def test_a_run_that_was_cut_ends_as_one_that_was_not(data: Path, tmp_path: Path) -> None:
    whole = FlowTrainer(config(data, tmp_path / "whole", 4)).run()
    first = FlowTrainer(config(data, tmp_path / "cut", 4))
    for _ in range(2):
        first.step()
        first.iteration += 1
    (tmp_path / "cut").mkdir()
    first.save()
    second = FlowTrainer(config(data, tmp_path / "cut", 4))
    assert second.iteration == 2
    resumed = second.run()
    expected, found = load_file(whole), load_file(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    NetFlow(resumed)  # it is a file that the estimator takes
    assert any((tmp_path / "whole" / "metrics.jsonl").read_text().count(word) for word in ("photometric", "epe"))


def test_a_run_folder_of_another_kind_and_missing_pictures_are_refused(data: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "other").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "other" / "state.safetensors", {"stage": "stage1"})
    with pytest.raises(TrainingError, match="no run of the flow network"):
        FlowTrainer(config(data, tmp_path / "other", 4))
    with pytest.raises(DatasetError, match="no picture"):
        FlowTrainer(config(data / "clip.mp4", tmp_path / "new", 4))


def test_the_command(data: Path, tmp_path: Path) -> None:
    from jobs.train import app

    flags = ["flow", "--data", str(data), "--out", str(tmp_path / "run"), "--iterations", "1", "--crop", "32"]
    done = CliRunner().invoke(app, [*flags, "--batch", "1", "--set", "holdout=0"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "flow.safetensors").is_file()
    refused = CliRunner().invoke(app, [*flags, "--set", "gan=1"])
    assert getattr(refused.exception, "code", "") == "train-option"
