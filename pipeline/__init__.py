"""One stream, no cluster: causal diffusion video super-resolution as a library.

    from pipeline import StreamDiffVSRPipeline

    pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
    for restored in pipe(frames):
        ...

The names below are the stable public API. They are imported when they are first used: loading this package loads
neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.errors import (
        CheckpointError,
        FlowError,
        InputError,
        PipelineError,
        ScheduleError,
        SizeError,
        StateError,
    )
    from pipeline.flow import FlowEstimator, make_flow
    from pipeline.options import Guidance, ModelOptions
    from pipeline.state import StreamState
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

_HOME = {
    "CheckpointError": "pipeline.errors",
    "FlowError": "pipeline.errors",
    "InputError": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "ScheduleError": "pipeline.errors",
    "SizeError": "pipeline.errors",
    "StateError": "pipeline.errors",
    "FlowEstimator": "pipeline.flow",
    "make_flow": "pipeline.flow",
    "Guidance": "pipeline.options",
    "ModelOptions": "pipeline.options",
    "StreamState": "pipeline.state",
    "StreamDiffVSRPipeline": "pipeline.stream_diffvsr",
}

__all__ = [
    "CheckpointError",
    "FlowError",
    "FlowEstimator",
    "Guidance",
    "InputError",
    "ModelOptions",
    "PipelineError",
    "ScheduleError",
    "SizeError",
    "StateError",
    "StreamDiffVSRPipeline",
    "StreamState",
    "make_flow",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
