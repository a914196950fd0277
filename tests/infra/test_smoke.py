"""The smoke test of images says what is wrong: one line a check, and a status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.images import smoke

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.images.smoke", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        | environment,
    )


def test_all_modules_can_be_imported_here_too() -> None:
    told = run("--only", "versions", "--only", "imports")
    assert told.returncode == 0, told.stdout + told.stderr
    first, second, last = told.stdout.splitlines()
    assert first.startswith("ok versions") and "torch 2." in first and "Ray 2." in first
    assert second.startswith("ok imports") and last == "2 of 2 checks are ok."


def test_a_failed_check_is_one_line_and_the_others_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setattr(smoke, "SBOM", Path("/nowhere/sbom.json"))
    monkeypatch.setattr(smoke, "PACKAGES", ("nosuchpackage",))
    assert smoke.main(["--only", "bill-of-materials", "--only", "imports", "--only", "versions"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED bill-of-materials: there is no /nowhere/sbom.json"
    assert lines[1] == "FAILED imports: ModuleNotFoundError: No module named 'nosuchpackage'"
    assert lines[2].startswith("ok versions") and lines[3] == "1 of 3 checks are ok."


def test_without_the_command_nothing_is_tried() -> None:
    told = run("--only", "versions", PATH="/usr/bin:/bin")
    assert told.returncode == 1 and "no command `upriver`" in told.stdout


def test_a_container_that_is_not_hardened_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(smoke.SmokeError, match="runs as root"):
        smoke.check_hardening()
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    monkeypatch.setattr(smoke, "_places", lambda: [str(tmp_path)])
    with pytest.raises(smoke.SmokeError, match=f"written to without being a mount: {tmp_path}"):
        smoke.check_hardening()


def test_a_service_that_ends_early_or_badly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    with (
        pytest.raises(smoke.SmokeError, match=r"ended with 2 before it was ready \(it said: .*no-such-option"),
        smoke._running("serve", "--no-such-option") as service,
    ):
        smoke._wait_until_ready("http://127.0.0.1:9/", service)
