"""What the RayServices say to Ray: Serve takes their configuration, and ports are the same wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from actors.endpoint import ApplicationArguments
from infra.live_settings import load_live_settings
from tests.k8s.manifests import OVERLAYS, Manifest, manifests, only

LIVE = [overlay for overlay in OVERLAYS if any(each.kind == "RayService" for each in manifests(overlay))]
# What an overlay decides; all else is the same everywhere, or the same service would behave in two ways.
DECIDED = {"replicas", "autoscaling", "num_cpus", "num_gpus"}
DECIDED_LIVE = {"models", "sessions"}
# Ray's ports that are no parameters: GCS, dashboard; Serve's: replicas behind HAProxy, and the proxy behind those.
FIXED = {6379, 8265, 8500, 9500, 30000, 31000, 40000, 41000}


def config(overlay: str) -> dict[str, Any]:
    """The Serve configuration of an overlay."""
    read: dict[str, Any] = yaml.safe_load(only(overlay, "RayService").data["spec"]["serveConfigV2"])
    return read


def groups(manifest: Manifest) -> list[dict[str, Any]]:
    """Head and workers of the cluster of a RayService or a RayJob."""
    spec = manifest.data["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("overlay", LIVE)
def test_serve_takes_the_configuration(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config(overlay))
    (application,) = schema.applications
    known = {name: value for name, value in application.args.items() if name in ApplicationArguments.model_fields}
    assert set(application.args) - set(known) <= {"autoscaling"}
    arguments = ApplicationArguments.model_validate(known)
    settings = load_live_settings(arguments.live).values
    assert settings.asks_for_credentials and not settings.insecure
    assert (schema.http_options.host, schema.http_options.port) == (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert schema.grpc_options.port == settings.grpc_port == 9000
    assert schema.grpc_options.grpc_servicer_functions == ["infra.live_grpc.add_LiveServicer_to_server"]


def test_overlays_differ_only_in_what_an_overlay_decides() -> None:
    common = []
    for overlay in LIVE:
        told = config(overlay)
        arguments = told["applications"][0]["args"]
        assert set(arguments["live"]) >= DECIDED_LIVE
        arguments["live"] = {name: value for name, value in arguments["live"].items() if name not in DECIDED_LIVE}
        told["applications"][0]["args"] = {name: value for name, value in arguments.items() if name not in DECIDED}
        common.append(told)
    assert common == common[:1] * len(LIVE)


@pytest.mark.parametrize("overlay", LIVE)
def test_a_node_has_room_for_its_replica_and_ends_after_it(overlay: str) -> None:
    service = only(overlay, "RayService")
    arguments = config(overlay)["applications"][0]["args"]
    _, worker = groups(service)
    pod = worker["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert arguments["num_cpus"] <= int(limits["cpu"])
    assert arguments["num_gpus"] <= int(limits.get("nvidia.com/gpu", 0))
    most = arguments["replicas"] if "replicas" in arguments else arguments["autoscaling"]["max_replicas"]
    assert most <= worker["maxReplicas"]
    # The hook waits longer than a replica may drain, the kubelet longer than the hook, the old cluster longest of all.
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    waits = int(hook.partition("second < ")[2].partition(";")[0])
    assert arguments["drain_s"] < waits < waits + 20 < pod["terminationGracePeriodSeconds"]
    assert service.data["spec"]["rayClusterDeletionDelaySeconds"] > pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("overlay", "kind", "policy", "fixed"),
    [*((overlay, "RayService", "ray", FIXED) for overlay in LIVE), ("archive", "RayJob", "archive-ray", {6379, 8265})],
)
def test_the_policy_names_the_ports_that_ray_is_given(overlay: str, kind: str, policy: str, fixed: set[int]) -> None:
    rule = only(overlay, "NetworkPolicy", policy).data["spec"]
    ranges = [(each["port"], each.get("endPort", each["port"])) for each in rule["ingress"][0]["ports"]]
    assert rule["egress"][0]["ports"] == rule["ingress"][0]["ports"]
    parameters = [group["rayStartParams"] for group in groups(only(overlay, kind))]
    for given in parameters:
        # Metrics are Prometheus' alone: another policy.
        named = {int(port) for name, port in given.items() if name.endswith("-port")} - {
            int(given["metrics-export-port"])
        }
        missing = {port for port in named | fixed if not any(low <= port <= high for low, high in ranges)}
        assert missing == set()
        assert (int(given["min-worker-port"]), int(given["max-worker-port"])) in ranges
    head, worker = ({name: each for name, each in given.items() if name.endswith("port")} for given in parameters)
    assert head == worker
