from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.settings import load_settings
from jobs.cli import main
from jobs.doctor import examine
from tests.random_model import save_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(autouse=True)
def _no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


def test_a_sound_installation_has_no_problem(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPRIVER_SEED", "3")
    assert main(["doctor", "--model", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["settings"]["seed"] == {"value": 3, "origin": "environment UPRIVER_SEED"}
    assert found["settings"]["model"]["origin"] == "flag"
    assert len(found["model"]["sha256"]) == 64 and found["model"]["parameters"]["unet"] > 0
    assert "h264" in found["video"]["encoders"] and found["device"]["used"] in ("cpu", "cuda", "mps")
    assert found["packages"]["torch"][0].isdigit()


def test_the_text_names_every_setting_with_its_origin(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for name in ("deinterlace", "max_pixels", "default", "flag", "Nothing is wrong."):
        assert name in text


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--model", "no_such_model"], 7, "no_such_model"),
        (["--device", "cuda:63"], 2, "cuda:63"),
    ],
)
def test_what_is_wrong_is_told_with_a_remedy(
    model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, named: str
) -> None:
    assert main(["doctor", "--model", str(model), *flags, "--json"]) == code
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 1 and named in problems[0]["what"] and problems[0]["remedy"]


def test_one_broken_part_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.doctor

    def broken(*_: object) -> dict[str, object]:
        raise RuntimeError("no libraries")

    monkeypatch.setattr(jobs.doctor, "_video", broken)
    findings = examine(load_settings({"model": "no_such_model"}))
    assert findings.sections["video"] == {"error": "no libraries"}
    assert findings.sections["device"]["used"]
    assert [problem.exit_code for problem in findings.problems] == [1, 7]
