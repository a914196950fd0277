"""Ray: start it quietly on this machine, or join the cluster that `RAY_ADDRESS` names.

A Ray that somebody else started in this process is used and left running. Nothing that Ray says by itself reaches the
terminal: what went wrong is told by the errors of the tasks.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from infra.errors import ClusterError
from infra.own_code import code_environment
from infra.ray_jobs import runs_in_a_job

CONNECT_TIMEOUT_S = 10.0
NODE_TIMEOUT_S = 300.0  # a node's first task waits for the code to arrive and for a worker to start
OBJECT_STORE_BYTES = 256 << 20  # only plans and progress records travel through it


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the tasks of one job may use."""

    address: str
    local: bool
    nodes: int
    cpus: int
    gpus: int
    start_s: float

    def now(self) -> Cluster:
        """Return what there is now: nodes come and go. As it was where no Ray is connected."""
        import ray

        if not ray.is_initialized():
            return self
        nodes, cpus, gpus = _totals()
        return replace(self, nodes=nodes, cpus=cpus, gpus=gpus)


@contextmanager
def connected(num_cpus: int, *, quiet: bool = True) -> Iterator[Cluster]:
    """Yield a `Cluster` to run tasks on; a Ray that was started or joined for it is shut down at the end.

    Args:
        num_cpus: logical CPUs of a Ray that is started here.
        quiet: drop what Ray's native code writes to stderr while Ray runs; Python's stderr is not touched.

    Raises:
        ClusterError: the cluster cannot be reached or Ray does not start.
    """
    _quieten()
    import ray

    began = time.perf_counter()
    ours = not ray.is_initialized()
    address = _address()
    with native_stderr_dropped() if ours and quiet else nullcontext():
        if ours:
            _start(address, num_cpus)
        try:
            nodes, cpus, gpus = _totals()
            yield Cluster(
                address=address,
                local=address == "local",
                nodes=nodes,
                cpus=cpus,
                gpus=gpus,
                start_s=time.perf_counter() - began,
            )
        finally:
            if ours:
                ray.shutdown()


def joins_a_cluster() -> bool:
    """Whether `connected` will join a cluster that runs already, instead of starting Ray on this machine."""
    return _address() != "local"


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What one node answered. `error` says, in one line, why it answered nothing."""

    address: str
    value: Any = None
    error: str | None = None


def ask_every_node(work: Callable[..., Any], *arguments: object) -> list[NodeAnswer]:
    """Call `work(*arguments)` once on every node of the connected Ray, all at a time; nodes that die are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(work)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        ): node
        for node in _alive_nodes()
    }
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    answers = []
    for reference in ready:
        address = str(asked[reference]["NodeManagerAddress"])
        try:
            answers.append(NodeAnswer(address, ray.get(reference)))
        except ray.exceptions.RayError as error:
            if asked[reference]["NodeID"] in {node["NodeID"] for node in _alive_nodes()}:
                answers.append(NodeAnswer(address, error=_last_line(error)))
    for reference in late:
        ray.cancel(reference, force=True)
        said = f"it has not answered for {NODE_TIMEOUT_S:.0f} s"
        answers.append(NodeAnswer(str(asked[reference]["NodeManagerAddress"]), error=said))
    return sorted(answers, key=lambda answer: answer.address)


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def _alive_nodes() -> Sequence[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _totals() -> tuple[int, int, int]:
    """Nodes, CPUs and GPUs."""
    import ray

    total = ray.cluster_resources()
    return len(_alive_nodes()), int(total.get("CPU", 0)), int(total.get("GPU", 0))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _start(address: str, num_cpus: int) -> None:
    import ray

    try:
        _knock(address)
        if address == "local":
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        else:
            # The nodes run this process's code, unless a job server has seen to it already.
            code = {} if runs_in_a_job() else code_environment()
            ray.init(address=address, runtime_env=code, logging_level=logging.CRITICAL, log_to_driver=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"Ray at {address} cannot be used: {reason}.",
            code="ray-unavailable",
            remedy=_remedy(address, error),
        ) from error


def _remedy(address: str, error: Exception) -> str:
    if address == "local":
        return "Check free memory and disk space."
    if type(error) is ConnectionError:  # somebody listens, and Ray does not say in it why it was not let in
        return "If the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; else correct RAY_ADDRESS."
    return "Correct or unset RAY_ADDRESS."


def _knock(address: str) -> None:
    """Raise OSError at once where nobody listens; Ray itself would try for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextmanager
def quiet_data(**settings: object) -> Iterator[None]:
    """Run Ray Data with `settings` of its context and without its bars and logs; other users notice nothing."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name, value in settings.items():
        setattr(context, name, value)
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def native_stderr_dropped() -> Iterator[None]:
    """Send what native code writes to file descriptor 2 nowhere; `sys.stderr` keeps its way to where it went before."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    before = sys.stderr
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)


def _quieten() -> None:
    # Read by Ray when it is imported or started. Users' own choices win.
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what the raylet says of dead workers would go to stdout
        "RAY_worker_niceness": "0",  # by default workers give way to every other program
        # OpenMP threads that spin while they wait take the core from the thread they wait for: on a busy machine a
        # step of the model takes twice as long; on an idle one, sleeping costs it 5 %. Workers inherit this.
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_TQDM": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.data", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
