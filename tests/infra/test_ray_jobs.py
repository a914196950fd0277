"""Jobs on a real Ray cluster of one node, with its job server and its token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import ClusterError
from infra.own_code import PACKAGES, code_environment
from infra.ray_jobs import JobServer
from infra.storage import storage_for
from tests.films import make_film
from tests.object_stores import SeaweedFS, free_ports
from tests.random_model import save_random_model
from tests.ray_cluster import RayCluster, ray_cluster
from tests.video_files import make_video_files


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, seaweedfs: SeaweedFS) -> Iterator[RayCluster]:
    """A head node with a job server, whose processes have the keys of an object store."""
    folder = tmp_path_factory.mktemp("ray")
    with ray_cluster(folder, cpus=2, job_server=True, **seaweedfs.environment()) as made:
        yield made


def test_the_code_that_travels_is_all_four_packages() -> None:
    folders = [Path(folder) for folder in code_environment()["py_modules"]]
    assert [folder.name for folder in folders] == list(PACKAGES) and all(
        (one / "__init__.py").is_file() for one in folders
    )


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001"])
def test_an_address_of_something_else_is_refused(address: str) -> None:
    with pytest.raises(ClusterError) as caught:
        JobServer(address)
    assert caught.value.code == "ray-address"


def test_nobody_there_and_no_password_shown() -> None:
    with pytest.raises(ClusterError) as caught:
        JobServer(f"http://me:sesame@127.0.0.1:{free_ports(1)[0]}")
    assert caught.value.code == "ray-unavailable" and "sesame" not in str(caught.value)


@pytest.mark.slow
def test_a_job_restores_and_ends_as_the_command_would(cluster: RayCluster, tmp_path: Path) -> None:
    source = make_video_files(tmp_path)["h264_vfr_mp4"]
    done = cluster.away("submit", "restore", "--shared-files", str(source), str(tmp_path / "out.mp4"), "--steps", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 0 and "job upriver-" in done.stderr
    missing = cluster.away("submit", "restore", "--shared-files", "/nowhere/a.mp4", str(tmp_path / "b.mp4"))
    assert missing.returncode == 5 and "/nowhere/a.mp4 does not exist" in missing.stdout


@pytest.mark.slow
def test_who_submitted_a_job_sees_how_far_it_is_and_so_does_everybody_else(
    cluster: RayCluster, tmp_path: Path, s3_bucket: str
) -> None:
    film = make_film(tmp_path / "film.mp4", (30, 40, 30))
    storage_for(s3_bucket).publish(film, f"{s3_bucket}/film.mp4")
    for file in save_random_model(tmp_path / "model").rglob("*"):
        if file.is_file():
            storage_for(s3_bucket).publish(file, f"{s3_bucket}/model/{file.relative_to(tmp_path / 'model')}")
    places = (f"{s3_bucket}/film.mp4", f"{s3_bucket}/out.mp4")
    options = ("--model", f"{s3_bucket}/model", "--preset", "ultrafast", "--segment-seconds", "0.4")
    with cluster.running_away("-m", "jobs.cli", "submit", "restore", *places, *options, "--wait") as job:
        seen = {"state": "", "frames_done": 0}
        while job.poll() is None and not (seen["state"] == "running" and seen["frames_done"]):
            status = cluster.away("status", places[1], "--json")
            told = json.loads(status.stdout)["jobs"] if status.returncode == 0 else []
            seen = told[0] if told else seen
        stdout, stderr = job.communicate(timeout=500)
    assert job.returncode == 0, stdout + stderr
    assert seen["state"] == "running" and 0 < seen["frames_done"] <= 100
    assert re.search(r"^\d+ of 100 frames \(\d+ %\).*; film\.mp4$", stdout, re.M), stdout
    finished = cluster.away("status", places[1])
    assert finished.returncode == 0 and "finished" in finished.stdout


@pytest.mark.slow
def test_a_job_is_asked_and_stopped_by_its_id(cluster: RayCluster) -> None:
    submitted = cluster.python(
        "-c", "from infra.ray_jobs import JobServer; print(JobServer().submit(['sleep', '600']))"
    )
    job_id = submitted.stdout.strip()
    assert job_id.startswith("upriver-"), submitted.stderr
    asked = cluster.away("submit", "status", job_id, "--json")
    assert json.loads(asked.stdout)["ended"] is False
    stopped = cluster.away("submit", "stop", job_id)
    assert stopped.returncode == 0 and job_id in stopped.stdout
    followed = cluster.away("submit", "logs", job_id, "--follow")
    assert followed.returncode == 143, followed.stdout + followed.stderr
    assert json.loads(cluster.away("submit", "status", job_id, "--json").stdout)["state"] == "STOPPED"


@pytest.mark.slow
def test_refusals_of_a_cluster_are_said_in_one_line(cluster: RayCluster) -> None:
    unknown = cluster.away("submit", "status", "upriver-none")
    assert unknown.returncode == 2 and "knows no job upriver-none" in unknown.stderr
    token = secrets.token_hex(32)
    refused = cluster.away("submit", "status", "upriver-none", RAY_AUTH_TOKEN=token)
    assert refused.returncode == 2 and "token" in refused.stderr and token not in refused.stderr
    for answer in (unknown, refused):
        assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_nodes_run_the_code_of_the_driver_that_joins(cluster: RayCluster) -> None:
    program = (
        "import ray\n"
        "from infra.cluster import connected\n"
        "def where():\n"
        "    import jobs.errors\n"
        "    return jobs.errors.__file__\n"
        "with connected(1) as found:\n"
        "    print(found.local, ray.get(ray.remote(num_cpus=0)(where).remote()))\n"
    )
    joined = cluster.python("-c", program, RAY_ADDRESS=cluster.address)
    assert joined.stdout.startswith("False ") and "/runtime_resources/py_modules_files/" in joined.stdout, joined.stderr
