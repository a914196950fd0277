"""Tiles: where they lie, that the decoder's are exact, that the U-Net's leave no seam, and what they save."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline.autoencoder import TemporalAutoencoderTiny
from pipeline.errors import MemoryLimitError
from pipeline.flow import FlowEstimator, upscale_flow
from pipeline.frames import frame_to_tensor
from pipeline.guidance import embed_condition, flow_warp
from pipeline.memory import SLACK, WORKER_BYTES, Tiler, beside_the_step, estimate, fits
from pipeline.tiling import (
    Past,
    TilePlan,
    Window,
    decode_in_tiles,
    decoder_reach,
    embed_in_tiles,
    embedding_reach,
    feature_reach,
    flow_in_tiles,
    predict_in_tiles,
    tiles,
)
from tests.moving_texture import make_clip

LEVEL = 2 / 255  # one step of 8 bits, in [-1, 1]


class FixedTiler(Tiler):
    """Takes the plan that a test wants."""

    def __init__(self, plan: TilePlan) -> None:
        super().__init__()
        self.plan = plan

    def plan_for(self, pipe: StreamDiffVSRPipeline, shape: object) -> TilePlan:
        return self.plan


@pytest.fixture(autouse=True)
def plain_pipe(pipe: StreamDiffVSRPipeline) -> Iterator[None]:
    yield
    pipe.memory_limit_bytes = None


@pytest.fixture(scope="module")
def tiny() -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained("tiny")


def joint_vae(blocks: tuple[int, ...] = (1, 1, 2)) -> TemporalAutoencoderTiny:
    torch.manual_seed(3)
    vae = TemporalAutoencoderTiny(
        encoder_block_out_channels=(8, 12, 16),
        decoder_block_out_channels=(16, 12, 8),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        encoder_temporal=False,
        temporal_fusion="joint",
    )
    return vae.eval().to(memory_format=torch.channels_last)


def smooth_flow(height: int, width: int, strength: float = 6.0) -> Tensor:
    torch.manual_seed(5)
    return torch.nn.functional.interpolate(torch.randn(1, 2, 5, 7), size=(height, width), mode="bilinear") * strength


def restore(pipe: StreamDiffVSRPipeline, plan: TilePlan, height: int, width: int, streams: int = 1) -> list[Tensor]:
    """Two frames, so that ARTG and TPM take part; with several streams, the last joins at the second frame."""
    pipe._tiler = FixedTiler(plan)
    clip = [frame_to_tensor(frame) for frame in make_clip(2, height, width)]
    states = [pipe.start(seed=k) for k in range(streams)]
    outputs = []
    for number, frame in enumerate(clip):
        present = states if number or streams == 1 else states[:-1]
        outputs.append(pipe.step(frame.repeat(len(present), 1, 1, 1), present, steps=1))
    return outputs


def test_tiles_cover_a_frame_once() -> None:
    counts = torch.zeros(83, 121)
    for window in tiles(83, 121, 40, 8):
        assert window.top % 8 == window.left % 8 == 0
        assert window.bottom - window.top <= 40 and window.right - window.left <= 40
        window.of(counts).add_(1)
    assert torch.equal(counts, torch.ones_like(counts))


def test_a_warp_through_a_window_is_that_part_of_the_warp() -> None:
    picture, flow = torch.rand(1, 3, 96, 120), smooth_flow(96, 120)
    window = Window(24, 72, 16, 88)
    for mode in ("exact", "published"):
        part = Past([picture[0]], mode, flow).warped(0, window)  # type: ignore[arg-type]
        assert torch.equal(part, window.of(flow_warp(picture, flow, mode)))  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [(1, 1, 2), (1, 3, 3)])
def test_reaches_are_enough_and_no_more(blocks: tuple[int, ...]) -> None:
    """A change beyond the reach changes nothing at a place; one within it does somewhere."""
    vae = joint_vae(blocks).double()
    reach, features_reach = decoder_reach(vae), feature_reach(vae)
    size, middle = 2 * reach + 24, reach + 12
    with torch.no_grad():
        latent = torch.randn(1, 4, size, size, dtype=torch.float64)
        picture = torch.randn(1, 3, 4 * size, 4 * size, dtype=torch.float64)
        features = vae.encode_temporal(picture)
        moved, moved_picture = latent.clone(), picture.clone()
        moved[..., middle] += 5
        moved_picture[..., 4 * middle : 4 * middle + 4] += 5
        change = (vae.decode(latent, features) - vae.decode(moved, features)).abs().amax(dim=(0, 1, 2))
        touched = change.reshape(-1, 4).amax(1).nonzero().flatten()
        assert reach - 2 <= int((touched - middle).abs().max()) <= reach
        widest = 0
        for one, other in zip(features, vae.encode_temporal(moved_picture), strict=True):
            per_latent = one.shape[-1] // size
            touched = (one - other).abs().amax(dim=(0, 1, 2)).reshape(-1, per_latent).amax(1).nonzero().flatten()
            widest = max(widest, int((touched - middle).abs().max()))
        assert features_reach - 2 <= widest <= features_reach


def test_tiles_of_the_decoder_are_exact() -> None:
    vae, height, width = joint_vae(), 90, 131
    picture = torch.rand(1, 3, 4 * height, 4 * width) * 2 - 1
    latents = torch.randn(2, 4, height, width)
    past = Past([picture[0]], "exact", smooth_flow(4 * height, 4 * width))
    with torch.no_grad():
        whole = [
            vae.decode(latents[:1]),
            vae.decode(latents[1:], vae.encode_temporal(past.warped(0, everything(picture)))),
        ]
        pieces = decode_in_tiles(vae, latents, past.warped, [1], 32)
    assert (pieces - torch.cat(whole)).abs().max() < 1e-5
    assert (whole[1] - vae.decode(latents[1:])).abs().max() > 0.01, "the TPMs say nothing: the test shows nothing"


def everything(picture: Tensor) -> Window:
    return Window(0, picture.shape[-2], 0, picture.shape[-1])


def test_tiles_of_the_embedding_are_exact(pipe: StreamDiffVSRPipeline) -> None:
    picture, flow = torch.rand(3, 280, 400), smooth_flow(280, 400)
    past = Past([picture], "exact", flow)
    with torch.no_grad():
        pieces = embed_in_tiles(pipe.controlnet, past, torch.empty(1, 3, 70, 100), 32)
        whole = embed_condition(pipe.controlnet, flow_warp(picture[None], flow, "exact"))
    assert embedding_reach(pipe.controlnet) < 8
    assert (pieces - whole).abs().max() < 1e-5 < whole.abs().max()


@pytest.mark.parametrize("streams", [1, 3])
def test_decoder_tiles_give_the_frames_of_the_untiled_engine(pipe: StreamDiffVSRPipeline, streams: int) -> None:
    """First frames are equal. Published TPMs run on across the ends of rows: at the frame's own edges that differs.

    Inside the frame, where the borders between tiles are, the difference is below a quarter of a level of 8 bits.
    """
    whole = restore(pipe, TilePlan(), 72, 100, streams)
    pieces = restore(pipe, TilePlan(decoder=32), 72, 100, streams)
    difference = (whole[1] - pieces[1]).abs()
    assert (whole[0] - pieces[0]).abs().max() < 1e-5
    assert streams == 1 or difference[-1].max() < 1e-5
    assert difference[..., :-32, 32:-32].max() < LEVEL / 4
    assert difference[..., :-32, :].max() < 4 * LEVEL  # with random TPMs, three times as strong as new ones


def test_unet_tiles_leave_no_seam(tiny: StreamDiffVSRPipeline) -> None:
    """Within a few levels of 8 bits everywhere, a third of one on average; and borders are not worse than the rest."""
    whole = restore(tiny, TilePlan(), 128, 176)
    pieces = restore(tiny, TilePlan(decoder=64, unet=64), 128, 176)
    difference_HW = (whole[1] - pieces[1]).abs().amax(dim=(0, 1))
    assert difference_HW.max() < 6 * LEVEL and difference_HW.mean() < LEVEL / 3
    border = torch.zeros_like(difference_HW, dtype=torch.bool)
    for window in tiles(128, 176, 64):
        if window.top:
            border[4 * window.top - 8 : 4 * window.top + 8] = True
        if window.left:
            border[:, 4 * window.left - 8 : 4 * window.left + 8] = True
    assert difference_HW[border].mean() < 1.5 * difference_HW[~border].mean()
    # a seam would be a step between neighbours where the whole frame has none
    step = (whole[1] - pieces[1]).diff(dim=3).abs()
    assert step[..., 4 * 64 - 1].mean() < max(2 * step.mean(), 0.05 * LEVEL)


def test_tiles_share_their_statistics() -> None:
    """A normalisation in tiles is that of the whole frame, however unlike the tiles are; each by itself it is not."""
    norm = torch.nn.GroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 60, 200)
    x[..., :100] = 0.3
    run = partial(
        predict_in_tiles,
        lambda row, window: norm(window.of(x[row : row + 1])),
        [norm],
        tuple(x.shape),
        40,
        4,
        x.device,
    )
    with torch.no_grad():
        whole, shared, alone = norm(x), run(), run(shared_statistics=False)
    assert (shared - whole).abs().max() < 1e-5
    assert (alone - whole).abs().max() > 0.5
    assert "forward" not in vars(norm), "the network is left as it was"


def test_ramps_of_flow_tiles_add_up_to_one() -> None:
    class Everywhere:
        name = "constant"

        def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
            return upscale_flow(torch.full((len(current_B3hw), 2, *current_B3hw.shape[2:]), 1.25))

        def to(self, device: object) -> FlowEstimator:
            return self

    frames = torch.zeros(2, 3, 90, 150)
    assert torch.allclose(flow_in_tiles(Everywhere(), frames, frames, 40), torch.full((2, 2, 360, 600), 5.0))


def test_a_limit_chooses_the_tiles_and_they_are_kept_within_it(pipe: StreamDiffVSRPipeline) -> None:
    whole = estimate(pipe, 540, 960).total
    assert fits(pipe, round(1.2 * whole), 540, 960) == TilePlan()
    tight = (whole + estimate(pipe, 540, 960, plan=TilePlan(decoder=64)).total) // 2
    plan = fits(pipe, tight, 540, 960)
    assert plan.decoder is not None and estimate(pipe, 540, 960, plan=plan).total <= tight
    pipe.memory_limit_bytes = round(SLACK * whole) + 10**9
    assert Tiler.plan_for(pipe._tiler, pipe, (1, 3, 540, 960)).is_whole
    pipe.set_aside(10**9 + round((SLACK - 1) * whole))
    assert not pipe._tiler.plan_for(pipe, (1, 3, 540, 960)).is_whole
    with pytest.raises(MemoryLimitError, match="smallest tiles") as caught:
        fits(pipe, 700 << 20, 1080, 1920)
    assert caught.value.code == "memory-limit"


def test_step_refuses_before_it_computes(pipe: StreamDiffVSRPipeline) -> None:
    pipe.memory_limit_bytes = 1 << 20
    state = pipe.start()
    with pytest.raises(MemoryLimitError):
        pipe.step(torch.zeros(1, 3, 32, 32), [state])
    assert state.is_first and not pipe.halve_tiles()


def test_tiles_are_halved_until_they_cannot_be(pipe: StreamDiffVSRPipeline) -> None:
    assert not pipe.halve_tiles(), "nothing was tried yet"
    pipe._tiler.plan_for(pipe, (1, 3, 480, 640))
    needs, count = [estimate(pipe, 480, 640).step], 0
    while pipe.halve_tiles():
        needs.append(estimate(pipe, 480, 640, plan=pipe._tiler.plan_for(pipe, (1, 3, 480, 640))).step)
        count += 1
        assert count < 20
    assert needs[1] < 0.75 * needs[0] and needs[-1] == min(needs)
    assert str(pipe.tiling) == "decoder 40, U-Net 40"


def test_weights_dtype_batch_and_attention_count(pipe: StreamDiffVSRPipeline, parity_folder: Path) -> None:
    one = estimate(pipe, 64, 64)
    assert estimate(pipe, 64, 64, batch=3).step == pytest.approx(3 * one.step, rel=0.1)
    assert one.weights == sum(p.nbytes for m in (pipe.unet, pipe.controlnet, pipe.vae) for p in m.parameters())
    published = StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="dis")
    full = estimate(published, 64, 64)
    half = estimate(published.to("cpu", torch.bfloat16), 64, 64)
    assert half.weights == full.weights // 2 and half.step < 0.8 * full.step
    assert beside_the_step(restored_pixels=100, written_pixels=10, waiting=2) == WORKER_BYTES + 600 + 2100


PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
from pipeline import StreamDiffVSRPipeline
from pipeline.frames import frame_to_tensor
from pipeline.memory import estimate
from tests.moving_texture import make_clip

width, height, limit = map(int, sys.argv[1:])
pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
pipe.memory_limit_bytes = limit or None
state = pipe.start()
for frame in make_clip(2, height, width):
    pipe.step(frame_to_tensor(frame), [state], steps=1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak, estimate(pipe, height, width, plan=pipe.tiling).total, pipe.tiling.is_whole)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "limit"), [(160, 120, 0), (320, 240, 0), (480, 270, 0), (480, 270, 1_200_000_000)]
)
def test_the_estimate_is_within_a_quarter_of_the_peak(width: int, height: int, limit: int, repository: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(width), str(height), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    peak, estimated, whole = done.stdout.split()
    assert 0.8 < int(estimated) / int(peak) < 1.25
    if limit:
        assert whole == "False" and int(peak) <= limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_estimate_on_a_gpu() -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained("tiny", device="cuda")
    state = pipe.start()
    torch.cuda.reset_peak_memory_stats()
    for frame in make_clip(2, 270, 480):
        pipe.step(frame_to_tensor(frame), [state], steps=1)
    assert estimate(pipe, 270, 480).total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)
