"""Writes `cli.md` and the `*_settings.md` beside this file from the code itself: `make docs`. Tests keep them current.

The text of each command is what `upriver COMMAND --help` prints, at a fixed width.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command

REFERENCE = Path(__file__).with_name("cli.md")
LIVE_SETTINGS = Path(__file__).with_name("live_settings.md")
PREDICTOR_SETTINGS = Path(__file__).with_name("predictor_settings.md")
WIDTH = 110

HEADER = """\
# The command line

Made by `make docs` from the commands themselves; do not edit. What each exit status means:
[exit_codes.md](exit_codes.md).
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Yield (typed name, parser object) of `upriver` and every command below it, in the order of the help."""
    from jobs.cli import app

    yield from _walk("upriver", get_command(app))


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if command.context_settings.get("help_option_names") == []:
        # A command that hands its arguments on: its parser is the `app` of the module of the same name.
        command = get_command(importlib.import_module(f"jobs.{name.split()[-1].replace('-', '_')}").app)
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        if not getattr(child, "hidden", False):
            yield from _walk(f"{name} {part}", child)


def help_text(name: str, command: Any) -> str:
    """Return what `NAME --help` prints, without colours and frames."""
    command.rich_markup_mode = None
    context = command.make_context(name, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines()).strip()


def reference() -> str:
    """Return the whole of `cli.md`."""
    parts = [HEADER]
    for name, command in commands():
        parts.append(f"## `{name}`\n\n```text\n{help_text(name, command)}\n```\n")
    return "\n".join(parts)


SETTINGS_HEADER = """\
# Settings of the live service

Made by `make docs` from `infra/live_settings.py`; do not edit. A setting stands in the table `[live]` of the
configuration file under the name below, or in the environment as `UPRIVER_LIVE_` and the name in capitals, which wins.
In the environment, lists have commas, and tables are JSON.

| name | default | what it is |
|---|---|---|
"""

LIMITS_HEADER = """
## Limits of a tenant

In the table `[live.limits]`, and for one tenant in `[live.tenants.NAME]`. They hold for each replica.

| name | default | what it is |
|---|---|---|
"""


def settings_reference() -> str:
    """Return the whole of `live_settings.md`."""
    from infra.live_settings import describe
    from infra.tenants import TenantLimits

    limits = [(name, field.default, field.description) for name, field in TenantLimits.model_fields.items()]
    return (
        SETTINGS_HEADER
        + "".join(f"| `{name}` | {_shown(value)} | {what} |\n" for name, value, what in describe())
        + LIMITS_HEADER
        + "".join(f"| `{name}` | {_shown(value)} | {what} |\n" for name, value, what in limits)
    )


PREDICTOR_HEADER = """\
# Settings of the predictor

Made by `make docs` from `infra/predictor_settings.py`; do not edit. A setting stands in the table `[predictor]` of the
configuration file under the name below, or in the environment as `UPRIVER_PREDICTOR_` and the name in capitals, which
wins. In the environment, lists have commas, and tables are JSON. With an engine of its own, credentials, the limits of
tenants and the sizes of frames are [settings of the live service](live_settings.md).

| name | default | what it is |
|---|---|---|
"""


def predictor_settings_reference() -> str:
    """Return the whole of `predictor_settings.md`."""
    from infra.predictor_settings import describe

    return PREDICTOR_HEADER + "".join(f"| `{name}` | {_shown(value)} | {what} |\n" for name, value, what in describe())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value) or "none"
    if value is None or value == {}:
        return "none"
    return "below" if isinstance(value, BaseModel) else str(value)


if __name__ == "__main__":
    LIVE_SETTINGS.write_text(settings_reference(), encoding="utf-8")
    PREDICTOR_SETTINGS.write_text(predictor_settings_reference(), encoding="utf-8")
    REFERENCE.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{REFERENCE}: {len(list(commands()))} commands\n")
