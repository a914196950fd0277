"""The pods that come of rendered objects, as the cluster will have them: with what KubeRay and KServe add to them.

A policy that looks only at what is written would miss the autoscaler beside a Ray head, would take a runtime and the
InferenceService that uses it for two halves of nothing, and would select pods by labels that they do not have yet.

What the operators add is taken from KubeRay 1.7 (ray-operator/controllers/ray/common/pod.go: labelPod,
BuildAutoscalerContainer; job.go: submitter) and KServe 0.21 (pkg/controller/v1beta1/inferenceservice: Standard mode).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Object = dict[str, Any]

# Kinds of which no pod comes.
WITHOUT_PODS: Final = frozenset({
    "ClusterRole", "ClusterRoleBinding", "ConfigMap", "GRPCRoute", "Gateway", "HTTPRoute", "HorizontalPodAutoscaler",
    "Ingress", "LimitRange", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "PodMonitor",
    "PriorityClass", "PrometheusRule", "ResourceQuota", "Role", "RoleBinding", "ScaledObject", "Secret", "Service",
    "ServiceAccount", "ServiceMonitor",
})  # fmt: skip
# The place of the pod template by kind.
_TEMPLATES: Final = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
_RAY: Final = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec", "RayCluster": ""}
_RUNTIMES: Final = ("ServingRuntime", "ClusterServingRuntime")
_MODEL_FIELDS: Final = (
    "env",
    "resources",
    "readinessProbe",
    "livenessProbe",
    "image",
    "volumeMounts",
    "securityContext",
)
_NOT_OF_A_POD: Final = ("model", "labels", "annotations", "minReplicas", "maxReplicas", "timeout", "deploymentStrategy")


@dataclass(frozen=True)
class Workload:
    """One kind of pod.

    Attributes:
        owner: the object that it comes of. role: what it is in it, such as `head`, `worker live`, `predictor`.
        labels: of the pod. spec: its spec. ends: whether it is meant to end by itself, as a job's pods do.
        claims: names of volumes that its controller makes.
        start: options of `ray start`, for a node of Ray.
    """

    owner: Object
    role: str
    namespace: str
    labels: dict[str, str]
    spec: dict[str, Any]
    ends: bool = False
    claims: tuple[str, ...] = ()
    start: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.owner["metadata"]["name"])

    def containers(self) -> list[dict[str, Any]]:
        """All of them: those that run first, and those beside the main one."""
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    def main(self) -> dict[str, Any]:
        """The first container, which is Ray's or the application's."""
        made: dict[str, Any] = self.spec["containers"][0]
        return made

    def ports(self) -> dict[str, int]:
        """Names and numbers of its ports."""
        return {
            str(port.get("name", port["containerPort"])): int(port["containerPort"])
            for container in self.containers()
            for port in container.get("ports", ())
        }

    def __str__(self) -> str:
        return f"{self.owner['kind']}/{self.name} {self.role}".strip()


def label_of(item: Object) -> str:
    """An object's kind and name, for messages."""
    return f"{item['kind']}/{item['metadata']['name']}"


def namespace_of(item: Object) -> str:
    return str(item["metadata"].get("namespace", "default"))


def workloads(objects: list[Object]) -> list[Workload]:
    """Every kind of pod that comes of the objects.

    Raises:
        ValueError: an object of a kind of which nothing is known here, so that no pod stays unseen.
    """
    return [made for item in objects for made in _of(item, objects)]


def _of(item: Object, objects: list[Object]) -> Iterator[Workload]:
    kind, space = str(item["kind"]), namespace_of(item)
    if kind == "Pod":
        yield Workload(item, "", space, dict(item["metadata"].get("labels") or {}), item["spec"])
    elif kind in _TEMPLATES:
        template: Any = item
        for step in _TEMPLATES[kind]:
            template = template[step]
        claims = tuple(each["metadata"]["name"] for each in item["spec"].get("volumeClaimTemplates", ()))
        yield Workload(
            item, "", space, _labels(template), template["spec"], ends=kind in ("Job", "CronJob"), claims=claims
        )
    elif kind in _RAY:
        cluster = item["spec"][_RAY[kind]] if _RAY[kind] else item["spec"]
        yield from _ray_pods(item, cluster)
        submitter = item["spec"].get("submitterPodTemplate")
        if submitter is not None:
            yield Workload(item, "submitter", space, _labels(submitter), submitter["spec"], ends=True)
    elif kind == "InferenceService":
        yield from _kserve_pods(item, objects)
    elif kind in _RUNTIMES:
        # Also seen through each InferenceService that uses it; by itself it must be as safe, for those of others.
        spec = {key: value for key, value in item["spec"].items() if key not in ("supportedModelFormats",)}
        yield Workload(item, "runtime", space, dict(item["spec"].get("labels") or {}), spec)
    elif kind not in WITHOUT_PODS:
        raise ValueError(f"{label_of(item)}: nobody has said whether pods come of this kind")


def _ray_pods(item: Object, cluster: dict[str, Any]) -> Iterator[Workload]:
    space, name = namespace_of(item), str(item["metadata"]["name"])
    serves = item["kind"] == "RayService"
    head = cluster["headGroupSpec"]
    spec = copy.deepcopy(head["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):
        said = cluster.get("autoscalerOptions") or {}
        taken = ("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext")
        beside = {"name": "autoscaler", "image": spec["containers"][0]["image"]}
        spec["containers"].append(beside | {key: said[key] for key in taken if key in said})
    start = {str(key): str(value) for key, value in (head.get("rayStartParams") or {}).items()}
    on_head = not item["spec"].get("excludeHeadPodFromServeSvc", False)
    labels = _ray_labels(_labels(head["template"]), name, "head", "headgroup", serves and on_head)
    yield Workload(item, "head", space, labels, spec, start=start)
    kept = cluster.get("gcsFaultToleranceOptions")
    if kept and kept.get("backend", "redis") == "redis":
        # A job that clears a deleted cluster's keys: the head's pod, without what is beside Ray, and never asked.
        cleaning = copy.deepcopy(head["template"]["spec"])
        main = {key: value for key, value in cleaning["containers"][0].items() if not key.endswith("Probe")}
        cleaning["containers"] = [main]
        yield Workload(
            item, "redis-cleanup", space, labels | {"ray.io/node-type": "redis-cleanup"}, cleaning, ends=True
        )
    for group in cluster.get("workerGroupSpecs") or ():
        labels = _ray_labels(_labels(group["template"]), name, "worker", group["groupName"], serves)
        start = {str(key): str(value) for key, value in (group.get("rayStartParams") or {}).items()}
        yield Workload(item, f"worker {group['groupName']}", space, labels, group["template"]["spec"], start=start)


def _ray_labels(own: Mapping[str, str], name: str, kind: str, group: str, serves: bool) -> dict[str, str]:
    """The operator's labels, which the template's may overrule but for three; a cluster's name has a random end."""
    made = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{name}-{kind}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **own,
        "ray.io/cluster": name,
        "ray.io/node-type": kind,
        "ray.io/group": group,
    }
    return made | {"ray.io/serve": "true" if serves else "false"}


def _kserve_pods(item: Object, objects: list[Object]) -> Iterator[Workload]:
    name, space = str(item["metadata"]["name"]), namespace_of(item)
    for component in ("predictor", "transformer", "explainer"):
        said = item["spec"].get(component)
        if said is None:
            continue
        spec = {key: value for key, value in said.items() if key not in _NOT_OF_A_POD}
        model = said.get("model")
        if model is not None:
            spec = _with_runtime(item, spec, model, objects)
        labels = {
            **(item["metadata"].get("labels") or {}),
            **(said.get("labels") or {}),
            "app": f"isvc.{name}-{component}",
            "component": component,
            "serving.kserve.io/inferenceservice": name,
        }
        yield Workload(item, component, space, labels, spec)


def _with_runtime(item: Object, spec: dict[str, Any], model: dict[str, Any], objects: list[Object]) -> dict[str, Any]:
    found = [each for each in objects if each["kind"] in _RUNTIMES and each["metadata"]["name"] == model.get("runtime")]
    if not found:
        raise ValueError(f"{label_of(item)}: its runtime {model.get('runtime')!r} is not among the objects")
    runtime = copy.deepcopy(found[0]["spec"])
    for container in runtime["containers"]:
        if container["name"] == "kserve-container":
            container.update({key: model[key] for key in _MODEL_FIELDS if key in model})
            container["args"] = [
                str(each).replace("{{.Name}}", item["metadata"]["name"]) for each in container.get("args", ())
            ]
    merged = {key: value for key, value in runtime.items() if key not in ("supportedModelFormats", "protocolVersions")}
    for key, value in spec.items():
        merged[key] = [*merged[key], *value] if isinstance(merged.get(key), list) else value
    return merged


def _labels(template: dict[str, Any]) -> dict[str, str]:
    return dict((template.get("metadata") or {}).get("labels") or {})


def container_lists(value: Any) -> int:
    """How many lists of containers there are anywhere in a value: what `workloads` must have seen."""
    if isinstance(value, dict):
        return isinstance(value.get("containers"), list) + sum(container_lists(each) for each in value.values())
    return sum(container_lists(each) for each in value) if isinstance(value, list) else 0
