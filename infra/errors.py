"""Errors with a code for machines and a remedy for people, and the root of those raised by `infra`.

`CodedError` is the shape that every package's root follows; `actors` and `jobs` derive theirs from it too. The library
`pipeline` has a root of the same shape of its own, because it depends on nothing here.
"""

from __future__ import annotations


class CodedError(Exception):
    """Something outside the program is wrong: a file, an option, a limit; never a defect in the program.

    Args:
        message: one sentence that names the offending value and the limit.
        code: stable identifier in kebab case, for programs and tests (`"settings-invalid"`).
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
        return (_rebuild, (type(self), dict(self.__dict__)))


def _rebuild(kind: type[CodedError], attributes: dict[str, object]) -> CodedError:
    error = kind.__new__(kind, attributes["message"])
    error.__dict__.update(attributes)
    return error


class InfraError(CodedError):
    """Root of all errors that the `infra` package raises on purpose."""


class SettingsError(InfraError):
    """A setting from a flag, the environment or a file has an impossible value, or its file cannot be read."""


class ClusterError(InfraError):
    """The cluster cannot be reached or started."""


class StorageError(InfraError):
    """A place cannot be read or written, is of an unsupported kind, or already holds something else."""


class NetworkError(InfraError):
    """Something that a URL names may not be fetched, or could not be. Hosts are named, never credentials or queries."""


class UrlRefused(NetworkError):
    """The service does not go there: scheme, host, port or address are not allowed, or it is no URL at all."""


class FetchFailed(NetworkError):
    """The server does not answer, not with that, or with more than may be read.

    Attributes:
        status: of HTTP where the server answered with an error, else 0.
        is_transient: another attempt may succeed.
    """

    def __init__(self, message: str, *, code: str, remedy: str, status: int = 0, is_transient: bool = False) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.status = status
        self.is_transient = is_transient


class PlaylistError(NetworkError):
    """An HLS playlist that cannot be read, or asks for what is not supported."""
