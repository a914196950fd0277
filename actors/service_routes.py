"""The routes beside the streams: uploads, archive jobs, and who may ask for them."""

# No postponed annotations here: FastAPI evaluates them, and cannot see what is local to a function.
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request

from actors.jobs_api import JobsSettings
from actors.jobs_api import make_router as make_jobs_router
from actors.live_server import LiveServer
from actors.restore_api import make_router as make_restore_router
from actors.step_lease import EngineLease
from actors.upload import UploadOptions, UploadSettings
from infra.live_settings import LiveSettings
from infra.restore_job import JobRules
from infra.tenants import Scope, Tenant
from pipeline.video import VideoInfo

if TYPE_CHECKING:
    from actors.gate import SettingsGate


def tenant_with(get_gate: Callable[[], "SettingsGate"], scope: Scope | None) -> Callable[[Request], Awaitable[Tenant]]:
    """Return a FastAPI dependency: the tenant of a request, whose credentials must be good for `scope`; None: any.

    It raises the refusals of `SettingsGate.tenant_of`.
    """

    async def tenant(request: Request) -> Tenant:
        return await get_gate().tenant_of(request.headers, request.client.host if request.client else None, scope)

    return tenant


def upload_settings(settings: LiveSettings) -> UploadSettings | None:
    """Return what the service's settings say of uploads; None: there are none."""
    if not settings.uploads:
        return None
    return UploadSettings(
        max_bytes=settings.limits.upload_bytes,
        max_pixels=settings.greatest_side**2,
        max_uploads=settings.uploads,
        spool_bytes=settings.spool_bytes,
        idle_s=settings.upload_idle_s,
    )


def jobs_settings(settings: LiveSettings) -> JobsSettings:
    """Return what the service's settings say of archive jobs."""
    rules = JobRules(
        sources=settings.job_sources,
        destinations=settings.job_destinations,
        models=settings.models,
        jobs_per_tenant=max(1, settings.limits.jobs),
    )
    return JobsSettings(rules=rules)


def add_service_routes(
    app: FastAPI,
    get_server: Callable[[], LiveServer],
    get_gate: Callable[[], "SettingsGate"],
    *,
    uploads: UploadSettings | None,
    jobs: JobsSettings,
) -> None:
    """Add `/v1/restore` and `/v1/jobs`.

    Args:
        get_server, get_gate: the replica's; asked at each request, because the application is made before them.
    """

    async def open_step(tenant: Any, options: UploadOptions, video: VideoInfo) -> EngineLease:
        server = get_server()
        get_gate().accounts.check_frame(tenant, video.width, video.height)
        return EngineLease(server, server.engine_named(options.model))

    restore_tenant = tenant_with(get_gate, Scope.RESTORE)
    if uploads is not None:
        app.include_router(
            make_restore_router(
                restore_tenant,
                open_step,
                uploads,
                most_bytes=lambda tenant: get_gate().accounts.limits(tenant).upload_bytes,
                take_place=lambda tenant: get_gate().accounts.open_job(tenant),
            )
        )
    jobs_tenant = tenant_with(get_gate, Scope.JOBS)
    app.include_router(
        make_jobs_router(jobs_tenant, jobs, most_jobs=lambda name: get_gate().settings.limits_of(name).jobs)
    )
