"""`/v1/jobs`: archive jobs asked for over the network: start one, look at it, list one's own, stop it.

A job is `upriver restore` on the cluster, submitted through Ray's job server. Each belongs to the tenant that asked for
it, and does not exist for others. Nothing is kept here: Ray remembers the jobs, the destination how far they are.
"""

# No postponed annotations here: FastAPI evaluates them, and cannot see what is local to `make_router`.
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from actors.refusing_route import RESPONSES, RefusingRoute
from infra.errors import ClusterError, StorageError
from infra.job_records import read_standing
from infra.ray_jobs import ENDED, JobInfo, JobServer
from infra.refusals import RateExceeded, Refusal
from infra.restore_job import JobOptions, JobRules
from infra.settings import load_settings

_TENANT: Final = "tenant"  # in the metadata of a job
_JOB_ID: Final = re.compile(r"upriver-[0-9a-f]{12}", re.ASCII)
_RETRY_AFTER_S: Final = 60.0
_LISTED: Final = 200


class JobUnknown(Refusal):
    """There is no such job, or it is another tenant's."""

    http_status = 404
    default_code = "job-unknown"


class NamedTenant(Protocol):
    """Who asks."""

    @property
    def name(self) -> str:
        """The name that jobs belong to."""


class JobsSettings(BaseModel):
    """Where jobs run, and what may be asked for.

    Attributes:
        job_server: ``http://host:8265``; None: as `infra.ray_jobs.JobServer` finds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_server: str | None = None
    rules: JobRules = JobRules()


class JobRequest(BaseModel):
    """What is to be restored, and where the result goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="a video, or a folder or prefix of videos", examples=["s3://tapes/in/reel-7.mov"])
    destination: str = Field(description="a file, or a folder or prefix", examples=["s3://tapes/out/reel-7.mp4"])
    options: JobOptions = JobOptions()


class JobProgress(BaseModel):
    """How far a job is by its own last report; frames are of the whole job, None before the first were counted."""

    phase: str
    updated_at: str | None
    videos_total: int
    videos_done: int
    videos_failed: int
    frames_total: int | None
    frames_done: int | None


class Job(BaseModel):
    """A job. `state` is one of pending, running, stopped, succeeded, failed; `exit_code` that of `upriver restore`."""

    job_id: str
    state: str
    ended: bool
    exit_code: int | None
    source: str
    destination: str
    started_at: str | None
    ended_at: str | None
    progress: JobProgress | None = None


class JobList(BaseModel):
    """A tenant's jobs, the latest first."""

    jobs: list[Job]


def make_router(
    tenant_dependency: Callable[..., Any],
    settings: JobsSettings,
    *,
    most_jobs: Callable[[str], int] | None = None,
) -> APIRouter:
    """Return the four routes.

    Args:
        tenant_dependency: FastAPI's, gives the tenant (something with a `name`) or raises a `Refusal`.
        most_jobs: of a tenant, by its name, that have not ended; None: as the rules say, for all the same.
    """
    router = APIRouter(route_class=RefusingRoute, prefix="/v1/jobs", tags=["jobs"], responses=RESPONSES)
    tenants_jobs = _TenantsJobs(settings, most_jobs or (lambda _: settings.rules.jobs_per_tenant))

    # Not `async`: these wait for the job server and for storage, so FastAPI gives them a thread.

    @router.post("", status_code=202, summary="Start a job")
    def start(request: JobRequest, tenant: Annotated[NamedTenant, Depends(tenant_dependency)]) -> Job:
        return tenants_jobs.start(tenant.name, request)

    @router.get("", summary="List the tenant's jobs")
    def list_jobs(tenant: Annotated[NamedTenant, Depends(tenant_dependency)]) -> JobList:
        return JobList(jobs=[_job(info) for info in tenants_jobs.of(tenant.name)[:_LISTED]])

    @router.get("/{job_id}", summary="How far a job is")
    def look(job_id: str, tenant: Annotated[NamedTenant, Depends(tenant_dependency)]) -> Job:
        return _with_progress(_job(tenants_jobs.one(tenant.name, job_id)))

    @router.delete("/{job_id}", status_code=202, summary="Stop a job; asked for again, it goes on where it was")
    def stop(job_id: str, tenant: Annotated[NamedTenant, Depends(tenant_dependency)]) -> Job:
        return _job(tenants_jobs.stop(tenant.name, job_id))

    return router


class _TenantsJobs:
    """The jobs of a cluster, tenant by tenant. The only way to a job goes through its tenant."""

    def __init__(self, settings: JobsSettings, most_jobs: Callable[[str], int]) -> None:
        self._settings, self._most_jobs = settings, most_jobs
        self._server: JobServer | None = None
        self._starting = threading.Lock()  # counting and starting are one act

    def start(self, tenant: str, request: JobRequest) -> Job:
        rules = self._settings.rules
        command = rules.command(tenant, request.source, request.destination, request.options)
        environment = load_settings().environment()
        metadata = {_TENANT: tenant, "source": request.source, "destination": request.destination}
        with self._starting:
            open_jobs = sum(info.state not in ENDED for info in self.of(tenant))
            most = self._most_jobs(tenant)
            if open_jobs >= most:
                raise RateExceeded(
                    f"{open_jobs} jobs have not ended yet.",
                    code="jobs-full",
                    limit=f"{most} jobs",
                    remedy="Wait for one to end, or stop one.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            server = self._connect()
            return _job(server.info(server.submit(command, environment=environment, metadata=metadata)))

    def of(self, tenant: str) -> list[JobInfo]:
        return [info for info in self._connect().jobs() if info.metadata.get(_TENANT) == tenant]

    def one(self, tenant: str, job_id: str) -> JobInfo:
        unknown = JobUnknown("There is no such job.", remedy="GET /v1/jobs lists yours.")
        if not _JOB_ID.fullmatch(job_id):
            raise unknown
        try:
            info = self._connect().info(job_id)
        except ClusterError as error:
            if error.code == "ray-job-unknown":
                raise unknown from None
            raise
        if info.metadata.get(_TENANT) != tenant:
            raise unknown
        return info

    def stop(self, tenant: str, job_id: str) -> JobInfo:
        self.one(tenant, job_id)
        self._connect().stop(job_id)
        return self.one(tenant, job_id)

    def _connect(self) -> JobServer:
        if self._server is None:
            self._server = JobServer(self._settings.job_server)
        return self._server


def _job(info: JobInfo) -> Job:
    return Job(
        job_id=info.job_id,
        state=info.state.lower(),
        ended=info.state in ENDED,
        exit_code=info.exit_code,
        source=info.metadata.get("source", ""),
        destination=info.metadata.get("destination", ""),
        started_at=_stamp(info.started_s),
        ended_at=_stamp(info.ended_s),
    )


def _with_progress(job: Job) -> Job:
    try:
        standing = read_standing(job.source, job.destination)
    except StorageError:
        return job  # what the cluster says is worth telling all the same
    if standing is None:
        return job
    progress = JobProgress(
        phase=standing.state,
        updated_at=standing.updated_at,
        videos_total=standing.videos_total,
        videos_done=standing.videos_done,
        videos_failed=standing.videos_failed,
        frames_total=standing.frames_total,
        frames_done=standing.frames_done,
    )
    return job.model_copy(update={"progress": progress})


def _stamp(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
