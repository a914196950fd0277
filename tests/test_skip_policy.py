"""A test that is skipped without a rule fails the whole run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import is_allowed, parse_allowed_skips

SKIPPED = 'import pytest\n\n@pytest.mark.skip(reason="no scanner here")\ndef test_scan():\n    pass\n'
SKIPPED_MODULE = 'import pytest\npytest.skip("no scanner here", allow_module_level=True)\n'
EXPECTED_FAILURE = 'import pytest\n\n@pytest.mark.xfail(reason="no scanner here")\ndef test_scan():\n    assert False\n'
SKIPPED_IN_SETUP = (
    'import pytest\n\n@pytest.fixture\ndef scanner():\n    pytest.skip("no scanner here")\n\n'
    "def test_scan(scanner):\n    pass\n"
)


def run_pytest(root: Path, repository: Path, *, test: str, rules: str) -> subprocess.CompletedProcess[str]:
    """Run `test`, beside one test that passes, under the repository's policy with `rules`."""
    (root / "tests").mkdir()
    shutil.copy(repository / "tests/conftest.py", root / "tests/conftest.py")
    (root / "tests/allowed_skips.txt").write_text(rules)
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / "tests/test_scan.py").write_text(test)
    (root / "tests/test_fine.py").write_text("def test_fine():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "test", [SKIPPED, SKIPPED_MODULE, EXPECTED_FAILURE, SKIPPED_IN_SETUP], ids=["mark", "module", "xfail", "fixture"]
)
def test_an_unlisted_skip_fails_the_run(repository: Path, tmp_path: Path, test: str) -> None:
    result = run_pytest(tmp_path, repository, test=test, rules="tests/test_other.py* | no scanner\n")
    assert result.returncode == 1, result.stdout
    assert "does not allow" in result.stdout and "no scanner here" in result.stdout


@pytest.mark.parametrize("test", [SKIPPED, SKIPPED_MODULE], ids=["mark", "module"])
def test_a_listed_skip_passes(repository: Path, tmp_path: Path, test: str) -> None:
    result = run_pytest(tmp_path, repository, test=test, rules="# why\ntests/test_scan.py*  |  no scanner\n")
    assert result.returncode == 0, result.stdout
    assert "1 skipped" in result.stdout


def test_rules_need_both_the_place_and_the_reason() -> None:
    rules = parse_allowed_skips("tests/video/*  |  needs a scanner\n")
    assert is_allowed("tests/video/test_a.py::test_b", "this needs a scanner, model 3", rules)
    assert not is_allowed("tests/audio/test_a.py::test_b", "this needs a scanner", rules)
    assert not is_allowed("tests/video/test_a.py::test_b", "flaky", rules)


@pytest.mark.parametrize("line", ["tests/a.py", "tests/a.py |", "| reason"])
def test_a_rule_without_place_or_reason_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_allowed_skips(f"# first\n{line}\n")
