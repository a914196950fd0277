"""Nothing in a step makes the processor wait for a GPU: rehearsed on the device "meta", whose tensors have no data.

It refuses what depends on values, and every operation that moves data between it and the processor is seen. So no GPU
and no CUDA build of torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import StreamDiffVSRPipeline
from pipeline.cuda_backend import CapturingBackend
from pipeline.flow import NetFlow, ZeroFlow

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class Crossings(TorchDispatchMode):
    """Lists the operations in which tensors of both devices take part.

    A list of numbers as an index is copied to the device unseen, so every index counts; so does `torch.tensor`, which
    copies likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if devices == {"cpu", "meta"} or func in _INDEXING:
            self.seen.append(str(func))
        return out


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.fixture(scope="module")
def elsewhere(parity_folder: Path) -> StreamDiffVSRPipeline:
    """The recorded checkpoint, with attention, on a device of its own and with the backend of GPUs."""
    pipe = StreamDiffVSRPipeline.from_pretrained(parity_folder, flow=ZeroFlow())
    assert pipe.model_sha256
    pipe.to("meta")
    pipe._backend = CapturingBackend(pipe)
    return pipe


@pytest.mark.parametrize(
    ("flow", "batch"),
    [
        pytest.param("zero", 1, marks=pytest.mark.slow),
        ("zero", 3),
        pytest.param("given", 1, marks=pytest.mark.slow),
        ("given", 3),
        ("net", 3),
    ],
)
def test_a_step_of_streams_alike_stays_on_the_device(
    elsewhere: StreamDiffVSRPipeline, batch: int, flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[object] = []
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **options: copies.append(data) or make(data, **options))
    monkeypatch.setattr(elsewhere, "flow", NetFlow().to("meta") if flow == "net" else ZeroFlow())
    states = [elsewhere.start(seed=seed) for seed in range(batch)]
    given = meta(batch, 2, 96, 128) if flow == "given" else None
    for moment in range(3):
        copies.clear()
        with Crossings() as crossings:
            output = elsewhere.step(meta(batch, 3, 24, 32), states, meta(batch, 4, 24, 32), given, steps=2)
        assert output.device.type == "meta"
        if moment > 1:  # tables are made with the first frame, and with the first that has a past
            assert not crossings.seen and not copies


@pytest.mark.parametrize(
    "cross",
    [
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.ones(4).to(x.device),
        lambda x: x[[0, 2]],
        lambda x: torch.empty_like(x, device="cpu").copy_(x),
    ],
)
def test_what_crosses_is_noticed(cross: Any) -> None:
    with Crossings() as crossings:
        try:
            cross(meta(4))
        except NotImplementedError:
            return
    assert crossings.seen


def test_what_depends_on_values_is_refused() -> None:
    for ask in (lambda: float(meta(4).sum()), lambda: meta(4)[meta(4) > 0], lambda: bool((meta(4) > 0).any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
