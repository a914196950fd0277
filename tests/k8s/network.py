"""Who may open a connection to whom: NetworkPolicy as Kubernetes defines it, evaluated without a network.

Semantics (networking.k8s.io/v1, "Network Policies" of the Kubernetes documentation): a pod that no policy of its
namespace selects for a direction is open in it; one that is selected is open only to what some rule of some policy
names; both ends must agree. A missing or empty list of peers, or ports, is all of them. Within one peer, the selectors
of namespace and pod must both hold. Answers to a connection are always allowed. Policies know addresses of pods only by
selectors: whether an ipBlock also catches a pod's own address depends on the network plug-in, so `allowed` can be asked
either way.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tests.k8s.workloads import Object, Workload, namespace_of

NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class End:
    """One end of a connection.

    Attributes:
        namespace: of a pod; None for what is no pod. labels: of the pod. namespace_labels: besides its name.
        address: where it has one that matters. ports: names of the pod's ports.
    """

    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    ports: Mapping[str, int] = field(default_factory=dict)


def pod(workload: Workload) -> End:
    """A workload's pod as an end of connections."""
    return End(workload.namespace, workload.labels, ports=workload.ports())


def outside(address: str) -> End:
    """What is no pod: a machine, a service of the cloud, the Kubernetes API."""
    return End(address=address)


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector holds; an empty one does for all, None for nothing.

    Raises:
        ValueError: an operator that there is not.
    """
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or ())


def _holds(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, operator, values = requirement["key"], requirement["operator"], requirement.get("values") or ()
    if operator == "In":
        return key in labels and labels[key] in values
    if operator == "NotIn":  # as the API has it: what lacks the label is not in the list either
        return labels.get(key) not in values
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    raise ValueError(f"{operator!r} is no operator of a selector")


def allowed(
    policies: list[Object], source: End, target: End, port: int, protocol: str = "TCP", *, by_address: bool = False
) -> bool:
    """Whether `source` may connect to a port of `target`.

    Args:
        policies: objects; those that are no NetworkPolicy are ignored.
        by_address: ipBlocks catch pods by their address too, as some network plug-ins have it. Ask with True before
            saying that something is denied, with False before saying that it is allowed.
    """
    found = [each for each in policies if each["kind"] == "NetworkPolicy"]
    return _open(found, "Egress", source, target, target, port, protocol, by_address) and _open(
        found, "Ingress", target, source, target, port, protocol, by_address
    )


def _open(
    policies: list[Object],
    direction: str,
    here: End,
    there: End,
    target: End,
    port: int,
    protocol: str,
    by_address: bool,
) -> bool:
    mine = [each for each in policies if here.namespace is not None and _is_for(each, direction, here)]
    if not mine:
        return True
    side, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    for policy in mine:
        for rule in policy["spec"].get(side) or ():
            if not _port_in(rule.get("ports"), target, port, protocol):
                continue
            named = rule.get(peers)
            if not named or any(_is_peer(each, there, namespace_of(policy), by_address) for each in named):
                return True
    return False


def _is_for(policy: Object, direction: str, end: End) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    return (
        direction in types
        and namespace_of(policy) == end.namespace
        and selects(spec.get("podSelector") or {}, end.labels)
    )


def _is_peer(peer: Mapping[str, Any], end: End, own: str, by_address: bool) -> bool:
    block = peer.get("ipBlock")
    if block is not None:
        if end.address is None or (end.namespace is not None and not by_address):
            return False
        return _within(end.address, block["cidr"]) and not any(
            _within(end.address, each) for each in block.get("except") or ()
        )
    if end.namespace is None:
        return False
    if "namespaceSelector" in peer:
        space = {**end.namespace_labels, NAMESPACE_LABEL: end.namespace}
        if not selects(peer["namespaceSelector"], space):
            return False
    elif end.namespace != own:
        return False
    return "podSelector" not in peer or selects(peer["podSelector"], end.labels)


def _within(address: str, network: str) -> bool:
    at, net = ipaddress.ip_address(address), ipaddress.ip_network(network)
    return at.version == net.version and at in net


def _port_in(ports: list[dict[str, Any]] | None, target: End, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for each in ports:
        if each.get("protocol", "TCP") != protocol:
            continue
        first = each.get("port")
        if first is None:
            return True
        if isinstance(first, str):  # the name of a port of the pod that is connected to
            if target.ports.get(first) == port:
                return True
        elif first <= port <= each.get("endPort", first):
            return True
    return False


def selectors(policy: Object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every selector of pods of the policy's own namespace in it, with the place where it stands."""
    yield "podSelector", policy["spec"].get("podSelector") or {}
    for side, peers in (("ingress", "from"), ("egress", "to")):
        for number, rule in enumerate(policy["spec"].get(side) or ()):
            for peer in rule.get(peers) or ():
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield f"{side}[{number}]", peer["podSelector"]
