"""The nodes of a cluster, asked before hours of work whether each can do its part.

A path that one node does not see would otherwise fail row after row there. A Ray that was started on this machine
needs none of this.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from actors.errors import Failure, FailureClass
from actors.node import VERSION_REMEDY, World, look_at_node
from infra.cluster import Cluster, NodeAnswer, ask_every_node
from infra.own_code import PACKAGES, code_fingerprint
from infra.storage import join, storage_for
from jobs.errors import TaskError
from jobs.sources import Item

_SOURCES = 8  # looked at on each node: what one does not see is a mount, not a file
_MARK = ".seen-"


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where a node keeps unfinished files: its host name, the folder there, and how much is free in it."""

    host: str
    folder: str
    free_bytes: int


def check_nodes(cluster: Cluster, area: str | None, items: Sequence[Item], files: Sequence[str] = ()) -> list[Scratch]:
    """Raise unless every node runs this code and sees the same sources and the same work area, writable.

    Args:
        area: place of the work area, which exists; None: nothing is to be written.
        items: what will be restored.
        files: other places that every node must see.

    Returns:
        The temporary folders that unfinished files will lie in, one a node; none where they lie in the work area.

    Raises:
        TaskError: of the class that the failure has there: `options` for another version and for paths that are not
            shared, `storage` for a store that a node cannot use.
    """
    remote = area is not None and not storage_for(area).is_local
    if cluster.local:
        return [_scratch(look_at_node(None))] if remote else []
    with _mark(area) if area is not None else nullcontext() as mark:
        world = World(
            code=code_fingerprint(),
            sources=tuple(_seen_here(items)),
            files=tuple(files),
            mark=mark,
        )
        answers = ask_every_node(look_at_node, world)
    failures = [(answer, failure) for answer in answers if (failure := _failure(answer)) is not None]
    if failures:
        raise _refusal(failures, len(answers))
    return [_scratch(answer.value) for answer in answers] if remote else []


def _scratch(told: Mapping[str, Any]) -> Scratch:
    return Scratch(told["host"], told["scratch"], told["free_bytes"])


def _seen_here(items: Sequence[Item]) -> Iterator[tuple[str, str]]:
    """Some sources and their versions; one that is not there is a failure of its video, found by planning."""
    for item in items[:_SOURCES]:
        found = storage_for(item.source).stat(item.source)
        if found is not None:
            yield item.source, found.version


@contextmanager
def _mark(area: str) -> Iterator[str]:
    """A file in the work area whose name no node can have looked for before."""
    storage = storage_for(area)
    mark = join(area, f"{_MARK}{secrets.token_hex(8)}")
    storage.write(mark, b"")
    try:
        yield mark
    finally:
        storage.delete(mark)


def _failure(answer: NodeAnswer) -> Failure | None:
    if answer.error is None:
        failure: Failure | None = answer.value["failure"]
        return failure
    if any(f"No module named '{name}" in answer.error for name in PACKAGES):
        return Failure(
            failure_class=FailureClass.OPTIONS,
            code="worker-version",
            message=f"The node at {answer.address} has no Upriver, or an older one: {answer.error}.",
            remedy=VERSION_REMEDY,
        )
    return Failure(
        failure_class=FailureClass.OPTIONS,
        code="worker-unusable",
        message=f"The node at {answer.address} cannot do this job's work: {answer.error}.",
        remedy="Give every node the same version of Python, Ray and Upriver's dependencies, or take it out.",
    )


def _refusal(failures: Sequence[tuple[NodeAnswer, Failure]], nodes: int) -> TaskError:
    answer, failure = failures[0]
    message = failure["message"]
    if failure["failure_class"] == FailureClass.STORAGE:  # such a message does not say where
        message = f"On the node {answer.value['host']}: {message}"
    if len(failures) > 1:
        message = f"{message} So it is, or likewise, on {len(failures)} of {nodes} nodes."
    return TaskError(message, code=failure["code"], remedy=failure["remedy"], failure_class=failure["failure_class"])
