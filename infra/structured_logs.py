"""Logs as JSON lines, or as text, without secrets: for the live service and the command line.

A line has time, level, logger, message, and what is known of where it happened: tenant, session, replica, the
request's number, the code of an error. Tenant and session come from `add_log_context`, which follows the tasks of a
stream. The standard library's logging does the rest; `use_serve_handlers` puts the replica's lines, and those of Ray
Serve, into Serve's files.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from typing import Any, Final, Literal, TextIO

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import SettingsError
from infra.redaction import redact

PACKAGES: Final = ("actors", "infra", "jobs", "pipeline")
_SERVE: Final = "ray.serve"
_FIELDS: Final = ("tenant", "session", "replica", "deployment", "application", "route", "request_id", "code")
_CONTEXT: Final[ContextVar[dict[str, str] | None]] = ContextVar("upriver_log_context", default=None)


class LogSettings(BaseSettings):
    """How to log: `UPRIVER_LOG_FORMAT` and `UPRIVER_LOG_LEVEL` in the environment, or the service's own settings."""

    model_config = SettingsConfigDict(env_prefix="UPRIVER_LOG_", frozen=True)

    format: Literal["off", "text", "json"] = Field(
        default="off", description="how log lines look; off: warnings only, by the standard library's default"
    )
    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="the least that is logged")


def add_log_context(**fields: str) -> None:
    """Give all lines that this task logs from now on, and the tasks that it starts, these fields."""
    _CONTEXT.set({**(_CONTEXT.get() or {}), **fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Strings are redacted before they are quoted.

    Args:
        fields: what every line has, such as the replica.
    """

    def __init__(self, **fields: str) -> None:
        super().__init__()
        self._fields = {name: value for name, value in fields.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(_message_of(record)),
            **self._fields,
            **context_of(record),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line.setdefault("code", getattr(error, "code", None) or "error")
            line["error"] = type(error).__name__
            line["traceback"] = redact(self.formatException(record.exc_info))  # type: ignore[arg-type]  # not None here
        elif record.exc_text:
            line["traceback"] = redact(record.exc_text)
        return json.dumps(line, ensure_ascii=False, default=str)


class RedactingFormatter(logging.Formatter):
    """Another formatter's lines, redacted; with the context behind them where `with_context` says so."""

    def __init__(self, inner: logging.Formatter, *, with_context: bool = False) -> None:
        super().__init__()
        self._inner, self._with_context = inner, with_context

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = redact(self._inner.format(record))
        if self._with_context and (context := context_of(record)):
            # Behind the first line: a traceback may follow.
            first, newline, rest = line.partition("\n")
            shown = " ".join(f"{name}={value}" for name, value in context.items())
            line = f"{first} [{shown}]{newline}{rest}"
        return line


def context_of(record: logging.LogRecord) -> dict[str, str]:
    """Return what is known of where a line was logged; what its own `extra` says goes before its task's context."""
    known = {name: getattr(record, name) for name in _FIELDS if isinstance(getattr(record, name, None), str | int)}
    return {name: redact(str(value)) for name, value in {**(_CONTEXT.get() or {}), **known}.items()}


def start_logs(settings: LogSettings, *, replica: str = "", stream: TextIO | None = None) -> None:
    """Log to `stream` (default: standard error) as the settings say; what an earlier call set up is replaced."""
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, _OwnHandler)]:
        root.removeHandler(handler)
    if settings.format == "off":
        return
    handler = _OwnHandler(stream or sys.stderr)
    handler.setFormatter(_formatter(settings, replica))
    root.addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(settings.level.upper())


def start_logs_from_environment() -> None:
    """Log as `UPRIVER_LOG_FORMAT` and `UPRIVER_LOG_LEVEL` say.

    Raises:
        SettingsError: they say something else than they can.
    """
    try:
        settings = LogSettings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = f"UPRIVER_LOG_{'_'.join(map(str, first['loc'])).upper()}"
        raise SettingsError(
            f"{name} in the environment is not possible: {first['msg']}.",
            code="settings-invalid",
            remedy=f"Correct {name}, or unset it.",
        ) from None
    start_logs(settings)


def use_serve_handlers(settings: LogSettings, *, replica: str) -> None:
    """Inside a replica of Ray Serve: write its lines where Serve writes its own, all of them redacted.

    Serve keeps a rotating file for each replica, which log collectors on a cluster read, and also writes to standard
    error. `serve_logging` is the other half: it belongs into the deployment's options.
    """
    handlers = logging.getLogger(_SERVE).handlers
    for handler in handlers:
        target = handler.target if isinstance(handler, MemoryHandler) and handler.target is not None else handler
        if settings.format == "json":
            target.setFormatter(JsonFormatter(replica=replica))
        elif not isinstance(target.formatter, RedactingFormatter):
            target.setFormatter(RedactingFormatter(target.formatter or logging.Formatter(), with_context=True))
    for package in PACKAGES:
        own = logging.getLogger(package)
        own.handlers[:] = handlers
        own.propagate = False
        own.setLevel(settings.level.upper())


def serve_logging(settings: LogSettings) -> dict[str, Any]:
    """Return `logging_config` for a deployment of Ray Serve (the fields of `ray.serve.schema.LoggingConfig`)."""
    return {
        "encoding": "JSON" if settings.format == "json" else "TEXT",
        "log_level": settings.level.upper(),
        "enable_access_log": settings.level == "debug",  # a line for each scrape and probe says nothing
    }


class _OwnHandler(logging.StreamHandler[TextIO]):
    """Recognised when logs are set up again."""


def _formatter(settings: LogSettings, replica: str) -> logging.Formatter:
    if settings.format == "json":
        return JsonFormatter(replica=replica)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    return RedactingFormatter(text, with_context=True)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit the text: the line is worth more than the complaint
        return str(record.msg)
