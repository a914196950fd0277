"""The readme and the book tell the truth: what they name exists, what they show runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.live_service import live_service

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "actors", "jobs", "infra")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"(?:^<!-- not run: (?P<excuse>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(page: Path, kind: str) -> list[str]:
    """The bodies of a page's code blocks of one kind, without those marked `<!-- not run: why -->`."""
    return [
        match["body"] for match in FENCE.finditer(page.read_text()) if match["kind"] == kind and not match["excuse"]
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def shell_lines(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, split into words, comments and leading assignments removed."""
    lines = []
    for body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                lines.append(words)
    return lines


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/reference/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def commands() -> dict[str, Any]:
    return dict(generator().commands())


def make_targets() -> set[str]:
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    return set(phony[1].split())


def complaint(words: list[str]) -> str | None:
    """What is wrong with a typed `upriver` command: an unknown command or option."""
    name, rest = "upriver", words[1:]
    while rest and f"{name} {rest[0]}" in commands():
        name, rest = f"{name} {rest[0]}", rest[1:]
    known = {option for parameter in commands()[name].params for option in [*parameter.opts, *parameter.secondary_opts]}
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
    if getattr(commands()[name], "commands", None) and rest and not rest[0].startswith("-"):
        return f"no command {name} {rest[0]}"
    return f"{name} has no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    problems = []
    for words in shell_lines(page):
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            problems += [f"no target {target}" for target in targets if target not in make_targets()]
        elif Path(words[0]).name == "upriver" and (wrong := complaint(words)):
            problems.append(wrong)
    prose = FENCE.sub("", page.read_text())
    problems += [f"no target {t}" for t in re.findall(r"`make ([\w-]+)", prose) if t not in make_targets()]
    problems += [wrong for text in re.findall(r"`(upriver [^`]+)`", prose) if (wrong := complaint(text.split()))]
    assert problems == []


def test_a_wrong_command_is_noticed() -> None:
    assert complaint(["upriver", "restore", "a", "b", "--no-such-option"])
    assert complaint(["upriver", "nosuchcommand", "a"])
    assert complaint(["upriver", "restore", "a.mp4", "b.mp4", "--steps", "1"]) is None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img[^>]*\bsrc=\"([^\"]+)\"", page.read_text())
    local = [link or picture for link, picture in targets if "://" not in (link or picture)]
    assert [target for target in local if not (page.parent / target).exists()] == []


PREDICTOR = ROOT / "docs/predictor.md"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks(PREDICTOR, "python"))))
def test_snippets_for_the_predictor_run(number: int) -> None:
    """Each in a process of its own: Triton's and KServe's clients cannot share one."""
    from tests.predictor_process import predictor

    with predictor("--model", "tiny") as running:
        body = blocks(PREDICTOR, "python")[number].replace("127.0.0.1:8081", f"127.0.0.1:{running.grpc_port}")
        told = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != PREDICTOR], ids=name_of)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of a page run one after the other, as a reader would type them, beside a small video `clip.mp4`."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4")
    namespace: dict[str, object] = {}
    with live_service(None, "tiny") if "127.0.0.1:8000" in page.read_text() else nullcontext() as service:
        for number, body in enumerate(blocks(page, "python"), 1):
            if service is not None:
                body = body.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
            exec(compile(body, f"{name_of(page)}, snippet {number}", "exec"), namespace)


def write_clip(path: Path) -> None:
    """Write four frames, 48x32, of a moving gradient."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        x = np.arange(48)[None, :, None] * 5 + np.zeros((32, 1, 3))
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(((x + 20 * k) % 256).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_the_command_reference_is_current() -> None:
    reference = ROOT / "docs/reference/cli.md"
    assert reference.read_text() == generator().reference(), "run `make docs`"


def test_the_exit_statuses_are_those_of_the_code() -> None:
    from jobs.errors import ExitCode

    rows = re.findall(r"^\| (\d+) \| (\w+) \|", (ROOT / "docs/reference/exit_codes.md").read_text(), re.M)
    assert {(int(status), name) for status, name in rows} == {(code.value, code.name.lower()) for code in ExitCode}


def tree_paths() -> list[str]:
    """The paths of the annotated tree in the readme: its lines are indented by two spaces per level."""
    match = re.search(r"<!-- tree -->\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert match is not None, "README.md has no tree"
    paths, parents = [], {0: ""}
    for line in match[1].splitlines():
        entry = line.split("#")[0]
        depth = (len(entry) - len(entry.lstrip())) // 2
        for name in entry.split():
            paths.append(parents[depth] + name)
            if name.endswith("/"):
                parents[depth + 1] = parents[depth] + name
    return paths


def test_the_tree_in_the_readme_is_the_tree() -> None:
    listed = tree_paths()
    assert [path for path in listed if not (ROOT / path).exists()] == []
    modules = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules - set(listed) == set(), "modules that the tree lacks"
