"""One change to a valid object of an overlay, to see that a rule notices it. The changes stand in mutations.yaml."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.k8s.manifests import manifests
from tests.k8s.workloads import Object, label_of

GONE: Final = "GONE"
# What stands for what in mutations.yaml.
NAMES: Final = {
    "SERVE": "RayService/upriver",
    "JOB": "RayJob/upriver-archive",
    "CRON": "CronJob/upriver-archive",
    "REDIS": "StatefulSet/upriver-redis",
    "GATEWAY": "InferenceService/upriver-gateway",
    "RUNTIME": "ClusterServingRuntime/upriver",
    "SMALL": "InferenceService/upriver-small",
}
PLACES: Final = {
    "HEAD": "spec.rayClusterConfig.headGroupSpec.template.spec",
    "WORKER": "spec.rayClusterConfig.workerGroupSpecs.0.template.spec",
    "SUBMITTER": "spec.submitterPodTemplate.spec",
    "JOB_HEAD": "spec.rayClusterSpec.headGroupSpec.template.spec",
    "JOB_WORKER": "spec.rayClusterSpec.workerGroupSpecs.0.template.spec",
    "CRON_POD": "spec.jobTemplate.spec.template.spec",
}
VALUES: Final = {"SIDECAR": {"name": "beside", "image": "busybox:1.37"}}


@dataclass(frozen=True)
class Mutation:
    """A change that `rule` must notice; the other fields are those of mutations.yaml."""

    rule: str
    target: str
    path: str
    value: Any
    says: str
    overlay: str
    replace: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.rule}-{self.target.partition('/')[0]}-{self.path.rpartition('.')[2] or 'object'}-{self.says}"


def mutations() -> list[Mutation]:
    """Every change of mutations.yaml."""
    said = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return [mutation(rule, each) for rule, all_of_it in said.items() for each in all_of_it]


def mutation(rule: str, said: dict[str, Any]) -> Mutation:
    """A change as mutations.yaml says it, with what its short names stand for."""
    first, dot, rest = str(said["at"]).partition(".")
    value, replace = said.get("becomes"), said.get("replace")
    value = (
        [VALUES.get(str(each), each) for each in value] if isinstance(value, list) else VALUES.get(str(value), value)
    )
    target = NAMES.get(said["object"], said["object"])
    place = PLACES.get(first, first) + dot + rest
    pattern = tuple(replace) if replace else None
    return Mutation(rule, target, place, value, said.get("says", ""), said.get("in", "production"), pattern)


def objects_of(overlay: str) -> list[Object]:
    """The rendered objects of an overlay; changing them changes nobody else's."""
    return [copy.deepcopy(each.data) for each in manifests(overlay)]


def mutated(change: Mutation) -> list[Object]:
    """The overlay's objects with the change made.

    Raises:
        ValueError: there is not exactly one such object. AssertionError: a pattern is not in the text.
    """
    objects = objects_of(change.overlay)
    if change.path == "":  # the object as a whole: one more, or one less
        others = [each for each in objects if label_of(each) != change.target]
        return others if change.value == GONE else [*others, copy.deepcopy(change.value)]
    (at,) = [each for each in objects if label_of(each) == change.target]
    *steps, last = [step.replace("|", ".") for step in change.path.split(".")]
    place: Any = at
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    if last == "-":
        place.append(copy.deepcopy(change.value))
        return objects
    key: Any = int(last) if isinstance(place, list) else last
    if change.replace:
        place[key], count = re.subn(*change.replace, place[key], count=1)
        assert count == 1, change
    elif change.value == GONE:
        del place[key]
    else:
        place[key] = copy.deepcopy(change.value)
    return objects
