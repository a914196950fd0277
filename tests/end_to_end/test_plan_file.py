"""`--plan-only` tells what the same command would do, and its plans can be kept and used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.plan
from jobs.archive_plan import planned
from jobs.cli import main
from jobs.records import VideoPlan
from jobs.sources import Item
from tests.films import make_film

pytestmark = pytest.mark.usefixtures("ray_running")
Told = Callable[..., tuple[int, dict[str, Any], str]]
SHOTS = (6, 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    return make_film(folder / "film.mp4", SHOTS)


@pytest.fixture
def film(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy2(source, tmp_path / "film.mp4"))


@pytest.fixture
def restore(film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run `upriver restore film.mp4 out.mp4 --json`; what it returned, printed, and said on stderr."""

    def run(*options: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main(["restore", str(film), str(tmp_path / "out.mp4"), *options, "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out), told.err

    return run


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that are decoded to plan them in this process."""
    names: list[str] = []
    plan_video = jobs.plan.plan_video

    def noted(item: Item, options: jobs.plan.PlanOptions, model_sha256: str) -> VideoPlan:
        names.append(item.name)
        return plan_video(item, options, model_sha256)

    monkeypatch.setattr(jobs.plan, "plan_video", noted)
    return names


def test_a_plan_is_made_once(restore: Told, film: Path, tmp_path: Path, decoded: list[str]) -> None:
    file = str(tmp_path / "plan.json")
    code, document, _ = restore("--plan-only", "--plan", file, "--exact")
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "plan.json"]
    assert json.loads(Path(file).read_text()) == document  # what --json prints
    archive, _ = planned(file)
    assert archive.frames == sum(SHOTS)
    assert restore("--plan-only", "--plan", file, "--exact")[0] == 0
    code, report, stderr = restore("--plan", file, "--exact")
    assert code == 0 and decoded == ["film.mp4"] and report["warnings"] == [] and "planned now" not in stderr
    assert report["videos"][0]["frames"] == sum(SHOTS)
    # Finished: there is nothing left to plan.
    code, document, _ = restore("--plan-only", "--exact")
    assert code == 0 and document["estimate"]["videos"] == 0 and document["estimate"]["finished"] == 1


@pytest.mark.parametrize("change", ["source", "option", "destination"])
def test_a_plan_of_something_else_is_not_used(
    restore: Told, film: Path, tmp_path: Path, decoded: list[str], change: str
) -> None:
    file = tmp_path / "plan.json"
    assert restore("--plan-only", "--plan", str(file))[0] == 0
    options = ("--plan", str(file), "--plan-only")
    if change == "source":
        os.utime(film, (1, 1))
    elif change == "destination":
        document = json.loads(file.read_text())
        document["videos"][0]["destination"] = "elsewhere.mp4"
        file.write_text(json.dumps(document))
    else:
        options += ("--seed", "3")
    assert restore(*options)[0] == 0
    assert decoded == ["film.mp4"] * 2


def test_a_plan_that_does_not_hold_is_said(restore: Told, film: Path, tmp_path: Path, decoded: list[str]) -> None:
    file = tmp_path / "plan.json"
    assert restore("--plan-only", "--plan", str(file))[0] == 0
    os.utime(film, (1, 1))
    code, report, stderr = restore("--plan", str(file))
    assert code == 0 and decoded == ["film.mp4"] * 2
    assert report["warnings"] == [f"{file}: 1 of 1 videos have no plan there that still holds; they are planned now."]
    assert report["warnings"][0] in stderr


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "plan-missing"),
        ("{}", "plan-invalid"),
        ("nonsense", "plan-invalid"),
        ('{"videos": [{}]}', "plan-invalid"),
    ],
)
def test_what_is_no_plan_is_refused(restore: Told, tmp_path: Path, content: str | None, code: str) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    status, document, _ = restore("--plan", str(file))
    assert status == 2 and document["error"]["code"] == code and "--plan-only --plan" in document["error"]["message"]
    assert not (tmp_path / "out.mp4").exists()


def test_the_plan_is_printed_for_people(film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["restore", str(film), str(tmp_path / "out.mp4"), "--plan-only", "--device", "cpu"]
    assert main([*command, "--seconds-per-megapixel", "100"]) == 0
    told = capsys.readouterr().out
    for line in (
        "film.mp4  96x64 -> 384x256",
        "videos    1",
        "shots     2",
        "frames    11",
        "film      0 s (0.00 hours)",
        "time      about 7 s with 1 worker, if nothing fails",
        "work      0.00 worker hours; this rests on the figure that was given",
        "storage   about 54.1 kB of results, at most 54.1 kB beside them; ",
    ):
        assert line in told, told
