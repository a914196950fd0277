"""What `upriver submit` makes of a command line; the cluster itself is in tests/infra/test_ray_jobs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import SettingsError
from jobs.cli import main
from jobs.errors import UsageError
from jobs.submit import job_of

PLACES = ["s3://tapes/in", "s3://tapes/out"]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPRIVER_BACKEND", raising=False)  # which every test run sets


def test_the_command_is_the_one_that_would_run_here() -> None:
    command, environment, metadata = job_of([*PLACES, "--steps", "1", "--overwrite"], shared_files=False)
    assert command == ["python", "-m", "jobs.cli", "restore", *PLACES, "--steps", "1", "--overwrite"]
    assert environment == {} and metadata == {"source": PLACES[0], "destination": PLACES[1]}


def test_environment_and_configuration_file_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.toml"
    config.write_text('codec = "hevc"\nsteps = 2\ncuts = false\nthreads = 3\n')
    monkeypatch.setenv("UPRIVER_THREADS", "7")
    for spelled in (["--config", str(config)], [f"--config={config}"]):
        command, environment, _ = job_of([*PLACES, *spelled, "--steps", "1"], shared_files=False)
        assert command[4:] == [*PLACES, "--steps", "1"]
        assert environment == {"UPRIVER_CODEC": "hevc", "UPRIVER_CUTS": "false", "UPRIVER_THREADS": "7"}


def test_nothing_wrong_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_STEPS", "many")
    with pytest.raises(SettingsError, match="UPRIVER_STEPS"):
        job_of(PLACES, shared_files=False)
    monkeypatch.delenv("UPRIVER_STEPS")
    assert main(["submit", "restore", *PLACES, "--no-such-option"]) == 2
    assert main(["submit", "restore", PLACES[0]]) == 2


@pytest.mark.parametrize("arguments", [["/films", PLACES[1]], [PLACES[0], "/out"], [*PLACES, "--model", "{here}"]])
def test_what_other_machines_may_not_see_is_refused(arguments: list[str], tmp_path: Path) -> None:
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    with pytest.raises(UsageError) as caught:
        job_of(arguments, shared_files=False)
    assert caught.value.code == "place-not-shared" and "--shared-files" in caught.value.remedy
    assert job_of(arguments, shared_files=True)[0][4:] == arguments


def test_a_shared_place_is_named_in_full() -> None:
    with pytest.raises(UsageError) as caught:
        job_of(["films", PLACES[1]], shared_files=True)
    assert caught.value.code == "place-relative"
