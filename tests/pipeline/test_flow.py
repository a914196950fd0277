"""Flow has the promised direction, unit and size, for every estimator and every frame size."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import FlowError
from pipeline.flow import DISFlow, FlowEstimator, GivenFlow, RAFTFlow, ZeroFlow, make_flow, upscale_flow
from pipeline.frames import frame_to_tensor
from pipeline.guidance import flow_warp
from tests.moving_texture import make_clip

SIZES = [(16, 16), (17, 33), (16, 200), (60, 80)]


def pair(height: int, width: int, motion: tuple[float, float] = (1.5, 0.5)) -> tuple[Tensor, Tensor]:
    """Return (current, previous) frames whose flow is `motion` input pixels everywhere."""
    previous, current = (frame_to_tensor(frame) for frame in make_clip(2, height, width, motion=motion))
    return current, previous


@pytest.mark.parametrize("size", ["input", "output"])
@pytest.mark.parametrize("motion", [(1.5, 0.5), (-2.0, 1.0)])
def test_dis_finds_the_motion_in_output_pixels(size: str, motion: tuple[float, float]) -> None:
    flow = DISFlow(size)(*pair(60, 80, motion))
    assert flow.shape == (1, 2, 240, 320) and flow.dtype == torch.float32
    middle = flow[0, :, 40:-40, 40:-40].flatten(1).median(dim=1).values
    torch.testing.assert_close(middle, torch.tensor(motion) * 4, rtol=0, atol=0.5)


def test_warping_by_the_flow_brings_the_previous_frame_onto_the_current_one() -> None:
    current, previous = pair(60, 80)
    enlarge = torch.nn.UpsamplingBilinear2d(scale_factor=4)
    flow = DISFlow()(current, previous)
    inside = (..., slice(24, -24), slice(24, -24))
    before = (enlarge(previous) - enlarge(current))[inside].abs().mean()
    after = (flow_warp(enlarge(previous), flow, "exact") - enlarge(current))[inside].abs().mean()
    assert after < 0.25 * before


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("estimator", [DISFlow(), DISFlow("output"), ZeroFlow()], ids=["dis", "dis-output", "zero"])
def test_every_size_and_batch(estimator: FlowEstimator, height: int, width: int) -> None:
    first, second = pair(height, width), pair(height, width, (-1.0, 2.0))
    flow = estimator(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert flow.shape == (2, 2, 4 * height, 4 * width)
    assert flow.isfinite().all()
    assert torch.equal(flow[:1], estimator(*first))
    assert torch.equal(flow[1:], estimator(*second))


def test_small_frames_are_padded_by_their_edge() -> None:
    """Padding keeps the motion: 16x16 is below what DIS can pyramid, and still finds a shift."""
    flow = DISFlow()(*pair(24, 24, (1.0, 0.0)))
    assert float(flow[0, 0, 24:-24, 24:-24].median()) == pytest.approx(4, abs=1)


def test_upscaled_vectors() -> None:
    """Vectors grow by four with the picture, and sit at pixel centres."""
    ramp_12hw = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 2, 8, 8)
    flow = upscale_flow(ramp_12hw)
    assert flow.shape == (1, 2, 32, 32)
    positions = (torch.arange(32) + 0.5) / 4 - 0.5
    torch.testing.assert_close(flow[0, 0, 5], positions.clamp(0, 7) * 4)


def test_zero_flow_is_zero() -> None:
    assert not ZeroFlow()(*pair(16, 20)).any()


def test_given_flow_asks_for_it() -> None:
    with pytest.raises(FlowError, match="flow_B2HW") as caught:
        GivenFlow()(*pair(16, 16))
    assert caught.value.code == "flow-not-given"


def test_names() -> None:
    assert isinstance(make_flow("dis"), DISFlow)
    assert make_flow("dis", size="output").size == "output"  # type: ignore[attr-defined]
    for name in ("dis", "zero", "given"):
        assert make_flow(name).name == name
        assert isinstance(make_flow(name), FlowEstimator)
    with pytest.raises(FlowError, match=r"'farneback'.*raft, raft-small, dis, net, zero or given"):
        make_flow("farneback")


def test_nothing_heavy_is_imported_before_it_is_needed(repository: Path) -> None:
    code = "import sys, pipeline.flow; print('cv2' in sys.modules, 'torchvision' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert out.stdout.split() == ["False", "False"]


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights for RAFT, and torchvision made importable while this module's tests run.

    Beside a torch without CUDA, torchvision lies in a folder of its own (`make venv` puts it there): its compiled
    operators are missing then, and every library that finds it would stumble. Two operators are looked up by name when
    it is imported; RAFT uses neither.
    """
    folder = Path(sys.prefix, "torchvision-for-tests")
    if folder.is_dir():
        sys.path.append(str(folder))
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    elif importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed for the tests; `make venv` installs it")
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_large, raft_small

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft_large.safetensors"
    save_file(raft_large(weights=None).state_dict(), path)
    save_file(raft_small(weights=None).state_dict(), path.with_name("raft_small.safetensors"))
    yield path
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        del library


def test_raft_pads_to_its_smallest_size_and_crops(raft_weights: Path) -> None:
    """At output size 68x132 is padded by its last row and column to 128x136, as RAFT itself shows."""
    from torchvision.models.optical_flow import raft_large

    current, previous = pair(17, 33)
    estimator = RAFTFlow(weights=raft_weights)
    flow = estimator(current, previous)
    assert flow.shape == (1, 2, 68, 132) and not flow.requires_grad

    model = raft_large(weights=None).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(raft_weights))
    with torch.no_grad():
        frames = [
            torch.nn.functional.pad(
                torch.nn.functional.interpolate(frame, scale_factor=4, mode="bicubic"), (0, 4, 0, 60), mode="replicate"
            )
            for frame in (current, previous)
        ]
        assert frames[0].shape[2:] == (128, 136)
        expected = model(*frames)[-1]
    assert torch.equal(flow, expected[..., :68, :132])


def test_raft_at_input_size(raft_weights: Path) -> None:
    estimator = make_flow("raft", size="input", raft_weights=raft_weights)
    assert estimator(*pair(17, 33)).shape == (1, 2, 68, 132)


def test_raft_with_fewer_updates_gives_an_earlier_estimate(raft_weights: Path) -> None:
    from torchvision.models.optical_flow import raft_large

    current, previous = pair(128, 136)
    flow = RAFTFlow("input", raft_weights, updates=3)(current, previous)
    model = raft_large(weights=None).eval()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(raft_weights))
    with torch.no_grad():
        estimates = model(current, previous)
    assert len(estimates) == 12
    torch.testing.assert_close(flow, upscale_flow(estimates[2]))
    with pytest.raises(FlowError, match="0 times"):
        RAFTFlow(updates=0)


def test_raft_small(raft_weights: Path) -> None:
    small = raft_weights.with_name("raft_small.safetensors")
    estimator = RAFTFlow("input", small, variant="small")
    assert estimator.name == "raft-small"
    assert estimator(*pair(17, 33)).shape == (1, 2, 68, 132)
    by_name = make_flow("raft-small", raft_weights=raft_weights)  # the checkpoint's weights are those of RAFT-large
    assert isinstance(by_name, RAFTFlow) and (by_name.size, by_name.weights) == ("input", None)
    with pytest.raises(FlowError, match=r"do not fit raft_small"):
        RAFTFlow("input", raft_weights, variant="small")(*pair(32, 32))


def test_the_memory_of_raft_is_counted_without_running_it(raft_weights: Path) -> None:
    from pipeline.memory import allocated_by

    current, previous = torch.empty(1, 3, 120, 160, device="meta"), torch.empty(1, 3, 120, 160, device="meta")
    volume = ((4 * 120 // 8) * (4 * 160 // 8)) ** 2 * 4
    whole = allocated_by(lambda: RAFTFlow(weights=raft_weights).without_data()(current, previous))
    assert 2 * volume < whole < 4 * volume
    small = allocated_by(lambda: RAFTFlow("input", raft_weights).without_data()(current, previous))
    assert small < whole / 5


def test_raft_refuses_other_weights(raft_weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FlowError, match=r"other\.safetensors.*do not fit") as caught:
        RAFTFlow(weights=tmp_path / "other.safetensors")(*pair(32, 32))
    assert caught.value.code == "flow-raft-weights"
    with pytest.raises(FlowError, match=r"none\.safetensors"):
        RAFTFlow(weights=tmp_path / "none.safetensors")(*pair(32, 32))


def test_raft_without_torchvision_says_what_to_do(repository: Path) -> None:
    """A broken or missing torchvision shows when the estimator is made, not at the second frame."""
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from pipeline import FlowError, make_flow\n"
        "try: make_flow('raft')\n"
        "except FlowError as error: print(error.code, error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert out.stdout.startswith("flow-raft-missing") and "upriver[raft]" in out.stdout
