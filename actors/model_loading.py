"""Models as live streams use them, loaded by name with the settings of an engine. Knows no Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from actors.live_engine import LiveEngine


class EngineConfig(BaseModel):
    """How models are loaded, as the settings of the same names say."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    flow: str = "auto"
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads of a step; 0: all cores")
    largest_batch: int = Field(
        default=0, ge=0, le=64, description="streams stepped together at most; 0: 8 on a GPU, 1 on a CPU, as measured"
    )


def load_engine(source: str, options: EngineConfig, *, max_pixels: int, name: str | None = None) -> LiveEngine:
    """Return the model with this name, folder, hub id or s3:// place. Takes seconds: call it off the event loop.

    Args:
        max_pixels: of the largest frame that it will be given.
        name: by which clients ask for it; None: `source`.

    Raises:
        CheckpointError, FlowError, BackendError, StorageError: it is not there, or not as it should be.
    """
    import torch

    from actors.hardware import choose_device, choose_formats, usable_cores
    from actors.live_engine import LiveEngine
    from infra.model_cache import local_model
    from pipeline.backends import choose_backend
    from pipeline.engine import open_engine

    device = choose_device(options.device)
    backend = choose_backend(options.backend, device)
    threads = options.threads or usable_cores()
    torch.set_num_threads(threads)
    pipe = open_engine(
        local_model(source),
        torch_dtype=choose_formats(options.dtype, device, backend),
        device=device,
        flow=None if options.flow == "auto" else options.flow,  # type: ignore[arg-type]  # checked when loaded
        max_pixels=max_pixels,
        backend=backend,
    )
    pipe.warm_up()
    largest_batch = options.largest_batch or (1 if device == "cpu" else 8)
    return LiveEngine(pipe, name or source, largest_batch=largest_batch, threads=threads)
