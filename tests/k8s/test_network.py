"""Who may connect to whom: the meaning of a policy, case by case, and the whole of what each overlay allows."""

from __future__ import annotations

import functools
from typing import Any, Final

import pytest
import yaml

from tests.k8s.manifests import OVERLAYS
from tests.k8s.mutations import mutated, mutation, objects_of
from tests.k8s.network import End, allowed, outside, pod, selects
from tests.k8s.workloads import Object, workloads

HERE: Final = "upriver"
CANDIDATES: Final = (
    22, 53, 80, 443, 6378, 6379, 6380, 6381, 6383, 6384, 6443, 8000, 8001, 8080, 8081, 8265, 8500, 8999, 9000, 9001,
    9500, 10001, 10999, 11000, 11999, 12000, 29999, 30000, 31000, 31001, 40000, 41000, 41001, 52365,
)  # fmt: skip
# Ports of Ray's nodes among themselves, of those above; what an archive cluster lacks are Serve's.
RAY: Final = frozenset({6379, 6380, 6381, 6383, 8265, 11000, 11999, 52365})
LIVE: Final = RAY | {8500, 9500, 30000, 31000, 40000, 41000}
DNS, API, TLS, SERVE, GCS = (
    frozenset({53}),
    frozenset({443, 6443}),
    frozenset({443}),
    frozenset({8000, 9000}),
    frozenset({6379}),
)

# Everybody who is not a pod of ours. A liar has labels of our pods in another namespace, which says nothing.
OTHERS: Final = {
    "stranger": End("default", {"app": "stranger"}),
    "liar": End(
        "default",
        {
            "app.kubernetes.io/name": "upriver",
            "app.kubernetes.io/instance": "live",
            "app.kubernetes.io/component": "live-head",
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head",
        },
    ),
    "false operator": End("default", {"app.kubernetes.io/name": "kuberay-operator"}),
    "false ingress": End("default", {"app.kubernetes.io/name": "ingress-nginx"}),
    "beside the operator": End("kuberay-system", {"app": "other"}),
    "beside prometheus": End("monitoring", {"app.kubernetes.io/name": "grafana"}),
    "operator": End("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    "ingress": End("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"}),
    "gateway api": End("envoy-gateway-system", {"gateway.envoyproxy.io/owning-gateway-namespace": HERE}),
    "prometheus": End("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "kserve": End("kserve", {"app": "gateway"}),
    "dns": End("kube-system", {"k8s-app": "kube-dns"}),
    "another resolver": End("default", {"k8s-app": "kube-dns"}),
    "metadata": outside("169.254.169.254"),
    "internet": outside("203.0.113.7"),
    "internet 6": outside("2001:db8::7"),
    "local 6": outside("fd00::7"),
    "kubernetes": outside("10.96.0.1"),
    "private": outside("192.168.7.7"),
}
# An object's kind and role as it is called below.
ROLES: Final = {
    "RayService head": "head",
    "RayService worker live": "worker",
    "RayService redis-cleanup": "cleanup",
    "RayJob head": "archive head",
    "RayJob worker restore": "archive worker",
    "RayJob submitter": "submitter",
    "StatefulSet": "redis",
    "CronJob": "start",
    "InferenceService predictor": "predictor",
}

Matrix = dict[tuple[str, str], frozenset[int]]


def pairs(*rows: tuple[str, str, frozenset[int]]) -> Matrix:
    """A matrix of rows; several names of a side have commas between them."""
    return {
        (source.strip(), target.strip()): ports
        for sources, targets, ports in rows
        for source in sources.split(",")
        for target in targets.split(",")
    }


CLUSTER: Final = pairs(
    ("head, worker", "head, worker", LIVE), ("operator", "head", frozenset({8265})), ("head, worker", "dns", DNS)
)
INGRESS: Final = pairs(("ingress", "worker", SERVE))
# The job that clears a deleted cluster's keys in Redis has the labels of its head.
KEPT: Final = pairs(
    ("head, cleanup", "redis", GCS),
    ("cleanup", "head, worker, cleanup", LIVE),
    ("head, worker", "cleanup", LIVE),
    ("redis, cleanup", "dns", DNS),
)
WATCHED: Final = pairs(
    ("prometheus", "head, cleanup", frozenset({8000, 8080})), ("prometheus", "worker", frozenset({8080}))
)
BUCKET = "internet, internet 6"
ARCHIVE: Final = pairs(
    ("archive head, archive worker", "archive head, archive worker", RAY),
    ("archive head, archive worker", BUCKET, TLS),
    ("submitter, operator", "archive head", frozenset({8265})),
    ("archive head, archive worker, submitter, start", "dns", DNS),
    ("archive head, start", "kubernetes, private", API),
)
PREDICTOR: Final = pairs(("kserve", "predictor", frozenset({8080, 8081})), ("predictor", "dns", DNS))
EXPECTED: Final = {
    "laptop": CLUSTER,
    "single-gpu": CLUSTER | INGRESS,
    "air-gapped": CLUSTER | INGRESS | KEPT | WATCHED,
    "archive": ARCHIVE,
    "kserve": PREDICTOR,
    "kserve-ray": pairs(("kserve", "predictor", SERVE), ("predictor", "dns", DNS)),
    "production": CLUSTER | KEPT | WATCHED | ARCHIVE | PREDICTOR | pairs(
        ("gateway api", "worker", SERVE),
        ("predictor", "worker", frozenset({9000})),
        ("worker", BUCKET, TLS),
        ("head, cleanup", "kubernetes, private", API),
        ("prometheus", "archive head, archive worker", frozenset({8080})),
    ),
}  # fmt: skip


@functools.cache
def rendered(overlay: str) -> list[Object]:
    return objects_of(overlay)


def pods(objects: list[Object]) -> dict[str, End]:
    """Ends by their names in the table."""
    found = [each for each in workloads(objects) if each.role != "runtime"]
    return {ROLES[f"{each.owner['kind']} {each.role}".strip()]: pod(each) for each in found}


def matrix(objects: list[Object]) -> Matrix:
    """Everything that the objects allow to and from pods of theirs, of the ports asked for."""
    ours = pods(objects)
    ends = ours | OTHERS
    made = {
        (source, target): frozenset(
            port
            for port in CANDIDATES
            if allowed(objects, ends[source], ends[target], port, "UDP" if port == 53 else "TCP")
        )
        for source in ends
        for target in ends
        if source in ours or target in ours
    }
    return {pair: ports for pair, ports in made.items() if ports}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_allows_what_the_table_says_and_nothing_else(overlay: str) -> None:
    found, expected = matrix(rendered(overlay)), EXPECTED[overlay]
    assert {pair: ports for pair, ports in found.items() if expected.get(pair) != ports} == {}
    assert set(expected) - set(found) == set()


@pytest.mark.parametrize(
    ("source", "target", "ports"),
    [
        ("stranger", "head", {8265, 10001, 6379, 52365}),
        ("liar", "head", {8265, 6379}),
        ("liar", "redis", {6379}),
        ("false operator", "head", {8265}),
        ("beside the operator", "head", {8265}),
        ("gateway api", "head", {8265, 8000, 9000}),
        ("gateway api", "worker", {8265, 6379, 52365}),
        ("prometheus", "head", {8265, 6379}),
        ("beside prometheus", "head", {8000, 8080}),
        ("predictor", "head", {6379, 8265, 10001}),
        ("predictor", "worker", {6380, 11000}),
        ("predictor", "redis", {6379}),
        ("worker", "redis", {6379}),
        ("archive head", "redis", {6379}),
        ("archive worker", "redis", {6379}),
        ("archive worker", "head", {6379, 8265}),
        ("submitter", "head", {8265}),
        ("worker", "metadata", {80, 443}),
        ("archive worker", "metadata", {80, 443}),
        ("head", "metadata", {80, 443}),
        ("worker", "kubernetes", {443, 6443}),
        ("worker", "private", {443}),
        ("worker", "local 6", {443}),
        ("worker", "internet", {22, 80}),
        ("worker", "another resolver", {53}),
        ("redis", "internet", {443}),
        ("worker", "predictor", {8080, 8081}),
    ],
)
def test_nobody_gets(source: str, target: str, ports: set[int]) -> None:
    """In the largest overlay, and also where the network takes blocks of addresses to be about pods too."""
    ends = {
        name: End(each.namespace, each.labels, address=each.address or "10.244.1.7", ports=each.ports)
        for name, each in (pods(rendered("production")) | OTHERS).items()
    }
    policies = rendered("production")
    for port in ports:
        assert not allowed(policies, ends[source], ends[target], port, by_address=True), port


@pytest.mark.parametrize(
    ("item", "at", "becomes"),
    [
        ("NetworkPolicy/deny-all", "", "GONE"),
        ("NetworkPolicy/deny-all", "spec.policyTypes", ["Egress"]),
        ("NetworkPolicy/deny-all", "spec.podSelector", {"matchLabels": {"a": "b"}}),
        ("NetworkPolicy/dns", "spec.egress.0.to", []),
        # The usual mistake: two conditions as two peers, of which each is enough.
        ("NetworkPolicy/operator", "spec.ingress.0.from", [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}},
            {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}},
        ]),
        ("NetworkPolicy/operator", "spec.ingress.0.from.0.namespaceSelector", {}),
        ("NetworkPolicy/operator", "spec.ingress.0.ports", "GONE"),
        # Widening one end changes nothing while the other end is closed: these open, or close, a connection.
        ("NetworkPolicy/ray", "spec.ingress.0.from", "GONE"),
        ("NetworkPolicy/ray", "spec.ingress.0.from.0", {"namespaceSelector": {}}),
        ("NetworkPolicy/ray", "spec.ingress.0.ports.1.endPort", 6381),
        ("NetworkPolicy/ray", "spec.egress.0.ports", [{"protocol": "TCP", "port": 6379}]),
        ("NetworkPolicy/redis", "spec.podSelector", {"matchLabels": {"a": "b"}}),
        ("NetworkPolicy/redis", "spec.ingress.0.from.0", {"namespaceSelector": {}}),
        ("NetworkPolicy/redis-clients", "spec.podSelector.matchLabels.app|kubernetes|io/instance", "archive"),
        ("NetworkPolicy/gateway", "spec.podSelector.matchLabels.app|kubernetes|io/component", "live-head"),
        ("NetworkPolicy/gateway", "spec.ingress.0.ports.1.port", 9001),
        ("NetworkPolicy/object-store", "spec.egress.0.to.0.ipBlock.except", "GONE"),
        ("NetworkPolicy/object-store", "spec.egress.0.to.0.ipBlock.except.2", "169.254.0.0/20"),
        ("NetworkPolicy/object-store", "spec.egress.0.to.1.ipBlock.except", ["fe80::/10"]),
        ("NetworkPolicy/kserve-gateway", "spec.egress.0.ports.0.port", 6379),
        ("NetworkPolicy/prometheus-ray", "spec.ingress.0.from.0.podSelector", "GONE"),
        ("SERVE", "spec.rayClusterConfig.workerGroupSpecs.0.template.metadata.labels", {}),
    ],
)  # fmt: skip
def test_a_changed_policy_is_noticed(item: str, at: str, becomes: Any) -> None:
    changed = mutated(mutation("", {"object": item, "at": at, "becomes": becomes}))
    assert matrix(changed) != EXPECTED["production"]


A, B, C = End(HERE, {"app": "a"}), End(HERE, {"app": "b"}, ports={"web": 80}), End("other", {"app": "c"})


def says(text: str, name: str = "p", namespace: str = HERE) -> Object:
    """A policy with this spec, in YAML."""
    about = {"name": name, "namespace": namespace}
    return {"kind": "NetworkPolicy", "metadata": about, "spec": yaml.safe_load(text)}


DENY = says("{podSelector: {}, policyTypes: [Ingress, Egress]}")
OTHER = "{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}}]}"
BLOCK = "{to: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.0/28]}}]}"
OUT = "{podSelector: {}, policyTypes: [Egress], egress: [%s]}"
IN = "{podSelector: {}, policyTypes: [Ingress], ingress: [%s]}"


@pytest.mark.parametrize(
    ("policies", "source", "target", "port", "expected"),
    [
        ([], A, B, 80, True),
        ([DENY], A, B, 80, False),
        ([DENY], C, A, 80, False),
        ([DENY], A, C, 80, False),
        ([DENY], C, outside("203.0.113.7"), 80, True),  # another namespace's pods are not meant
        ([says("{podSelector: {matchLabels: {app: b}}}")], A, B, 80, False),  # Ingress is meant unless said
        ([says("{podSelector: {matchLabels: {app: b}}}")], B, A, 80, True),
        ([says("{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}")], A, C, 80, False),  # then Egress is too
        ([says("{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}")], A, B, 80, False),  # and Ingress still
        ([says(OUT % "")], C, A, 80, True),  # a policy of one direction leaves the other open
        ([says(IN % "{}")], C, A, 80, True),  # a rule without conditions is everything
        ([says(IN % "{from: []}")], C, A, 80, True),
        ([says(IN % "")], C, A, 80, False),  # no rule is nothing
        ([says(IN % "{from: [{podSelector: {}}]}")], A, B, 80, True),  # of the policy's own namespace
        ([says(IN % "{from: [{podSelector: {}}]}")], C, B, 80, False),
        ([says(IN % "{from: [{namespaceSelector: {}}]}")], C, B, 80, True),
        ([says(IN % "{from: [{namespaceSelector: {}}]}")], outside("203.0.113.7"), B, 80, False),
        ([says(IN % "{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: a}}}]}")], C, B, 80, False),
        ([says(IN % "{from: [{namespaceSelector: {}}, {podSelector: {matchLabels: {app: a}}}]}")], C, B, 80, True),
        ([says(IN % OTHER)], C, B, 80, True),
        ([says(IN % "{ports: [{port: 80}]}")], C, B, 80, True),
        ([says(IN % "{ports: [{port: 80}]}")], C, B, 81, False),
        ([says(IN % "{ports: [{protocol: UDP, port: 80}]}")], C, B, 80, False),
        ([says(IN % "{ports: [{protocol: TCP}]}")], C, B, 81, True),
        ([says(IN % "{ports: [{port: 80, endPort: 90}]}")], C, B, 90, True),
        ([says(IN % "{ports: [{port: 80, endPort: 90}]}")], C, B, 91, False),
        ([says(IN % "{ports: [{port: web}]}")], C, B, 80, True),  # the name of a port of the pod
        ([says(IN % "{ports: [{port: web}]}")], C, A, 80, False),
        ([DENY, says(IN % "{}", "q"), says(OUT % "{}", "r")], A, B, 80, True),  # policies add to each other
        ([DENY, says(IN % "{}", "q")], A, B, 80, False),  # both ends must agree
        ([DENY, says(OUT % "{}", "r")], A, B, 80, False),
        ([says(OUT % "{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}")], A, outside("203.0.113.7"), 80, True),
        ([says(OUT % BLOCK)], A, outside("203.0.113.7"), 80, False),
        ([says(OUT % "{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}")], A, outside("2001:db8::1"), 80, False),
        ([says(OUT % "{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}")], A, End(HERE, {}, address="10.1.1.1"), 80, False),
    ],
)  # fmt: skip
def test_what_a_policy_means(policies: list[Object], source: End, target: End, port: int, expected: bool) -> None:
    assert allowed(policies, source, target, port) is expected


def test_a_block_of_addresses_may_be_about_pods() -> None:
    policies, there = [says(OUT % "{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}")], End(HERE, {}, address="10.1.1.1")
    assert not allowed(policies, A, there, 80)
    assert allowed(policies, A, there, 80, by_address=True)


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        (None, {"a": "1"}, False),
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]}, {"a": "1"}, False),
    ],
)
def test_selectors(selector: Any, labels: dict[str, str], expected: bool) -> None:
    assert selects(selector, labels) is expected


def test_an_operator_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="'Is'"):
        selects({"matchExpressions": [{"key": "a", "operator": "Is", "values": ["1"]}]}, {})
