"""Jobs asked for over HTTP, on a real Ray with its job server and a real object store."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from fastapi import FastAPI, Header

from actors.jobs_api import JobsSettings, make_router
from infra.job_records import read_standing
from infra.refusals import Unauthorized
from infra.restore_job import JobRules
from infra.storage import storage_for
from tests.films import make_film
from tests.http_server import TIMEOUT_S, served
from tests.object_stores import SeaweedFS, free_ports
from tests.ray_cluster import RayCluster, ray_cluster
from tests.work_area import Job

MODEL = "stand-in:300"
JOB_TIMEOUT_S = 240.0


class Tenant(NamedTuple):
    name: str


def who(x_tenant: Annotated[str, Header()] = "") -> Tenant:
    if not x_tenant:
        raise Unauthorized("No credentials.", remedy="Give some.")
    return Tenant(x_tenant)


class Api:
    """The routes on a server, asked as one tenant or another."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(self, method: str, path: str = "", tenant: str = "ann", **body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        headers = {"X-Tenant": tenant} if tenant else {}
        content = json.dumps(body) if body else None
        connection.request(method, f"/v1/jobs{path}", content, headers | {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        connection.close()
        return answer.status, told


def api_on(job_server: str, rules: JobRules) -> Any:
    app = FastAPI()
    app.include_router(make_router(who, JobsSettings(job_server=job_server, rules=rules)))
    return served(app)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, seaweedfs: SeaweedFS) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("ray")
    with (
        ray_cluster(folder, cpus=2, job_server=True, **seaweedfs.environment()) as made,
        pytest.MonkeyPatch.context() as m,
    ):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            m.setenv(name, made.environment[name])
        yield made


@pytest.fixture
def api(cluster: RayCluster, s3_bucket: str) -> Iterator[Api]:
    rules = JobRules(
        sources=(s3_bucket,), destinations=(f"{s3_bucket}/{{tenant}}/",), models=(MODEL,), jobs_per_tenant=1
    )
    with api_on(cluster.job_server, rules) as port:
        yield Api(port)


def until(look: Callable[[], bool]) -> None:
    limit = time.monotonic() + JOB_TIMEOUT_S
    while not look():
        assert time.monotonic() < limit
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_from_the_request_to_its_result(api: Api, tmp_path: Path, s3_bucket: str) -> None:
    storage = storage_for(s3_bucket)
    storage.publish(make_film(tmp_path / "film.mp4", (30, 30)), f"{s3_bucket}/film.mp4")
    destination = f"{s3_bucket}/ann/film.mp4"
    status, job = api(
        "POST", source=f"{s3_bucket}/film.mp4", destination=destination, options={"model": MODEL, "scale": 2}
    )
    assert status == 202 and job["state"] in ("pending", "running") and not job["ended"], job
    path = f"/{job['job_id']}"
    # Another tenant has no such job, whatever it asks of it.
    for method in ("GET", "DELETE"):
        status, told = api(method, path, tenant="bob")
        assert (status, told["kind"], told["code"]) == (404, "JobUnknown", "job-unknown")
    assert api("GET", tenant="bob") == (200, {"jobs": []})
    # One at a time.
    status, told = api("POST", source=f"{s3_bucket}/film.mp4", destination=f"{s3_bucket}/ann/second.mp4")
    assert (status, told["kind"], told["code"]) == (429, "RateExceeded", "jobs-full") and told["retry_after_s"]
    seen = []

    def ended() -> bool:
        seen.append(api("GET", path)[1])
        return seen[-1]["ended"]

    until(ended)
    assert (seen[-1]["state"], seen[-1]["exit_code"]) == ("succeeded", 0), seen[-1]
    reports = [one["progress"] for one in seen if one["progress"] and one["progress"]["frames_total"]]
    assert reports and reports[-1]["frames_total"] == 60 and 0 < reports[-1]["frames_done"] <= 60
    assert storage.stat(destination) is not None
    status, listed = api("GET")
    assert [one["job_id"] for one in listed["jobs"]] == [job["job_id"]] and listed["jobs"][0][
        "destination"
    ] == destination


@pytest.mark.slow
def test_a_job_is_stopped_by_its_tenant(api: Api, tmp_path: Path, s3_bucket: str) -> None:
    storage_for(s3_bucket).publish(make_film(tmp_path / "film.mp4", (400,)), f"{s3_bucket}/film.mp4")
    places = {"source": f"{s3_bucket}/film.mp4", "destination": f"{s3_bucket}/cat/film.mp4"}
    status, job = api("POST", tenant="cat", **places, options={"model": MODEL})
    assert status == 202
    path = f"/{job['job_id']}"
    until(lambda: api("GET", path, tenant="cat")[1]["state"] == "running")
    assert api("DELETE", path, tenant="cat")[0] == 202
    until(lambda: api("GET", path, tenant="cat")[1]["ended"])
    assert api("GET", path, tenant="cat")[1]["state"] == "stopped"


@pytest.mark.slow
def test_refusals_have_one_shape(api: Api, s3_bucket: str) -> None:
    before = api("GET")
    places = {"source": f"{s3_bucket}/a", "destination": f"{s3_bucket}/ann/b"}
    cases = [
        (api("POST", tenant="", source="a", destination="b"), 401, "unauthorized"),
        (api("POST", source="--debug", destination=f"{s3_bucket}/ann/b"), 400, "job-place"),
        (api("POST", source=f"{s3_bucket}/a", destination=f"{s3_bucket}/bob/b"), 403, "job-destination"),
        (api("POST", source="s3://other/a", destination=f"{s3_bucket}/ann/b"), 403, "job-source"),
        (api("POST", source=f"{s3_bucket}/a"), 400, "bad-request"),
        (api("POST", **places, options={"config": "x"}), 400, "bad-request"),
        (api("POST", **places, options={"model": "tiny"}), 403, "job-model"),
        (api("GET", "/upriver-000000000000"), 404, "job-unknown"),
        (api("GET", "/raysubmit_x"), 404, "job-unknown"),
        (api("GET", "/upriver-000000000000%0a"), 404, "job-unknown"),
        (api("DELETE", "/upriver-..%3fx"), 404, "job-unknown"),
    ]
    for (status, told), expected, code in cases:
        assert (status, told.get("code")) == (expected, code), told
        assert told["type"] == "refused" and told["remedy"]
    assert api("GET") == before and before[0] == 200


def test_no_cluster_is_said_and_its_address_is_not() -> None:
    (nobody,) = free_ports(1)
    rules = JobRules(sources=("/films",), destinations=("/results",))
    with api_on(f"http://me:sesame@127.0.0.1:{nobody}", rules) as port:
        for status, told in (
            Api(port)("GET"),
            Api(port)("POST", source="/films/a.mov", destination="/results/a.mp4"),
        ):
            assert (status, told["kind"], told["code"]) == (503, "AdmissionRefused", "ray-unavailable")
            assert told["retry_after_s"] and str(nobody) not in str(told) and "sesame" not in str(told)


def test_how_far_a_job_is_comes_from_its_own_latest_report(tmp_path: Path) -> None:
    dst = str(tmp_path / "out")
    assert read_standing("tapes", dst) is None
    old = Job(dst, {"a.mp4": [10]}, job_id="aa", started_ago_s=900)
    old.write_job("finished")
    job = Job(dst, {"a.mp4": [10, 20], "b.mp4": [30]}, job_id="bb")
    job.write_job()
    standing = read_standing("tapes", dst)
    assert standing is not None and (standing.state, standing.frames_total, standing.videos_total) == (
        "running",
        None,
        2,
    )
    job.write_progress(frames_left=25, done=["a.mp4"])
    standing = read_standing("tapes", dst)
    assert standing is not None and (standing.frames_done, standing.frames_total, standing.videos_done) == (35, 60, 1)
    assert read_standing("other tapes", dst) is None
    job.put("progress.json", '{"from": "a newer version"}')
    standing = read_standing("tapes", dst)
    assert standing is not None and standing.frames_done is None
