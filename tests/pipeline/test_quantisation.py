"""Eight-bit convolutions by OpenVINO: how near, which, and where they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline import StreamDiffVSRPipeline
from pipeline.backends import require_dtype
from pipeline.cuda_backend import psnr_db
from pipeline.errors import BackendError
from pipeline.frame_core import CoreKind, FrameCore
from pipeline.made_up_clip import scene
from pipeline.options import Guidance
from pipeline.quantisation import Block, bearable, measure_blocks, measure_ranges
from pipeline.schedule import make_schedule
from tests.moving_texture import make_clip

CLOSE_DB = 45.0  # on a texture that moves, errors go round


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("pipeline.backends.processor_flags", lambda: frozenset({"avx512_vnni"}))
        yield


@pytest.fixture(scope="module")
def pipe() -> StreamDiffVSRPipeline:
    """The built-in model; what computes it in int8 was made while guidance was off."""
    pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
    pipe.use_backend("openvino", torch.int8)
    pipe.guidance = Guidance(artg=False, tpm=False)
    pipe.warm_up()
    pipe.guidance = Guidance()
    return pipe


def restore(pipe: StreamDiffVSRPipeline, count: int, steps: int | None = None) -> list[Tensor]:
    state = pipe.start(seed=5)
    frames = [torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1 for frame in make_clip(count, 40, 56)]
    return [pipe.step(frame, [state], steps=steps) for frame in frames]


def worst_db(found: list[Tensor], wanted: list[Tensor]) -> float:
    return min(psnr_db(a, b) for a, b in zip(found, wanted, strict=True))


def test_thirty_frames_stay_close(pipe: StreamDiffVSRPipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Errors go round in the recurrence; and a convolution without bias would lose its scale."""
    caplog.set_level("INFO", logger="pipeline.openvino_backend")
    assert pipe.numerics == "int8 by openvino"
    found = restore(pipe, 30, 1)
    wanted = restore(StreamDiffVSRPipeline.from_pretrained("tiny"), 30, 1)
    assert CLOSE_DB <= worst_db(found, wanted) < 60, "60 dB and more would be bf16"
    inner = [
        layer
        for network in (pipe.unet, pipe.controlnet)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and min(layer.weight.shape[:2]) >= 8
    ]
    embedding = [one for one in pipe.controlnet.controlnet_cond_embedding.modules() if isinstance(one, nn.Conv2d)]
    assert f"predict_guided: {len(inner) - len(embedding) + 1} convolutions" in caplog.text
    assert f"embed: {len(embedding) - 1} convolutions" in caplog.text  # the first one takes a picture


def test_what_was_made_is_kept(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    found = restore(pipe, 3)
    again = StreamDiffVSRPipeline.from_pretrained("tiny", backend="openvino", torch_dtype=torch.int8)
    for measure in ("measure_ranges", "measure_blocks", "nearness_db"):
        monkeypatch.setattr(f"pipeline.openvino_backend.{measure}", lambda *_, **__: pytest.fail("it was kept"))
    assert worst_db(restore(again, 3), found) > 100
    again.use_backend("openvino", torch.float32)
    assert worst_db(restore(again, 3), found) < 60, "other number formats have forms of their own"


@pytest.mark.slow
def test_blocks_that_cost_too_much_are_left_out(
    pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline.openvino_backend")
    wanted = restore(StreamDiffVSRPipeline.from_pretrained("tiny"), 3)
    usual = worst_db(restore(pipe, 3), wanted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.openvino_backend.INT8_PSNR_DB", 58.0)
    stricter = StreamDiffVSRPipeline.from_pretrained("tiny", backend="openvino", torch_dtype=torch.int8)
    assert usual + 3 < worst_db(restore(stricter, 3), wanted) < 70
    assert "of 92 convolutions compute in 8 bits" in caplog.text and "the rest in f32" in caplog.text


def test_each_block_is_rounded_by_itself(pipe: StreamDiffVSRPipeline) -> None:
    schedule = make_schedule(pipe.scheduler, 1, pipe.options.schedules)
    alone, guided = (FrameCore(pipe, CoreKind(guided, schedule, Guidance())).eval() for guided in (False, True))
    before = [p.clone() for p in guided.parameters()]
    ranges = measure_ranges(alone, guided)
    blocks = measure_blocks(alone, guided, ranges)
    assert sum(len(block.names) for block in blocks) == 92 and min(block.error for block in blocks) > 0
    assert all(torch.equal(x, y) for x, y in zip(before, guided.parameters(), strict=True)), "weights are put back"


def test_of_equal_errors_the_block_of_most_work_is_kept() -> None:
    blocks = [Block(["small"], 1.0, 10), Block(["large"], 1.0, 1000), Block(["tiny"], 0.001, 0)]
    assert [block.names for block in bearable(blocks, 1.5)] == [["large"], ["tiny"]]
    assert bearable(blocks, 3.0) and len(bearable(blocks, 3.0)) == 3
    assert bearable(blocks, 0.0) == []


@pytest.mark.slow
def test_attention_and_published_modules(parity_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Random weights lean on every digit: most stays in fp32, and pictures near."""
    pipe = StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="dis")
    wanted = restore(pipe, 30, 1)
    pipe.use_backend("openvino", torch.int8)
    assert CLOSE_DB <= worst_db(restore(pipe, 30, 1), wanted) < 70
    assert "of 153 convolutions compute in 8 bits" in caplog.text


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_other_backends_refuse(backend: str) -> None:
    with pytest.raises(BackendError) as refused:
        StreamDiffVSRPipeline.from_pretrained("tiny", backend=backend, torch_dtype=torch.int8)
    assert refused.value.code == "backend-int8" and "openvino" in str(refused.value.remedy)


def test_a_processor_whose_sums_would_overflow_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    require_dtype("openvino", torch.int8)
    monkeypatch.setattr("pipeline.backends.processor_flags", lambda: frozenset({"avx2", "avx512f"}))
    with pytest.raises(BackendError) as refused:
        require_dtype("openvino", torch.int8)
    assert refused.value.code == "processor-int8"
    require_dtype("openvino", torch.bfloat16)


def test_scenes_reach_black_and_white_and_are_the_same_everywhere() -> None:
    pictures = np.stack([scene(number) for number in range(3)])
    assert pictures.shape == (3, 64, 64, 3) and pictures.dtype == np.float32
    assert pictures.min() == 0 and pictures.max() == 1
    np.testing.assert_allclose(pictures.mean((1, 2, 3)), [0.5, 0.5, 0.5], atol=0.08)
    assert np.array_equal(scene(1), pictures[1]) and not np.array_equal(pictures[0], pictures[1])
