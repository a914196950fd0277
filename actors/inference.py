"""One inference request, whatever its transport: checked, restored by a stream of its own or of its sequence, counted.

Knows no transport and not the `kserve` package.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from actors.fetched_video import fetch_clip
from actors.inference_statistics import InferenceStatistics
from actors.oip import (
    VERSION,
    Clip,
    ClipLimits,
    Tensor,
    bad,
    clip_of,
    outputs_of,
    require_json_fits,
    require_outputs,
    require_result_fits,
)
from actors.oip_parameters import CallParameters
from actors.predictor_backend import Backend, Caller, LiveService, require_model
from actors.sequences import (
    DeadlineExceeded,
    Restored,
    SequenceKey,
    SequenceLimits,
    Sequences,
    finish,
    look_at,
    restore,
)
from infra.errors import NetworkError
from infra.protocol import Hello, output_size
from infra.refusals import AdmissionRefused, Forbidden, Refusal, ServiceFailure

if TYPE_CHECKING:
    from infra.predictor_settings import PredictorSettings

logger = logging.getLogger(__name__)

_RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked for.

    Attributes:
        transport: `rest` or `grpc`, for the figures.
        outputs: names of those that are wanted; none: all.
        frame_as_json: the restored frames are to be written as numbers.
    """

    model: str
    version: str
    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[str] = ()
    frame_as_json: bool = False
    transport: str = "rest"


@dataclass(frozen=True, slots=True)
class Result:
    """The answer."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, str]
    outputs: Sequence[Tensor]


class Inference:
    """See the module. Lives in one event loop.

    Attributes:
        sequences, statistics, backend: what it works with.
        draining: readiness is denied and no sequence is started; what is under way, and single requests, go on.
    """

    def __init__(self, settings: PredictorSettings, backend: Backend) -> None:
        self.settings, self.backend = settings, backend
        self.limits = ClipLimits(settings.max_frames, settings.max_result_bytes)
        self.sequences = Sequences(
            SequenceLimits(settings.sequences, settings.sequence_queue, settings.sequence_idle_s)
        )
        self.statistics = InferenceStatistics()
        self.under_way = 0
        self.draining = False
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin: models are loaded and have made a step when it returns."""
        await self.backend.start()
        self.sequences.start()

    async def drain(self, seconds: float) -> None:
        """Deny readiness, start no sequence, and wait until no request is under way and no sequence open, or so long.

        Single requests are answered all the while: a load balancer takes a moment to look elsewhere.
        """
        self.draining = self.sequences.draining = True
        over = time.monotonic() + seconds
        while (self.under_way or len(self.sequences)) and time.monotonic() < over:
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the sequences that are left, after the requests that have their turn, and then the engine."""
        await self.sequences.stop()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self.backend.stop()

    async def is_ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether requests, for this model if one is named, would be served now.

        Raises:
            BadMessage: there is no such model or version.
        """
        if model is not None:
            require_model(self.backend, model, version)
        return not self.draining and await self.backend.is_ready()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that are under way. Transports take it before they read what a caller sends.

        Raises:
            AdmissionRefused: there is none left.
        """
        if self.under_way >= self.settings.requests:
            raise AdmissionRefused(
                f"{self.under_way} requests are under way.",
                code="requests-full",
                limit=f"{self.settings.requests} requests",
                remedy="Try again, at another replica if there is one.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def infer(self, call: Call, caller: Caller) -> Result:
        """Restore what a request holds; its caller has been admitted, and it has a place.

        Raises:
            Refusal: for whatever reason; there is no other error but those of the program itself.
        """
        began_s = time.perf_counter()
        require_model(self.backend, call.model, call.version)
        try:
            parameters = CallParameters.read(call.parameters)
            require_outputs(call.outputs)
            restored, single = await self._restored(call, caller, parameters)
        except Refusal as refusal:
            self.statistics.count(call.model, call.transport, refusal.code, began_s)
            raise
        except Exception as error:
            self.statistics.count(call.model, call.transport, "internal", began_s)
            logger.exception("a request failed")
            raise ServiceFailure("The request failed.", code="internal", remedy="Try again.") from error
        headers = [answer.header for answer in restored.answers]
        self.statistics.count(call.model, call.transport, "ok", began_s, headers)
        return self._result(call, parameters, restored, single)

    async def _restored(self, call: Call, caller: Caller, parameters: CallParameters) -> tuple[Restored, bool]:
        clip = clip_of(call.inputs, self.limits)
        if isinstance(clip, str):
            if parameters.sequence_id:
                raise bad("A video is restored as a whole.", "Leave out sequence_id.", code="video-in-sequence")
            clip = await self._fetched(clip)
        if not len(clip):
            if not (parameters.sequence_id and parameters.sequence_end and not parameters.sequence_start):
                raise bad("The request has no input.", "Send frame or video_uri.")
            hello = None
        else:
            hello = parameters.hello(clip, call.model, caller.credentials)
            result_sizes = [output_size(hello, *size) for size in clip.sizes]
            require_result_fits(clip, result_sizes, self.limits)
            if call.frame_as_json:
                require_json_fits(hello.codec_out, result_sizes)
        if parameters.sequence_id:
            key = SequenceKey(caller.digest, call.model, parameters.sequence_id)
            restored = await self.sequences.run(
                key, clip, parameters, hello, lambda first: self.backend.open_stream(caller, first)
            )
        else:
            assert hello is not None
            restored = await self._alone(clip, parameters, hello, caller)
        return restored, clip.single

    async def _fetched(self, address: str) -> Clip:
        policy = self.settings.fetch
        if policy is None:
            raise Forbidden(
                "Videos are not fetched here.",
                code="video-uri-off",
                remedy="Send frames, or ask the operator for the setting fetch of the predictor.",
            )
        try:
            return await asyncio.to_thread(
                fetch_clip, address, policy, limits=self.limits, limit_bytes=self.settings.fetch_bytes
            )
        except NetworkError as error:
            raise bad(error.message, error.remedy, code=error.code) from None

    async def _alone(self, clip: Clip, parameters: CallParameters, hello: Hello, caller: Caller) -> Restored:
        """A stream for one request, which ends with it."""
        # A task, and not `asyncio.timeout`: opening a stream may swallow a cancellation that comes just as it is open.
        working = asyncio.create_task(self._by_itself(clip, parameters, hello, caller))
        working.add_done_callback(look_at)
        try:
            await asyncio.wait([working], timeout=parameters.timeout_s)
            if working.done():
                return working.result()
        finally:
            working.cancel()
        raise DeadlineExceeded(
            f"The answer did not come within {parameters.timeout_s:g} s.",
            remedy="Send it again, or give it more time.",
        )

    async def _by_itself(self, clip: Clip, parameters: CallParameters, hello: Hello, caller: Caller) -> Restored:
        stream = self.backend.open_stream(caller, hello)
        await stream.__aenter__()
        try:
            return await restore(stream, hello, clip, cut=parameters.cut)
        finally:  # the answer does not wait for the end
            closing = asyncio.create_task(finish(stream))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _result(self, call: Call, parameters: CallParameters, restored: Restored, single: bool) -> Result:
        about = {"model_sha256": restored.model_sha256}
        if isinstance(self.backend, LiveService):
            self.backend.learn(call.model, restored.model_sha256)
        if parameters.sequence_id:
            about["sequence_id"] = parameters.sequence_id
        tensors = outputs_of(restored.answers, restored.hello, single=single)
        wanted = [tensor for tensor in tensors if not call.outputs or tensor.name in call.outputs]
        return Result(call.model, VERSION, call.id, about, wanted)

    async def metrics(self) -> bytes:
        """Return the metrics of the predictor and of its engine, as Prometheus text."""
        own = self.statistics.page(
            sequences=len(self.sequences), under_way=self.under_way, ended=dict(self.sequences.ended)
        )
        return await self.backend.metrics() + own
