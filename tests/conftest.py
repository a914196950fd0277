"""What every test run shares: a quiet, repeatable environment and the rule that no test is skipped unnoticed.

It imports neither the packages under test nor torch nor Ray, so that a run of one small file stays fast.
"""

from __future__ import annotations

import fnmatch
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

# Set before torch, OpenCV or Ray are imported: they read these once. One thread makes floating point sums repeatable.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # as infra/cluster.py has it: what the raylet says of dead workers
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "120",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# The user's own settings and cluster must not leak into a test. Where CRD schemas lie is no setting of Upriver.
_CRDS = "UPRIVER_CRD_DIR"
for _name in [name for name in os.environ if name.startswith("UPRIVER_") or name == "RAY_ADDRESS"]:
    if _name != _CRDS:
        del os.environ[_name]
# Nor does a test leave anything in the user's cache. What is known of a model there spares later processes seconds.
_CACHE = tempfile.TemporaryDirectory(prefix="upriver-tests-")
os.environ["UPRIVER_MODEL_CACHE"] = _CACHE.name
# The reference, whatever is installed: tests compare what jobs and services give with the engine, bit for bit. Those of
# other backends ask for them.
os.environ["UPRIVER_BACKEND"] = "eager"


def parse_allowed_skips(text: str) -> list[tuple[str, str]]:
    """Return (node id pattern, reason text) rules.

    Raises ValueError for a line that is not of the form `pattern | reason`.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pattern, bar, reason = (part.strip() for part in line.partition("|"))
        if not bar or not pattern or not reason:
            raise ValueError(f"allowed_skips.txt line {number}: expected `node id pattern | reason`, got {line!r}")
        rules.append((pattern, reason))
    return rules


def is_allowed(nodeid: str, reason: str, rules: list[tuple[str, str]]) -> bool:
    """Whether a skip of `nodeid` with `reason` is covered by one of the rules."""
    return any(fnmatch.fnmatchcase(nodeid, pattern) and text in reason for pattern, text in rules)


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail}"
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


class SkipPolicy:
    """Fails the run when a test was skipped, or was expected to fail, without a rule in allowed_skips.txt."""

    def __init__(self, rules: list[tuple[str, str]]) -> None:
        self.rules = rules
        self.offences: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            reason = _skip_reason(report)
            if not is_allowed(report.nodeid, reason, self.rules):
                self.offences.append((report.nodeid, reason))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.offences and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.offences:
            terminalreporter.section("skips that tests/allowed_skips.txt does not allow", sep="=", red=True)
            for nodeid, reason in self.offences:
                terminalreporter.write_line(f"{nodeid}  |  {reason}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolicy(parse_allowed_skips(ALLOWED_SKIPS.read_text())), "upriver-skip-policy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu and shared tests where the machine has not what they need."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not (ROOT.parent / "shared").is_dir():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason="needs the reference data beside the checkout"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the checkout."""
    return ROOT


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for each test, whatever the one before it has set: two on a busy machine are ten times slower."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
