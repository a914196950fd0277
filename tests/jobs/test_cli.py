from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from actors.errors import FailureClass
from infra.errors import SettingsError, StorageError
from infra.settings import Settings
from jobs import cli
from jobs.cli import app, main
from jobs.errors import ExitCode, Interrupted, NoInputError, TaskError, UsageError, exit_code_of, exit_code_of_failure
from pipeline.errors import CheckpointError, FlowError
from pipeline.video_errors import DestinationError, EncodeError, UnreadableVideo, UnsupportedOutput

# The surface that scripts rely on. A change here is a change for users: say so in the documentation.
SURFACE = {
    "upriver": ["--version"],
    "upriver restore": [
        "SRC", "DST", "--model", "--steps", "--seed", "--device", "--dtype", "--backend", "--flow", "--scale",
        "--height", "--codec",
        "--crf", "--preset", "--encoder",
        "--pix-fmt", "--fragmented", "--no-fragmented", "--framemd5", "--no-framemd5", "--hls",
        "--deinterlace", "--cuts", "--no-cuts", "--compare", "--truth", "--overwrite",
        "--retry-failed", "--keep", "--segment-seconds", "--split-seconds", "--warm-up-frames", "--exact", "--no-exact",
        "--slots", "--memory-gb", "--actors", "--min-actors", "--threads", "--plan-only", "--plan", "--limit",
        "--shuffle", "--priority", "--seconds-per-megapixel", "--report", "--config", "--json", "--debug",
    ],
    "upriver status": ["DST", "--watch", "--json", "--debug"],
    "upriver cancel": ["DST", "--wait", "--no-wait", "--json", "--debug"],
    "upriver report": ["DST", "--output", "-o", "--samples", "--json", "--debug"],
    "upriver verify": ["SRC", "DST", "--scale", "--height", "--json", "--debug"],
    "upriver doctor": ["--model", "--device", "--dtype", "--backend", "--flow", "--config", "--json", "--debug"],
    "upriver bench": [],
    "upriver serve": [],
    "upriver predictor": [],
    "upriver keys": [],
    "upriver submit": [],
    "upriver archive-plan": [],
    "upriver train": [],
    "upriver evaluate": [],
    "upriver assets": [],
}  # fmt: skip


def surface() -> dict[str, list[str]]:
    root = typer.main.get_command(app)
    found = {"upriver": names(root)}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        found[f"upriver {name}"] = names(command)
    return found


def names(command: object) -> list[str]:
    given = []
    for parameter in command.params:  # type: ignore[attr-defined]
        if parameter.param_type_name == "argument":
            given.append(parameter.name.upper())
        else:
            given += [option for option in [*parameter.opts, *parameter.secondary_opts] if option != "--help"]
    return given


def test_the_surface_is_the_one_that_is_promised() -> None:
    assert surface() == SURFACE


def test_the_defaults_in_the_help_are_those_of_the_settings() -> None:
    restore = typer.main.get_command(app).commands["restore"]  # type: ignore[attr-defined]
    checked = 0
    for parameter in restore.params:
        field = Settings.model_fields.get(parameter.name)
        if field is None or field.default is None:
            continue
        default, flag = field.default, parameter.name.replace("_", "-")
        if isinstance(default, bool):
            told = flag if default else f"no-{flag}"
        else:
            told = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"[default: {told}" in parameter.help, parameter.name
        checked += 1
    assert checked >= 8


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from jobs.cli import main\n"
        "code = main(['--help']) or main(['restore', '--help']) or main(['--version'])\n"
        "heavy = {'torch', 'ray', 'cv2', 'av', 'numpy', 'diffusers', 'pydantic_settings'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded: {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bench_and_train_load_neither_ray_nor_opencv() -> None:
    program = (
        "import sys, jobs.bench, jobs.bench_against, jobs.bench_measure, jobs.bench_pipeline, jobs.train\n"
        "heavy = {'ray', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a defect"), 1),
        (UsageError("m", code="c", remedy="r"), 2),
        (SettingsError("m", code="c", remedy="r"), 2),
        (UnsupportedOutput("m", remedy="r"), 2),
        (NoInputError("m", code="c", remedy="r"), 5),
        (UnreadableVideo("m", remedy="r"), 5),
        (StorageError("m", code="c", remedy="r"), 6),
        (DestinationError("m", remedy="r"), 6),
        (EncodeError("m", remedy="r"), 6),
        (PermissionError(13, "no"), 6),
        (CheckpointError("m", code="c", remedy="r"), 7),
        (FlowError("m", code="c", remedy="r"), 7),
        (TaskError("m", code="c", remedy="r", failure_class="model"), 7),
        (TaskError("m", code="c", remedy="r", failure_class="source-unreadable"), 5),
        (KeyboardInterrupt(), 130),
        (Interrupted(ExitCode.TERMINATED), 143),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


def test_every_failure_class_has_an_exit_code() -> None:
    assert {exit_code_of_failure(each) for each in FailureClass} <= set(ExitCode)
    from jobs import errors

    assert set(errors._BY_FAILURE_CLASS) == set(FailureClass)


@pytest.mark.parametrize(
    "typed", [[], ["restore"], ["restore", "a"], ["nonsense"], ["restore", "a", "b", "--scale", "7"]]
)
def test_wrong_typing_ends_with_two(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_is_told_in_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import jobs.restore

    def broken(*_: object, **__: object) -> int:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr(jobs.restore, "restore_command", broken)
    assert main(["restore", "a", "b"]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "ZeroDivisionError" in told.err and "--debug" in told.err and not told.out
    assert main(["restore", "a", "b", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_tells_errors_to_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore", str(tmp_path / "none.mp4"), str(tmp_path / "out.mp4"), "--json"]) == 5
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "exit_code": 5,
        "error": {"code": "source-missing", "message": f"{tmp_path / 'none.mp4'} does not exist. Check the path."},
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "0"], "steps=0"),
        (["--scale", "2", "--height", "720"], "--scale and --height"),
        (["--truth", "x.mp4"], "--compare"),
        (["--warm-up-frames", "3"], "--split-seconds"),
        (["--split-seconds", "2"], "--segment-seconds"),
        (["--device", "tpu"], "device='tpu'"),
        (["--hls", "1080,719"], "even numbers"),
        (["--hls", "tall"], "even numbers"),
    ],
)
def test_contradictory_options_are_refused_before_anything_else(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", "none.mp4", "out.mp4", *options]) == 2
    told = capsys.readouterr()
    assert named in told.err and told.err.count("\n") == 1


def test_commands_with_own_parsers_get_everything_that_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--help"]) == 0
    assert "stage1" in capsys.readouterr().out
    import jobs.train

    seen: list[object] = []
    monkeypatch.setattr(jobs.train, "app", lambda **given: seen.append(given["args"]))
    assert main(["train", "stage1", "--data", "d", "--set", "gan=0.05"]) == 0
    assert seen == [["stage1", "--data", "d", "--set", "gan=0.05"]]
    assert cli.app is app
