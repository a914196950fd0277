"""A stream's state survives a file bit for bit, and refuses what it cannot be."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

import pipeline.state
from pipeline import StateError, StreamState

MODEL = "a" * 64
STATES = Path(__file__).resolve().parents[1] / "data/states"


def full_state(dtype: torch.dtype = torch.float32) -> StreamState:
    torch.manual_seed(0)
    state = StreamState(model_sha256=MODEL, seed=2**64 - 1, index=41)
    output = torch.randn(3, 64, 84).to(dtype)
    output[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype)
    state.advance(output, torch.randn(3, 16, 21))
    state.detector = {"histogram": torch.arange(7), "mean": torch.tensor(0.25)}
    return state


def bits(tensor: torch.Tensor | None) -> bytes:
    assert tensor is not None
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: StreamState, expected: StreamState) -> None:
    for name in ("model_sha256", "seed", "index", "height", "width", "version"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("prev_output_3HW", "prev_input_3HW"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b), name
    assert found.detector.keys() == expected.detector.keys()
    assert all(bits(found.detector[key]) == bits(tensor) for key, tensor in expected.detector.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_by_path(tmp_path: Path, dtype: torch.dtype) -> None:
    state = full_state(dtype)
    state.save(tmp_path / "stream.safetensors")
    assert_same(StreamState.load(tmp_path / "stream.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]  # nothing half-written stays


def test_round_trip_by_file_object() -> None:
    state, file = full_state(), io.BytesIO()
    state.save(file)
    file.seek(0)
    assert_same(StreamState.load(file, device="cpu"), state)


def test_a_fresh_state_has_no_tensors() -> None:
    state, file = StreamState(model_sha256=MODEL, seed=3, index=5), io.BytesIO()
    state.save(file)
    file.seek(0)
    found = StreamState.load(file)
    assert found.is_first and found.prev_input_3HW is None and found.detector == {}
    assert (found.seed, found.index, found.height, found.width) == (3, 5, None, None)


def test_views_of_a_batch_can_be_saved(tmp_path: Path) -> None:
    state = full_state()
    batch = torch.randn(2, 3, 64, 84).to(memory_format=torch.channels_last)
    state.advance(batch[1], torch.randn(2, 3, 16, 21)[1])
    state.save(tmp_path / "s")
    assert_same(StreamState.load(tmp_path / "s"), state)


def test_reset_keeps_seed_index_and_detector() -> None:
    state = full_state()
    state.reset()
    assert state.is_first and state.prev_input_3HW is None and state.height is None
    assert (state.seed, state.index) == (2**64 - 1, 42)
    assert set(state.detector) == {"histogram", "mean"}


def test_skip_counts_a_frame_and_starts_anew() -> None:
    state = full_state()
    state.skip()
    assert state.is_first
    assert state.index == 43


def test_another_models_state_is_refused_and_both_are_named(tmp_path: Path) -> None:
    full_state().save(tmp_path / "s")
    with pytest.raises(StateError, match=f"{MODEL}.*{'b' * 64}") as caught:
        StreamState.load(tmp_path / "s", model_sha256="b" * 64)
    assert caught.value.code == "state-other-model"


def rewrite(path: Path, **changes: object) -> None:
    """Change fields in the metadata of a state file."""
    from safetensors.torch import load_file, save_file

    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    fields = json.loads(header["__metadata__"]["upriver_state"]) | changes
    save_file(load_file(path), path, metadata={"upriver_state": json.dumps(fields)})


def test_an_unknown_version_is_refused_and_both_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    full_state().save(path)
    rewrite(path, version=99)
    with pytest.raises(StateError, match=f"version 99.* reads {pipeline.state.VERSION}") as caught:
        StreamState.load(path)
    assert caught.value.code == "state-version"


def pattern(*shape: int) -> torch.Tensor:
    """Return numbers in [-1, 1] that are written nowhere but here, equal on every machine."""
    steps = torch.arange(math.prod(shape), dtype=torch.int64) * 7919 % 2001 - 1000
    return steps.to(torch.float32).div(1000).reshape(shape)


@pytest.mark.parametrize("version", range(1, pipeline.state.VERSION + 1))
def test_a_file_that_an_earlier_version_wrote_is_read(version: int) -> None:
    """Each version's file is kept: it was written when that version was the newest, and is never written again."""
    expected = StreamState(model_sha256="5e" * 32, seed=2**64 - 2, index=12)
    expected.advance(pattern(3, 64, 96).to(torch.bfloat16), pattern(3, 16, 24))
    expected.detector = {"histogram": torch.arange(7), "mean": torch.tensor(0.25)}
    assert_same(StreamState.load(STATES / f"version-{version}.safetensors"), expected)


def test_the_schema_before_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the schema moves on, a file of the version before passes through its upgrade."""
    path = tmp_path / "s"
    full_state().save(path)
    rewrite(path, seed="12")  # as if this version had written seeds as text

    def upgrade(fields: dict, tensors: dict) -> tuple[dict, dict]:
        return fields | {"version": fields["version"] + 1, "seed": int(fields["seed"])}, tensors

    monkeypatch.setitem(pipeline.state.UPGRADES, pipeline.state.VERSION, upgrade)
    monkeypatch.setattr(pipeline.state, "VERSION", pipeline.state.VERSION + 1)
    found = StreamState.load(path)
    assert found.seed == 12
    assert found.index == 42


@pytest.mark.parametrize("content", [b"", b"not a state", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(StateError) as caught:
        StreamState.load(tmp_path / "s")
    assert caught.value.code == "state-unreadable"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    full_state().save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(StateError, match="not a stream state"):
        StreamState.load(tmp_path / "s")


def test_safetensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(StateError, match="not a stream state"):
        StreamState.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("seed", "index", "code"), [(-1, 0, "state-seed"), (2**64, 0, "state-seed"), (0, -1, "state-index")]
)
def test_out_of_range(seed: int, index: int, code: str) -> None:
    with pytest.raises(StateError) as caught:
        StreamState(model_sha256=MODEL, seed=seed, index=index)
    assert caught.value.code == code
