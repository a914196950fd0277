"""Jobs on a real Ray cluster of one node, with its job server and its token."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import ClusterError
from infra.own_code import PACKAGES, code_environment
from infra.ray_jobs import JobServer
from tests.object_stores import free_ports
from tests.ray_cluster import RayCluster, ray_cluster
from tests.video_files import make_video_files


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head node with a job server."""
    with ray_cluster(tmp_path_factory.mktemp("ray"), cpus=2, job_server=True) as made:
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
