"""The wheel that a user installs works without the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MAX_WHEEL_BYTES = 20 * 1024 * 1024


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by pip as a user would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(repository),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("upriver-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_the_model_and_the_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("upriver-")} == {"pipeline", "actors", "jobs", "infra"}
    assert any(name.startswith("pipeline/models/tiny/") and name.endswith(".safetensors") for name in names)
    assert {"jobs/report.html.jinja", "jobs/report.css", "jobs/report.js"} < set(names)
    assert {"actors/page/index.html", "actors/page/style.css", "actors/page/client.js"} < set(names)
    assert {name.split("/")[-1] for name in names if "/licenses/" in name} >= {"LICENSE", "NOTICE"}
    assert all(f"{package}/py.typed" in names for package in ("pipeline", "actors", "jobs", "infra"))
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


@pytest.mark.slow
def test_the_unpacked_wheel_restores_a_frame(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import numpy, pipeline\n"
        "pipe = pipeline.StreamDiffVSRPipeline.from_pretrained('tiny')\n"
        "print(pipeline.__file__, next(iter(pipe([numpy.zeros((16, 16, 3), numpy.uint8)]))).shape)\n"
    )
    # -P and PYTHONPATH: the unpacked wheel comes before the checkout's editable install.
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(tmp_path / "site"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout and "(64, 64, 3)" in result.stdout
