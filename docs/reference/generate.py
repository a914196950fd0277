"""Writes `cli.md` beside this file from the commands themselves: `make docs`. A test keeps the file current.

The text of each command is what `upriver COMMAND --help` prints, at a fixed width.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

REFERENCE = Path(__file__).with_name("cli.md")
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


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{REFERENCE}: {len(list(commands()))} commands\n")
