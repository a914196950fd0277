"""Commands as jobs of a Ray cluster, through its job server: submit, follow, ask, stop.

A submitted command runs on the cluster, not here: this machine may be switched off. The cluster's nodes need what
Upriver depends on; the code of Upriver itself travels with the job, so that driver, actors and this machine agree.
Secrets do not travel: an environment that is sent along can be read by everybody who sees the cluster's dashboard.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from infra.errors import ClusterError
from infra.own_code import code_environment
from infra.urls import redact_url

STOP_GRACE_S = 60  # between asking a job to stop and killing it; Ray's own choice is 3
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# What differs between machines and is no secret. Keys come from the nodes: a role, a mounted file, their environment.
TRAVELS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True, slots=True)
class JobInfo:
    """What the cluster says of a job: `state` is Ray's word, `exit_code` the command's once it has ended.

    `metadata` is what it was submitted with; the times are in seconds since 1970.
    """

    job_id: str
    state: str
    exit_code: int | None
    command: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    started_s: float | None = None
    ended_s: float | None = None


class JobServer:
    """The job server of one cluster.

    Args:
        address: `http://host:8265`; None takes `RAY_API_SERVER_ADDRESS`, or a cluster that runs on this machine.

    Raises:
        ClusterError: nobody answers there, or a token is missing or wrong.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise ClusterError(
                f"{redact_url(self.address)} is no address of a job server.",
                code="ray-address",
                remedy="Give the dashboard's address, http://host:8265, by --address or RAY_API_SERVER_ADDRESS.",
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with _translated(self.address):
            from ray.job_submission import JobSubmissionClient

            for name in _TALKATIVE:
                logging.getLogger(name).setLevel(logging.ERROR)
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Start `command` on the cluster with this process's code, and return the job's id.

        Args:
            environment: variables for the command; visible to everybody who sees the dashboard.
            metadata: shown beside the job.
        """
        variables = {name: os.environ[name] for name in TRAVELS if name in os.environ}
        variables |= {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), "PYTHONUNBUFFERED": "1", **(environment or {})}
        with _translated(self.address):
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"upriver-{uuid.uuid4().hex[:12]}",
                    runtime_env={**code_environment(), "env_vars": variables},
                    metadata=dict(metadata or {}),
                )
            )

    def info(self, job_id: str) -> JobInfo:
        """Return what the cluster knows of a job."""
        with _translated(self.address, job_id):
            found = self._client.get_job_info(job_id)
        return _job_info(job_id, found)

    def jobs(self) -> list[JobInfo]:
        """Return all jobs that were submitted and that the cluster remembers, the latest first."""
        with _translated(self.address):
            found = self._client.list_jobs()
        told = [_job_info(one.submission_id, one) for one in found if one.submission_id]
        return sorted(told, key=lambda job: job.started_s or 0.0, reverse=True)

    def follow(self, job_id: str, write: Callable[[str], object]) -> JobInfo:
        """Hand on what the job prints until it ends, and return how it ended."""

        async def pass_on() -> None:
            async for text in self._client.tail_job_logs(job_id):
                write(text)

        with _translated(self.address, job_id):
            asyncio.run(pass_on())
        return self.info(job_id)

    def output(self, job_id: str) -> str:
        """Return what the job has printed so far."""
        with _translated(self.address, job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop, as a signal would; it saves its state and may be submitted again. False: it had ended."""
        with _translated(self.address, job_id):
            return bool(self._client.stop_job(job_id))


def _job_info(job_id: str, found: Any) -> JobInfo:
    return JobInfo(
        job_id=job_id,
        state=str(found.status.value),
        exit_code=found.driver_exit_code,
        command=found.entrypoint or "",
        metadata=dict(found.metadata or {}),
        started_s=found.start_time / 1000 if found.start_time else None,
        ended_s=found.end_time / 1000 if found.end_time else None,
    )


def runs_in_a_job() -> bool:
    """Whether this process was started by a job server, which has taken care of the code on the nodes."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def _translated(address: str, job_id: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, ClusterError):
            raise
        raise _explained(error, redact_url(address), job_id) from error


def _explained(error: Exception, address: str, job_id: str) -> ClusterError:
    kind, text = type(error).__name__, str(error)
    if kind == "AuthenticationError":
        return ClusterError(
            f"The job server at {address} wants a token, or does not know the one that was sent.",
            code="ray-token",
            remedy="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's.",
        )
    if isinstance(error, OSError):  # requests' errors are among them
        return ClusterError(
            f"No job server answers at {address}.",
            code="ray-unavailable",
            remedy="Give the dashboard's address, http://host:8265, by --address or RAY_API_SERVER_ADDRESS.",
        )
    if job_id and ("does not exist" in text or "status code 404" in text):
        return ClusterError(
            f"The cluster at {address} knows no job {job_id}.",
            code="ray-job-unknown",
            remedy="Check the id that `upriver submit` printed, and the cluster.",
        )
    if "No available agent" in text:
        return ClusterError(
            f"The cluster at {address} cannot start jobs yet.",
            code="ray-starting",
            remedy="Try again in a minute; if it lasts, look for dashboard_agent.log on its head.",
        )
    first = text.strip().splitlines()[0] if text.strip() else kind
    return ClusterError(
        f"The job server at {address} refused: {first}.", code="ray-refused", remedy="Look at the cluster's dashboard."
    )


def python_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `upriver` with `arguments` on a node, by the `python` that is found first there."""
    return ["python", "-m", "jobs.cli", *arguments]
