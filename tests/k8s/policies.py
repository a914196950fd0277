"""What must hold for every pod: a function for each rule, from rendered objects to what breaks it, in words.

Nothing here knows Upriver: see `agreement.py` for what ties manifests to the code, `network.py` for who may talk to
whom, `references.py` for what must exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any, Final

from tests.k8s.workloads import Object, Workload, container_lists, label_of, workloads

Rule = Callable[[list[Object]], Iterable[str]]

_SUFFIXES: Final = {
    "": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20,
    "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
# Private keys, our own and Amazon's keys, URLs with a password.
KEYS: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bupr_[0-9a-f]{16}_|://[^/\s:'\"]*:[^@\s/'\"$]+@"
)
_MEASURED: Final = ("cpu", "memory", "ephemeral-storage")
_SAFE_VOLUMES: Final = frozenset(
    {"emptyDir", "configMap", "secret", "projected", "persistentVolumeClaim", "downwardAPI", "ephemeral", "csi"}
)
_IMAGE: Final = re.compile(
    r"^(?P<name>[a-z0-9.\-_/]+(:\d+/[a-z0-9.\-_/]+)?)(:(?P<tag>[\w.\-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?$"
)


def quantity(text: str | int | float) -> Decimal:
    """The number that a Kubernetes quantity means: `500m`, `2`, `4Gi`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def _each(objects: list[Object]) -> Iterator[tuple[Workload, dict[str, Any], str]]:
    """Every container of every pod, with its name for messages."""
    for workload in workloads(objects):
        for container in workload.containers():
            yield workload, container, f"{workload} {container['name']}"


def _setting(workload: Workload, container: dict[str, Any], name: str) -> Any:
    """A setting of the security context: the container's, else the pod's."""
    own = (container.get("securityContext") or {}).get(name)
    return own if own is not None else (workload.spec.get("securityContext") or {}).get(name)


def every_pod_is_seen(objects: list[Object]) -> Iterator[str]:
    """No list of containers anywhere that the rules do not look at."""
    made = workloads(objects)
    for item in objects:
        # The pod that clears Redis is written as the head, and that of a model as its runtime.
        written = [each for each in made if each.owner is item and each.role != "redis-cleanup"]
        seen = sum(not (item["kind"] == "InferenceService" and "model" in item["spec"][each.role]) for each in written)
        if container_lists(item) != seen:
            yield f"{label_of(item)}: {container_lists(item)} lists of containers, of which {seen} are seen"


def not_privileged(objects: list[Object]) -> Iterator[str]:
    for _, container, name in _each(objects):
        context = container.get("securityContext") or {}
        if context.get("privileged"):
            yield f"{name}: privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: does not forbid to gain privileges"
        if context.get("procMount", "Default") != "Default":
            yield f"{name}: sees the whole of /proc"


def not_root(objects: list[Object]) -> Iterator[str]:
    for workload, container, name in _each(objects):
        if _setting(workload, container, "runAsNonRoot") is not True:
            yield f"{name}: may run as root"
        if _setting(workload, container, "runAsUser") in (0, "0") or _setting(workload, container, "runAsGroup") == 0:
            yield f"{name}: runs as root"


def read_only_root(objects: list[Object]) -> list[str]:
    return [
        f"{name}: its root file system can be written"
        for _, container, name in _each(objects)
        if (container.get("securityContext") or {}).get("readOnlyRootFilesystem") is not True
    ]


def no_capabilities(objects: list[Object]) -> Iterator[str]:
    for _, container, name in _each(objects):
        said = (container.get("securityContext") or {}).get("capabilities") or {}
        if said.get("drop") != ["ALL"]:
            yield f"{name}: keeps capabilities"
        if said.get("add"):
            yield f"{name}: has capabilities {said['add']}"


def system_calls_filtered(objects: list[Object]) -> list[str]:
    return [
        f"{name}: no seccomp profile"
        for workload, container, name in _each(objects)
        if (_setting(workload, container, "seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost")
    ]


def nothing_of_the_node(objects: list[Object]) -> Iterator[str]:
    """Neither its network, nor its processes, nor its files, nor its ports."""
    for workload in workloads(objects):
        yield from [f"{workload}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if workload.spec.get(key)]
        for volume in workload.spec.get("volumes", ()):
            kinds = set(volume) - {"name"}
            if not kinds <= _SAFE_VOLUMES:
                yield f"{workload}: volume {volume['name']} is {', '.join(sorted(kinds - _SAFE_VOLUMES))}"
    for _, container, name in _each(objects):
        yield from [
            f"{name}: host port {port['hostPort']}" for port in container.get("ports", ()) if port.get("hostPort")
        ]


def resources_bounded(objects: list[Object]) -> Iterator[str]:
    """Requests and limits of processor, memory and disk on every container; a limit is not below its request."""
    for _, container, name in _each(objects):
        said = container.get("resources") or {}
        requests, limits = said.get("requests") or {}, said.get("limits") or {}
        for what in _MEASURED:
            yield from [
                f"{name}: no {part} of {what}" for part in ("requests", "limits") if what not in (said.get(part) or {})
            ]
        for what in requests.keys() & limits.keys():
            if quantity(requests[what]) > quantity(limits[what]):
                yield f"{name}: requests more {what} than its limit"
        for what in requests.keys() | limits.keys():
            if "/" in what and requests.get(what) != limits.get(what):
                yield f"{name}: {what} requested and limited differ"


def volumes_bounded(objects: list[Object]) -> Iterator[str]:
    """An emptyDir has a size, and one in memory, with Ray's object store in it, fits into its container's limit."""
    for workload in workloads(objects):
        in_memory = Decimal(0)
        for volume in workload.spec.get("volumes", ()):
            empty = volume.get("emptyDir")
            if empty is None:
                continue
            if "sizeLimit" not in empty:
                yield f"{workload}: volume {volume['name']} has no size"
            elif empty.get("medium") == "Memory":
                in_memory += quantity(empty["sizeLimit"])
                store = workload.start.get("object-store-memory")
                if store is not None and quantity(store) > quantity(empty["sizeLimit"]):
                    yield f"{workload}: Ray's object store is larger than {volume['name']}"
        memory = (workload.main().get("resources") or {}).get("limits", {}).get("memory", 0)
        if in_memory and in_memory * 2 > quantity(memory):
            yield f"{workload}: files in memory could take more than half of its {memory}"


def volumes_mounted(objects: list[Object]) -> Iterator[str]:
    """What is mounted exists, nothing is mounted twice at a place, and every volume is mounted somewhere."""
    for workload in workloads(objects):
        there = [*(each["name"] for each in workload.spec.get("volumes", ())), *workload.claims]
        yield from [f"{workload}: two volumes {name}" for name in sorted(set(there)) if there.count(name) > 1]
        used = set()
        for container in workload.containers():
            mounts = container.get("volumeMounts", ())
            places = [mount["mountPath"] for mount in mounts]
            used |= {mount["name"] for mount in mounts}
            yield from [
                f"{workload} {container['name']}: no volume {mount['name']}"
                for mount in mounts
                if mount["name"] not in there
            ]
            yield from [
                f"{workload} {container['name']}: {path} twice"
                for path in sorted(set(places))
                if places.count(path) > 1
            ]
        if workload.role != "redis-cleanup":
            yield from [f"{workload}: volume {name} is not mounted" for name in sorted(set(there) - used)]


def images_named(objects: list[Object]) -> Iterator[str]:
    """Every image has a digest, or a tag that means one version."""
    for _, container, name in _each(objects):
        image = str(container.get("image", ""))
        match = _IMAGE.match(image)
        if match is None:
            yield f"{name}: {image!r} is no image"
        elif match["digest"] is None and (match["tag"] is None or not re.search(r"\d", match["tag"])):
            yield f"{name}: {image} has no version"
        if container.get("imagePullPolicy") == "Always":
            yield f"{name}: cannot start while the registry is away"


def probed(objects: list[Object]) -> Iterator[str]:
    """What runs for long is asked whether it is ready and alive, on ports that it has, and not in a hurry."""
    for workload in workloads(objects):
        if workload.ends:
            continue
        container = workload.main()
        name = f"{workload} {container['name']}"
        yield from [f"{name}: no {kind}" for kind in ("readinessProbe", "livenessProbe") if not container.get(kind)]
        ready, alive = container.get("readinessProbe") or {}, container.get("livenessProbe") or {}
        if alive and _patience_s(alive) < 30:
            yield f"{name}: ended after {_patience_s(alive)} s without an answer"
        if ready and alive and _patience_s(ready) > _patience_s(alive):
            yield f"{name}: ended before it is taken out of its Service"


def _patience_s(probe: dict[str, Any]) -> int:
    return int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))


def no_secret_values(objects: list[Object]) -> Iterator[str]:
    """Neither as a Secret, nor in an environment, nor in an argument, nor in a ConfigMap."""
    secret = re.compile(r"(?i)(password|passwd|secret|token|credential|access_?key|private_?key)")
    for item in objects:
        if item["kind"] == "Secret" and (item.get("data") or item.get("stringData")):
            yield f"{label_of(item)}: has values"
        for key, value in (item.get("data") or {}).items() if item["kind"] == "ConfigMap" else ():
            if re.search(r"(?im)^\s*(requirepass|masterauth|password|secret|token)\s*[:= ]\s*\S", str(value)):
                yield f"{label_of(item)}: {key} has a secret"
    for _, container, name in _each(objects):
        for variable in container.get("env", ()):
            value = str(variable.get("value", ""))
            if secret.search(variable["name"]) and value and not value.startswith(("/", "$(")):
                yield f"{name}: the value of {variable['name']} is written out"
        words = " ".join(map(str, [*container.get("command", ()), *container.get("args", ())]))
        if re.search(r"(?i)--?(\w*-)?(password|requirepass|token|secret)[= ](?!\$\(|/)\S", words):
            yield f"{name}: a secret among its arguments"
    if found := KEYS.search(repr(objects)):
        yield f"a key, or a URL with a password, stands in the objects: {found[0][:12]}..."


RULES: Final[dict[str, Rule]] = {
    rule.__name__: rule
    for rule in (
        every_pod_is_seen, not_privileged, not_root, read_only_root, no_capabilities, system_calls_filtered,
        nothing_of_the_node, resources_bounded, volumes_bounded, volumes_mounted, images_named, probed,
        no_secret_values,
    )
}  # fmt: skip
