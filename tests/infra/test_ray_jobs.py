"""Jobs on a real Ray cluster of one node, with its job server and its token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.errors import ClusterError
from infra.ray_jobs import PACKAGES, JobServer, code_environment
from tests.object_stores import free_ports
from tests.video_files import make_video_files

START_TIMEOUT_S = 120.0
SCRIPTS = sysconfig.get_path("scripts")


@dataclass(frozen=True)
class Cluster:
    job_server: str
    address: str
    environment: dict[str, str]

    def upriver(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command of another machine: it knows the cluster by address and token."""
        return self.python("-m", "jobs.cli", *arguments, **environment)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.environment["HOME"],  # Ray looks for modules in the driver's folder first
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.job_server, **environment},
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node, on ports of its own and in a folder of its own, so that other clusters do not matter."""
    folder = tmp_path_factory.mktemp("ray")
    gcs, dashboard, agent, metrics = free_ports(4)
    environment = {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        "HOME": str(folder),
    }
    command = [
        str(Path(SCRIPTS) / "ray"), "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000",
        f"--temp-dir=/tmp/upriver-{gcs}", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        made = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
        wait_until(lambda: answers(f"http://127.0.0.1:{agent}/api/healthz"), folder / "ray.log")
        wait_until(lambda: answers(f"{made.job_server}/api/version"), folder / "ray.log")
        yield made
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            if member.is_running():
                member.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family, timeout=10)
        subprocess.run(["rm", "-rf", f"/tmp/upriver-{gcs}"], check=True)


def wait_until(is_so: Callable[[], bool], log: Path) -> None:
    limit = time.monotonic() + START_TIMEOUT_S
    while not is_so():
        if time.monotonic() > limit:
            raise RuntimeError(log.read_text()[-3000:])
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


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
def test_a_job_restores_and_ends_as_the_command_would(cluster: Cluster, tmp_path: Path) -> None:
    source = make_video_files(tmp_path)["h264_vfr_mp4"]
    done = cluster.upriver(
        "submit", "restore", "--shared-files", str(source), str(tmp_path / "out.mp4"), "--steps", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 0 and "job upriver-" in done.stderr
    missing = cluster.upriver("submit", "restore", "--shared-files", "/nowhere/a.mp4", str(tmp_path / "b.mp4"))
    assert missing.returncode == 5 and "/nowhere/a.mp4 does not exist" in missing.stdout


@pytest.mark.slow
def test_a_job_is_asked_and_stopped_by_its_id(cluster: Cluster) -> None:
    submitted = cluster.python(
        "-c", "from infra.ray_jobs import JobServer; print(JobServer().submit(['sleep', '600']))"
    )
    job_id = submitted.stdout.strip()
    assert job_id.startswith("upriver-"), submitted.stderr
    asked = cluster.upriver("submit", "status", job_id, "--json")
    assert json.loads(asked.stdout)["ended"] is False
    stopped = cluster.upriver("submit", "stop", job_id)
    assert stopped.returncode == 0 and job_id in stopped.stdout
    followed = cluster.upriver("submit", "logs", job_id, "--follow")
    assert followed.returncode == 143, followed.stdout + followed.stderr
    assert json.loads(cluster.upriver("submit", "status", job_id, "--json").stdout)["state"] == "STOPPED"


@pytest.mark.slow
def test_refusals_of_a_cluster_are_said_in_one_line(cluster: Cluster) -> None:
    unknown = cluster.upriver("submit", "status", "upriver-none")
    assert unknown.returncode == 2 and "knows no job upriver-none" in unknown.stderr
    token = secrets.token_hex(32)
    refused = cluster.upriver("submit", "status", "upriver-none", RAY_AUTH_TOKEN=token)
    assert refused.returncode == 2 and "token" in refused.stderr and token not in refused.stderr
    for answer in (unknown, refused):
        assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_nodes_run_the_code_of_the_driver_that_joins(cluster: Cluster) -> None:
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
