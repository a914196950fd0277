"""A place in a replica's model for work that is no live stream: an uploaded video steps between the batches of streams.

One frame at a time goes to the thread that owns the device, behind what waits there: so an upload takes at most every
second turn, and a live stream waits for one step of it at most.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from infra.refusals import AdmissionRefused

if TYPE_CHECKING:
    from torch import Tensor

    from actors.live_engine import LiveEngine
    from actors.live_server import LiveServer
    from pipeline.state import StreamState


class EngineLease:
    """`actors.upload.StepLease` on an engine. Made in the server's event loop, called from elsewhere."""

    def __init__(self, server: LiveServer, engine: LiveEngine) -> None:
        self._server, self._engine = server, engine
        self._loop = asyncio.get_running_loop()

    def start(self, seed: int) -> StreamState:
        """Return the state of a new stream."""
        return self._engine.pipe.start(seed=seed)

    def step(self, frame_13HW: Tensor, state: StreamState, steps: int | None) -> Tensor:
        """Return the restored frame (1,3,4h,4w).

        Raises:
            AdmissionRefused: the replica goes away; an upload cannot go on elsewhere.
            PipelineError: as the engine's step.
        """
        if self._server.draining:
            raise AdmissionRefused(
                "This replica is going away.", code="draining", remedy="Send the video again.", retry_after_s=1.0
            )
        outcome: list[Tensor] = []

        def work() -> None:
            outcome.append(self._engine.pipe.step(frame_13HW, [state], steps=steps))

        asyncio.run_coroutine_threadsafe(self._server.stepper.in_thread(work), self._loop).result()
        return outcome[0]

    def close(self) -> None:
        """Nothing is held between steps."""
