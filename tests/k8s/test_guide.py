"""What k8s/README.md tells: the reader's own overlay renders as it is printed, and every Secret and folder is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import K8S, OVERLAYS, manifests, pods, render

GUIDE = (K8S / "README.md").read_text()


def test_an_overlay_of_ones_own_is_as_printed(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", GUIDE, re.S)
    remote = re.search(r"https://\S+//k8s/overlays/production\?ref=\S+", text)
    assert remote
    # Kustomize wants relative paths of folders.
    local = os.path.relpath(K8S / "overlays" / "production", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(text.replace(remote[0], local))
    objects = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(render(tmp_path))}
    assert objects["Gateway", "upriver"]["spec"]["gatewayClassName"] == "envoy"
    assert [each["hostname"] for each in objects["Gateway", "upriver"]["spec"]["listeners"]] == [
        *objects["HTTPRoute", "upriver"]["spec"]["hostnames"],
        *objects["GRPCRoute", "upriver"]["spec"]["hostnames"],
    ]
    assert "s3://tapes/in" in objects["RayJob", "upriver-archive"]["spec"]["entrypoint"]
    rendered = json.dumps(list(objects.values()))
    images = set(re.findall(r'"image": "([^"]+)"', rendered))
    assert {f"registry.example.org/video/upriver:0.1.0-{kind}" for kind in ("cpu", "gpu")} < images
    assert not any(image.startswith("upriver:") for image in images) and "example.org" in rendered


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_secret_that_has_to_be_there_is_named(overlay: str) -> None:
    rendered = json.dumps([each.data for each in manifests(overlay)])
    asked = set(re.findall(r'"secretName": "([^"]+)"', rendered))
    asked |= set(re.findall(r'"(?:secretKeyRef|secretRef|credentials)": {[^}]*"name": "([^"]+)"', rendered))
    asked |= set(re.findall(r'"certificateRefs": \[{"name": "([^"]+)"', rendered))
    (row,) = re.findall(rf"^\| `{overlay}` \|.*$", GUIDE, re.M)
    assert set(re.findall(r"`(upriver-[a-z0-9-]+)`", row)) == asked


def test_no_secret_is_in_the_manifests() -> None:
    assert [str(each) for overlay in OVERLAYS for each in manifests(overlay) if each.kind == "Secret"] == []


def test_the_tree_is_the_tree() -> None:
    (tree,) = re.findall(r"```text\n(.*?)```", GUIDE, re.S)
    said = {name for line in tree.splitlines() for name in re.findall(r"([a-z-]+)/", line.strip().split("   ")[0])}
    there = {path.parent.name for path in K8S.rglob("kustomization.yaml")}
    assert said == there | {"components", "overlays"}


def test_every_pod_is_found() -> None:
    found = {str(pod) for overlay in ("production", "kserve") for each in manifests(overlay) for pod in pods(each)}
    assert found == {
        "production: CronJob/upriver-archive .jobTemplate.spec.template",
        "production: InferenceService/upriver-gateway .predictor",
        "production: RayJob/upriver-archive .rayClusterSpec.headGroupSpec.template",
        "production: RayJob/upriver-archive .rayClusterSpec.workerGroupSpecs[0].template",
        "production: RayJob/upriver-archive .submitterPodTemplate",
        "production: RayService/upriver .rayClusterConfig.headGroupSpec.template",
        "production: RayService/upriver .rayClusterConfig.workerGroupSpecs[0].template",
        "production: StatefulSet/upriver-redis .template",
        "kserve: ClusterServingRuntime/upriver ",
    }
