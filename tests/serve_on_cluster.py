"""Programs for `tests.ray_cluster.RayCluster`: the live service on it, and what Serve says of it.

python -m tests.serve_on_cluster deploy PORT '{"replicas": 2, ...}'      until it runs
python -m tests.serve_on_cluster replicas                                 one JSON object: state and pid by id
"""

from __future__ import annotations

import json
import sys

APPLICATION = "live"


def main() -> None:
    """See the module."""
    import ray
    from ray import serve

    what, *arguments = sys.argv[1:]
    ray.init(namespace="upriver", log_to_driver=False, logging_level="ERROR")
    if what == "deploy":
        from actors.endpoint import application

        port, told = arguments
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": int(port)})
        serve.run(application(json.loads(told)), name=APPLICATION, route_prefix="/")
        return
    if what == "replicas":
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        details = ray.get(controller.get_serve_instance_details.remote())
        (deployment,) = details["applications"][APPLICATION]["deployments"].values()
        found = {one["replica_id"]: {"state": one["state"], "pid": one.get("pid")} for one in deployment["replicas"]}
        print(json.dumps(found))
        return
    raise ValueError(what)


if __name__ == "__main__":
    main()
