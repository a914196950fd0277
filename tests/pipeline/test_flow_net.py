"""The flow network finds motion, takes every size, and stays one graph that can be exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import FlowError, StreamDiffVSRPipeline
from pipeline.flow import NET_WEIGHTS, NetFlow, make_flow, upscale_flow
from pipeline.flow_net import FlowNet, correlate, least_squares, warp
from pipeline.frames import frame_to_tensor
from pipeline.memory import allocated_by, estimate
from tests.moving_texture import make_clip

SIZES = [(16, 16), (17, 33), (16, 200), (61, 83)]


@pytest.fixture(scope="module")
def net() -> NetFlow:
    return NetFlow()


def pair(height: int, width: int, motion: tuple[float, float] = (1.5, 0.5)) -> tuple[Tensor, Tensor]:
    """Return (current, previous) frames whose flow is `motion` input pixels everywhere."""
    previous, current = (frame_to_tensor(frame) for frame in make_clip(2, height, width, motion=motion))
    return current, previous


@pytest.mark.parametrize("motion", [(0.0, 0.0), (1.5, 0.5), (-2.0, 1.0), (0.25, -0.25), (6.0, -4.0)])
def test_it_finds_the_motion_in_output_pixels(net: NetFlow, motion: tuple[float, float]) -> None:
    flow = net(*pair(72, 96, motion))
    assert flow.shape == (1, 2, 288, 384) and flow.dtype == torch.float32
    middle = flow[0, :, 60:-60, 60:-60].flatten(1).median(dim=1).values
    torch.testing.assert_close(middle, torch.tensor(motion) * 4, rtol=0, atol=0.5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_size_and_batch(net: NetFlow, height: int, width: int) -> None:
    first, second = pair(height, width), pair(height, width, (-1.0, 2.0))
    flow = net(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert flow.shape == (2, 2, 4 * height, 4 * width)
    assert flow.isfinite().all() and not flow.requires_grad
    torch.testing.assert_close(flow[:1], net(*first), rtol=0, atol=2e-3)
    torch.testing.assert_close(flow[1:], net(*second), rtol=0, atol=2e-3)


def test_equal_frames_give_equal_flow(net: NetFlow) -> None:
    """A stream that is resumed from its state must go on with the same numbers, also in another process."""
    frames = pair(40, 56)
    first = net(*frames)
    net(*pair(48, 32, (3.0, 3.0)))
    assert torch.equal(first, net(*frames))
    assert torch.equal(first, NetFlow()(*frames))


def test_flat_and_half_precision_frames(net: NetFlow) -> None:
    """Without texture nothing is known, and nothing large may be made up; frames of any dtype give fp32."""
    grey = torch.full((1, 3, 32, 48), 0.2)
    assert float(net(grey, grey).abs().max()) < 4
    assert net(grey.bfloat16(), grey.bfloat16()).dtype == torch.float32


def test_exported_and_traced_it_gives_the_same(net: NetFlow) -> None:
    current, previous = pair(45, 70)
    eager = net.network(current, previous)
    exported = torch.export.export(net.network, (current, previous)).module()
    torch.testing.assert_close(exported(current, previous), eager, rtol=0, atol=1e-4)
    traced = torch.jit.trace(net.network, (current, previous))
    other = pair(45, 70, (-3.0, 2.0))
    torch.testing.assert_close(traced(*other), net.network(*other), rtol=0, atol=1e-4)
    torch.testing.assert_close(exported(*other), net.network(*other), rtol=0, atol=1e-4)


def test_exported_with_a_free_batch(net: NetFlow) -> None:
    current, previous = (x.repeat(2, 1, 1, 1) for x in pair(32, 48))
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(net.network, (current, previous), dynamic_shapes=({0: batch}, {0: batch})).module()
    three = [x.repeat(3, 1, 1, 1) for x in pair(32, 48, (2.0, 2.0))]
    torch.testing.assert_close(exported(*three), net.network(*three), rtol=0, atol=1e-3)


def test_the_network_is_small() -> None:
    assert NET_WEIGHTS.stat().st_size < 1_000_000
    assert 50_000 <= sum(parameter.numel() for parameter in FlowNet().parameters()) <= 320_000


def test_it_is_chosen_by_name_and_refuses_other_weights(tmp_path: Path) -> None:
    assert isinstance(make_flow("net"), NetFlow) and make_flow("net").name == "net"
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text", "none"):
        with pytest.raises(FlowError, match=rf"{name}\.safetensors") as caught:
            NetFlow(tmp_path / f"{name}.safetensors")
        assert caught.value.code == "flow-net-weights"


def test_its_memory_is_counted_without_running_it(net: NetFlow) -> None:
    frames = [torch.empty(1, 3, 120, 160, device="meta") for _ in range(2)]
    counted = allocated_by(lambda: net.without_data()(*frames))
    result = 2 * 480 * 640 * 4
    assert result < counted < 60 << 20


def test_a_new_network_is_least_squares_over_a_pyramid() -> None:
    """Its heads are silent, so even without training it moves toward a small motion."""
    torch.manual_seed(0)
    flow = (
        FlowNet()
        .eval()
        .requires_grad_(False)(*pair(64, 64, (0.6, 0.0)))[0, :, 16:-16, 16:-16]
        .flatten(1)
        .median(dim=1)
        .values
    )
    assert 0.2 < float(flow[0]) < 0.9 and abs(float(flow[1])) < 0.2


def test_least_squares_solves_for_a_small_shift() -> None:
    x_w, y_h1 = torch.arange(40.0), torch.arange(32.0).unsqueeze(1)

    def waves(shift_x: float, shift_y: float) -> Tensor:
        x, y = x_w + shift_x, y_h1 + shift_y
        return (torch.sin(0.5 * x) + torch.sin(0.4 * y) + torch.sin(0.3 * (x + y))).view(1, 1, 32, 40)

    step = least_squares(waves(0.4, -0.3), waves(0, 0), torch.tensor(1e-6))[0, :, 6:-6, 6:-6]
    torch.testing.assert_close(step.mean(dim=(1, 2)), torch.tensor([0.4, -0.3]), rtol=0, atol=0.03)
    flat = torch.zeros(1, 1, 16, 16)
    assert not least_squares(flat + 0.1, flat, torch.tensor(1e-3)).any()


def test_the_warp_fetches_where_the_flow_points() -> None:
    ramp = torch.arange(12.0).expand(1, 1, 8, 12)
    flow = torch.zeros(1, 2, 8, 12)
    torch.testing.assert_close(warp(ramp, flow), ramp)
    flow[:, 0] = 1.5
    torch.testing.assert_close(warp(ramp, flow), (ramp + 1.5).clamp(max=11))


def test_correlation_is_highest_at_the_shift() -> None:
    torch.manual_seed(1)
    previous = torch.randn(1, 32, 12, 12)
    current = previous.roll((-1, 2), dims=(2, 3))  # current(y, x) = previous(y + 1, x - 2)
    best = correlate(current, previous, 2)[0, :, 4:-4, 4:-4].argmax(dim=0)
    assert (best == 3 * 5 + 0).all()


def test_upscaled_flow_keeps_the_meaning(net: NetFlow) -> None:
    frames = pair(32, 48)
    torch.testing.assert_close(net(*frames), upscale_flow(net.network(*frames)))


def test_the_engine_runs_with_it_and_its_memory_is_known(net: NetFlow, model_folder: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, flow="net")
    current, previous = pair(32, 48)
    state, other = pipe.start(), pipe.start()
    for frame, flow in ((previous, None), (current, net(current, previous))):
        found = pipe.step(frame, [state], steps=1)
        assert torch.equal(found, pipe.step(frame, [other], steps=1, flow_B2HW=flow))
    with_net = estimate(pipe, 64, 96)
    pipe.flow = make_flow("zero")
    assert with_net.weights - estimate(pipe, 64, 96).weights == sum(p.nbytes for p in net.network.parameters()) + 12
