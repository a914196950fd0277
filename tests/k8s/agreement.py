"""What ties the manifests to the code: settings, commands, configurations, routes, waits and places, as rules.

Each rule takes rendered objects and yields, in words, what the code would not take or what would not come in time.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from tests.k8s.manifests import ROOT
from tests.k8s.policies import Rule
from tests.k8s.workloads import Object, Workload, label_of, workloads

PREFIX: Final = "UPRIVER_"
# What the application answers without credentials, besides what its own list of routes says.
_AGENT: Final = {"/api/healthz", "/api/local_raylet_healthz"}  # Ray: dashboard/modules/healthz
_OPEN_INFERENCE: Final = {"/v2/health/live", "/v2/health/ready"}  # the protocol's "Health" section
_DRAIN_IN_A_HOOK: Final = re.compile(r"second < (\d+)")
# Variables that libraries write to, whatever else they are for.
_WRITTEN: Final = (
    "XDG_CACHE_HOME",
    "HF_HOME",
    "UPRIVER_MODEL_CACHE",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TMPDIR",
)


def _containers(objects: list[Object]) -> Iterator[tuple[Workload, dict[str, Any], str]]:
    for workload in workloads(objects):
        for container in workload.containers():
            yield workload, container, f"{workload} {container['name']}"


def _values(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: str(each["value"]) for each in container.get("env", ()) if "value" in each}


@cache
def settings_classes() -> dict[str, Any]:
    """Every class of settings that reads the environment, by its prefix."""
    import infra
    from infra.settings import LayeredSettings

    for module in pkgutil.iter_modules(infra.__path__):
        if module.name.endswith("settings"):
            importlib.import_module(f"infra.{module.name}")
    return {str(each.model_config["env_prefix"]): each for each in LayeredSettings.__subclasses__()}


@cache
def read_directly() -> frozenset[str]:
    """Variables that the code reads by their whole name."""
    from infra.structured_logs import LogSettings

    texts = [
        path.read_text()
        for package in ("pipeline", "actors", "infra", "jobs")
        for path in (ROOT / package).rglob("*.py")
    ]
    found = {name for text in texts for name in re.findall(r"[\"'](UPRIVER_[A-Z_]*[A-Z])[\"']", text)}
    return frozenset(found | {f"UPRIVER_LOG_{name.upper()}" for name in LogSettings.model_fields})


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update(values, XDG_CONFIG_HOME=os.devnull)  # no file of the user's
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def settings_are_known(objects: list[Object]) -> Iterator[str]:
    """Every `UPRIVER_*` is a setting, and its value a possible one."""
    from infra.errors import InfraError
    from infra.settings import load_layers
    from infra.structured_logs import LogSettings

    for _, container, name in _containers(objects):
        mine = {key: value for key, value in _values(container).items() if key.startswith(PREFIX)}
        for key in mine:
            owner = max((prefix for prefix in settings_classes() if key.startswith(prefix)), key=len)
            field = key.removeprefix(owner).lower()
            if key not in read_directly() and field not in settings_classes()[owner].model_fields:
                yield f"{name}: no setting {key}"
        try:
            with _environment(mine):
                LogSettings()
                for prefix, settings in settings_classes().items():
                    load_layers(settings, table=None if prefix == PREFIX else prefix.split("_")[1].lower())
        except (InfraError, ValidationError) as error:
            yield f"{name}: {error}"


def commands_parse(objects: list[Object]) -> Iterator[str]:
    """Whatever runs `upriver` does it with a command and options that there are."""
    for workload, container, name in _containers(objects):
        words = [str(each) for each in [*container.get("command", ()), *container.get("args", ())]]
        # The image's entry point is `upriver`; the operator gives Ray's containers a command of its own.
        if words and "command" not in container and not workload.start:
            words = ["upriver", *words]
        if words[:1] == ["upriver"]:
            yield from (f"{name}: {problem}" for problem in _unparsed(words[1:]))
    for item in objects:
        if item["kind"] == "RayJob":
            words = shlex.split(item["spec"]["entrypoint"])
            if words[:1] != ["upriver"]:
                yield f"{label_of(item)}: its entry point is {words[0]}"
            yield from (f"{label_of(item)}: {problem}" for problem in _unparsed(words[1:]))


def _unparsed(words: list[str]) -> Iterator[str]:
    import typer
    from typer.main import get_command

    from jobs.cli import app

    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    if words[0] not in commands:
        yield f"no command {words[0]!r}"
        return
    command = commands[words[0]]
    if command.context_settings.get("allow_extra_args"):  # it hands its words on to a parser of its own
        command = get_command(importlib.import_module(f"jobs.{words[0].replace('-', '_')}").app)
    try:
        command.make_context(words[0], words[1:])
    except typer.BadParameter.__mro__[1] as error:  # what all of the parser's errors descend from
        yield str(error)


def serve_configurations_are_taken(objects: list[Object]) -> Iterator[str]:
    """By Serve's schema, by the application's arguments, by the service's settings; and ports are those of the pods."""
    from ray.serve.schema import ServeDeploySchema

    from actors.endpoint import APPLICATION, ApplicationArguments
    from infra.errors import InfraError
    from infra.live_settings import load_live_settings

    for item in objects:
        if item["kind"] != "RayService":
            continue
        try:
            config = yaml.safe_load(item["spec"]["serveConfigV2"])
            schema = ServeDeploySchema.model_validate(config)
            (application,) = schema.applications
            module, _, function = application.import_path.partition(":")
            if not callable(getattr(importlib.import_module(module), function, None)):
                yield f"{label_of(item)}: {application.import_path} cannot be imported"
            arguments = ApplicationArguments.model_validate(application.args)
            live = load_live_settings(arguments.live).values
        except (ValidationError, InfraError, ImportError) as error:
            yield f"{label_of(item)}: {error}"
            continue
        yield from (f"{label_of(item)}: Serve has no {name}" for name in _ignored(schema, config))
        if application.name != APPLICATION:
            yield f"{label_of(item)}: the application is called {application.name}"
        if not live.asks_for_credentials:
            yield f"{label_of(item)}: asks nobody for credentials"
        worker = next(each for each in workloads([item]) if each.role.startswith("worker"))
        said = {
            "serve": (schema.http_options.port, live.port),
            "serve-grpc": (schema.grpc_options.port, live.grpc_port),
        }
        for port, numbers in said.items():
            if set(numbers) != {worker.ports().get(port)}:
                yield f"{label_of(item)}: port {port} is {numbers} here and {worker.ports().get(port)} in the pod"


def _ignored(model: BaseModel, said: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Fields that Serve's schema would pass over in silence."""
    for name, value in said.items():
        if name not in type(model).model_fields:
            yield place + name
            continue
        read = getattr(model, name)
        if isinstance(read, BaseModel) and isinstance(value, Mapping):
            yield from _ignored(read, value, f"{place}{name}.")
        elif isinstance(read, list) and read and isinstance(read[0], BaseModel):
            for one, told in zip(read, value, strict=True):
                yield from _ignored(one, told, f"{place}{name}.")


@cache
def routes() -> frozenset[str]:
    """Paths that the live application answers to a GET."""
    from actors.live_app import make_app

    app = make_app(lambda: None)  # type: ignore[arg-type, return-value]  # nobody is asked here
    return frozenset(route.path for route in app.routes if "GET" in (getattr(route, "methods", None) or ()))


def probes_ask_what_is_there(objects: list[Object]) -> Iterator[str]:
    """A path is a route of what listens on its port, and the port one of the pod's, or of Ray's agent."""
    for workload, container, name in _containers(objects):
        words = [str(each) for each in container.get("args", ())]
        predictor = words[:1] == ["predictor"]
        names = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
        agent = int(workload.start.get("dashboard-agent-listen-port", 0))
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = (container.get(kind) or {}).get("httpGet")
            if not get:
                continue
            port, path = names.get(get["port"], get["port"]), get["path"]
            if port not in {*names.values(), agent}:
                yield f"{name}: {kind} asks port {port}, which is not the pod's"
            there = _AGENT if port == agent else _OPEN_INFERENCE if predictor else routes()
            if path not in there:
                yield f"{name}: {kind} asks for {path}, which is no route of port {port}"
            if kind == "livenessProbe" and path in ("/readyz", "/v2/health/ready"):
                yield f"{name}: is ended when it is only not ready"


def waits_are_long_enough(objects: list[Object]) -> Iterator[str]:
    """Whoever waits for another waits longer than it may take."""
    longest_drain = idle = 0.0
    for item in objects:
        if item["kind"] != "RayService":
            continue
        args = yaml.safe_load(item["spec"]["serveConfigV2"])["applications"][0]["args"]
        drain, idle = float(args.get("drain_s", 60)), float(args["live"].get("idle_timeout_s", 60))
        longest_drain = max(longest_drain, drain)
        for workload in workloads([item]):
            if not workload.role.startswith("worker"):
                continue
            grace = int(workload.spec.get("terminationGracePeriodSeconds", 30))
            hook = (workload.main().get("lifecycle") or {}).get("preStop", {}).get("exec", {}).get("command", ("",))[-1]
            waits = _DRAIN_IN_A_HOOK.search(hook)
            if waits is None:
                yield f"{workload}: nothing drains its replicas before it is stopped"
            elif int(waits[1]) <= drain:
                yield f"{workload}: the hook waits {waits[1]} s, a replica may drain for {drain:.0f}"
            if grace <= max(drain, int(waits[1]) if waits else 0) + 20:
                yield f"{workload}: is killed after {grace} s"
            if item["spec"].get("rayClusterDeletionDelaySeconds", 60) < grace + drain:
                yield f"{label_of(item)}: an old cluster is deleted before its streams have ended"
        upgrade = item["spec"].get("upgradeStrategy", {}).get("clusterUpgradeOptions")
        if upgrade and upgrade["intervalSeconds"] <= drain:
            yield f"{label_of(item)}: a step of an upgrade begins before the last one's replicas have drained"
    for item in objects:
        yield from _proxy_waits(item, idle)
    for workload, container, name in _containers(objects):
        least = _stop_s(list(container.get("args", ())))
        if workload.role != "runtime" and int(workload.spec.get("terminationGracePeriodSeconds", 30)) <= least:
            yield f"{name}: is killed before its streams have ended, which may take {least:.0f} s"


def _stop_s(words: list[Any]) -> float:
    """How long a process with these arguments may take to end."""
    from actors.endpoint import ApplicationArguments

    predictor = settings_classes()["UPRIVER_PREDICTOR_"]
    if words[:1] == ["serve"]:
        return ApplicationArguments().drain_s
    return float(predictor.model_fields["drain_s"].default) if words[:1] == ["predictor"] else 0.0


def _proxy_waits(item: Object, idle_s: float) -> Iterator[str]:
    if item["kind"] == "Ingress":
        for way in ("read", "send"):
            said = item["metadata"].get("annotations", {}).get(f"nginx.ingress.kubernetes.io/proxy-{way}-timeout", "60")
            if float(said) <= idle_s:
                yield f"{label_of(item)}: ends a silent stream after {said} s, the service after {idle_s:.0f}"
    if item["kind"] == "HTTPRoute":
        for rule in item["spec"]["rules"]:
            for kind in ("request", "backendRequest"):
                if (rule.get("timeouts") or {}).get(kind) != "0s":
                    yield f"{label_of(item)}: ends a WebSocket by its {kind} time-out"


def places_are_mounted(objects: list[Object]) -> Iterator[str]:
    """Files that configurations and arguments name lie in what is mounted; what is written to can be written."""
    for workload, container, name in _containers(objects):
        mounts = {PurePosixPath(each["mountPath"]): each for each in container.get("volumeMounts", ())}
        named = re.findall(r"(?<==)/[\w/.-]+", " ".join(map(str, container.get("args", ()))))
        if workload.owner["kind"] == "RayService" and workload.role.startswith("worker"):
            live = yaml.safe_load(workload.owner["spec"]["serveConfigV2"])["applications"][0]["args"]["live"]
            named += [live["keys_file"], *(model for model in live["models"] if model.startswith("/"))]
        for place in named:
            if _mount(mounts, place) is None and not place.startswith("/mnt/models"):  # KServe mounts that
                yield f"{name}: {place} is not mounted"
        written = [value for key, value in _values(container).items() if key in _WRITTEN]
        # What starts runs is a script of Python's own library; everything else of ours, and Ray, has temporary files.
        if "upriver:" in container["image"] and container["name"] != "start":
            written.append("/tmp")
        for place in written:
            mount = _mount(mounts, place)
            if mount is None or mount.get("readOnly"):
                yield f"{name}: {place} cannot be written"


def _mount(mounts: Mapping[PurePosixPath, Any], place: str) -> Any:
    path = PurePosixPath(place)
    return next((mounts[each] for each in (path, *path.parents) if each in mounts), None)


RULES: Final[dict[str, Rule]] = {
    rule.__name__: rule
    for rule in (
        settings_are_known, commands_parse, serve_configurations_are_taken, probes_ask_what_is_there,
        waits_are_long_enough, places_are_mounted,
    )
}  # fmt: skip
