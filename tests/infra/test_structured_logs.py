"""Log lines are JSON, say where they come from, and hold no secret, whoever logs them."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import SettingsError
from infra.refusals import BadMessage
from infra.structured_logs import (
    PACKAGES,
    JsonFormatter,
    LogSettings,
    RedactingFormatter,
    add_log_context,
    serve_logging,
    start_logs,
    start_logs_from_environment,
    use_serve_handlers,
)

SECRET = "upr_0123456789abcdef_" + "s" * 43
JSON = LogSettings(format="json", level="info")
logger = logging.getLogger("actors.live_server")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    own = [logging.getLogger(name) for name in (*PACKAGES, "ray.serve")]
    before = [(one.level, one.propagate, list(one.handlers)) for one in own]
    yield
    start_logs(LogSettings(format="off"))
    for one, (level, propagate, handlers) in zip(own, before, strict=True):
        one.level, one.propagate, one.handlers[:] = level, propagate, handlers
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]  # levels were set past `setLevel`


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_happened_and_where() -> None:
    stream = io.StringIO()
    start_logs(JSON, replica="live#1", stream=stream)

    def log() -> None:
        add_log_context(tenant="acme", session="7")
        logger.info("stream %s opened", "7", extra={"code": "opened"})

    contextvars.copy_context().run(log)
    logger.debug("not this one")
    logging.getLogger("websockets").warning("a library's line")
    first, second = lines(stream)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "actors.live_server",
        "message": "stream 7 opened",
        "replica": "live#1",
        "tenant": "acme",
        "session": "7",
        "code": "opened",
    }
    assert (second["logger"], second["level"]) == ("websockets", "warning") and "tenant" not in second


def test_tasks_of_two_streams_do_not_mix() -> None:
    stream = io.StringIO()
    start_logs(JSON, stream=stream)

    async def part(number: int) -> None:
        logger.info("part of %d", number)

    async def serve(number: int, other: asyncio.Barrier) -> None:
        add_log_context(session=str(number))
        await other.wait()
        await asyncio.create_task(part(number))

    async def run() -> None:
        barrier = asyncio.Barrier(2)
        await asyncio.gather(*(asyncio.create_task(serve(number, barrier)) for number in (1, 2)))

    asyncio.run(run())
    assert {(line["message"], line["session"]) for line in lines(stream)} == {("part of 1", "1"), ("part of 2", "2")}


def test_an_error_has_its_code_and_no_secret() -> None:
    stream = io.StringIO()
    start_logs(JSON, stream=stream)
    try:
        raise BadMessage(f"no frame: {SECRET}", remedy="See the protocol.")
    except BadMessage:
        logger.exception("it failed with %s", SECRET)
    (line,) = lines(stream)
    assert (line["code"], line["error"]) == ("bad-message", "BadMessage")
    assert "Traceback" in line["traceback"] and "no frame" in line["traceback"]
    assert "s" * 43 not in stream.getvalue() and stream.getvalue().count("upr_0123456789abcdef_***") == 2


def test_no_message_can_write_lines_of_its_own() -> None:
    stream = io.StringIO()
    start_logs(JSON, stream=stream)
    logger.info("model %s", 'x"}\n{"level": "error"')
    (line,) = lines(stream)
    assert line["level"] == "info"


def test_text_lines_are_redacted_too() -> None:
    stream = io.StringIO()
    start_logs(LogSettings(format="text", level="debug"), stream=stream)

    def log() -> None:
        add_log_context(session="7")
        logger.debug("key %s", SECRET)

    contextvars.copy_context().run(log)
    assert stream.getvalue().endswith("DEBUG actors.live_server: key upr_0123456789abcdef_*** [session=7]\n"), (
        stream.getvalue()
    )


def test_logs_are_set_up_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    start_logs(JSON, stream=first)
    start_logs(JSON, stream=second)
    logger.info("once")
    assert first.getvalue() == "" and len(lines(second)) == 1
    start_logs(LogSettings(format="off"))
    logger.info("never")
    assert len(lines(second)) == 1


def test_arguments_that_do_not_fit_lose_no_line() -> None:
    record = logging.LogRecord("actors", logging.INFO, "", 1, "%d frames", ("many",), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "%d frames"


@pytest.mark.parametrize("format_", ["json", "text"])
def test_serves_handlers_write_our_lines_and_redact_its_own(format_: str) -> None:
    stream = io.StringIO()
    target = logging.StreamHandler(stream)
    target.setFormatter(logging.Formatter("%(levelname)s serve -- %(message)s"))
    memory = logging.handlers.MemoryHandler(1, target=target)
    serve = logging.getLogger("ray.serve")
    serve.handlers[:] = [memory]
    serve.setLevel("INFO")
    settings = LogSettings(format=format_, level="info")  # type: ignore[arg-type]  # one of two words
    use_serve_handlers(settings, replica="live#1")
    use_serve_handlers(settings, replica="live#1")
    serve.info("GET /?token=%s", "s3cr3t")
    logger.info("ours %s", SECRET)
    text = stream.getvalue()
    assert "s3cr3t" not in text and "s" * 43 not in text and len(text.splitlines()) == 2
    if format_ == "json":
        assert [line["replica"] for line in lines(stream)] == ["live#1"] * 2
    else:
        assert isinstance(target.formatter, RedactingFormatter)
        assert text.splitlines()[0] == "INFO serve -- GET /?token=***"


def test_serve_understands_its_half() -> None:
    from ray.serve.schema import LoggingConfig

    assert LoggingConfig(**serve_logging(JSON)).encoding == "JSON"
    quiet = LoggingConfig(**serve_logging(LogSettings(format="text", level="warning")))
    assert (quiet.log_level, quiet.enable_access_log) == ("WARNING", False)


def test_an_impossible_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_LOG_FORMAT", "xml")
    with pytest.raises(SettingsError, match="UPRIVER_LOG_FORMAT"):
        start_logs_from_environment()


def test_the_command_line_logs_as_the_environment_says(repository: Path, tmp_path: Path) -> None:
    """A video that is none makes the reader log, or not."""
    program = (
        "import logging, sys\n"
        "from jobs.cli import main\n"
        "status = main(['--version'])\n"
        "logging.getLogger('jobs.restore').info('key upr_0123456789abcdef_%s', 's' * 43)\n"
        "sys.exit(status)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(repository), "UPRIVER_LOG_FORMAT": "json"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["message"] == "key upr_0123456789abcdef_***" and line["logger"] == "jobs.restore"
    wrong = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "--version"],
        env=environment | {"UPRIVER_LOG_LEVEL": "loud"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert wrong.returncode != 0 and "UPRIVER_LOG_LEVEL" in wrong.stderr and "Traceback" not in wrong.stderr
