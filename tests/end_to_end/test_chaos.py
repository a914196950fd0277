"""Driver, worker or object store is killed at a random moment, and the same command is given again until it is done.

Whatever was killed and whenever: the pictures are those of an undisturbed run, and nothing is left lying about. The
moments are drawn from the number of the run, so that each can be repeated.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from infra.storage import storage_for
from jobs.manifest import read_manifest
from tests.films import frame_hashes, make_film
from tests.object_stores import BUCKET, SeaweedFS, use

SHOTS = (6, 9, 5)
OPTIONS = ("--exact", "--segment-seconds", "0.12", "--json")
SEGMENTS = 2 + 3 + 2
KINDS = ("driver", "worker", "store")
PATIENCE_S = 300.0
IN_EVERY_RUN = 5  # each kind at least once; the others are slow
Strike = Callable[["subprocess.Popen[bytes]"], object]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("film") / "film.mp4", SHOTS, sound=True)


@pytest.fixture(scope="module")
def expected(film: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an undisturbed run gives."""
    result = tmp_path_factory.mktemp("undisturbed") / "out.mp4"
    options = ("--model", str(model), "--steps", "1", "--preset", "ultrafast")
    assert run(["restore", str(film), str(result), *OPTIONS, *options]) == 0
    return frame_hashes(result)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A store of these tests' own, because they kill it."""
    with SeaweedFS(tmp_path_factory.mktemp("store")) as server:
        yield server


def records(area: str) -> int:
    """How many segments are finished; -1 while nobody can say."""
    try:
        return sum(info.place.endswith(".json") and "/segments/" in info.place for info in storage_for(area).list(area))
    except Exception:
        return -1


@contextmanager
def at_a_moment(area: str, chance: random.Random, strike: Callable[[], None]) -> Iterator[None]:
    """Call `strike` in a thread after so many finished segments and a little more, if the job lasts so long."""
    wanted, more_s = chance.randrange(SEGMENTS), chance.random() * 0.5
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and records(area) < wanted:
            over.wait(0.02)
        if not over.wait(more_s):
            strike()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kill_worker(driver: subprocess.Popen[bytes]) -> None:
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                return
        except psutil.Error:
            continue


def run(arguments: list[str], area: str = "", chance: random.Random | None = None, strike: Strike | None = None) -> int:
    """Run the command in a process of its own with a Ray of its own; return its status, negative if it was killed."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    workers: list[psutil.Process] = []
    moment = at_a_moment(area, chance, lambda: strike(driver)) if chance and strike else nullcontext()
    try:
        with moment:
            while driver.poll() is None:
                with suppress(psutil.Error):
                    workers = psutil.Process(driver.pid).children(recursive=True) or workers
                with suppress(subprocess.TimeoutExpired):
                    driver.wait(0.2)
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()
    psutil.wait_procs(workers, timeout=5)  # those that work go with the driver; two idle agents stay for a minute
    return driver.returncode


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.slow] if n >= IN_EVERY_RUN else []) for n in range(30)]
)
def test_nothing_is_lost(
    film: Path,
    expected: list[str],
    store: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    chance = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    remote = use(store, monkeypatch)
    in_bucket = kind == "store" or chance.random() < 0.5
    folder = remote if in_bucket else str(tmp_path)
    result = f"{folder}/out.mp4"
    area = f"{result}.upriver"
    arguments = ["restore", str(film), result, *OPTIONS]
    stop = threading.Event()
    early: list[str] = []

    def watch() -> None:  # a manifest may only be there when the film is
        while not stop.wait(0.05):
            try:
                if read_manifest(result) is not None and storage_for(result).stat(result) is None:
                    early.append("a manifest without its film")
            except Exception:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()

    def strike_store(driver: object) -> None:
        store.kill()
        time.sleep(chance.random())
        store.start()

    strikes: dict[str, Strike] = {"driver": lambda driver: driver.kill(), "worker": kill_worker, "store": strike_store}
    codes = []
    try:
        codes.append(run(arguments, area, chance, strikes[kind]))
        limit = time.monotonic() + PATIENCE_S
        while codes[-1] != 0 and time.monotonic() < limit:
            codes.append(run(arguments))
    finally:
        stop.set()
        watcher.join()
    assert codes[-1] == 0 and not early, codes
    assert run(arguments) == 0  # finished: nothing to do
    local = tmp_path / "fetched.mp4"
    storage_for(result).fetch(result, local)
    assert frame_hashes(local) == expected
    manifest = read_manifest(result)
    assert manifest is not None and manifest.output.frames == sum(SHOTS) and len(manifest.parts) == SEGMENTS
    left = {info.place.removeprefix(f"{folder}/") for info in storage_for(folder).list(folder)} - {"fetched.mp4"}
    assert left == {"out.mp4", "out.mp4.manifest.json", "out.mp4.sha256"}
    assert not store.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads")
