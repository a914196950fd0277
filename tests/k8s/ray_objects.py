"""What the manifests say to Ray, as a machine without Kubernetes can do it: environments, configurations, commands.

Replaced are only ports, which would be in each other's way, and places that the kubelet mounts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tests.k8s.mutations import objects_of
from tests.k8s.workloads import Object, Workload, workloads


def ray_object(overlay: str, kind: str) -> Object:
    """The overlay's one RayService, or RayJob."""
    (found,) = [each for each in objects_of(overlay) if each["kind"] == kind]
    return found


def serve_config(overlay: str) -> dict[str, Any]:
    """The Serve configuration of the overlay's RayService."""
    read: dict[str, Any] = yaml.safe_load(ray_object(overlay, "RayService")["spec"]["serveConfigV2"])
    return read


def relocated(config: dict[str, Any], *, http: int, grpc: int, keys_file: str) -> dict[str, Any]:
    """The configuration with other ports, and with the file of keys at another place."""
    made = copy.deepcopy(config)
    made["http_options"]["port"], made["grpc_options"]["port"] = http, grpc
    (application,) = made["applications"]
    application["args"]["live"] |= {"port": http, "grpc_port": grpc, "keys_file": keys_file}
    return made


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    """The variables whose values stand in the manifest."""
    return {each["name"]: str(each["value"]) for each in container.get("env", ()) if "value" in each}


def ray_environment(item: Object) -> dict[str, str]:
    """What all nodes of a cluster have in their environment, as the operator and the containers have it.

    Raises:
        AssertionError: nodes differ in a variable.
    """
    cluster = item["spec"].get("rayClusterConfig") or item["spec"]["rayClusterSpec"]
    made = {"RAY_AUTH_MODE": cluster["authOptions"]["mode"]}
    for workload in workloads([item]):
        for name, value in environment(workload.main()).items():
            assert made.setdefault(name, value) == value, f"{workload}: {name}"
    return made


def probes(objects: list[Object]) -> Iterator[tuple[Workload, int, str]]:
    """(pod, port, path) of every HTTP probe."""
    for workload in workloads(objects):
        for container in workload.containers():
            names = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                get = (container.get(kind) or {}).get("httpGet")
                if get:
                    yield workload, int(names.get(get["port"], get["port"])), str(get["path"])
