"""Where the states of live streams survive their replica: a book of snapshots, fenced by epochs.

A snapshot is the state after all frames below an id. It may be handed out for resuming only if the client has had all
answers below that id: so the newest one that is acknowledged is kept, and those after it. Whoever takes a stream over
raises its epoch, and what an older owner writes from then on is refused. Knows no Ray: `actors.state_holder` makes it
an actor.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from actors.session import SessionKey
from infra.refusals import AdmissionRefused, StateLost

MOST_BYTES: Final = 4 << 30
KEPT_S: Final = 120.0  # for a client that lost its connection
IDLE_S: Final = 10.0
"""A stream that nobody wrote to for so long may have to make room: its client left it, or sends nothing.

If it still has an owner, that one enters it again with its next snapshot; meanwhile it would begin anew after a crash.
"""
MOST_SNAPSHOTS: Final = 4
UNKNOWN: Final = "state-unknown"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The stream after all frames with an id smaller than `below`; `state` is that of `StreamState.to_bytes`."""

    below: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Takeover:
    """What a replica gets that goes on with a stream.

    Attributes:
        snapshot: the newest that the client's answers cover.
        about: what the first replica noted of the stream; JSON-like.
    """

    epoch: int
    snapshot: Snapshot
    about: dict[str, Any]


class StateSink(Protocol):
    """What the owner of a stream needs of the book. Arguments and errors as in `StateBook`."""

    async def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None: ...

    async def close(self, key: SessionKey, epoch: int) -> None: ...


class StateStore(StateSink, Protocol):
    """What a replica needs of the book, wherever it lies. Arguments and errors as in `StateBook`."""

    async def open(self, key: SessionKey, about: dict[str, Any], snapshot: Snapshot) -> str: ...

    async def enter_again(
        self, key: SessionKey, epoch: int, token: str, about: dict[str, Any], snapshot: Snapshot
    ) -> None: ...

    async def take_over(self, key: SessionKey, token: str, received: int) -> Takeover: ...

    async def figures(self) -> dict[str, int]: ...


@dataclass(slots=True)
class _Entry:
    token_sha256: bytes
    about: dict[str, Any]
    touched: float
    epoch: int = 1
    snapshots: list[Snapshot] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return sum(len(snapshot.state) for snapshot in self.snapshots)


class StateBook:
    """See the module. Not for several threads.

    Args:
        most_bytes: of all snapshots together. Beyond it those go that were idle longest, of the tenant that has most:
            nobody fills the book for the others by opening streams and leaving them. Busy streams stay.
        kept_s: how long a stream is kept that nobody writes to.
    """

    def __init__(
        self, *, most_bytes: int = MOST_BYTES, kept_s: float = KEPT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_bytes, self._kept_s, self._clock = most_bytes, kept_s, clock
        self._entries: dict[SessionKey, _Entry] = {}

    @property
    def size_bytes(self) -> int:
        """Of all snapshots."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def figures(self) -> dict[str, int]:
        """Return how many streams there are, their bytes, and how many bytes there may be."""
        return {"streams": len(self), "bytes": self.size_bytes, "limit_bytes": self._most_bytes}

    def open(self, key: SessionKey, about: dict[str, Any], snapshot: Snapshot) -> str:
        """Enter a new stream with its first snapshot; returns the token that proves who may resume it.

        Raises:
            AdmissionRefused: there is no room.
        """
        self._expire()
        self._make_room(len(snapshot.state))
        token = secrets.token_urlsafe(24)
        self._entries[key] = _Entry(_digest(token), about, self._clock(), snapshots=[snapshot])
        return token

    def enter_again(self, key: SessionKey, epoch: int, token: str, about: dict[str, Any], snapshot: Snapshot) -> None:
        """Enter a stream whose owner finds it gone: this book is new, because the one before it was lost.

        Raises:
            StateLost: somebody else goes on with it.
            AdmissionRefused: there is no room.
        """
        entry = self._entries.get(key)
        if entry is not None and entry.epoch >= epoch:
            raise _lost(key)
        self._make_room(len(snapshot.state))
        self._entries[key] = _Entry(_digest(token), about, self._clock(), epoch, [snapshot])

    def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None:
        """Add a snapshot; forget those that can no longer be asked for.

        Args:
            received: all answers with a smaller id have arrived at the client.

        Raises:
            StateLost: somebody else goes on with the stream; or, with the code `UNKNOWN`, it is not known here.
            AdmissionRefused: there is no room.
        """
        entry = self._owned(key, epoch)
        self._make_room(len(snapshot.state), keep=key)
        entry.touched = self._clock()
        entry.snapshots = [one for one in entry.snapshots if one.below < snapshot.below] + [snapshot]
        covered = [one for one in entry.snapshots if one.below <= received]
        if covered:
            entry.snapshots = entry.snapshots[len(covered) - 1 :]
        # The first and the last ones: the first may be what the client needs, those between only save it work.
        del entry.snapshots[1 : -(MOST_SNAPSHOTS - 1)]

    def take_over(self, key: SessionKey, token: str, received: int) -> Takeover:
        """Hand a stream to another replica; the one that had it can write no more.

        Raises:
            StateLost: no such stream, another's token, or no snapshot that old. One message for all of them.
        """
        self._expire()
        entry = self._entries.get(key)
        digest = _digest(token)
        if not hmac.compare_digest(digest, entry.token_sha256 if entry else bytes(32)) or entry is None:
            raise _lost(key)
        usable = [one for one in entry.snapshots if one.below <= received]
        if not usable:
            raise _lost(key)
        entry.epoch += 1
        entry.touched = self._clock()
        entry.snapshots = [usable[-1]]  # what came later is not what the next owner will make
        return Takeover(entry.epoch, usable[-1], entry.about)

    def close(self, key: SessionKey, epoch: int) -> None:
        """Wipe a stream out, if it is still this owner's."""
        entry = self._entries.get(key)
        if entry is not None and entry.epoch == epoch:
            del self._entries[key]

    def _owned(self, key: SessionKey, epoch: int) -> _Entry:
        entry = self._entries.get(key)
        if entry is None or entry.epoch < epoch:
            raise _lost(key, UNKNOWN)
        if entry.epoch > epoch:
            raise _lost(key)
        return entry

    def _expire(self) -> None:
        old = self._clock() - self._kept_s
        for key in [key for key, entry in self._entries.items() if entry.touched < old]:
            del self._entries[key]

    def _make_room(self, size_bytes: int, keep: SessionKey | None = None) -> None:
        if self.size_bytes + size_bytes <= self._most_bytes:
            return
        self._expire()
        while self.size_bytes + size_bytes > self._most_bytes:
            spare = self._longest_idle(keep) if size_bytes <= self._most_bytes else None
            if spare is None:
                raise AdmissionRefused(
                    f"The states of live streams take {self.size_bytes / 1e9:.1f} GB.",
                    code="states-full",
                    limit=f"{self._most_bytes / 1e9:.1f} GB",
                    remedy="Try again when other streams have ended, or give the service more memory for states.",
                    retry_after_s=self._kept_s / 4,
                )
            del self._entries[spare]

    def _longest_idle(self, keep: SessionKey | None) -> SessionKey | None:
        """Return the stream to part with: of those that are idle, the oldest of the tenant that takes most room."""
        idle = self._clock() - IDLE_S
        spare = [key for key, entry in self._entries.items() if entry.touched <= idle and key != keep]
        sizes: Counter[str] = Counter()
        for key, entry in self._entries.items():
            sizes[key.tenant] += entry.size_bytes
        return min(spare, key=lambda key: (-sizes[key.tenant], self._entries[key].touched), default=None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _lost(key: SessionKey, code: str | None = None) -> StateLost:
    return StateLost(
        f"The stream {key.session} cannot be resumed here.",
        code=code,
        remedy="Open a new stream: its first frame is restored without memory of those before.",
    )


class LocalStates:
    """The book in this process: streams survive a lost connection, not a lost process."""

    def __init__(self, book: StateBook | None = None) -> None:
        self.book = book or StateBook()

    async def open(self, key: SessionKey, about: dict[str, Any], snapshot: Snapshot) -> str:
        """As `StateBook.open`."""
        return self.book.open(key, about, snapshot)

    async def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None:
        """As `StateBook.put`."""
        self.book.put(key, epoch, snapshot, received)

    async def enter_again(
        self, key: SessionKey, epoch: int, token: str, about: dict[str, Any], snapshot: Snapshot
    ) -> None:
        """As `StateBook.enter_again`."""
        self.book.enter_again(key, epoch, token, about, snapshot)

    async def take_over(self, key: SessionKey, token: str, received: int) -> Takeover:
        """As `StateBook.take_over`."""
        return self.book.take_over(key, token, received)

    async def close(self, key: SessionKey, epoch: int) -> None:
        """As `StateBook.close`."""
        self.book.close(key, epoch)

    async def figures(self) -> dict[str, int]:
        """As `StateBook.figures`."""
        return self.book.figures()


class OwnedStates:
    """The store as a stream's owner uses it: where the book was lost and another is there, the stream is entered again.

    So streams go on without a reset while the keeper of states is replaced; only what ends meanwhile is lost.
    """

    def __init__(self, states: StateStore, token: str, about: dict[str, Any]) -> None:
        self._states, self._token, self._about = states, token, about

    async def put(self, key: SessionKey, epoch: int, snapshot: Snapshot, received: int) -> None:
        """As `StateBook.put`."""
        try:
            await self._states.put(key, epoch, snapshot, received)
        except StateLost as error:
            if error.code != UNKNOWN:
                raise
            await self._states.enter_again(key, epoch, self._token, self._about, snapshot)

    async def close(self, key: SessionKey, epoch: int) -> None:
        """As `StateBook.close`."""
        await self._states.close(key, epoch)
