"""What the end-to-end tests share: one Ray for the whole run, a small model, small videos of many kinds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.random_model import save_random_model
from tests.video_files import make_bad_files, make_video_files


@pytest.fixture(scope="session")
def ray_running() -> Iterator[None]:
    """One Ray with two logical CPUs; jobs find it running and leave it so."""
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the spelling that Ray reads
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        object_store_memory=128 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole sources by name."""
    return make_video_files(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Damaged sources and files that are no video, by name."""
    return make_bad_files(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """The random model, one thread, fast encoding, and no configuration of the user's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.setenv("UPRIVER_MODEL", str(model))
    monkeypatch.setenv("UPRIVER_THREADS", "1")
    monkeypatch.setenv("UPRIVER_STEPS", "1")
    monkeypatch.setenv("UPRIVER_DTYPE", "fp32")
    monkeypatch.setenv("UPRIVER_PRESET", "ultrafast")
