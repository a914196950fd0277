"""`upriver cancel`: ask the job that writes a destination to stop, from any machine that can write there.

The request is a small file in the job's work area, which its driver looks for; nothing is sent and nobody is killed.
What is finished stays, and the same restore command goes on after it.
"""

from __future__ import annotations

import getpass
import json
import socket
import sys
import time
from datetime import UTC, datetime

from infra.storage import join, storage_for
from jobs.errors import ExitCode, NoInputError
from jobs.forecast import duration
from jobs.manifest import timestamp
from jobs.observation import Area, read_areas
from jobs.standing import SILENT_AFTER_S

CANCEL = "cancel"
_LOOK_S = 1.0


def request_cancel(area: str) -> None:
    """Leave the request in a work area, with the time, the user and the machine that it comes from."""
    request = {"requested_at": timestamp(), "user": _user(), "host": socket.gethostname()}
    storage_for(area).write(join(area, CANCEL), json.dumps(request).encode() + b"\n")


def is_cancelled(area: str) -> bool:
    """Return whether somebody asked the job in this work area to stop."""
    return storage_for(area).stat(join(area, CANCEL)) is not None


def withdraw_cancel(area: str) -> None:
    """Take a request back; a job that starts does it too, since the request was for the one before."""
    storage_for(area).delete(join(area, CANCEL))


def cancel_command(dst: str, *, wait: bool, as_json: bool) -> int:
    """Run `upriver cancel`: 0 when no job runs any more (without `wait`: when asked), 4 when one does not answer.

    Raises:
        NoInputError: no job writes `dst`. StorageError: the request cannot be written, or the destination not read.
    """
    areas = read_areas(dst)
    if not areas:
        raise NoInputError(
            f"There is no job at {dst}.",
            code="nothing-there",
            remedy="Give the destination that `upriver restore` was given; a finished job has tidied up.",
        )
    ends = [_cancel(dst, area, wait=wait, as_json=as_json) for area in areas if area.is_open]
    if not ends:
        last = areas[0].job
        ends = [_Told(last.job_id, last.state, f"Job {last.job_id} is not running: {last.state} at {last.ended_at}.")]
        _say(ends[0].text, as_json)
    if as_json:
        print(json.dumps({"destination": dst, "jobs": [{"job_id": end.job_id, "state": end.state} for end in ends]}))
    return int(ExitCode.FAILURES if any(end.state == "silent" for end in ends) else ExitCode.DONE)


class _Told:
    """How the cancelling of one job ended, for people and for programs."""

    def __init__(self, job_id: str, state: str, text: str) -> None:
        self.job_id, self.state, self.text = job_id, state, text


def _cancel(dst: str, area: Area, *, wait: bool, as_json: bool) -> _Told:
    job_id = area.job.job_id
    where = f"job {job_id} on {area.job.host} (process {area.job.pid})"
    request_cancel(area.place)
    if not wait:
        end = _Told(job_id, "asked", f"Asked {where} to stop. What is finished stays.")
    else:
        _say(f"Asked {where} to stop; waiting for it.", as_json)
        end = _wait(dst, area)
    _say(end.text, as_json)
    return end


def _wait(dst: str, area: Area) -> _Told:
    """Look until the job says that it ended, has tidied up, or is silent for a minute."""
    job_id = area.job.job_id
    while True:
        now = next((each for each in read_areas(dst) if each.place == area.place), None)
        if now is None:
            return _Told(job_id, "finished", f"Job {job_id} has finished.")
        if not now.is_open:
            kept = " What is finished stays; the same command continues." if now.job.state != "finished" else ""
            return _Told(job_id, now.job.state, f"Job {job_id} is {now.job.state}.{kept}")
        silent_s = (datetime.now(UTC) - now.last_sign()).total_seconds()
        if silent_s > SILENT_AFTER_S:
            return _Told(
                job_id,
                "silent",
                f"Job {job_id} does not answer: no sign of life for {duration(silent_s)}. Its driver on "
                f"{area.job.host} may be dead; if it is not, it stops as soon as it sees the request.",
            )
        time.sleep(_LOOK_S)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _say(text: str, as_json: bool) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout)
