"""Two observed replicas on a Ray Serve of their own, for `tests/end_to_end/test_live_observed.py`.

Run as a program it serves until its stdin ends; its first line on stdout says where Serve's logs are.
"""

from __future__ import annotations

import sys
from typing import Any

APPLICATION = "observed"


def main() -> None:
    """Serve on the port given as argument."""
    import ray
    from ray import serve

    from infra.structured_logs import LogSettings, serve_logging

    logs = LogSettings(format="json", level="info")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**28)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    deployment = serve.deployment(
        serve.ingress(_build)(Observed),
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.5},
        logging_config=serve_logging(logs),
    )
    serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")
    print(ray._private.worker._global_node.get_logs_dir_path(), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def _build() -> Any:
    from ray import serve

    from actors.live_app import make_app

    return make_app(lambda: serve.get_replica_context().servable_object.server)


class Observed:
    """A replica with a stand-in for a model; set up as `actors.endpoint.Endpoint` does it."""

    async def __init__(self) -> None:
        import asyncio

        from ray import serve

        from actors.live_server import LiveConfig, LiveServer
        from actors.state_holder import HeldStates, holder
        from infra.structured_logs import use_serve_handlers
        from infra.telemetry import Telemetry, TelemetryConfig
        from tests.live_service import open_live_engine

        replica = serve.get_replica_context().replica_tag
        shown = TelemetryConfig(log_format="json")
        use_serve_handlers(shown.logs, replica=replica)
        held = HeldStates(holder(APPLICATION, kept_s=60, most_bytes=2**26))
        engine = open_live_engine()
        telemetry = Telemetry.start(shown, replica)
        self.server = LiveServer(LiveConfig(), {engine.name: engine}, states=held, telemetry=telemetry, board=held)
        self.server.start()
        self._posting = asyncio.get_running_loop().create_task(self.server.desk.post_forever())


if __name__ == "__main__":
    main()
