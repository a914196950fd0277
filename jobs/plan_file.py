"""Plans in a file of the user's own: made by `--plan-only --plan FILE`, used by the same command without `--plan-only`.

The file is the document that `--plan-only --json` prints, so that `upriver archive-plan` reads it as well. A plan in it
counts only for the very run that it was made for: same source, same version of it, same model, same options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from infra.storage import storage_for
from jobs.errors import UsageError
from jobs.records import VideoPlan
from jobs.sources import Item

_REMEDY = "Make it with `upriver restore SRC DST --plan-only --plan FILE`."


class PlanFile:
    """The plans of a file."""

    def __init__(self, place: str, plans: Sequence[VideoPlan]) -> None:
        self.place = place
        self._plans = {plan.run_id: plan for plan in plans}

    def find(self, item: Item, run: str) -> VideoPlan | None:
        """Return the plan of `item`, whose run id is `run`, or None where there is none that holds."""
        plan = self._plans.get(run)
        if plan is None or (plan.source, plan.destination) != (item.source, item.destination):
            return None
        return plan.model_copy(update={"name": item.name, "priority": item.priority})


def read_plan_file(place: str, *, may_be_absent: bool = False) -> PlanFile:
    """Return the plans at `place`, none of them if it `may_be_absent` and is.

    Raises:
        UsageError: there is no such file, or it is no plan of this version.
        StorageError: it cannot be read.
    """
    storage = storage_for(place)
    if storage.stat(place) is None:
        if may_be_absent:
            return PlanFile(place, [])
        raise UsageError(f"There is no plan at {place}.", code="plan-missing", remedy=_REMEDY)
    try:
        videos = json.loads(storage.read(place))["videos"]
        return PlanFile(place, [VideoPlan.model_validate(video) for video in videos])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UsageError(
            f"{place} is no plan of this version of Upriver.", code="plan-invalid", remedy=_REMEDY
        ) from error


def write_plan_file(place: str, document: Mapping[str, Any]) -> None:
    """Write the document that `--plan-only` made.

    Raises:
        StorageError: it cannot be written.
    """
    storage_for(place).write(place, json.dumps(document, indent=2).encode() + b"\n")
