"""The stand-in takes the time it says and keeps to the contract of the engine whose place it takes."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.engine import StandIn, open_engine
from pipeline.errors import CheckpointError, InputError, StateError
from pipeline.model_source import is_stand_in
from pipeline.state import StreamState


def test_it_repeats_pixels_and_advances_states_in_the_time_it_was_told() -> None:
    engine = open_engine("stand-in:60", torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=10**6)
    frames_B3HW = torch.rand(2, 3, 5, 7)
    states = [engine.start(seed=1), engine.start(seed=2, index=9)]
    began = time.perf_counter()
    output_B3HW = engine.step(frames_B3HW, states, steps=[None, None])
    assert 0.06 <= time.perf_counter() - began < 0.5
    assert output_B3HW.shape == (2, 3, 20, 28) and torch.equal(output_B3HW[:, :, ::4, 3::4], frames_B3HW)
    assert [state.index for state in states] == [1, 10] and not states[0].is_first


def test_names_that_are_none_and_states_of_others_are_refused() -> None:
    for name in ("stand-in:", "stand-in:fast", "stand-in:-1", "stand-in:1e9", "stand-in:600001"):
        assert is_stand_in(name)
        with pytest.raises(CheckpointError, match="stand-in"):
            StandIn(name)
    assert not is_stand_in("tiny") and StandIn("stand-in:1").model_sha256 == StandIn("stand-in:2.5").model_sha256
    with pytest.raises(StateError, match="belongs to the model"):
        StandIn("stand-in:0").step(torch.zeros(1, 3, 4, 4), [StreamState(model_sha256="other")])
    with pytest.raises(InputError, match="1 frames and 0 states"):
        StandIn("stand-in:0").step(torch.zeros(1, 3, 4, 4), [])
