"""The operations book can be followed: its commands run, and what it names exists.

Blocks of kind `console` are run, page by page, in one shell and one folder, beside a small video `clip.mp4`: what
stands behind `$` is typed, what stands below has to come out (`...` stands for anything). Blocks of kind `bash` are not
run, since they need a cluster or a container engine; all that they name is looked up.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.live_settings import LIVE_PREFIX, LiveSettings
from infra.metrics import APPLICATION_FAMILIES, FAMILIES
from infra.settings import ENV_PREFIX, Settings
from tests.dashboards import SELECTOR, SUFFIX, alerts
from tests.object_stores import free_ports
from tests.prometheus_server import program
from tests.test_documentation import FENCE, ROOT, commands, name_of, write_clip

BOOK = sorted((ROOT / "docs/operations").glob("*.md"))
OVERLAYS = {"laptop", "single-gpu", "production", "air-gapped"}
PORTS = (8000, 6390)  # in the book; a test uses free ones instead
QUICK = {"keys.md"}  # pages whose commands start no Ray


@dataclass(frozen=True)
class Typed:
    """A command of a page, and what it should print."""

    command: str
    expected: str


def bodies(page: Path, *kinds: str) -> list[str]:
    return [match["body"] for match in FENCE.finditer(page.read_text()) if match["kind"] in kinds]


def typed(page: Path) -> list[Typed]:
    """What is typed on a page, in order."""
    found = []
    for body in bodies(page, "console"):
        for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            found.append(Typed(command, expected.strip()))
    return found


def as_pattern(expected: str) -> str:
    return ".*".join(re.escape(piece) for piece in expected.split("..."))


class Shell:
    """One bash; what its commands print, errors too."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PATH": path,
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "400",
                "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            },
        )

    def run(self, command: str) -> tuple[str, int]:
        """Run a command; returns what it printed, and its status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        mark = uuid.uuid4().hex
        self.process.stdin.write(f"{command}\necho {mark} $?\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            before, found, status = line.partition(mark)
            lines.append(before if found else line)
            if found:
                return "".join(lines).strip(), int(status)
        raise AssertionError(f"the shell ended in: {command}")

    def end(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        for child in [*children, self.process]:
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    write_clip(tmp_path / "clip.mp4")
    made = Shell(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.name in QUICK else [pytest.mark.slow])
        for page in BOOK
        if typed(page)
    ],
)
def test_a_page_is_followed(page: Path, shell: Shell) -> None:
    if any("redis-server" in one.command for one in typed(page)):
        program("redis-server")
    free = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))

    def moved(text: str) -> str:
        for port, other in free.items():
            text = re.sub(rf"(?:(?<=127\.0\.0\.1:)|(?<=--port )|(?<=-p )){port}\b", str(other), text)
        return text

    for one in typed(page):
        said, status = shell.run(moved(one.command))
        assert status == 0, f"$ {one.command}\nended with {status}:\n{said}"
        assert re.fullmatch(as_pattern(moved(one.expected)), said, re.S), f"$ {one.command}\nsaid:\n{said}"


def test_another_answer_is_noticed(shell: Shell) -> None:
    said, status = shell.run("echo one; echo two; false")
    assert (said, status) == ("one\ntwo", 1)
    assert re.fullmatch(as_pattern("one\n..."), said, re.S) and not re.fullmatch(as_pattern("one"), said, re.S)


def upriver_commands(page: Path) -> list[list[str]]:
    """The words behind each `upriver` of a page's blocks, variables and redirections left out."""
    lines = [line for body in bodies(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += [one.command for one in typed(page)]
    plain = [re.sub(r"\$\([^)]*\)", "VALUE", line) for line in lines]
    typed_words = re.compile(r"(?:^|[;&|(]\s*|(?:[A-Z_]+=\S+ )+)upriver ((?:(?!\s\d?>)[^;&|#)])*)")
    return [shlex.split(match[1]) for line in plain for match in typed_words.finditer(line)]


def parse(words: list[str]) -> str | None:
    """What the command line says of these words without running anything; None: nothing is wrong."""
    name, rest = "upriver", list(words)
    while rest and f"{name} {rest[0]}" in commands():
        name, rest = f"{name} {rest[0]}", rest[1:]
    if getattr(commands()[name], "commands", None):
        return f"no command {name} {rest[0] if rest else ''}"
    try:
        commands()[name].make_context(name, rest)
    except Exception as error:
        return str(getattr(error, "message", error)) or type(error).__name__
    return None


@pytest.mark.parametrize("page", BOOK, ids=name_of)
def test_every_upriver_command_can_be_typed(page: Path) -> None:
    wrong = [
        (words, said)
        for words in upriver_commands(page)
        if words and not words[0].startswith("-") and (said := parse(words))
    ]
    assert wrong == []


def test_a_wrong_command_is_noticed() -> None:
    assert sum(len(upriver_commands(page)) for page in BOOK) > 20
    assert parse(["keys", "create", "studio", "--scope", "live"]) is None
    assert parse(["keys", "craete", "studio"]) == "no command upriver keys craete"
    assert parse(["keys", "create", "--no-such", "studio"]) and parse(["bench", "--frames", "many"])


def named_paths(page: Path) -> set[str]:
    """What a page names of this repository: in commands, in tables, in prose."""
    text = page.read_text()
    return set(
        re.findall(
            r"(?<![\w./-])((?:tests|infra|k8s|docs|jobs|actors|pipeline|benchmarks)/[\w./-]*\w/?)(?![\w/])", text
        )
    )


@pytest.mark.parametrize("page", BOOK, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    missing = {path for path in named_paths(page) if not (ROOT / path).exists()}
    assert {path for path in missing if not path.startswith(PENDING)} == set()
    overlays = set(re.findall(r"k8s/overlays/([\w-]+)", page.read_text()))
    assert overlays <= OVERLAYS


# Parts that are made beside this book: looked for as soon as there is anything of them.
PENDING = tuple(
    folder for folder in ("k8s/", "tests/k8s/", "tests/end_to_end/test_head_restart.py") if not (ROOT / folder).exists()
)


def test_tests_that_are_named_exist() -> None:
    missing = []
    for page in BOOK:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
            if not re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(), re.M):
                missing.append(f"{page.name}: {file}::{name}")
    assert missing == []


def test_every_threat_names_its_test_or_says_that_it_has_none() -> None:
    page = (ROOT / "docs/operations/threat_model.md").read_text()
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        for line in page.splitlines()
        if re.match(r"\| [STRIDE](?:, [STRIDE])* \|", line)
    ]
    assert len(rows) > 35 and {letter for row in rows for letter in row[0].split(", ")} == set("STRIDE")
    assert [row for row in rows if len(row) != 5 or not all(row)] == []
    assert [row[1] for row in rows if "tests/" not in row[3] and row[3] != "no test"] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*BOOK, *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/live").glob("*.md")], ids=name_of
)
def test_anchors_exist(page: Path) -> None:
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        other = page if not target else (page.parent / target)
        if "://" not in target and other.exists() and anchor not in anchors(other):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def known_settings() -> set[str]:
    named = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    named |= {f"{LIVE_PREFIX}{name.upper()}" for name in LiveSettings.model_fields}
    for package in ("pipeline", "actors", "jobs", "infra"):  # those that are read one by one
        for file in (ROOT / package).rglob("*.py"):
            named |= set(re.findall(r"\bUPRIVER_[A-Z0-9_]+\b", file.read_text()))
    return named | {f"{ENV_PREFIX}CONFIG"}


def test_settings_that_are_named_exist() -> None:
    # One is misspelt on purpose, to show what is said then.
    named = {name for page in BOOK for name in re.findall(r"\bUPRIVER_[A-Z0-9_]*[A-Z0-9]\b", page.read_text())}
    assert named - known_settings() - {"UPRIVER_LIVE_SESIONS"} == set()
    assert f"{LIVE_PREFIX}SESSIONS" in named


def test_metrics_that_are_named_exist() -> None:
    known = {family.shown_name for family in (*FAMILIES, *APPLICATION_FAMILIES)}
    for page in BOOK:
        named = {SUFFIX.sub("", name) for name in re.findall(r"\bupriver_live_\w+", page.read_text())}
        wrong = {name for name in named if name not in known and not any(k.startswith(name) for k in known)}
        assert wrong == set(), page.name


def test_queries_can_be_asked(tmp_path: Path) -> None:
    queries = [line for page in BOOK for body in bodies(page, "promql") for line in body.splitlines() if line.strip()]
    for page in BOOK:  # in tables a bar is escaped
        queries += [
            q.replace("\\|", "|") for q in re.findall(r"^\| `([^`]*upriver_live[^`]*)` \|", page.read_text(), re.M)
        ]
    assert len(queries) > 25
    labels = {family.shown_name: {*family.labels, "replica", "le"} for family in (*FAMILIES, *APPLICATION_FAMILIES)}
    for query in queries:
        for name, braces in SELECTOR.findall(query):
            chosen = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))
            assert chosen <= labels[SUFFIX.sub("", name) if SUFFIX.sub("", name) in labels else name], query
    rules = [
        f"      - record: book:{number}\n        expr: >-\n          {query}" for number, query in enumerate(queries)
    ]
    (tmp_path / "rules.yaml").write_text("groups:\n  - name: book\n    rules:\n" + "\n".join(rules) + "\n")
    told = subprocess.run(
        [program("promtool"), "check", "rules", str(tmp_path / "rules.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_has_its_section() -> None:
    page = (ROOT / "docs/operations/alerts.md").read_text()
    sections = re.split(r"^## ", page, flags=re.M)[1:]
    assert [section.partition("\n")[0] for section in sections] == [alert["alert"] for alert in alerts()]
    for section, alert in zip(sections, alerts(), strict=True):
        assert "*Look at:*" in section or "*Look at:* " in section, alert["alert"]
        assert re.search(r"\*(?:Do|Causes and what to do):\*|What to do", section), alert["alert"]
        assert (alert["labels"]["severity"] == "critical") == section.split("\n\n")[1].startswith("**Critical.**")
        address = alert["annotations"].get("runbook_url", "")
        assert not address or address.endswith(f"alerts.md#{alert['alert'].lower()}")


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/operations/README.md").read_text()
    assert [page.name for page in BOOK if page.name != "README.md" and f"({page.name}" not in index] == []
