"""The live service of the manifests on a real Ray, deployed as KubeRay deploys it: by a request to the dashboard."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.http

from actors.replay import LogEntry, replay
from infra.api_keys import KeyFile, make_key, write_keys
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Hello, output_size
from infra.refusals import Unauthorized
from infra.tenants import Scope
from tests.k8s.manifests import OVERLAYS
from tests.k8s.mutations import objects_of
from tests.k8s.ray_objects import environment, probes, ray_environment, ray_object, relocated, serve_config
from tests.k8s.workloads import Workload, workloads
from tests.live_service import open_live_engine
from tests.object_stores import free_ports
from tests.ray_cluster import ROOT, RayCluster, ray_cluster

pytestmark = pytest.mark.slow  # Ray with a dashboard, HAProxy, a model: a minute on two busy cores

OVERLAY = "laptop"
DEPLOY = "/api/serve/applications/"  # as KubeRay's dashboardclient has it
START_S = 120.0
HELLO = Hello(width=48, height=32, codec_in="raw", codec_out="raw", seed=5, least_steps=4)
PICTURES = [np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8) for number in range(4)]


@dataclass(frozen=True)
class Service:
    """The application where it runs. `key`: for streams; `admin`: for metrics too."""

    cluster: RayCluster
    http: int
    grpc: int
    key: str
    admin: str
    keys_file: Path

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def dashboard(self, method: str, **request: object) -> httpx.Response:
        """Ask as the operator asks: with the cluster's token."""
        token = self.cluster.environment["RAY_AUTH_TOKEN"]
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.request(method, self.cluster.job_server + DEPLOY, headers=headers, timeout=60, **request)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A head with the manifest's environment; ports and the mounted file of keys are replaced, nothing else."""
    folder = tmp_path_factory.mktemp("k8s")
    keys, records = zip(
        *(make_key("studio", scopes) for scopes in ([Scope.LIVE], [Scope.LIVE, Scope.ADMIN])), strict=True
    )
    write_keys(folder / "keys.json", KeyFile(keys=records))
    http, grpc, *others = free_ports(6)
    names = ("FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC", "HAPROXY_METRICS", "HAPROXY_STATS")
    ports = {f"RAY_SERVE_{name}_PORT": str(port) for name, port in zip(names, others, strict=True)}
    variables = ray_environment(ray_object(OVERLAY, "RayService"))
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1" and variables["RAY_AUTH_MODE"] == "token"
    (folder / "cluster").mkdir()
    with ray_cluster(
        folder / "cluster", cpus=4, job_server=True, PYTHONPATH=str(ROOT), **variables, **ports
    ) as cluster:
        made = Service(cluster, http, grpc, *keys, folder / "keys.json")
        config = relocated(serve_config(OVERLAY), http=http, grpc=grpc, keys_file=str(folder / "keys.json"))
        told = made.dashboard("PUT", json=config)
        assert told.status_code == 200, told.text
        limit = time.monotonic() + START_S
        while (status := made.dashboard("GET").json()["applications"]["upriver"]["status"]) != "RUNNING":
            assert time.monotonic() < limit and status == "DEPLOYING", made.dashboard("GET").text
            time.sleep(0.2)
        yield made


def test_the_dashboard_asks_for_the_token(service: Service) -> None:
    """Who deploys an application runs code: no token, no deployment, and the one that runs goes on."""
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        told = httpx.put(service.cluster.job_server + DEPLOY, json={"applications": []}, headers=headers)
        assert told.status_code in (401, 403)
    assert set(service.dashboard("GET").json()["applications"]) == {"upriver"}


def test_what_runs_is_what_the_manifest_says(service: Service) -> None:
    told = service.dashboard("GET").json()
    assert told["proxy_location"] == serve_config(OVERLAY)["proxy_location"] == "EveryNode"
    assert {each["status"] for each in told["proxies"].values()} == {"HEALTHY"}
    (deployment,) = told["applications"]["upriver"]["deployments"].values()
    said = serve_config(OVERLAY)["applications"][0]["args"]
    assert deployment["status"] == "HEALTHY" and deployment["target_num_replicas"] == said["replicas"]
    assert deployment["deployment_config"]["graceful_shutdown_timeout_s"] == said["drain_s"]
    assert deployment["deployment_config"]["ray_actor_options"]["num_cpus"] == said["num_cpus"]
    assert deployment["deployment_config"]["user_config"] == {"models": said["live"]["models"]}


@pytest.mark.parametrize("transport", ["ws", "grpc"])
def test_a_stream_is_restored_as_the_offline_engine_restores_it(service: Service, transport: str) -> None:
    url = f"{transport}://127.0.0.1:{service.http if transport == 'ws' else service.grpc}"

    async def run() -> list[LiveAnswer]:
        with pytest.raises(Unauthorized):
            async with LiveStream(url, HELLO):
                pass
        async with LiveStream(url, HELLO, api_key=service.key) as stream:
            for each in PICTURES:
                await stream.send_picture(each)
            await stream.close()
            return [answer async for answer in stream]

    answers = asyncio.run(run())
    assert [answer.id for answer in answers] == list(range(len(PICTURES)))
    log = [entry for answer in answers if (entry := LogEntry.from_header(answer.header))]
    assert [entry.level for entry in log] == [4] * len(PICTURES)
    engine = open_live_engine("tiny")
    offline = replay(
        engine.pipe, log, lambda number: PICTURES[number], seed=HELLO.seed, size_of=partial(output_size, HELLO)
    )
    for answer, expected in zip(answers, offline, strict=True):
        assert answer.picture().shape == (128, 192, 3)
        difference = np.abs(answer.picture().astype(int) - expected)
        assert (difference <= 1).mean() >= 0.999  # equivalent, as docs/concepts.md has it


def test_probes_of_all_manifests_are_answered(service: Service) -> None:
    """Without a key or a token: the kubelet has neither."""
    places = {8000: service.base, 52365: service.cluster.agent}
    asked = set()
    for overlay in OVERLAYS:
        for workload, port, path in probes(objects_of(overlay)):
            if "predictor" in json.dumps(workload.main().get("args", [])):
                continue  # the Open Inference Protocol's: not this application
            assert port in places, f"{workload}: {port}"
            asked.add((port, path))
    assert asked == {(8000, "/readyz"), (8000, "/healthz"), (52365, "/api/healthz")}
    for port, path in asked:
        told = httpx.get(places[port] + path, timeout=10)
        assert told.status_code == 200, (path, told.text)


def test_ready_is_warm(service: Service) -> None:
    """What `/readyz` promises: every model that the manifest names has made a step; it is known what one costs."""
    assert httpx.get(f"{service.base}/readyz").json()["status"] == "ok"
    told = httpx.get(f"{service.base}/v1/models", headers={"X-Api-Key": service.key}).json()["models"]
    assert [model["name"] for model in told] == serve_config(OVERLAY)["applications"][0]["args"]["live"]["models"]
    assert all(cost > 0 for model in told for cost in model["step_ms"].values())


def test_routes_that_are_let_in_and_scraped(service: Service) -> None:
    """Paths of Ingress, HTTPRoute and ServiceMonitor lead to something; metrics want an admin's key."""
    objects = objects_of("production") + objects_of("single-gpu")
    monitors = [each for each in objects if each["kind"] == "ServiceMonitor"]
    scraped = {endpoint["path"] for each in monitors for endpoint in each["spec"]["endpoints"]}
    assert scraped == {"/metrics"}
    for key, status in ((None, 401), (service.key, 403), (service.admin, 200)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        told = httpx.get(f"{service.base}/metrics", headers=headers)
        assert told.status_code == status
    assert "upriver_" in told.text
    rules = [
        path["path"]
        for each in objects
        if each["kind"] == "Ingress"
        for rule in each["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    rules += [
        match["path"]["value"]
        for each in objects
        if each["kind"] == "HTTPRoute"
        for rule in each["spec"]["rules"]
        for match in rule["matches"]
    ]
    assert set(rules) == {"/v1", "/healthz", "/readyz", "/upriver.live.v1.Live"}
    for path in ("/v1/models", "/healthz", "/readyz"):
        assert httpx.get(service.base + path, headers={"X-Api-Key": service.key}).status_code == 200


@contextmanager
def predictor(container: dict[str, Any], places: dict[str, str]) -> Iterator[None]:
    """Run `upriver` with the container's arguments and environment; `places` replaces the values of options."""
    words = [str(each) for each in container["args"]]
    for option, value in places.items():
        (number,) = [number for number, word in enumerate(words) if word.startswith(option + "=")]
        words[number] = f"{option}={value}"
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment(container)},
    )
    try:
        yield
        process.terminate()
        assert process.wait(60) == 0  # within terminationGracePeriodSeconds
    finally:
        process.kill()
        process.wait()


def wait_for(url: str) -> None:
    """Return when a probe there would succeed."""
    limit = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < limit, url
        time.sleep(0.2)


@pytest.mark.parametrize("overlay", ["production", "kserve"])
def test_predictors_of_the_manifests_answer_their_probes_and_restore(service: Service, overlay: str) -> None:
    """The gateway in front of the service, and the runtime with a model of its own, asked by a client of Triton's."""
    found: list[Workload] = [each for each in workloads(objects_of(overlay)) if each.role == "predictor"]
    (workload,) = found
    http, grpc = free_ports(2)
    places = {"--http-port": str(http), "--grpc-port": str(grpc)}
    if overlay == "production":
        model, places["--service"] = "tiny", f"grpc://127.0.0.1:{service.grpc}"
    else:
        model, places["--keys"] = "upriver", str(service.keys_file)
        places["--model"] = "upriver=tiny"  # KServe would put a folder at /mnt/models
    with predictor(workload.main(), places):
        asked = {(port, path) for each, port, path in probes(objects_of(overlay)) if each.role == "predictor"}
        assert asked == {(8080, "/v2/health/live"), (8080, "/v2/health/ready")}
        for _, path in sorted(asked):
            wait_for(f"http://127.0.0.1:{http}{path}")
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{http}", network_timeout=60.0)
        tensor = tritonclient.http.InferInput("frame", list(PICTURES[0].shape), "UINT8")
        tensor.set_data_from_numpy(PICTURES[0])
        with pytest.raises(tritonclient.utils.InferenceServerException) as refused:
            client.infer(model, [tensor])
        assert refused.value.status() == "401"
        told = client.infer(model, [tensor], headers={"X-Api-Key": service.key})
        client.close()
    expected = next(replay(open_live_engine("tiny").pipe, [LogEntry(0, 0, 4, True)], lambda number: PICTURES[number]))
    assert (np.abs(told.as_numpy("frame").astype(int) - expected) <= 1).mean() >= 0.999
