"""Rows that share the batches of one model."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from actors.errors import FailureClass, TilesFixed, failure_class
from actors.step_batch import StepBatch
from pipeline import StreamDiffVSRPipeline
from pipeline.frames import frame_to_tensor
from tests.moving_texture import make_clip
from tests.random_model import save_random_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained(save_random_model(tmp_path_factory.mktemp("model") / "random"))


def restore(step: Callable[..., torch.Tensor], pipe: StreamDiffVSRPipeline, clip: Any, seed: int) -> torch.Tensor:
    state = pipe.start(seed=seed)
    return torch.cat([step(frame_to_tensor(frame), state, 1) for frame in clip])


def together(batch: StepBatch, pipe: StreamDiffVSRPipeline, clips: list[Any]) -> list[torch.Tensor]:
    """Restore each clip in a thread of its own."""
    outputs: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []
    ready = threading.Barrier(len(clips))

    def work(number: int) -> None:
        try:
            with batch.row():
                ready.wait()
                outputs[number] = restore(batch.step, pipe, clips[number], seed=number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(clips))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [outputs[number] for number in range(len(clips))]


def alone(pipe: StreamDiffVSRPipeline, clip: Any, seed: int) -> torch.Tensor:
    return restore(lambda frame, state, steps: pipe.step(frame, [state], steps=steps), pipe, clip, seed)


def test_rows_share_batches_and_their_results_are_equivalent(pipe: StreamDiffVSRPipeline) -> None:
    clips = [make_clip(count, 32, 48) for count in (6, 6, 4)]
    batch = StepBatch(pipe, largest=3, patience_s=30.0)
    for number, found in enumerate(together(batch, pipe, clips)):
        expected = alone(pipe, clips[number], seed=number)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
    # As long as all three go on each batch has three streams; nobody waits for one that is over.
    assert batch.sizes == {3: 4, 2: 2}


def test_frames_of_other_sizes_go_by_themselves(pipe: StreamDiffVSRPipeline) -> None:
    clips = [make_clip(3, 32, 48), make_clip(3, 24, 32)]
    batch = StepBatch(pipe, largest=2, patience_s=0.01)
    for number, found in enumerate(together(batch, pipe, clips)):
        assert torch.equal(found, alone(pipe, clips[number], seed=number))
    assert batch.sizes == {1: 6}


def test_one_slot_waits_for_nobody(pipe: StreamDiffVSRPipeline) -> None:
    clip = make_clip(2, 32, 48)
    batch = StepBatch(pipe, largest=1, patience_s=1000.0)
    with batch.row():
        assert torch.equal(restore(batch.step, pipe, clip, 0), alone(pipe, clip, 0))


def test_a_batch_that_does_not_fit_is_halved(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step = pipe.step

    def small(frames_B3HW: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if len(frames_B3HW) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(frames_B3HW, *rest, **named)

    monkeypatch.setattr(pipe, "step", small)
    clips = [make_clip(3, 32, 48) for _ in range(4)]
    batch = StepBatch(pipe, largest=4, patience_s=5.0)
    together(batch, pipe, clips)
    assert max(batch.sizes) == 2 and sum(size * count for size, count in batch.sizes.items()) == 12


def test_a_frame_that_does_not_fit_is_tried_in_smaller_tiles(
    pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, halved = pipe.step, []

    def small(*given: Any, **named: Any) -> torch.Tensor:
        if len(halved) < 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*given, **named)

    monkeypatch.setattr(pipe, "step", small)
    monkeypatch.setattr(pipe, "halve_tiles", lambda: halved.append(1) or len(halved) < 3)
    batch = StepBatch(pipe, largest=1)
    assert batch.step(torch.zeros(1, 3, 16, 16), pipe.start(), 1).shape == (1, 3, 64, 64)
    monkeypatch.setattr(pipe, "halve_tiles", lambda: False)
    halved.clear()
    with pytest.raises(torch.OutOfMemoryError):
        batch.step(torch.zeros(1, 3, 16, 16), pipe.start(), 1)


def test_an_exact_run_does_not_change_its_tiles(pipe: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tried = pipe.step, []

    def small(*given: Any, **named: Any) -> torch.Tensor:
        tried.append(1)
        if len(tried) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*given, **named)

    monkeypatch.setattr(pipe, "step", small)
    batch, state = StepBatch(pipe, largest=1, fixed_tiles=True), pipe.start()
    batch.step(torch.zeros(1, 3, 64, 64), state, 1)
    before = pipe.tiling
    with pytest.raises(TilesFixed) as caught:
        batch.step(torch.zeros(1, 3, 64, 64), state, 1)
    assert len(tried) == 2 and pipe.tiling == before and state.index == 1
    assert failure_class(caught.value) is FailureClass.OUT_OF_MEMORY and "--memory-gb" in caught.value.remedy


def test_an_error_reaches_every_row_of_the_batch(pipe: StreamDiffVSRPipeline) -> None:
    batch = StepBatch(pipe, largest=2)
    wrong = torch.zeros(1, 3, 8, 8)  # too small
    with batch.row(), pytest.raises(Exception, match="too small"):
        batch.step(wrong, pipe.start(), 1)
    assert batch.step(torch.zeros(1, 3, 16, 16), pipe.start(), 1).shape == (1, 3, 64, 64)


def test_what_a_stand_in_needs_imports_no_diffusers() -> None:
    """It takes seconds, in which a replica that just took streams over would answer nobody."""
    script = (
        "import sys\nimport actors.live_server, actors.live_engine, actors.restoration\n"
        "from actors.model_loading import EngineConfig, load_engine\n"
        "load_engine('stand-in:5', EngineConfig(backend='eager'), max_pixels=10**6)\n"
        "print('diffusers' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
