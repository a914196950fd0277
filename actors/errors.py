"""The root of the errors raised by `actors`, and the class of a failure: what kind of thing went wrong with one task.

A failure travels from a worker to the driver as a small record, not as an exception: the class decides there whether
the task is tried again, whether the other tasks go on, and which exit status the whole job ends with.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import TypedDict

from infra.errors import ClusterError, CodedError, InfraError, SettingsError
from pipeline.errors import CheckpointError, FlowError, MemoryLimitError, PipelineError, ScheduleError, StateError
from pipeline.video_errors import DestinationError, EncodeError, UnsupportedOutput


class FailureClass(StrEnum):
    """What kind of thing went wrong with one task."""

    SOURCE = "source-unreadable"
    DECODE = "decode"
    OUT_OF_MEMORY = "out-of-memory"
    MODEL = "model"
    ENCODE = "encode"
    STORAGE = "storage"
    TIMEOUT = "timeout"
    LOST_ACTOR = "lost-actor"
    OPTIONS = "options"
    INTERNAL = "internal"


class ActorsError(CodedError):
    """Root of all errors that the `actors` package raises on purpose; `failure_class` is the kind of each."""

    failure_class = FailureClass.OPTIONS


class DecodeMismatch(ActorsError):
    """Read from a place inside, the source gives other pictures than it gave when it was planned."""

    failure_class = FailureClass.DECODE


class SourceChanged(ActorsError):
    """The source is not what it was when it was planned."""

    failure_class = FailureClass.SOURCE


class ModelChanged(ActorsError):
    """The model is not the one that the job was planned with."""

    failure_class = FailureClass.MODEL


class TilesFixed(ActorsError):
    """Memory ran out, and an exact run must not go on in smaller tiles than it began with."""

    failure_class = FailureClass.OUT_OF_MEMORY


class RowTaken(ActorsError):
    """Another worker restores the same row and was faster: this one must stop."""

    failure_class = FailureClass.LOST_ACTOR


class DamagedWork(ActorsError):
    """Something in the work area is not what its record says; `shots` are those that have to be looked at again."""

    failure_class = FailureClass.STORAGE

    def __init__(self, message: str, *, shots: list[int], remedy: str) -> None:
        super().__init__(message, code="work-damaged", remedy=remedy)
        self.shots = shots


class UnfaithfulResult(ActorsError):
    """An assembled result lacks something that it must have, or has it at other times."""

    failure_class = FailureClass.ENCODE


class Undecodable(ActorsError):
    """A frame of a live stream is no picture of its codec, is damaged, or needs pictures that never came.

    It costs the stream this one frame: the endpoint answers it with the reason `UNDECODABLE`.
    """

    failure_class = FailureClass.DECODE

    def __init__(self, message: str, *, code: str = "frame-undecodable", remedy: str) -> None:
        super().__init__(message, code=code, remedy=remedy)


class Failure(TypedDict):
    """One failed attempt as it travels and as the ledger keeps it."""

    failure_class: str
    code: str
    message: str
    remedy: str


# Errors of the operating system that mean "the place to write to", whatever was being done at that moment.
_STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR})


def failure_class(error: BaseException) -> FailureClass:
    """Return the class of `error`; anything that is not one of this project's own errors is judged by its type."""
    if isinstance(error, CheckpointError | FlowError | ScheduleError | StateError):
        return FailureClass.MODEL
    if isinstance(error, SettingsError | ClusterError | UnsupportedOutput):
        return FailureClass.OPTIONS
    if isinstance(error, DestinationError):
        return FailureClass.STORAGE
    if isinstance(error, EncodeError):
        return FailureClass.ENCODE
    if isinstance(error, MemoryLimitError):
        return FailureClass.OUT_OF_MEMORY
    if isinstance(error, PipelineError):
        return FailureClass.SOURCE
    if isinstance(error, ActorsError):
        return error.failure_class
    if isinstance(error, InfraError):
        return FailureClass.STORAGE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FailureClass.OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return FailureClass.STORAGE
    return FailureClass.INTERNAL


def describe_failure(error: BaseException) -> Failure:
    """Return `error` as a `Failure`; unknown exceptions keep their type's name, so that a report can be written."""
    kind = failure_class(error)
    if isinstance(error, PipelineError | CodedError):
        return Failure(failure_class=kind, code=error.code, message=error.message, remedy=error.remedy)
    if kind is FailureClass.OUT_OF_MEMORY:
        return Failure(
            failure_class=kind,
            code="out-of-memory",
            message=f"Memory ran out: {_first_line(error)}.",
            remedy="Use a smaller source, --dtype bf16, or a machine with more memory.",
        )
    if kind is FailureClass.STORAGE:
        return Failure(
            failure_class=kind,
            code="destination-unwritable",
            message=f"Writing failed: {_first_line(error)}.",
            remedy="Check free space and permissions of the destination.",
        )
    return Failure(
        failure_class=kind,
        code="internal",
        message=f"Unexpected {type(error).__name__}: {_first_line(error)}.",
        remedy="Run again with --debug and report the traceback.",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else "no message"
