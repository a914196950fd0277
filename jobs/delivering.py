"""Extras of results that were finished before: made of the finished files by tasks of their own, nothing is restored.

The manifest of a result names its extras, so that it is written anew at the end, as a whole. Which failures are tried
again is as for everything else; what a finished or failed one means for the job is up to the callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.delivery import Delivery, Extras, attempt_delivery
from actors.errors import Failure, FailureClass, describe_failure
from actors.records import Delivered
from jobs.errors import ExitCode, Interrupted
from jobs.ledger import Ledger, may_try_again, wait_s
from jobs.manifest import Manifest, write_manifest
from jobs.sources import Item
from jobs.workarea import WorkArea

_LOOK_S = 0.2


@dataclass(slots=True, eq=False)
class Finished:
    """A result that is finished and lacks extras; `attempts` failed ones."""

    item: Item
    run_id: str
    manifest: Manifest
    attempts: int = 0


class Delivering:
    """Has extras made and calls back for each result that is done or given up.

    Args:
        extras: what is wanted. overwrite: replace what somebody else put in their places.
        on_delivered: called with each result and what is beside it, after its manifest says so.
        on_given_up: called with each result that failed for the last time; what it raises ends the job.
        is_cancelled: asked now and then.
        at_once: how many tasks run at a time.
    """

    def __init__(
        self,
        *,
        area: WorkArea,
        ledger: Ledger,
        extras: Extras,
        overwrite: bool,
        on_delivered: Callable[[Finished, Delivered], None],
        on_given_up: Callable[[Finished, Failure], None],
        is_cancelled: Callable[[], bool],
        at_once: int = 2,
    ) -> None:
        self._area, self._ledger = area, ledger
        self._extras, self._overwrite = extras, overwrite
        self._on_delivered, self._on_given_up, self._is_cancelled = on_delivered, on_given_up, is_cancelled
        self._at_once = at_once
        self._not_before = 0.0  # the next start, on the monotonic clock

    def run(self, results: Sequence[Finished]) -> None:
        """Have the extras of all `results` made.

        Raises:
            Interrupted: somebody cancelled the job.
            Exception: what `on_given_up` raised.
        """
        import ray

        waiting, running = list(results), dict[Any, Finished]()
        try:
            while waiting or running:
                if self._is_cancelled():
                    raise Interrupted(ExitCode.TERMINATED, cancelled=True)
                while waiting and len(running) < self._at_once and time.monotonic() >= self._not_before:
                    result = waiting.pop(0)
                    task = ray.remote(num_cpus=0, max_retries=0)(attempt_delivery)
                    running[task.remote(self._delivery(result))] = result
                if running:
                    for reference in ray.wait(list(running), timeout=_LOOK_S)[0]:
                        result = running.pop(reference)
                        if self._ended(result, reference):
                            waiting.append(result)
                else:
                    time.sleep(_LOOK_S)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _ended(self, result: Finished, reference: Any) -> bool:
        """Take what a task returned; True: it is to be tried again."""
        import ray

        seconds, host = 0.0, None
        failure: Failure
        try:
            told = ray.get(reference)
            if "delivered" in told:
                delivered = Delivered(**told["delivered"])
                manifest = result.manifest.model_copy(update={"extras": delivered})
                write_manifest(result.item.destination, manifest)
                self._on_delivered(result, delivered)
                return False
            failure, seconds, host = told["failure"], told["seconds"], told["host"]
        except ray.exceptions.RayError:
            failure = Failure(
                failure_class=FailureClass.LOST_ACTOR,
                code="delivery-lost",
                message=f"The process that made the extras of {result.item.name} died.",
                remedy="It may have lacked memory or disk space.",
            )
        except Exception as error:
            failure = describe_failure(error)
        result.attempts += 1
        again = may_try_again(failure, result.attempts)
        # Without the run's id: that the extras fail must not keep the video from being restored.
        self._ledger.add(
            result.item.name, failure, final=not again, attempt=result.attempts, seconds=seconds, host=host
        )
        if again:
            self._not_before = max(self._not_before, time.monotonic() + wait_s(failure, result.attempts))
        else:
            self._on_given_up(result, failure)
        return again

    def _delivery(self, result: Finished) -> Delivery:
        manifest, destination = result.manifest, result.item.destination
        return Delivery(
            name=result.item.name,
            destination=destination,
            place=self._area.video(result.run_id),
            sha256=manifest.output.sha256 or "",
            before=manifest.extras,
            extras=self._extras,
            preset=str(manifest.options.get("preset", "medium")),
            overwrite=self._overwrite,
        )
