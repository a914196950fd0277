"""The archive run of the manifests on a real Ray: its entry point, through the job server, as KubeRay submits it."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from infra.storage import storage_for
from tests.end_to_end.test_mixed_folder import FRAMES, SIZE, film
from tests.k8s.ray_objects import ray_environment, ray_object
from tests.live_service import open_live_engine
from tests.object_stores import BUCKET, SeaweedFS, use
from tests.ray_cluster import ROOT, RayCluster, ray_cluster

pytestmark = pytest.mark.slow  # Ray with a job server, and three runs on it

RUN_S = 240.0
NAMES = ("deep/two.mkv", "one.mp4")


@dataclass(frozen=True)
class Archive:
    """A cluster, the store that it was given, and a client with the cluster's token."""

    cluster: RayCluster
    store: SeaweedFS
    client: Any

    def run(self, source: str, destination: str) -> tuple[str, int | None, str]:
        """Submit the manifest's command for other places and wait: state, exit status, what it printed."""
        spec = ray_object("archive", "RayJob")["spec"]
        words = shlex.split(spec["entrypoint"])
        assert words[:2] == ["upriver", "restore"] and all(each.startswith("s3://") for each in words[2:4])
        command = spec["entrypoint"].replace(words[3], destination).replace(words[2], source)
        job = self.client.submit_job(entrypoint=command, entrypoint_num_cpus=spec["entrypointNumCpus"])
        limit = time.monotonic() + RUN_S
        while not (info := self.client.get_job_info(job)).status.is_terminal():
            assert time.monotonic() < limit, self.client.get_job_logs(job)[-3000:]
            time.sleep(0.2)
        return str(info.status.value), info.driver_exit_code, self.client.get_job_logs(job)

    def objects(self, place: str) -> dict[str, tuple[str, str]]:
        """Entity tag and time of every object of a place."""
        prefix = place.removeprefix(f"s3://{BUCKET}/") + "/"
        listed = self.store.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
        return {each["Key"].removeprefix(prefix): (each["ETag"], str(each["LastModified"])) for each in listed}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, seaweedfs: SeaweedFS) -> Iterator[Archive]:
    """A Ray with the environment of the manifest's containers, and the three variables of the Secret `upriver-s3`."""
    from ray.job_submission import JobSubmissionClient

    variables = ray_environment(ray_object("archive", "RayJob"))
    assert variables["RAY_AUTH_MODE"] == "token"
    variables["UPRIVER_GPUS_PER_ACTOR"] = "0"  # as components/archive has it without components/archive-gpu
    known = seaweedfs.environment()
    variables |= {name: known[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    variables["AWS_ENDPOINT_URL"] = seaweedfs.endpoint
    folder = tmp_path_factory.mktemp("archive")
    with ray_cluster(folder, cpus=4, job_server=True, PYTHONPATH=str(ROOT), **variables) as cluster:
        token = cluster.environment["RAY_AUTH_TOKEN"]
        client = JobSubmissionClient(cluster.job_server, headers={"Authorization": f"Bearer {token}"})
        yield Archive(cluster, seaweedfs, client)


def decoded(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def test_a_run_restores_and_the_next_has_nothing_to_do(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = use(archive.store, monkeypatch)
    source, destination = f"{place}/tapes", f"{place}/restored"
    for name in NAMES:
        storage_for(source).publish(film(tmp_path / "sent" / name), f"{source}/{name}")  # moves it
        film(tmp_path / name)

    state, status, told = archive.run(source, destination)
    assert (state, status) == ("SUCCEEDED", 0), told
    assert archive.store.environment()["AWS_SECRET_ACCESS_KEY"] not in told
    first = archive.objects(destination)
    assert {name for name in first if not name.startswith(".upriver/")} >= {
        each for name in NAMES for each in (name, f"{name}.manifest.json", f"{name}.sha256")
    }
    engine = open_live_engine("tiny").pipe
    for name in NAMES:
        result, record = tmp_path / "result" / name, tmp_path / "result" / f"{name}.manifest.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        storage_for(destination).fetch(f"{destination}/{name}", result)
        storage_for(destination).fetch(f"{destination}/{name}.manifest.json", record)
        manifest = json.loads(record.read_text())
        assert manifest["output"]["sha256"] == hashlib.sha256(result.read_bytes()).hexdigest()
        assert manifest["model"]["name"] == "tiny"
        pictures = decoded(result)
        assert len(pictures) == FRAMES and pictures[0].shape == (4 * SIZE[1], 4 * SIZE[0], 3)
        # The encoder is lossy: near to what the engine gives, and nearer than to any other picture of it.
        expected = list(engine(iter(decoded(tmp_path / name))))
        for number, shown in enumerate(pictures):
            away = [float(np.abs(shown.astype(int) - each).mean()) for each in expected]
            assert away[number] == min(away) and away[number] < 6, away

    state, status, told = archive.run(source, destination)
    assert (state, status) == ("SUCCEEDED", 0), told
    assert told.count("finished before; nothing to do") == len(NAMES), told
    assert {name: each for name, each in archive.objects(destination).items() if name in first} == first


def test_a_run_that_fails_says_so(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator reads the job's state, and people its exit status: 5, nothing could be decoded."""
    place = use(archive.store, monkeypatch)
    (tmp_path / "text.mp4").write_text("no video")
    storage_for(place).publish(tmp_path / "text.mp4", f"{place}/tapes/text.mp4")
    state, status, told = archive.run(f"{place}/tapes", f"{place}/restored")
    assert (state, status) == ("FAILED", 5), told
    assert "Traceback" not in told
