"""The errors of the library: one root, each with a code for machines and a remedy for people.

A `PipelineError` means that something outside the program is wrong (a file, a size, an option), never a defect in the
program. Its message names the offending value and the limit; `remedy` says what to do next. Callers such as a command
line print `str(error)` and map `code` to an exit status; this module knows nothing of either.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Root of all errors that the `pipeline` package raises on purpose.

    Args:
        message: one sentence that names the value and the limit; no traceback is needed to understand it.
        code: a stable identifier in kebab case, for programs and tests (`"checkpoint-pickle"`).
        remedy: what the reader can do about it, as an imperative sentence.
    """

    def __init__(self, message: str, *, code: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process borders in a cluster.
        return (_rebuild, (type(self), self.message, self.code, self.remedy, self.__dict__))


def _rebuild(
    kind: type[PipelineError], message: str, code: str, remedy: str, attributes: dict[str, object]
) -> PipelineError:
    error = kind.__new__(kind, message)
    PipelineError.__init__(error, message, code=code, remedy=remedy)
    error.__dict__.update(attributes)
    return error


class CheckpointError(PipelineError):
    """A model cannot be found, read, or does not fit its own configuration."""


class SizeError(PipelineError):
    """A frame is smaller or larger than the model can restore, or differs from its stream's size."""


class MemoryLimitError(SizeError):
    """A frame, or a batch of them, needs more memory than is allowed, even in tiles."""


class StateError(PipelineError):
    """A stream state cannot be read, belongs to another model, or to another stream."""


class FlowError(PipelineError):
    """A flow estimator is not installed, unknown, or was handed a flow that does not fit."""


class BackendError(PipelineError):
    """A backend is unknown, not installed, or does not run on the device."""


class ScheduleError(PipelineError):
    """A denoising schedule is impossible: an unknown number of steps or timesteps out of order."""


class InputError(PipelineError):
    """A frame or tensor has the wrong shape, type or count for the call."""
