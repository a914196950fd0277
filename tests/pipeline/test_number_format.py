"""Which number format a model gets: the first that keeps its pictures, found out once and kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import StreamDiffVSRPipeline, number_format
from pipeline.errors import BackendError
from pipeline.made_up_clip import made_up_clip
from pipeline.openvino_backend import cpu_has_bf16

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "upriver/notes"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The formats that were compared with fp32."""
    found: list[torch.dtype] = []
    original = number_format._Trial.compare_cast

    def compare(self: number_format._Trial, dtype: torch.dtype) -> float:
        found.append(dtype)
        return original(self, dtype)

    monkeypatch.setattr(number_format._Trial, "compare_cast", compare)
    return found


def load(source: str | Path, *formats: torch.dtype, backend: str = "eager") -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained(source, torch_dtype=formats, flow="zero", backend=backend)


def test_the_built_in_model_bears_bf16(compared: list[torch.dtype], own_cache: Path) -> None:
    assert load("tiny", BF16, FP32).numerics == "bfloat16"
    assert compared == [BF16]
    (place,) = own_cache.iterdir()
    assert 50 < json.loads(place.read_text())["bfloat16"] < 60


def test_random_weights_do_not_and_get_what_is_nearer(
    parity_folder: Path, compared: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    assert load(parity_folder, BF16, FP16, FP32).numerics == "float16"
    assert compared == [BF16, FP16]
    assert "bfloat16 is not used" in caplog.text and "--dtype" in caplog.text
    assert load(parity_folder, BF16, FP32).numerics == "float32"
    assert load(parity_folder, BF16).numerics == "bfloat16", "what is asked for is what one gets"


@pytest.mark.slow
def test_pictures_in_the_chosen_format_keep_45_db(parity_folder: Path) -> None:
    """Thirty frames, each path on its own previous outputs."""
    from pipeline.cuda_backend import psnr_db

    chosen, reference = load(parity_folder, BF16, FP16, FP32), load(parity_folder, FP32)
    states = [pipe.start(seed=3) for pipe in (chosen, reference)]
    worst = torch.inf
    for frame_13hw, _, _ in made_up_clip(5, 30, 4, side=24):
        outputs = [
            pipe.step(frame_13hw, [state], steps=2) for pipe, state in zip((chosen, reference), states, strict=True)
        ]
        worst = min(worst, psnr_db(*outputs))
    assert 45 <= worst < 80


def test_openvino_is_compared_by_what_it_computes(
    own_cache: Path, compared: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load("tiny", BF16, FP32, backend="openvino")
    assert pipe.numerics == "bfloat16 by openvino" and not compared
    (place,) = own_cache.iterdir()
    assert json.loads(place.read_text())["bfloat16"] > 50
    place.write_text(json.dumps({"bfloat16": 12.0}))
    assert load("tiny", BF16, FP32, backend="openvino").numerics == "float32 by openvino"
    assert "12.0 dB" in caplog.text


@pytest.mark.slow
def test_openvino_leaves_random_weights_in_fp32(parity_folder: Path) -> None:
    expected = "float32" if cpu_has_bf16() else "bfloat16"  # which OpenVINO then computes in fp32 all the same
    assert load(parity_folder, BF16, FP32, backend="openvino").numerics == f"{expected} by openvino"


def test_what_was_found_is_kept(compared: list[torch.dtype], own_cache: Path) -> None:
    load("tiny", BF16, FP32)
    load("tiny", BF16, FP32)
    assert compared == [BF16]
    (place,) = own_cache.iterdir()
    place.write_text(json.dumps({"bfloat16": 12.0}))
    assert load("tiny", BF16, FP32).numerics == "float32", "it is what was found that counts"
    place.write_text("{")
    assert load("tiny", BF16, FP32).numerics == "bfloat16"
    assert compared == [BF16, BF16]


def test_a_cache_that_cannot_be_written_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load("tiny", BF16, FP32).numerics == "bfloat16"


def test_values_near_the_largest_of_fp16_rule_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "HEADROOM", 65504.0)  # so that 1 is near
    assert load("tiny", FP16, FP32).numerics == "float32"


def test_too_little_memory_for_a_comparison_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out(*_: object) -> float:
        raise torch.OutOfMemoryError("no room\nand more")

    monkeypatch.setattr(number_format._Trial, "compare_cast", run_out)
    assert load("tiny", BF16, FP32).numerics == "bfloat16"
    assert "bfloat16 is used without a comparison with float32: no room" in caplog.text and "more" not in caplog.text


@pytest.mark.parametrize("formats", [(FP32,), (BF16,), (FP32, BF16)])
def test_one_format_or_fp32_needs_no_comparison(formats: tuple[torch.dtype, ...], compared: list[torch.dtype]) -> None:
    assert load("tiny", *formats).dtype == formats[0]
    assert not compared


def test_every_format_must_be_one_that_the_backend_computes_in() -> None:
    with pytest.raises(BackendError) as refused:
        load("tiny", BF16, torch.int8)
    assert refused.value.code == "backend-int8"
