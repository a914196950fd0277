"""Ray clusters of several nodes on one machine, as far apart as one machine allows.

Each node but the head is a set of processes in namespaces of its own: it has its own host name, its own address on
loopback, its own process numbers, an empty /tmp of its own in which only the folders that the cluster shares can be
seen, and no Upriver installed. Pulling its plug (`Node.kill`) ends all of its processes at once. Needs root.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.object_stores import free_ports

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")
PACKAGES = sysconfig.get_path("purelib")
START_TIMEOUT_S = 120.0
_STORE_BYTES = 100_000_000
_STARTED = "Ray runtime started."


@dataclass
class Node:
    """One node; `name` is its host name."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End every process of the node at once, as if its plug were pulled."""
        # The namespace's first process takes all others with it.
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for member in family:
            with suppress(psutil.Error):
                member.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=30)


@dataclass
class RayCluster:
    """A head and its nodes. `address` is for `RAY_ADDRESS`, `job_server` for `RAY_API_SERVER_ADDRESS`.

    Attributes:
        agent: where the head's agent answers.
        folder: of the head's machine alone. shared: the folder in it that all nodes see.
        environment: of the head, and of whoever uses the cluster from its machine.
        start_head: starts the head, also again, under the same address; what it knew is gone unless Redis has it.
    """

    folder: Path
    address: str
    job_server: str
    environment: dict[str, str]
    start_head: Callable[[], Node]
    nodes: list[Node] = field(default_factory=list)
    agent: str = ""
    heads: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        """The head that runs, or ran last."""
        return self.heads[-1]

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def upriver(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command with this checkout's code on the cluster, to its end."""
        with self.running(*arguments, **environment) as process:
            stdout, stderr = process.communicate(timeout=500)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    @contextmanager
    def running(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """Run the command while the caller does other things; it is killed if it still runs at the end."""
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        with self._started(command, {"RAY_ADDRESS": self.address, **environment}) as process:
            yield process

    def away(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command as on another machine, which knows nothing but the job server and the token."""
        return self.python("-m", "jobs.cli", *arguments, **environment)

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        with self.running_away(*arguments, **environment) as process:
            stdout, stderr = process.communicate(timeout=500)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    @contextmanager
    def running_away(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """Run a program there while the caller does other things; it is killed if it still runs at the end."""
        known = {"RAY_API_SERVER_ADDRESS": self.job_server, **environment}
        with self._started([sys.executable, *arguments], known) as process:
            yield process

    @contextmanager
    def _started(self, command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            command,
            cwd=self.folder,  # Ray looks for modules in the driver's folder first
            env={**self.environment, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def add_node(self, name: str, *, cpus: int = 1, code: Path | None = None, **environment: str) -> Node:
        """Add a machine; `code` is a folder with an Upriver that is installed there."""
        address = f"127.0.0.{len(self.nodes) + 2}"
        start = [*_RAY_START, f"--address={self.address}", f"--node-ip-address={address}", f"--num-cpus={cpus}"]
        paths = sorted(Path(PACKAGES).glob("*upriver*.pth"))
        installed = self.folder / f"{name}.pth"
        installed.write_text("" if code is None else f"{code}\n")
        script = [
            f"hostname {name}",
            f"mount --bind {self.shared} /mnt",
            *(f"mount --bind {installed} {path}" for path in paths),
            *(f"mount -t tmpfs tmpfs {path}" for path in sorted(Path(PACKAGES).glob("upriver-*.dist-info"))),
            "mount -t tmpfs tmpfs /tmp",
            f"mkdir -p {self.shared} /tmp/home",
            f"mount --move /mnt {self.shared}",
            "cd /tmp/home",
            f"exec {shlex.join(start)}",
        ]
        command = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec"]
        environment = {"HOME": "/tmp/home", "TMPDIR": "/tmp", **environment}
        log = self.folder / f"{name}.log"
        node = Node(name, _start([*command, "\n".join(script)], {**self.environment, **environment}, log), log)
        self.nodes.append(node)
        wait_until(lambda: _STARTED in log.read_text(), log, node.process)
        return node


_RAY_START = [
    str(Path(SCRIPTS) / "ray"), "start", "--block", "--num-gpus=0", f"--object-store-memory={_STORE_BYTES}",
    "--disable-usage-stats",
]  # fmt: skip


@contextmanager
def ray_cluster(
    folder: Path, *, cpus: int = 1, job_server: bool = False, redis_password: str = "", **variables: str
) -> Iterator[RayCluster]:
    """Start a head with `cpus`, on ports of its own and in a folder of its own, so that other clusters do not matter.

    Users must show a token. A node that does not answer for three seconds is dead.

    Args:
        folder: empty; for logs, and for what is shared.
        job_server: commands can be submitted. redis_password: of the Redis that `RAY_REDIS_ADDRESS` names.
        variables: of the environment of all nodes, and of who uses the cluster.
    """
    gcs, dashboard, agent, metrics = free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_worker_niceness": "0",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        **variables,
    }
    command = [
        *_RAY_START, "--head", f"--port={gcs}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}",
        f"--include-dashboard={job_server}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--temp-dir=/tmp/upriver-{gcs}",
    ]  # fmt: skip
    if redis_password:
        command.append(f"--redis-password={redis_password}")

    def start_head() -> Node:
        log = folder / f"head-{len(made.heads)}.log"
        # Its trace on this machine, on which a node still looks for it: Ray would take it for running.
        Path(f"/tmp/upriver-{gcs}/ray_current_cluster").unlink(missing_ok=True)
        head = Node("head", _start(command, environment, log), log)
        made.heads.append(head)
        wait_until(lambda: _STARTED in log.read_text(), log, head.process)
        if job_server:
            wait_until(lambda: answers(f"http://127.0.0.1:{agent}/api/healthz"), log, head.process)
            wait_until(lambda: answers(f"{made.job_server}/api/version"), log, head.process)
        return head

    made = RayCluster(folder, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment, start_head)
    made.agent = f"http://127.0.0.1:{agent}"
    made.shared.mkdir()
    try:
        made.start_head()
        yield made
    finally:
        for node in [*made.nodes, *made.heads]:
            if node.process.poll() is None:
                node.kill()
        subprocess.run(["rm", "-rf", f"/tmp/upriver-{gcs}"], check=True)


def _start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )


def wait_until(is_so: Callable[[], bool], log: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when `is_so`; raise with the end of `log` when that takes too long or the process has ended."""
    limit = time.monotonic() + START_TIMEOUT_S
    while not is_so():
        if time.monotonic() > limit or process.poll() is not None:
            raise RuntimeError(log.read_text()[-3000:])
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a server answers at `url`, even if it wants a token."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True
