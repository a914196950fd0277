"""What holds for the checkout as a whole: sizes, formats, names, and that nothing of one machine is left in it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "actors", "jobs", "infra")
MAX_FILE_BYTES = 20 * 1024 * 1024
MAX_LINES = 500
UNHELPFUL_NAMES = {"utils", "util", "helpers", "common", "misc", "manager"}
UNPICKLING_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".joblib"}

# Written in pieces, so that this file does not contain what it looks for.
MACHINE_TRACES = {
    "a path of one machine": r"(?<![\w.])/(?:work/(?:main|shared|\.)|root/|opt/(?:pypi|wheels)|tmp/[A-Z]/|home/\w+/)",
    "the host of a package registry": r"(?:files\.pythonhosted|\bpypi|registry\.npmjs|deb\.debian)\.(?:org|com)\b",
    "an internal tool": r"\bfarm" + r"-\w+",
}


@cache
def repository_files() -> tuple[Path, ...]:
    """Files that are, or are about to be, part of the repository."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        paths = [ROOT / name for name in listing.split("\0") if name]
    else:  # an unpacked source archive
        paths = [path for name in (*PACKAGES, "tests", "docs") for path in (ROOT / name).rglob("*")]
    return tuple(sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts))


@cache
def text_of(path: Path) -> str | None:
    """The text of a file, None where it is not text."""
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def looks_pickled(path: Path) -> bool:
    """Whether reading `path` as weights would run code: by its name, pickle's first bytes, or torch's archive."""
    if path.suffix in UNPICKLING_SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(4096)
    is_pickle = len(head) > 2 and head[0] == 0x80 and head[1] in (2, 3, 4, 5)
    return is_pickle or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head)


def machine_traces(text: str) -> list[str]:
    """What in `text` only makes sense on the machine where it was written."""
    return [f"{what}: {match.group()}" for what, form in MACHINE_TRACES.items() for match in re.finditer(form, text)]


def test_no_file_is_large() -> None:
    assert [relative(path) for path in repository_files() if path.stat().st_size > MAX_FILE_BYTES] == []


def test_no_file_needs_unpickling() -> None:
    assert [relative(path) for path in repository_files() if looks_pickled(path)] == []


def test_unpickling_is_recognised(tmp_path: Path) -> None:
    import pickle

    import torch

    torch.save({"weight": torch.zeros(2)}, tmp_path / "disguised.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "old.weights", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.dat").write_bytes(pickle.dumps({"weight": [0.0] * 9}))
    (tmp_path / "fine.txt").write_text("weights")
    assert [path.name for path in sorted(tmp_path.iterdir()) if looks_pickled(path)] == [
        "disguised.safetensors",
        "old.weights",
        "plain.dat",
    ]


def test_nothing_names_one_machine() -> None:
    found = {relative(path): machine_traces(text) for path in repository_files() if (text := text_of(path)) is not None}
    assert {path: traces for path, traces in found.items() if traces} == {}


@pytest.mark.parametrize(
    "text",
    ["see /" + "work/shared/notes.md", "/" + "root/.cache", "https://" + "pypi" + ".org/x", "farm" + "-bench run"],
)
def test_traces_of_one_machine_are_recognised(text: str) -> None:
    assert machine_traces(text)


def test_modules_are_short_and_named_after_things() -> None:
    modules = [path for path in repository_files() if path.suffix == ".py" and relative(path).startswith(PACKAGES)]
    assert modules
    assert {relative(path): n for path in modules if (n := len(path.read_text().splitlines())) > MAX_LINES} == {}
    assert [relative(path) for path in modules if path.stem in UNHELPFUL_NAMES] == []


def test_constraints_pin_every_dependency_exactly() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)  # no local part: it would tie torch to one index
            assert match, f"not an exact public version: {line}"
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", item)[0]).lower() for item in wanted} - {"upriver"}  # type: ignore[index]
    assert names - set(pins) == set()


def test_ci_runs_the_same_command_as_a_person() -> None:
    script = ROOT / ".ci/run"
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert "make test" in lines and "make lint" in lines
    assert any(line.startswith("set -") and "e" in line for line in lines)
    assert os.access(script, os.X_OK)
