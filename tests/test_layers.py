"""The layer rules of `.importlinter` hold, and each of them would be noticed if it did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("pipeline", "actors", "jobs", "infra")
CLUSTER_AND_WEB = ("ray", "boto3", "botocore", "fastapi", "starlette", "uvicorn", "kserve")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages under `root` with the configuration that lies there."""
    # -P keeps the folder of the installed command off the path; PYTHONPATH puts `root` before the installed packages.
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-P", "-c", program, "--no-cache", "--config", str(root / ".importlinter")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_layers_hold(repository: Path) -> None:
    result = lint_imports(repository)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("pipeline/bad.py", "import actors", "Layers point downward"),
        ("pipeline/bad.py", "import jobs", "Layers point downward"),
        ("actors/bad.py", "import jobs", "Layers point downward"),
        ("infra/bad.py", "import pipeline", "infra serves"),
        ("infra/bad.py", "import actors", "infra serves"),
        ("infra/bad.py", "import jobs", "infra serves"),
        ("pipeline/bad.py", "import infra", "does not reach up to infra"),
        *[("pipeline/bad.py", f"def late():\n    import {name}", "no cluster") for name in CLUSTER_AND_WEB],
    ],
)
def test_a_broken_layer_is_noticed(
    repository: Path, tmp_path: Path, module: str, statement: str, contract: str
) -> None:
    (tmp_path / ".importlinter").write_text((repository / ".importlinter").read_text())
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / module).write_text(statement + "\n")
    result = lint_imports(tmp_path)
    broken = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert result.returncode != 0
    assert len(broken) == 1 and contract in broken[0], result.stdout + result.stderr


def test_the_library_imports_where_there_is_no_cluster_and_no_web_framework(repository: Path) -> None:
    """Also through third parties: import-linter only sees our own import statements."""
    modules = sorted(
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for path in (repository / "pipeline").glob("*.py")
        if path.name != "__init__.py"
    )
    # None in sys.modules makes an import fail and makes find_spec say "not installed", as on a lean machine.
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({CLUSTER_AND_WEB!r}))\n"
        f"for name in {['pipeline', *modules]!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_driver_and_assembly_leave_torch_to_those_who_restore(repository: Path) -> None:
    """Torch and diffusers take four seconds to import: nobody who needs neither waits for them."""
    for module in ("jobs.restore", "jobs.plan", "actors.assemble", "actors.upscaler"):
        program = f"import {module}, sys; sys.exit(bool({{'torch', 'diffusers'}} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", program], cwd=repository).returncode == 0, module
