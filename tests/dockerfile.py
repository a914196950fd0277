"""A Dockerfile as stages and steps, read by BuildKit's own parser; its variables; what its ignore file lets through."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import dockerfile

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::(?P<sign>[-+])(?P<word>[^}]*))?\}|(?P<plain>\w+))")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. `words` are its arguments, quotes removed; a shell command is one word."""

    instruction: str
    words: tuple[str, ...]
    flags: tuple[str, ...]
    line: int
    as_list: bool

    def flag(self, name: str) -> str | None:
        """The value of `--name=value`, None without it."""
        return next((flag.partition("=")[2] for flag in self.flags if flag.partition("=")[0] == f"--{name}"), None)

    def mounts(self) -> list[dict[str, str]]:
        """What `RUN --mount=...` mounts, as its options."""
        found = [flag.removeprefix("--mount=") for flag in self.flags if flag.startswith("--mount=")]
        return [dict(option.split("=", 1) for option in each.split(",") if "=" in option) for each in found]

    def pairs(self) -> dict[str, str]:
        """Of ENV, LABEL and ARG: names and values; an ARG without a value has an empty one."""
        if self.instruction == "ARG":
            return {name: value for name, _, value in (word.partition("=") for word in self.words)}
        return dict(zip(self.words[::2], self.words[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    steps: tuple[Step, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """A Dockerfile: the arguments before its first stage, and its stages in order."""

    arguments: Mapping[str, str]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def line_of(self, name: str) -> list[Stage]:
        """A stage and those that it is built upon, the first one first."""
        stage = self.stage(name)
        return [] if stage is None else [*self.line_of(stage.base), stage]


def parse(text: str) -> Recipe:
    """Read a Dockerfile.

    Raises:
        dockerfile.GoParseError: BuildKit would refuse it.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    steps: list[Step] = []
    for command in dockerfile.parse_string(text):
        quoted = command.cmd.upper() in ("ENV", "LABEL", "ARG")
        words = tuple(_unquoted(word) if quoted else word for word in command.value)
        step = Step(command.cmd.upper(), words, tuple(command.flags), command.start_line, command.json)
        if step.instruction == "FROM":
            if stages:
                stages[-1] = Stage(stages[-1].name, stages[-1].base, tuple(steps), stages[-1].line)
            name = words[2] if len(words) == 3 and words[1].upper() == "AS" else str(len(stages))
            stages.append(Stage(name, expand(words[0], arguments), (), step.line))
            steps = []
        elif stages:
            steps.append(step)
        else:
            arguments |= step.pairs()
    if stages:
        stages[-1] = Stage(stages[-1].name, stages[-1].base, tuple(steps), stages[-1].line)
    return Recipe(arguments, tuple(stages))


def _unquoted(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return f"{name}={value[1:-1]}"
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put in what `$NAME`, `${NAME}`, `${NAME:-word}` and `${NAME:+word}` stand for, as Docker does outside of RUN."""

    def value(match: re.Match[str]) -> str:
        known = variables.get(match["braced"] or match["plain"], "")
        if match["sign"] == "-":
            return known or match["word"]
        return (match["word"] if known else "") if match["sign"] == "+" else known

    return _VARIABLE.sub(value, text)


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    """Docker's patterns: of Go's `filepath.Match`, rooted in the context; `**` stands for any number of folders."""
    made = ""
    for part in re.split(r"(\*\*/?|\*|\?)", text.strip("/")):
        special = {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        made += special.get(part, re.escape(part))
    return re.compile(made)


def is_ignored(path: str, rules: str) -> bool:
    """Whether the build does not see `path`, which is relative to its context: the last rule that matches decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    ignored = False
    for rule in rules.splitlines():
        rule = rule.strip()
        if rule and not rule.startswith("#"):
            wanted = rule.startswith("!")
            if any(_pattern(rule.removeprefix("!")).fullmatch(prefix) for prefix in prefixes):
                ignored = not wanted
    return ignored


def context_files(root: Path, rules: str) -> list[str]:
    """What the build sees of `root`: paths relative to it, sorted."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if not is_ignored(path, rules):
                found.append(path)
    return sorted(found)
