"""The ledger of a job: every failed attempt, with its class, and what follows from it for the next one.

Attempts are remembered over the runs of a job, so that a video that cannot be restored is not tried for ever: after its
last attempt it is in quarantine until somebody asks for it with `--retry-failed`.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pydantic import ValidationError

from actors.errors import Failure, FailureClass
from infra.storage import storage_for
from jobs.manifest import timestamp
from jobs.records import LedgerRecord

# How often something is tried before it is given up, by the class of its last failure.
ATTEMPTS: dict[FailureClass, int] = {
    FailureClass.SOURCE: 1,
    FailureClass.DECODE: 2,
    FailureClass.OUT_OF_MEMORY: 3,
    FailureClass.MODEL: 1,
    FailureClass.ENCODE: 2,
    FailureClass.STORAGE: 4,
    FailureClass.TIMEOUT: 2,
    FailureClass.LOST_ACTOR: 3,
    FailureClass.OPTIONS: 1,
    FailureClass.INTERNAL: 2,
}
# What may be other than it was without the video or the options having changed: nothing that fails so is quarantined.
_ABOUT_THE_PLACE = frozenset({FailureClass.STORAGE, FailureClass.OPTIONS, FailureClass.MODEL})
# Nobody waits better for a dead worker or a file that does not decode; a store comes back.
_BACK_OFF_S = {FailureClass.STORAGE: 2.0, FailureClass.OUT_OF_MEMORY: 1.0, FailureClass.TIMEOUT: 1.0}
_LONGEST_WAIT_S = 60.0


def may_try_again(failure: Failure, attempt: int) -> bool:
    """Return whether there is an attempt after number `attempt` (from 1) that ended in `failure`."""
    if failure["code"] in ("destination-exists", "result-changed", "storage-full"):
        return False
    return attempt < ATTEMPTS[FailureClass(failure["failure_class"])]


def wait_s(failure: Failure, attempt: int) -> float:
    """Return how long to wait before the attempt after number `attempt`, in seconds: twice as long each time."""
    first_s = _BACK_OFF_S.get(FailureClass(failure["failure_class"]), 0.0)
    return min(_LONGEST_WAIT_S, first_s * 2 ** (attempt - 1))


class Ledger:
    """Failed attempts of a job, one JSON record a line, each written before the job goes on.

    Attributes:
        place: of the file. records: all of them, those of earlier runs too. added: how many are of this run.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._storage = storage_for(place)
        self.records: list[LedgerRecord] = []
        self.added = 0
        self._torn = False
        if self._storage.stat(place) is not None:
            content = self._storage.read(place)
            self._torn = not content.endswith(b"\n")
            for line in content.splitlines():
                try:
                    self.records.append(LedgerRecord.model_validate_json(line))
                except ValidationError:  # cut short by a crash
                    continue

    def add(
        self,
        name: str,
        failure: Failure,
        *,
        final: bool,
        run_id: str | None = None,
        shot: int | None = None,
        attempt: int = 1,
        seconds: float = 0.0,
        host: str | None = None,
    ) -> None:
        """Write one failed attempt."""
        record = LedgerRecord(
            time=timestamp(),
            name=name,
            run_id=run_id,
            shot=shot,
            attempt=attempt,
            final=final,
            host=host or platform.node(),
            seconds=round(seconds, 3),
            **failure,
        )
        self.records.append(record)
        self.added += 1
        if self._storage.is_local:
            path = Path(self.place.removeprefix("file://"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + record.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._torn = False
        else:  # nothing is appended in an object store
            lines = (one.model_dump_json() + "\n" for one in self.records)
            self._storage.write(self.place, "".join(lines).encode())

    def attempts(self, run_id: str) -> dict[int | None, int]:
        """Return by shot how often it failed since it was last given up: a job that goes on does not count anew."""
        counts: dict[int | None, int] = {}
        for record in self.records:
            if record.run_id == run_id:
                counts[record.shot] = 0 if record.final else record.attempt
        return counts

    def quarantined(self, run_id: str) -> LedgerRecord | None:
        """Return the last failure of a video that is not to be tried again by itself."""
        last = next((one for one in reversed(self.records) if one.run_id == run_id and one.final), None)
        if last is None or FailureClass(last.failure_class) in _ABOUT_THE_PLACE:
            return None
        return last
