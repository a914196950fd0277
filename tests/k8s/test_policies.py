"""Every pod of every overlay is locked down and bounded, and what it names exists; each rule notices what it is for."""

from __future__ import annotations

import functools

import pytest

from tests.k8s import agreement, policies, references
from tests.k8s.manifests import K8S, OVERLAYS
from tests.k8s.mutations import Mutation, mutated, mutation, mutations, objects_of
from tests.k8s.policies import KEYS, quantity
from tests.k8s.references import missing, prerequisites, unmatched_selectors
from tests.k8s.workloads import Object, Workload, workloads

RULES = policies.RULES | references.RULES | agreement.RULES
MUTATIONS = mutations()


@functools.cache
def valid(overlay: str) -> list[Object]:
    return objects_of(overlay)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_keeps_every_rule(overlay: str, rule: str) -> None:
    assert list(RULES[rule](valid(overlay))) == []


@pytest.mark.parametrize("change", MUTATIONS, ids=str)
def test_a_rule_notices(change: Mutation) -> None:
    """By a message that says what was changed."""
    found = list(RULES[change.rule](mutated(change)))
    assert any(change.says in each for each in found), found


def test_options_of_the_predictor_are_parsed_where_there_is_one() -> None:
    from typer.main import get_command

    from jobs.cli import app

    there = "predictor" in get_command(app).commands  # type: ignore[attr-defined]
    change = mutation("", {"object": "GATEWAY", "at": "spec.predictor.containers.0.args.1", "becomes": "--services=x"})
    assert any("--services" in each for each in agreement.commands_parse(mutated(change))) is there


def test_every_rule_is_broken_above() -> None:
    assert {each.rule for each in MUTATIONS} == set(RULES)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_named_is_there_or_told(overlay: str) -> None:
    """Secrets that an installer must make stand in the guide of k8s/, and no others; all else is there."""
    needed = missing(valid(overlay))
    assert [each for each in needed if each.kind != "Secret"] == []
    assert {each.name for each in needed} == prerequisites((K8S / "README.md").read_text())[overlay]


@pytest.mark.parametrize(
    ("item", "at", "kind"),
    [
        ("SERVE", "WORKER.volumes.3.secret.secretName", "Secret"),
        ("SERVE", "WORKER.volumes.2.persistentVolumeClaim.claimName", "PersistentVolumeClaim"),
        ("SERVE", "WORKER.serviceAccountName", "ServiceAccount"),
        ("SERVE", "WORKER.priorityClassName", "PriorityClass"),
        ("SERVE", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name", "Secret"),
        ("REDIS", "spec.template.spec.volumes.0.configMap.name", "ConfigMap"),
        ("REDIS", "spec.template.spec.containers.0.env.0.valueFrom.secretKeyRef.name", "Secret"),
        ("JOB", "JOB_HEAD.containers.0.envFrom.0.secretRef.name", "Secret"),
        ("CRON", "CRON_POD.volumes.0.configMap.name", "ConfigMap"),
        ("InferenceService/upriver", "spec.predictor.model.storageUri", "PersistentVolumeClaim"),
        ("RoleBinding/upriver-archive-start", "roleRef.name", "Role"),
        ("RoleBinding/upriver-archive-start", "subjects.0.name", "ServiceAccount"),
        ("HTTPRoute/upriver", "spec.parentRefs.0.name", "Gateway"),
        ("Gateway/upriver", "spec.listeners.0.tls.certificateRefs.0.name", "Secret"),
        ("ServiceMonitor/upriver", "spec.endpoints.0.authorization.credentials.name", "Secret"),
    ],
)
def test_a_missing_object_is_noticed(item: str, at: str, kind: str) -> None:
    overlay = "kserve" if item == "InferenceService/upriver" else "production"
    becomes = "pvc://misspelt/folder" if at.endswith("storageUri") else "misspelt"
    change = mutation("", {"object": item, "at": at, "becomes": becomes, "in": overlay})
    assert (kind, "misspelt") in {(each.kind, each.name) for each in missing(mutated(change))}


@functools.cache
def all_pods() -> list[Workload]:
    return [each for overlay in OVERLAYS for each in workloads(valid(overlay))]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policies_select_pods(overlay: str) -> None:
    """Each selector, and each value that it lists, has a pod; in another overlay, perhaps: components are shared."""
    assert unmatched_selectors(valid(overlay), all_pods()) == set()


@pytest.mark.parametrize(
    ("item", "at"),
    [
        ("NetworkPolicy/redis", "spec.podSelector.matchLabels.app|kubernetes|io/name"),
        ("NetworkPolicy/redis", "spec.ingress.0.from.0.podSelector.matchLabels.ray|io/node-type"),
        ("NetworkPolicy/kserve-gateway", "spec.egress.0.to.0.podSelector.matchLabels.app|kubernetes|io/component"),
        ("NetworkPolicy/object-store", "spec.podSelector.matchExpressions.0.values.-"),
    ],
)
def test_a_selector_of_nothing_is_noticed(item: str, at: str) -> None:
    changed = mutated(mutation("", {"object": item, "at": at, "becomes": "misspelt"}))
    assert any("misspelt" in each for each in unmatched_selectors(changed, all_pods()))


def test_no_key_stands_in_the_files() -> None:
    """Nor in what no overlay renders: comments, patches, components that are switched on by hand."""
    texts = {path: path.read_text() for path in K8S.rglob("*") if path.suffix in (".yaml", ".md", ".py")}
    assert len(texts) > 50
    assert {path.name: found[0] for path, text in texts.items() if (found := KEYS.search(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN EC PRIVATE " + "KEY-----",
        "key: AKIA" + "ABCDEFGH01234567",
        "upr_" + "0123456789abcdef_x",
        "redis://:" + "a@host",
        "https://me:" + "word@host/x",
    ],
)
def test_a_key_is_seen(text: str) -> None:
    assert KEYS.search(text)
    assert not KEYS.search("https://host:9000/x@y redis://host:6379 upr_[0-9a-zA-Z_-]*")


def test_a_kind_that_nobody_knows_is_an_error() -> None:
    item = {"apiVersion": "v1", "kind": "Replicator", "metadata": {"name": "x"}, "spec": {}}
    with pytest.raises(ValueError, match="Replicator/x"):
        workloads([item])


def test_pods_have_what_operators_add() -> None:
    pods = {str(each): each for each in workloads(valid("production"))}
    head, worker = pods["RayService/upriver head"], pods["RayService/upriver worker live"]
    assert [each["name"] for each in head.containers()] == ["ray-head", "autoscaler"]
    assert head.labels["ray.io/node-type"] == "head" and head.labels["ray.io/serve"] == "false"
    assert worker.labels["ray.io/node-type"] == "worker" and worker.labels["ray.io/serve"] == "true"
    assert worker.labels["app.kubernetes.io/name"] == "upriver"  # the template's wins
    assert pods["RayService/upriver redis-cleanup"].labels["ray.io/node-type"] == "redis-cleanup"
    assert pods["RayJob/upriver-archive submitter"].ends and not worker.ends
    predictor = next(each for each in workloads(valid("kserve")) if each.role == "predictor")
    assert predictor.labels["serving.kserve.io/inferenceservice"] == "upriver"
    assert (
        predictor.main()["image"].startswith("upriver:") and predictor.spec["serviceAccountName"] == "upriver-predictor"
    )
    assert "--model=upriver=/mnt/models" in predictor.main()["args"]


def test_quantities() -> None:
    assert (quantity("500m"), quantity("2"), quantity(2), quantity("1Gi")) == (quantity("0.5"), 2, 2, 2**30)
    assert quantity("536870912") == quantity("512Mi") and quantity("1G") < quantity("1Gi")
    with pytest.raises(ValueError, match="'4GB'"):
        quantity("4GB")


def test_prerequisites_are_read_from_a_guide() -> None:
    guide = """
| overlay | install | Secrets |
|---|---|---|
| `laptop` | `kubectl` | `upriver-keys` |
| `other` | | `a`, `b` (none with workload identity) |

| what | version |
| `x` | `y` |
"""
    assert prerequisites(guide) == {"laptop": {"upriver-keys"}, "other": {"a", "b"}}
