"""Errors of the command line, and the one table that turns an error into an exit status.

| status | meaning | status | meaning |
|---|---|---|---|
| 0 | done | 5 | no input could be decoded |
| 1 | internal error | 6 | destination or storage |
| 2 | usage | 7 | model |
| 3 | done, a source was damaged | 8 | verify found a difference |
| 4 | finished with failures | 130, 143 | interrupted, terminated |
"""

from __future__ import annotations

from enum import IntEnum

from infra.errors import CodedError


class ExitCode(IntEnum):
    """Exit statuses of `upriver`."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    DAMAGED = 3
    FAILURES = 4
    NO_INPUT = 5
    STORAGE = 6
    MODEL = 7
    DIFFERENT = 8
    INTERRUPTED = 130
    TERMINATED = 143


class JobsError(CodedError):
    """Root of all errors that the `jobs` package raises on purpose."""


class UsageError(JobsError):
    """The command line asks for something impossible: contradictory options, a source that equals its destination."""


class NoInputError(JobsError):
    """There is nothing to restore: a missing source, a folder without videos, nothing that decodes."""


class Interrupted(Exception):
    """A signal, or `upriver cancel`, asked the job to stop; what is finished is kept."""

    def __init__(self, exit_code: ExitCode, *, cancelled: bool = False) -> None:
        super().__init__("cancelled" if cancelled else exit_code.name.lower())
        self.exit_code = exit_code
        self.cancelled = cancelled


class TaskError(JobsError):
    """A failure that a worker reported, raised again in the driver because it decides the job's end."""

    def __init__(self, message: str, *, code: str, remedy: str, failure_class: str) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.failure_class = failure_class


_BY_JOBS_ERROR: dict[type[JobsError], ExitCode] = {
    UsageError: ExitCode.USAGE,
    NoInputError: ExitCode.NO_INPUT,
}

# Keys are values of actors.errors.FailureClass.
_BY_FAILURE_CLASS: dict[str, ExitCode] = {
    "source-unreadable": ExitCode.NO_INPUT,
    "decode": ExitCode.NO_INPUT,
    "out-of-memory": ExitCode.INTERNAL,
    "model": ExitCode.MODEL,
    "encode": ExitCode.STORAGE,
    "storage": ExitCode.STORAGE,
    "timeout": ExitCode.INTERNAL,
    "lost-actor": ExitCode.INTERNAL,
    "options": ExitCode.USAGE,
    "internal": ExitCode.INTERNAL,
}


def exit_code_of_failure(failure_class: str) -> ExitCode:
    """Return the exit status of a job whose only task failed with `failure_class`."""
    return _BY_FAILURE_CLASS.get(failure_class, ExitCode.INTERNAL)


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit status for `error`, whichever package raised it."""
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, TaskError):
        return exit_code_of_failure(error.failure_class)
    for kind, code in _BY_JOBS_ERROR.items():
        if isinstance(error, kind):
            return code
    from actors.errors import failure_class

    return exit_code_of_failure(failure_class(error))
