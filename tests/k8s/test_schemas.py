"""Every object of every overlay is one that the API server would take, and a misspelt field is noticed in each kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.alerts import SOURCE, TARGET, prometheus_rule
from tests.dashboards import ALERTS, DASHBOARD
from tests.k8s.manifests import K8S, OVERLAYS, Manifest, manifests, only, render
from tests.k8s.schemas import DefinitionMissing, problems, strict

# By hand, so that a kind that nobody renders any more is missed.
KINDS = {
    "ClusterServingRuntime", "ConfigMap", "CronJob", "GRPCRoute", "Gateway", "HTTPRoute", "InferenceService", "Ingress",
    "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "PodMonitor", "PriorityClass",
    "PrometheusRule", "RayJob", "RayService", "Role", "RoleBinding", "Service", "ServiceAccount", "ServiceMonitor",
    "StatefulSet",
}  # fmt: skip
# Objects whose fields are the user's: any name is right there.
FREE = {"data", "labels", "annotations", "matchLabels", "selector", "nodeSelector", "rayStartParams"}
FREE |= {"requests", "limits", "namespaceSelector", "podSelector"}


def one_of(kind: str) -> Manifest:
    """An object of this kind, from whichever overlay has one: that in which most is said."""
    found = [each for overlay in OVERLAYS for each in manifests(overlay) if each.kind == kind]
    return max(found, key=lambda each: len(json.dumps(each.data)))


def named_objects(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all objects in a value whose fields have a meaning."""
    if isinstance(value, dict):
        if value:
            yield path
        for key, each in value.items():
            if key not in FREE:
                yield from named_objects(each, (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from named_objects(each, (*path, number))


def misspelt(manifest: Manifest, path: tuple[str | int, ...]) -> Manifest:
    """The object, in which the last field of the object at `path` has two letters swapped."""
    data = copy.deepcopy(manifest.data)
    place: Any = data
    for step in path:
        place = place[step]
    name = list(place)[-1]
    place[name[:-2] + name[:-3:-1] if len(set(name[-2:])) > 1 else name + "s"] = place.pop(name)
    return replace(manifest, data=data)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    wrong, unchecked = {}, None
    for each in manifests(overlay):
        try:
            if found := problems(each):
                wrong[str(each)] = found
        except DefinitionMissing as missing:
            unchecked = str(missing)
    assert wrong == {}
    if unchecked:
        pytest.skip(unchecked)


def checked(manifest: Manifest) -> list[str]:
    """As `problems`; skips the test where the object cannot be checked."""
    try:
        return problems(manifest)
    except DefinitionMissing as missing:
        pytest.skip(str(missing))


def test_the_overlays_are_all_there_and_have_all_kinds() -> None:
    assert set(OVERLAYS) >= {"laptop", "single-gpu", "production", "air-gapped", "archive", "kserve", "kserve-ray"}
    assert {each.kind for overlay in OVERLAYS for each in manifests(overlay)} == KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_misspelt_field_is_noticed_wherever_it_is(kind: str) -> None:
    manifest = one_of(kind)
    assert checked(manifest) == []
    paths = [path for path in named_objects(manifest.data) if path not in ((), ("metadata",))]
    paths = [path for path in paths if path[0] != "metadata"] or [("metadata",)]
    # A validation takes up to a third of a second: of the large objects about eight places, of the others every one.
    step = max(1, len(paths) // 8)
    unnoticed = [path for path in paths[::step] if not checked(misspelt(manifest, path))]
    assert unnoticed == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayService", "spec.upgradeStrategy.typ", "NewCluster"),
        ("RayService", "spec.rayClusterConfig.workerGroupSpecs.0.replicsa", 2),
        ("RayService", "spec.rayClusterConfig.workerGroupSpecs.0.replicas", "two"),
        ("RayService", "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.image", 7),
        ("RayService", "spec.rayClusterConfig.authOptions.mode", "tokens"),
        ("RayService", "spec.rayClusterConfig.headGroupSpec.template.metadata.labels", ["a"]),
        ("RayJob", "spec.shutdownAfterJobFinish", True),
        ("RayJob", "spec.ttlSecondsAfterFinished", "60"),
        ("InferenceService", "spec.predictor.minReplica", 2),
        ("InferenceService", "spec.predictor.containers.0.readinessProbe.httpGet.prot", 8080),
        ("ClusterServingRuntime", "spec.supportedModelFormats.0.autoselect", True),
        ("StatefulSet", "spec.template.spec.containers.0.securityContext.readOnlyRootFileSystem", True),
        ("StatefulSet", "spec.replicas", "one"),
        ("NetworkPolicy", "spec.policyType", ["Ingress"]),
        ("PodDisruptionBudget", "spec.maxUnavailble", 1),
        ("CronJob", "spec.jobTemplate.spec.template.spec.serviceAcountName", "x"),
        ("Namespace", "metadata.label", {}),
        ("ServiceMonitor", "spec.endpoints.0.intervall", "10s"),
        ("ServiceMonitor", "spec.endpoints.0.interval", "ten seconds"),
        ("PrometheusRule", "spec.groups.0.rules.0.expression", "up"),
        ("HTTPRoute", "spec.rules.0.timeouts.reqest", "0s"),
        ("Gateway", "spec.listeners.0.tls.mode", "terminate"),
        ("GRPCRoute", "spec.rules.0.backendRefs.0.port", "9000"),
    ],
)
def test_a_wrong_field_or_value_is_noticed(kind: str, path: str, value: object) -> None:
    manifest = one_of(kind)
    data = copy.deepcopy(manifest.data)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = data
    for step in steps:
        place = place[step]
    place[last] = value
    assert checked(replace(manifest, data=data))


def test_open_objects_stay_open() -> None:
    free = {"type": "object", "properties": {"a": {}}, "x-kubernetes-preserve-unknown-fields": True}
    assert "additionalProperties" not in strict(free)
    named = strict({"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}})
    assert named["additionalProperties"] is False and named["properties"]["a"]["additionalProperties"] is False
    assert strict({"additionalProperties": {"type": "string"}})["additionalProperties"] == {"type": "string"}
    assert strict({"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}) == {
        "type": ["integer", "string"]
    }


def test_no_object_is_rendered_twice() -> None:
    for overlay in OVERLAYS:
        names = [(each.kind, each.data["metadata"].get("namespace"), each.name) for each in manifests(overlay)]
        assert len(names) == len(set(names))


def test_every_component_is_part_of_an_overlay() -> None:
    folders = {path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")}
    files = [K8S / "overlays" / overlay / "kustomization.yaml" for overlay in OVERLAYS]
    used = {Path(each).name for file in files for each in yaml.safe_load(file.read_text()).get("components", ())}
    assert folders == used


def test_every_file_is_part_of_a_kustomization() -> None:
    for folder in [path.parent for path in K8S.rglob("kustomization.yaml")]:
        said = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = {*said.get("resources", ()), *(each.get("path") for each in said.get("patches", ()))}
        named |= {file for each in said.get("configMapGenerator", ()) for file in each.get("files", ())}
        there = {path.name for path in folder.iterdir() if path.suffix in (".yaml", ".py")}
        assert there - named == {"kustomization.yaml"}, folder


def test_the_alerts_are_those_of_the_dashboards_folder() -> None:
    assert SOURCE == ALERTS
    assert TARGET.read_text() == prometheus_rule(SOURCE.read_text()), "run `python k8s/alerts.py`"
    rule = only("production", "PrometheusRule")
    assert rule.data["spec"] == yaml.safe_load(ALERTS.read_text())


def test_the_dashboard_is_that_of_the_dashboards_folder() -> None:
    shown = only("production", "ConfigMap", "upriver-dashboard")
    assert json.loads(shown.data["data"]["live.json"]) == json.loads(DASHBOARD.read_text())
    assert shown.data["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_kustomize_refuses_what_does_not_fit_together(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(AssertionError, match=r"nothing\.yaml"):
        render(tmp_path)
