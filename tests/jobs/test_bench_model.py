"""Random models of known sizes, what they cost, and the memory that the published size needs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from jobs.bench_model import PREFIX, random_model
from jobs.bench_stages import flops_by_stage
from jobs.cli import main
from jobs.errors import UsageError
from pipeline.memory import fits
from pipeline.tiling import TilePlan

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

# Input sizes (height, width) of 1280x720 and 1920x1080.
HD, FULL_HD = (180, 320), (270, 480)
GB = 10**9


@cache
def published(flow: str = "zero") -> StreamDiffVSRPipeline:
    """The published sizes in bf16, without data: as on a GPU, whose estimates leave the interpreter out."""
    return random_model("published", device="meta", dtype=torch.bfloat16, flow=flow)


def test_the_published_sizes_are_the_published_ones() -> None:
    """Parameters as the published files have bytes: 1.89 GB, 831 MB and 8.23 MB of fp32, with their headers."""
    pipe = published()
    counts = [sum(p.numel() for p in network.parameters()) for network in (pipe.unet, pipe.controlnet, pipe.vae)]
    assert counts == [472_374_020, 207_699_264, 2_052_501]


def test_flops_of_a_published_frame_at_720p() -> None:
    """TFLOP per frame, counted by hand for the paper's networks: 3.99 a U-Net step, 1.56 an ARTG step with its
    embedding of the condition (0.275, which this engine makes once a frame), 0.42 encoder features, 0.48 the decoder
    without its temporal modules.
    """
    flops = {stage: count / 1e12 for stage, count in flops_by_stage(published(), *HD).items()}
    assert set(flops) == {"unet", "artg", "tpm", "decoder"}
    assert flops["unet"] == pytest.approx(4 * 3.99, rel=0.005)
    assert flops["artg"] == pytest.approx(4 * 1.56 - 3 * 0.275, rel=0.005)
    assert flops["tpm"] == pytest.approx(0.42, rel=0.005)
    assert 0.48 <= flops["decoder"] < 0.50
    assert sum(flops.values()) == pytest.approx(22.29, rel=0.002)


def test_flops_grow_with_streams_and_pixels() -> None:
    pipe = random_model("tiny", device="meta", dtype=torch.float32, flow="zero")
    one, two = flops_by_stage(pipe, 32, 32), flops_by_stage(pipe, 32, 32, batch=2)
    # the embedding of the timestep does not grow with pixels
    assert all(two[stage] == pytest.approx(2 * one[stage], rel=0.01) for stage in one)
    large = flops_by_stage(pipe, 64, 64)
    assert all(large[stage] == pytest.approx(4 * one[stage], rel=0.03) for stage in one)


@pytest.mark.parametrize(("size", "limit_gb"), [(HD, 8), (FULL_HD, 12)])
def test_the_published_model_fits_without_tiles(size: tuple[int, int], limit_gb: int) -> None:
    """8 GB for 1280x720 and 12 GB for 1920x1080, with the slack that a limit leaves."""
    assert fits(published("dis"), limit_gb * GB, *size) == TilePlan()


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_random_models_restore_and_are_equal_each_time(name: str) -> None:
    frame = torch.zeros(1, 3, 16, 24)
    outputs = []
    for _ in range(2):
        pipe = random_model(name, device="cpu", dtype=torch.float32)
        state = pipe.start()
        pipe.step(frame, [state], steps=1)
        outputs.append(pipe.step(frame, [state], steps=1))
    assert outputs[0].shape == (1, 3, 64, 96) and outputs[0].isfinite().all() and outputs[0].std() > 0.01
    assert torch.equal(*outputs)
    assert pipe.flow.name == "dis" and pipe.options.warp == "exact"


def test_weights_are_made_in_the_format_asked_for() -> None:
    pipe = random_model("tiny", device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for n in (pipe.unet, pipe.controlnet, pipe.vae) for p in n.parameters()} == {torch.bfloat16}


def test_only_the_bench_knows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="published, small, tiny"):
        random_model("huge", device="cpu", dtype=torch.float32)
    assert main(["doctor", "--model", f"{PREFIX}tiny", "--json"]) == 7
    assert main(["bench", "--model", f"{PREFIX}huge"]) == 2
