"""`POST /v1/restore`: a video in the request's body, the restored video in the answer, both at the same time.

Knows HTTP, and who may have how many uploads at a time; the video is `upload`'s matter, the model the caller's.
"""

# No postponed annotations here: FastAPI evaluates them, and cannot see what is local to `make_router`.
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Response

from actors.byte_pipe import BytePipe, Gone
from actors.duplex_response import Answer, DuplexResponse
from actors.refusing_route import RESPONSES, RefusingRoute
from actors.thread_call import ThreadCall
from actors.upload import RestoreUpload, StepLease, UploadOptions, UploadSettings
from infra.refusals import AdmissionRefused
from pipeline.video import VideoInfo

INPUT_HEADER: Final = "Upriver-Input"
SIZE_HEADER: Final = "Upriver-Size"
LEFT_OUT_HEADER: Final = "Upriver-Left-Out"
_RETRY_AFTER_S: Final = 10.0
_LONGEST_HEADER: Final = 1000

OpenStep = Callable[[Any, UploadOptions, VideoInfo], Awaitable[StepLease]]
"""(tenant, options, video) -> its place in the model. Raises a `Refusal`: no such model, no capacity, ..."""

_DESCRIPTION: Final = """
The answer begins before the upload has ended where the container allows it: MPEG-TS, Matroska, WebM, FLV, fragmented
MP4, and MP4 with its index in front. Others are stored first. `Upriver-Input` says which: `streamed` or `spooled`.
`Upriver-Size` is the size of the result, `Upriver-Left-Out` names streams that it does not have. The result is a
fragmented MP4 with time stamps and sound as sent. Its last box (`uuid` 6f1d3f0c-6f0e-4c5a-9b0a-5d1c6a2f8e47) holds
JSON that tells of damage in the upload. If the restoration fails after it began, the body ends without its last chunk.
"""


def make_router(
    tenant_dependency: Callable[..., Any],
    open_step: OpenStep,
    settings: UploadSettings,
    *,
    most_bytes: Callable[[Any], int] | None = None,
    take_place: Callable[[Any], AbstractContextManager[object]] = lambda tenant: nullcontext(),
) -> APIRouter:
    """Return the route.

    Args:
        tenant_dependency: FastAPI's, gives the tenant or raises a `Refusal`; what it gives is passed to `open_step`.
        open_step: lends a place in the model to an upload that was looked at and accepted.
        most_bytes: of an upload of a tenant; None: as the settings say, for all the same.
        take_place: counts an upload of a tenant until it is left; raises a `Refusal` if that would be too many.
    """
    router = APIRouter(route_class=RefusingRoute, tags=["restore"])
    places = UploadPlaces(settings.max_uploads)

    @asynccontextmanager
    async def restored(body: BytePipe, tenant: Any, options: UploadOptions) -> AsyncIterator[Answer]:
        with take_place(tenant):
            async with _restored(body, tenant, options, open_step, settings, places) as answer:
                yield answer

    @router.post(
        "/v1/restore",
        summary="Restore an uploaded video",
        description=_DESCRIPTION,
        response_class=Response,
        responses={
            200: {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}},
            **RESPONSES,
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def restore(
        options: Annotated[UploadOptions, Query()], tenant: Annotated[Any, Depends(tenant_dependency)]
    ) -> Response:
        return DuplexResponse(
            lambda body: restored(body, tenant, options),
            _pipe(settings),
            max_bytes=settings.max_bytes if most_bytes is None else most_bytes(tenant),
            idle_s=settings.idle_s,
        )

    return router


class UploadPlaces:
    """How many uploads there may be at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._tidying: set[asyncio.Task[None]] = set()

    def take(self) -> None:
        """Take a place.

        Raises:
            AdmissionRefused: there is none.
        """
        if self._taken >= self._limit:
            raise AdmissionRefused(
                f"{self._limit} uploads are being restored already.",
                code="uploads-full",
                limit=f"{self._limit} uploads",
                remedy="Try again later.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._taken += 1

    async def give_back(self, calls: Sequence[ThreadCall[Any]], lease: StepLease | None, upload: RestoreUpload) -> None:
        """Wait for the threads of an upload and release what they used; goes on if who waits is cancelled."""

        async def tidy() -> None:
            for call in calls:
                await call.ended()
            if lease is not None:
                lease.close()
            upload.close()
            self._taken -= 1

        task = asyncio.create_task(tidy())
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)
        await asyncio.shield(task)


def _pipe(settings: UploadSettings) -> BytePipe:
    return BytePipe(settings.buffer_bytes, spill_bytes=settings.spool_bytes, folder=settings.spool_folder)


@asynccontextmanager
async def _restored(
    body: BytePipe,
    tenant: object,
    options: UploadOptions,
    open_step: OpenStep,
    settings: UploadSettings,
    places: UploadPlaces,
) -> AsyncIterator[Answer]:
    places.take()
    upload = RestoreUpload(body, options, settings)
    out = _pipe(settings)
    calls: list[ThreadCall[None]] = []
    lease: StepLease | None = None
    try:
        calls.append(opening := ThreadCall(upload.open, "upload-open"))
        await opening
        lease = lent = await open_step(tenant, options, upload.info)
        calls.append(ThreadCall(lambda: upload.run(lent, out), "upload-run"))
        await out.filled()
        yield Answer(out.chunks(), headers=_headers(upload))
    finally:
        # However it was left: nobody waits for bytes any more, and so every thread ends.
        body.abort(Gone())
        out.abort(Gone())
        await places.give_back(calls, lease, upload)


def _headers(upload: RestoreUpload) -> dict[str, str]:
    headers = {
        "Content-Type": "video/mp4",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        INPUT_HEADER: "streamed" if upload.streamed else "spooled",
        SIZE_HEADER: f"{upload.width}x{upload.height}",
    }
    if upload.left_out:
        # Names and languages come from the upload: only what cannot end a header is kept of them.
        text = "; ".join(upload.left_out).encode("ascii", "replace").decode()
        headers[LEFT_OUT_HEADER] = "".join(one if one.isprintable() else "?" for one in text)[:_LONGEST_HEADER]
    return headers
