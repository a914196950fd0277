"""What an object has to look like: the API's own schemas, so strict that a field nobody knows is an error.

Custom resources are checked against their CustomResourceDefinitions, which are not part of this repository; those that
are not there by models of the fields that we use. What is core to Kubernetes, by `kubernetes-validate`.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import yaml
from pydantic import ValidationError

from tests.k8s.extensions import MODELS
from tests.k8s.manifests import ROOT, Manifest

# The oldest Kubernetes that the guides name, and the newest that kubernetes-validate knows.
VERSIONS: Final = ("1.29", kubernetes_validate.latest_version())
CORE_GROUPS: Final = {
    "", "apps", "batch", "networking.k8s.io", "policy", "rbac.authorization.k8s.io", "scheduling.k8s.io"
}  # fmt: skip
# What must come from a real CustomResourceDefinition.
DEFINED: Final = {("ray.io", "RayService"), ("ray.io", "RayJob")} | {
    ("serving.kserve.io", kind) for kind in ("InferenceService", "ClusterServingRuntime")
}
WHERE: Final = (
    "needs the CRD schemas: files of ray-project/kuberay (helm-chart/kuberay-operator/crds) and kserve/kserve "
    "(config/crd/full) in the folder that UPRIVER_CRD_DIR names, or in ../shared/crds beside the checkout"
)


class DefinitionMissing(Exception):
    """An object cannot be checked here; the text is the reason of the skip."""


def crd_folder() -> Path | None:
    """The folder of the CustomResourceDefinitions, None where there is none."""
    named = os.environ.get("UPRIVER_CRD_DIR")
    folder = Path(named) if named else ROOT.parent / "shared" / "crds"
    return folder if folder.is_dir() else None


@cache
def definition(group: str, kind: str) -> dict[str, dict[str, Any]] | None:
    """The strict schemas of a kind by version, None where the folder has no definition of it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    folder = crd_folder()
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        text = path.read_text()
        if not re.search(rf"^ +kind: {kind}$", text, re.M):  # parsing one takes a second
            continue
        for each in yaml.load_all(text, Loader=loader):
            spec = each["spec"] if isinstance(each, dict) and each.get("kind") == "CustomResourceDefinition" else {}
            if spec and (spec["group"], spec["names"]["kind"]) == (group, kind):
                versions = [version for version in spec["versions"] if version["served"]]
                return {version["name"]: strict(version["schema"]["openAPIV3Schema"]) for version in versions}
    return None


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, in which a field that it does not name is an error, as the API server prunes or refuses it.

    Objects whose definition says that it keeps unknown fields, or describes them, stay open; `metadata`, of which a
    definition says nothing, is checked elsewhere.
    """
    made = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        made["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    return made


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with an object, in words.

    Raises:
        DefinitionMissing: its definition would have to be there and is not.
    """
    found = [problem for metadata in _metadata(manifest.data) for problem in _core(_carrier(metadata))]
    if manifest.group in CORE_GROUPS:
        return [*found, *_core(manifest.data)]
    key = (manifest.group, manifest.kind)
    versions = definition(*key)
    if versions is not None:
        schema = versions.get(manifest.version)
        if schema is None:
            return [*found, f"{manifest.kind} has no version {manifest.version}"]
        errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest.data)
        return found + [f"{error.json_path}: {error.message[:300]}" for error in errors]
    if key in MODELS:
        try:
            MODELS[key].model_validate(manifest.data)
        except ValidationError as error:
            return found + [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return found
    if key in DEFINED:
        raise DefinitionMissing(WHERE)
    return [*found, f"nothing is known of {manifest.group}/{manifest.kind}"]


def _core(data: dict[str, Any]) -> tuple[str, ...]:
    return _core_of(json.dumps(data))


@cache
def _core_of(data: str) -> tuple[str, ...]:
    """The same for the text of an object: overlays have most of their objects in common."""
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(json.loads(data), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error}"[:400])
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{version}: {error}")
    return tuple(found)


def _metadata(value: Any) -> list[dict[str, Any]]:
    """Every `metadata` in an object: definitions of custom resources say no more of it than that it is an object."""
    if isinstance(value, list):
        return [found for each in value for found in _metadata(each)]
    if not isinstance(value, dict):
        return []
    own = [value["metadata"]] if isinstance(value.get("metadata"), dict) else []
    return own + [found for key, each in value.items() if key != "metadata" for found in _metadata(each)]


def _carrier(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
