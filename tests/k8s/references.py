"""What must exist: everything that an object names is another object, a port of one, or a prerequisite that is told.

And what must not be reachable: Ray's own ports, by any Service, Ingress or route of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.k8s.network import selectors, selects
from tests.k8s.policies import Rule
from tests.k8s.workloads import Object, Workload, label_of, namespace_of, workloads

# GCS, dashboard, Ray Client, agents: who reaches one of them runs code (CVE-2023-48022), or reads what is there.
RAY_PORTS: Final = {6379, 6380, 6381, 6382, 6383, 8265, 10001, 52365}
_PUBLIC: Final = ("LoadBalancer", "NodePort", "ExternalName")
# In every namespace of every cluster.
_ALWAYS: Final = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
_ALWAYS_CLASSES: Final = {"system-cluster-critical", "system-node-critical"}


@dataclass(frozen=True)
class Named:
    """An object that another one names. `by`: which, in words."""

    kind: str
    name: str
    by: str


def named(objects: list[Object]) -> Iterator[Named]:
    """Everything in the namespace that objects name and that somebody must have made."""
    for workload in workloads(objects):
        spec, by = workload.spec, str(workload)
        yield Named("ServiceAccount", spec.get("serviceAccountName", "default"), by)
        if spec.get("priorityClassName"):
            yield Named("PriorityClass", spec["priorityClassName"], by)
        for each in spec.get("imagePullSecrets", ()):
            yield Named("Secret", each["name"], by)
        for volume in spec.get("volumes", ()):
            yield from _of_volume(volume, by)
        for container in workload.containers():
            yield from _of_environment(container, f"{by} {container['name']}")
    for item in objects:
        yield from _of_object(item)


def _of_volume(volume: Mapping[str, Any], by: str) -> Iterator[Named]:
    if "persistentVolumeClaim" in volume:
        yield Named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], by)
    sources = [volume, *(volume.get("projected") or {}).get("sources", ())]
    for source in sources:
        config, secret = source.get("configMap"), source.get("secret")
        if config and not config.get("optional"):
            yield Named("ConfigMap", config["name"], by)
        if secret and not secret.get("optional"):
            yield Named("Secret", secret.get("secretName") or secret["name"], by)


def _of_environment(container: Mapping[str, Any], by: str) -> Iterator[Named]:
    for each in container.get("envFrom", ()):
        for key, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
            if key in each:  # an optional one is told too: somebody will look for it
                yield Named(kind, each[key]["name"], by)
    for each in container.get("env", ()):
        source = each.get("valueFrom") or {}
        for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if key in source:
                yield Named(kind, source[key]["name"], by)


def _of_object(item: Object) -> Iterator[Named]:
    by, spec = label_of(item), item.get("spec") or {}
    if item["kind"] == "Ingress":
        for each in spec.get("tls", ()):
            yield Named("Secret", each["secretName"], by)
    elif item["kind"] == "Gateway":
        for listener in spec["listeners"]:
            for each in (listener.get("tls") or {}).get("certificateRefs", ()):
                yield Named("Secret", each["name"], by)
    elif item["kind"] in ("ServiceMonitor", "PodMonitor"):
        for endpoint in [*spec.get("endpoints", ()), *spec.get("podMetricsEndpoints", ())]:
            credentials = (endpoint.get("authorization") or {}).get("credentials")
            if credentials:
                yield Named("Secret", credentials["name"], by)
    elif item["kind"] == "RoleBinding":
        yield Named(item["roleRef"]["kind"], item["roleRef"]["name"], by)
        for subject in item.get("subjects", ()):
            yield Named(subject["kind"], subject["name"], by)
    elif item["kind"] == "InferenceService":
        place = str((spec["predictor"].get("model") or {}).get("storageUri", ""))
        if place.startswith("pvc://"):
            yield Named("PersistentVolumeClaim", place.removeprefix("pvc://").partition("/")[0], by)
    elif item["kind"] in ("HTTPRoute", "GRPCRoute"):
        for parent in spec.get("parentRefs", ()):
            yield Named("Gateway", parent["name"], by)
    for key in ("rayClusterConfig", "rayClusterSpec"):
        password = ((spec.get(key) or {}).get("gcsFaultToleranceOptions") or {}).get("redisPassword")
        if password:
            yield Named("Secret", password["valueFrom"]["secretKeyRef"]["name"], by)


def missing(objects: list[Object]) -> list[Named]:
    """What is named and is none of the objects."""
    there = {(item["kind"], item["metadata"]["name"]) for item in objects} | _ALWAYS
    return [
        each
        for each in named(objects)
        if (each.kind, each.name) not in there and not (each.kind == "PriorityClass" and each.name in _ALWAYS_CLASSES)
    ]


def prerequisites(guide: str) -> dict[str, set[str]]:
    """Names of the Secrets that a guide tells to make first, by overlay: the last column of its table of overlays."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in guide.splitlines() if line.startswith("|")
    ]
    start = next(number for number, row in enumerate(rows) if row[0] == "overlay" and row[-1] == "Secrets")
    told = {}
    for row in rows[start + 2 :]:
        overlay = re.fullmatch(r"`([a-z-]+)`", row[0])
        if overlay is None:  # the next table
            break
        told[overlay[1]] = set(re.findall(r"`([a-z0-9][a-z0-9.-]*)`", row[-1]))
    return told


def services(objects: list[Object]) -> list[Object]:
    """Services of the objects, and those that KubeRay and KServe make of them, with the selectors that they get."""
    made = [item for item in objects if item["kind"] == "Service"]
    for item in objects:
        space, name = namespace_of(item), item["metadata"]["name"]
        if item["kind"] in ("RayService", "RayJob", "RayCluster"):
            pods = {each.role: each for each in workloads([item])}
            head = item["spec"].get("rayClusterConfig") or item["spec"].get("rayClusterSpec") or item["spec"]
            group = head["headGroupSpec"]
            ports = [{"name": key, "port": port} for key, port in pods["head"].ports().items()]
            selector = {"ray.io/cluster": name, "ray.io/node-type": "head"}
            made.append(_service(f"{name}-head-svc", space, selector, ports, group.get("serviceType", "ClusterIP")))
            upgrade = (item["spec"].get("upgradeStrategy") or {}).get("type")
            if item["kind"] == "RayService" and upgrade != "NewClusterWithIncrementalUpgrade":
                said = item["spec"].get("serveService") or {"metadata": {}, "spec": {}}
                serving = {each["name"]: each for each in ports if each["name"].startswith("serve")}
                serving |= {each["name"]: each for each in said["spec"].get("ports", ())}
                made.append(
                    _service(
                        said["metadata"].get("name", f"{name}-serve-svc"),
                        space,
                        {"ray.io/cluster": name, "ray.io/serve": "true"},
                        list(serving.values()),
                        said["spec"].get("type", group.get("serviceType", "ClusterIP")),
                    )
                )
    return made


def _service(name: str, space: str, selector: dict[str, str], ports: list[Any], kind: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": space},
        "spec": {"type": kind, "selector": selector, "ports": ports},
    }


def selected(objects: list[Object], space: str, labels: Mapping[str, str]) -> list[Workload]:
    """The pods of a namespace that have all these labels."""
    return [
        each
        for each in workloads(objects)
        if each.namespace == space and selects({"matchLabels": labels}, each.labels) and each.role != "redis-cleanup"
    ]


def services_lead_to_pods(objects: list[Object]) -> Iterator[str]:
    """A Service selects pods, and each of its ports is one that they have."""
    for service in services(objects):
        spec = service["spec"]
        pods = selected(objects, namespace_of(service), spec.get("selector") or {"-": "-"})
        if not pods:
            yield f"{label_of(service)}: selects no pod"
        for port in spec["ports"]:
            wanted = port.get("targetPort", port["port"])
            for each in pods:
                ports = each.ports()
                if wanted not in (ports if isinstance(wanted, str) else ports.values()):
                    yield f"{label_of(service)}: {each} has no port {wanted}"


def routes_lead_to_services(objects: list[Object]) -> Iterator[str]:
    """Every backend of an Ingress or a route is a port of a Service."""
    there: dict[str, set[Any]] = {}
    for service in services(objects):
        there[service["metadata"]["name"]] = {
            key for port in service["spec"]["ports"] for key in (port["port"], port.get("name"))
        }
    for item, name, port in backends(objects):
        if name not in there:
            yield f"{label_of(item)}: no Service {name}"
        elif port not in there[name]:
            yield f"{label_of(item)}: Service {name} has no port {port}"


def backends(objects: list[Object]) -> Iterator[tuple[Object, str, Any]]:
    """(object, Service, port name or number) of whatever lets traffic in."""
    for item in objects:
        spec = item.get("spec") or {}
        if item["kind"] == "Ingress":
            found = [path["backend"] for rule in spec.get("rules", ()) for path in rule["http"]["paths"]]
            found += [spec["defaultBackend"]] if "defaultBackend" in spec else []
            for each in found:
                port = each["service"]["port"]
                yield item, each["service"]["name"], port.get("name", port.get("number"))
        elif item["kind"] in ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute"):
            for rule in spec["rules"]:
                for each in rule["backendRefs"]:
                    yield item, each["name"], each["port"]


def ray_not_exposed(objects: list[Object]) -> Iterator[str]:
    """No Service is seen from outside, no Ingress or route leads to a port of Ray's own; tokens are asked for."""
    by_name = {service["metadata"]["name"]: service for service in services(objects)}
    for service in by_name.values():
        if service["spec"].get("type", "ClusterIP") in _PUBLIC or service["spec"].get("externalIPs"):
            yield f"{label_of(service)}: is seen outside of the cluster"
    for item, name, port in backends(objects):
        for each in (by_name.get(name) or {"spec": {"ports": []}})["spec"]["ports"]:
            if port in (each["port"], each.get("name")) and _numbers(each) & RAY_PORTS:
                yield f"{label_of(item)}: leads to Ray's port {port}"
    for item in objects:
        spec = item.get("spec") or {}
        cluster = (
            spec.get("rayClusterConfig")
            or spec.get("rayClusterSpec")
            or (spec if item["kind"] == "RayCluster" else None)
        )
        if item["kind"] in ("RayService", "RayJob", "RayCluster") and cluster:
            if (cluster.get("authOptions") or {}).get("mode") != "token":
                yield f"{label_of(item)}: asks nobody for a token"
            if cluster["headGroupSpec"].get("enableIngress"):
                yield f"{label_of(item)}: has an Ingress for the dashboard"


def _numbers(port: Mapping[str, Any]) -> set[int]:
    return {each for each in (port["port"], port.get("targetPort")) if isinstance(each, int)}


def ports_of_probes_exist(objects: list[Object]) -> Iterator[str]:
    """A named port is one of its container's."""
    for workload in workloads(objects):
        for container in workload.containers():
            names = {port.get("name") for port in container.get("ports", ())}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind) or {}
                for how in ("httpGet", "tcpSocket"):
                    port = (probe.get(how) or {}).get("port")
                    if isinstance(port, str) and port not in names:
                        yield f"{workload} {container['name']}: {kind} asks a port {port} that there is not"


def monitors_find_ports(objects: list[Object]) -> Iterator[str]:
    """A monitor selects a Service, or pods, of which each has the port that it names."""
    for item in objects:
        spec, space = item.get("spec") or {}, namespace_of(item)
        if item["kind"] == "ServiceMonitor":
            chosen = [s for s in services(objects) if selects(spec["selector"], s["metadata"].get("labels") or {})]
            if not chosen:
                yield f"{label_of(item)}: selects no Service"
            for endpoint in spec["endpoints"]:
                for service in chosen:
                    if endpoint["port"] not in {port.get("name") for port in service["spec"]["ports"]}:
                        yield f"{label_of(item)}: {label_of(service)} has no port {endpoint['port']}"
        elif item["kind"] == "PodMonitor":
            pods = [w for w in workloads(objects) if w.namespace == space and selects(spec["selector"], w.labels)]
            pods = [each for each in pods if each.role != "redis-cleanup"]
            if not pods:
                yield f"{label_of(item)}: selects no pod"
            for endpoint in spec["podMetricsEndpoints"]:
                yield from [
                    f"{label_of(item)}: {each} has no port {endpoint['port']}"
                    for each in pods
                    if endpoint["port"] not in each.ports()
                ]


def budgets_cover_pods(objects: list[Object]) -> Iterator[str]:
    """A disruption budget selects pods, lets at least one of them go, and no two budgets are about one pod."""
    budgets = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    for workload in workloads(objects):
        mine = [
            each
            for each in budgets
            if namespace_of(each) == workload.namespace and selects(each["spec"].get("selector"), workload.labels)
        ]
        if len(mine) > 1:
            yield f"{workload}: {len(mine)} budgets, so that it cannot be evicted at all"
    for item in budgets:
        pods = [w for w in workloads(objects) if selects(item["spec"].get("selector"), w.labels)]
        if not pods:
            yield f"{label_of(item)}: selects no pod"
        if item["spec"].get("maxUnavailable") in (0, "0", "0%"):
            yield f"{label_of(item)}: lets no pod go, so that no node can be drained"
        least = item["spec"].get("minAvailable")
        for each in pods:
            fewest = (
                (each.owner["spec"].get("predictor") or {}).get("minReplicas"),
                each.owner["spec"].get("replicas"),
            )
            for count in fewest:
                if isinstance(least, int) and isinstance(count, int) and least >= count:
                    yield f"{label_of(item)}: lets none of {count} pods go, so that no node can be drained"


def unmatched_selectors(objects: list[Object], pods: list[Workload]) -> set[str]:
    """Selectors of the objects' policies, and single values in them, that none of the pods has."""
    return {
        f"{label_of(item)} {place}: {part}"
        for item in objects
        if item["kind"] == "NetworkPolicy"
        for place, selector in selectors(item)
        for part in _parts(selector)
        if not any(each.namespace == namespace_of(item) and selects(part, each.labels) for each in pods)
    }


def _parts(selector: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The selector once for each value that it lists: a misspelt one among others would not be missed otherwise."""
    for number, each in enumerate(selector.get("matchExpressions") or ()):
        if each["operator"] == "In" and len(each["values"]) > 1:
            for value in each["values"]:
                others = [*selector["matchExpressions"]]
                others[number] = {**each, "values": [value]}
                yield {**selector, "matchExpressions": others}
            return
    yield dict(selector)


def least_rights(objects: list[Object]) -> Iterator[str]:
    """Roles name what they allow, nothing that leads to more; only who has a Role, or scales Ray, gets a token."""
    leading = {"secrets", "pods/exec", "pods/attach", "serviceaccounts/token", "roles", "rolebindings", "clusterroles"}
    for item in objects:
        if item["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            yield f"{label_of(item)}: counts in all namespaces"
        for rule in item.get("rules", ()) if item["kind"] in ("Role", "ClusterRole") else ():
            for key in ("apiGroups", "resources", "verbs"):
                if "*" in rule.get(key, ()):
                    yield f"{label_of(item)}: all {key}"
            if set(rule.get("resources", ())) & leading or set(rule.get("verbs", ())) & {
                "escalate",
                "bind",
                "impersonate",
            }:
                yield f"{label_of(item)}: can give itself more rights"
        if item["kind"] == "ServiceAccount" and item.get("automountServiceAccountToken") is not False:
            yield f"{label_of(item)}: its pods get a token unasked"
    bound = {
        subject["name"]
        for item in objects
        if item["kind"] == "RoleBinding"
        for subject in item.get("subjects", ())
        if subject["kind"] == "ServiceAccount"
    }
    for workload in workloads(objects):
        account = workload.spec.get("serviceAccountName")
        if workload.role == "runtime":  # the account is the InferenceService's
            continue
        if account in (None, "default"):
            yield f"{workload}: has the namespace's account"
        if workload.spec.get("automountServiceAccountToken") is not False and account not in bound:
            yield f"{workload}: gets a token that it has no use for"
        tokens = {
            volume["name"]
            for volume in workload.spec.get("volumes", ())
            for source in (volume.get("projected") or {}).get("sources", ())
            if "serviceAccountToken" in source
        }
        for container in workload.containers():
            if container["name"] != "autoscaler" and tokens & {
                each["name"] for each in container.get("volumeMounts", ())
            }:
                yield f"{workload} {container['name']}: gets a token that it has no use for"


RULES: Final[dict[str, Rule]] = {
    rule.__name__: rule
    for rule in (
        services_lead_to_pods, routes_lead_to_services, ray_not_exposed, ports_of_probes_exist, monitors_find_ports,
        budgets_cover_pods, least_rights,
    )
}  # fmt: skip
