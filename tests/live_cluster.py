"""The live application on a Ray Serve of its own, in a process of its own that takes orders: `LiveCluster`.

Run as a program it is that process: a JSON order a line on stdin, a JSON answer a line on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.object_stores import free_ports

ROOT = Path(__file__).resolve().parents[1]


class LiveCluster:
    """A running Serve.

    Attributes:
        port: of HTTP and WebSockets. url: for `LiveStream`.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, grpc_port: int) -> None:
        self._process, self.port, self.grpc_port = process, port, grpc_port
        self.url = f"ws://127.0.0.1:{port}"
        self.grpc_url = f"grpc://127.0.0.1:{grpc_port}"
        self.http = f"http://127.0.0.1:{port}"

    def order(self, what: str, **details: Any) -> Any:
        """Give an order; returns its answer.

        Raises:
            AssertionError: it failed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **details}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert answer["ok"], answer["value"]
                return answer["value"]
        raise AssertionError("the live cluster's process has ended")

    def deploy(self, *, models: list[str], replicas: int = 1, **options: Any) -> None:
        """Deploy the application, or roll it over to these options; returns when the new version runs.

        `options`: of `LiveSettings`, besides `drain_s`, `threads`, `largest_batch` and `autoscaling`.
        """
        self.order("deploy", models=models, replicas=replicas, options=options)

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Return the live replicas by id: `state` and `pid`."""
        found: dict[str, dict[str, Any]] = self.order("replicas")
        return found


@contextmanager
def live_cluster(*, haproxy: bool = False) -> Iterator[LiveCluster]:
    """Start a Ray with Serve; everything is ended afterwards."""
    port, grpc_port = free_ports(2)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # 30 by default: for load balancers that are not here
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.live_cluster", str(port), str(grpc_port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    cluster = LiveCluster(process, port, grpc_port)
    try:
        cluster.order("ready")
        yield cluster
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Take orders until stdin ends."""
    import ray
    from ray import serve

    from infra.live_grpc import SERVICER_FUNCTION

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**28)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])},
        grpc_options={"port": int(sys.argv[2]), "grpc_servicer_functions": [SERVICER_FUNCTION]},
    )
    for line in sys.stdin:
        order = json.loads(line)
        try:
            value, ok = _obey(order), True
        except Exception as error:
            value, ok = f"{type(error).__name__}: {error}", False
        print("ANSWER " + json.dumps({"ok": ok, "value": value}), flush=True)
    serve.shutdown()
    ray.shutdown()


def _obey(order: dict[str, Any]) -> Any:
    import ray
    from ray import serve

    if order["what"] == "ready":
        return True
    if order["what"] == "deploy":
        from ray.serve.context import _get_global_client  # what `serve deploy` reaches through the dashboard
        from ray.serve.schema import ServeDeploySchema

        options = order["options"]
        drain_s = options.pop("drain_s", 30.0)
        engine = {"threads": options.pop("threads", 1), "largest_batch": options.pop("largest_batch", 8)}
        arguments = {"live": options, "engine": engine, "num_cpus": 0.5, "drain_s": drain_s}
        deployment = {"name": "live", "user_config": {"models": order["models"]}}
        if scaling := options.pop("autoscaling", None):
            arguments["autoscaling"] = scaling
        else:
            deployment["num_replicas"] = order["replicas"]
        app = {
            "name": "live",
            "route_prefix": "/",
            "import_path": "actors.endpoint:application",
            "args": arguments,
            "deployments": [deployment],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[app]), _blocking=True)
        return True
    if order["what"] == "delete":
        serve.delete("live", _blocking=False)
        return True
    if order["what"] == "replicas":
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        details = ray.get(controller.get_serve_instance_details.remote())
        live = details["applications"].get("live", {"deployments": {}})["deployments"].get("live", {"replicas": []})
        return {one["replica_id"]: {"state": one["state"], "pid": one.get("pid")} for one in live["replicas"]}
    raise ValueError(order["what"])


if __name__ == "__main__":
    main()
