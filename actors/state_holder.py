"""The detached actor that keeps the states of live streams, and tells replicas when they have to go.

It outlives every replica, so a state that a dying replica handed in is still there (an object that a dead process put
into Ray's object store is not). It also asks Serve's controller, once for all replicas, which of them are being
stopped: a replica is not told of that itself while it still has open streams.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import ray
from ray.actor import ActorHandle

from actors.session import SessionKey
from actors.state_book import Snapshot, StateBook, Takeover
from infra.exposition import ScrapeBoard
from infra.refusals import Refusal, ServiceFailure

logger = logging.getLogger(__name__)

NAMESPACE: Final = "upriver"
POLL_S: Final = 0.25
_CONTROLLER_S: Final = 10.0
_HEAD_RESOURCE: Final = "node:__internal_head__"  # Ray's mark of the head


class StateHolder:
    """See the module; `holder` returns the one of an application.

    Args:
        application: name of the Serve application whose streams it keeps.
        kept_s, most_bytes: see `StateBook`.
    """

    def __init__(self, application: str, kept_s: float, most_bytes: int) -> None:
        self._application = application
        self._book = StateBook(kept_s=kept_s, most_bytes=most_bytes)
        self._scrapes = ScrapeBoard()
        self._watched: dict[str, asyncio.Event] = {}
        self._poll: asyncio.Task[None] | None = None

    async def open(self, key: SessionKey, about: dict[str, Any], snapshot: Snapshot) -> str:
        """As `StateBook.open`."""
        return self._book.open(key, about, snapshot)

    async def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None:
        """As `StateBook.put`."""
        self._book.put(key, epoch, snapshot, received)

    async def enter_again(
        self, key: SessionKey, epoch: int, token: str, about: dict[str, Any], snapshot: Snapshot
    ) -> None:
        """As `StateBook.enter_again`."""
        self._book.enter_again(key, epoch, token, about, snapshot)

    async def take_over(self, key: SessionKey, token: str, received: int) -> Takeover:
        """As `StateBook.take_over`."""
        return self._book.take_over(key, token, received)

    async def close(self, key: SessionKey, epoch: int) -> None:
        """As `StateBook.close`."""
        self._book.close(key, epoch)

    async def figures(self) -> dict[str, int]:
        """As `StateBook.figures`."""
        return self._book.figures()

    async def exchange_metrics(self, replica: str, number: int, packed: bytes) -> dict[str, tuple[float, bytes]]:
        """As `actors.live_figures.Board`."""
        self._scrapes.post(replica, number, packed)
        return self._scrapes.read()

    async def told_to_go(self, replica: str, patience_s: float) -> bool:
        """Wait until a replica has to hand its streams over: it is being stopped, and another one can take them.

        Args:
            replica: its id in Serve.
            patience_s: after so long the answer is False, and the replica asks again.
        """
        if self._poll is None:
            self._poll = asyncio.get_running_loop().create_task(self._watch_serve())
        event = self._watched.setdefault(replica, asyncio.Event())
        try:
            async with asyncio.timeout(patience_s):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            self._watched.pop(replica, None)
        return True

    async def _watch_serve(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                replicas = await replicas_of(self._application)
            except Exception as error:  # the controller restarts, or Serve is shut down
                logger.debug("Serve's controller does not answer: %s", error)
                continue
            if replicas is None:
                leaving = set(self._watched)
            elif "RUNNING" in replicas.values():
                leaving = {name for name, state in replicas.items() if state == "STOPPING"}
            else:
                leaving = (
                    set()
                )  # nobody could take the streams yet; an application that is built anew lists no replicas
            for name in leaving & set(self._watched):
                self._watched[name].set()


async def replicas_of(application: str) -> dict[str, str] | None:
    """Return the states (STARTING, RUNNING, STOPPING, ...) of an application's replicas by id; None: it is deleted.

    Serve's public status only counts replicas. What its controller returns here is what the dashboard's REST API shows.
    """
    # Looking the name up waits for the head; a head that is gone must not stop everything else in this loop.
    controller: Any = await asyncio.to_thread(ray.get_actor, "SERVE_CONTROLLER_ACTOR", namespace="serve")
    async with asyncio.timeout(_CONTROLLER_S):  # the call itself would wait for as long as the controller is away
        details = await controller.get_serve_instance_details.remote()
    app = details["applications"].get(application)
    if app is None or app["status"] == "DELETING":
        return None
    return {one["replica_id"]: one["state"] for each in app["deployments"].values() for one in each["replicas"]}


def holder(application: str, *, kept_s: float, most_bytes: int) -> ActorHandle[StateHolder]:
    """Return the holder of an application; made if it is not there.

    It is put beside the head, not on it: streams are opened and resumed while the head is replaced.
    """
    actor: Any = ray.remote(StateHolder).options(
        name=f"states-{application}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=10_000,  # every replica has a call waiting
        label_selector=_beside_the_head(),
    )
    made: ActorHandle[StateHolder] = actor.remote(application, kept_s, most_bytes)
    return made


def _beside_the_head() -> dict[str, str] | None:
    """Return the label selector of every node but the head; None where there is no other."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    heads = [node["NodeID"] for node in nodes if _HEAD_RESOURCE in node.get("Resources", {})]
    return {"ray.io/node-id": f"!{heads[0]}"} if heads and len(nodes) > len(heads) else None


class HeldStates:
    """The holder as a replica uses it: `actors.state_book.StateStore`, and `actors.live_figures.Board`."""

    def __init__(self, actor: ActorHandle[StateHolder]) -> None:
        self._actor: Any = actor

    async def open(self, key: SessionKey, about: dict[str, Any], snapshot: Snapshot) -> str:
        """As `StateBook.open`."""
        token: str = await self._call("open", key, about, snapshot)
        return token

    async def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None:
        """As `StateBook.put`."""
        await self._call("put", key, epoch, snapshot, received)

    async def enter_again(
        self, key: SessionKey, epoch: int, token: str, about: dict[str, Any], snapshot: Snapshot
    ) -> None:
        """As `StateBook.enter_again`."""
        await self._call("enter_again", key, epoch, token, about, snapshot)

    async def take_over(self, key: SessionKey, token: str, received: int) -> Takeover:
        """As `StateBook.take_over`."""
        takeover: Takeover = await self._call("take_over", key, token, received)
        return takeover

    async def close(self, key: SessionKey, epoch: int) -> None:
        """As `StateBook.close`."""
        await self._call("close", key, epoch)

    async def figures(self) -> dict[str, int]:
        """As `StateBook.figures`."""
        figures: dict[str, int] = await self._call("figures")
        return figures

    async def exchange_metrics(self, replica: str, number: int, packed: bytes) -> dict[str, tuple[float, bytes]]:
        """As `actors.live_figures.Board`."""
        replicas: dict[str, tuple[float, bytes]] = await self._call("exchange_metrics", replica, number, packed)
        return replicas

    async def _call(self, name: str, *arguments: object) -> Any:
        try:
            return await getattr(self._actor, name).remote(*arguments)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Refusal):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise ServiceFailure(
                "The keeper of the streams' states does not answer.",
                code="states-unreachable",
                remedy="Try again.",
                retry_after_s=1.0,
            ) from error
