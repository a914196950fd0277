"""Pictures to tensors and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.frames import frame_to_tensor, tensor_to_frame


def levels(dtype: type[np.integer]) -> np.ndarray:
    """Every 8-bit level, or as many 16-bit ones, the extremes among them; more rows than one band has."""
    found = np.linspace(0, np.iinfo(dtype).max, 256).round().astype(dtype)
    return np.ascontiguousarray(np.random.default_rng(0).permuted(np.tile(found, 75)).reshape(80, 80, 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_levels_come_back_as_they_were(dtype: type[np.integer]) -> None:
    frame = levels(dtype)
    tensor = frame_to_tensor(frame)
    assert tensor.shape == (1, 3, 80, 80) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    back = tensor_to_frame(tensor[0], np.dtype(dtype))
    assert back.dtype == dtype and np.array_equal(back, frame)


def test_what_lies_outside_is_clamped_and_halves_go_to_even() -> None:
    values = torch.tensor([-7.0, 7.0, (0.5 / 255) * 2 - 1]).view(3, 1, 1)
    assert tensor_to_frame(values, np.dtype(np.uint8)).tolist() == [[[0, 255, 0]]]


def test_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="float32"):
        frame_to_tensor(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_frames_travel_to_a_gpu_and_back(dtype: type[np.integer]) -> None:
    frame = levels(dtype)
    there = frame_to_tensor(frame, torch.device("cuda"))
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), frame_to_tensor(frame), rtol=0, atol=1e-6)
    back = tensor_to_frame(there[0], np.dtype(dtype))
    assert back.dtype == dtype and np.array_equal(back, frame)
