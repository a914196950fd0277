"""Jobs on clusters of several nodes: each a set of processes of its own, that see what is shared and nothing else."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.own_code import code_folders
from infra.storage import storage_for
from tests.faulty_store import FaultyStore
from tests.films import frame_hashes, make_film
from tests.object_stores import SeaweedFS, use
from tests.random_model import save_random_model
from tests.ray_cluster import RayCluster, ray_cluster

SHOTS = (9, 5, 12, 7, 10, 8, 11, 6, 9, 7, 12, 8)  # enough for each worker, though one begins later
OPTIONS = ("--exact", "--segment-seconds", "0.2", "--steps", "1", "--preset", "ultrafast")
PATIENCE_S = 200.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """The head and one more machine, `node-b`, a CPU each; the machines share a folder with a film and a model."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.add_node("node-b")
        make_film(made.shared / "film.mp4", SHOTS, sound=True)
        save_random_model(made.shared / "model")
        made.environment["UPRIVER_MODEL"] = str(made.shared / "model")
        yield made


@pytest.fixture(scope="module")
def expected(cluster: RayCluster) -> list[str]:
    """The pictures of the film as one worker on this machine makes them."""
    result = cluster.folder / "alone.mp4"
    done = cluster.upriver("restore", str(cluster.shared / "film.mp4"), str(result), *OPTIONS, RAY_ADDRESS="")
    assert done.returncode == 0, done.stderr
    return frame_hashes(result)


def hosts(area: Path) -> set[str]:
    """Where the segments were made."""
    return {json.loads(path.read_text())["host"] for path in area.rglob("segments/*.json")}


def ledger(area: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in area.rglob("ledger.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_film_is_restored_by_two_nodes_and_is_the_same(cluster: RayCluster, expected: list[str]) -> None:
    """Neither node has an Upriver of its own: what they run came from the driver."""
    result = cluster.shared / "two.mp4"
    done = cluster.upriver("restore", str(cluster.shared / "film.mp4"), str(result), *OPTIONS, "--keep")
    assert done.returncode == 0, done.stderr
    assert len(hosts(cluster.shared / "two.mp4.upriver")) == 2
    assert frame_hashes(result) == expected


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SRC", "DST", "another DST", "model"])
def test_a_place_that_a_node_does_not_see_is_refused_at_once(cluster: RayCluster, what: str) -> None:
    src, dst, model = cluster.shared / "film.mp4", cluster.shared / "out" / "refused.mp4", cluster.shared / "model"
    hidden = cluster.folder / "here only"
    hidden.mkdir(exist_ok=True)
    if what == "SRC":
        src = shutil.copy2(src, hidden / "film.mp4")
    elif what == "model":
        model = shutil.copytree(model, hidden / "model")
    elif what == "DST":
        dst = hidden / "refused.mp4"
    else:  # there is such a folder on every machine
        dst = Path("/tmp/home") / f"{cluster.folder.name}.mp4"
    done = cluster.upriver("restore", str(src), str(dst), *OPTIONS, "--model", str(model), "--json")
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    place = {"SRC": str(src), "model": str(model)}.get(what, f"{dst}.upriver")
    assert error["code"] == "worker-sees-no-file" and "node-b" in error["message"] and place in error["message"]
    assert "storage that all nodes share" in error["message"]
    assert not dst.exists() and not Path(f"{dst}.upriver").exists()


@pytest.mark.slow
def test_another_folder_under_the_same_path_is_refused(cluster: RayCluster) -> None:
    """Such as a local disk that every machine has."""
    result = Path("/tmp/home") / cluster.folder.name
    area = Path(f"{result}/.upriver")
    made = not result.parent.exists()
    result.mkdir(parents=True)
    try:
        first = cluster.upriver("restore", str(cluster.shared / "film.mp4"), f"{result}/out.mp4", *OPTIONS, "--json")
        assert first.returncode == 2 and "node-b" in first.stdout, first.stderr
        assert not area.exists() and list(result.iterdir()) == []
    finally:
        shutil.rmtree(result.parent if made else result)


@pytest.mark.slow
def test_a_folder_is_refused_as_a_whole_and_no_row_is_tried(cluster: RayCluster) -> None:
    hidden = cluster.folder / "tapes"
    hidden.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(cluster.shared / "film.mp4", hidden / name)
    result = cluster.shared / "folder"
    done = cluster.upriver("restore", str(hidden), str(result), *OPTIONS)
    assert done.returncode == 2 and f"node-b does not see {hidden}/a.mp4" in done.stderr
    assert ledger(result) == [] and not list(result.rglob("plan.json"))
    assert json.loads(next(result.rglob("job.json")).read_text())["exit_code"] == 2


@pytest.mark.slow
def test_relative_places_mean_those_of_the_driver(cluster: RayCluster, expected: list[str]) -> None:
    done = cluster.upriver("restore", "shared/film.mp4", "shared/relative.mp4", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert frame_hashes(cluster.shared / "relative.mp4") == expected


@pytest.mark.slow
def test_a_node_that_dies_costs_nothing_but_time(
    tmp_path_factory: pytest.TempPathFactory, cluster: RayCluster, expected: list[str]
) -> None:
    film, result = cluster.shared / "film.mp4", cluster.shared / "lost.mp4"
    area = Path(f"{result}.upriver")
    node = cluster.add_node("node-c")
    with cluster.running("restore", str(film), str(result), *OPTIONS, "--keep", "--actors", "3") as job:
        limit = time.monotonic() + PATIENCE_S
        while "node-c" not in hosts(area) and job.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert job.poll() is None, job.stderr.read() if job.stderr else ""
        node.kill()
        _, stderr = job.communicate(timeout=500)
    assert job.returncode == 0, stderr
    assert {(one["failure_class"], one["host"], one["final"]) for one in ledger(area)} == {
        ("lost-actor", "node-c", False)
    }
    assert frame_hashes(result) == expected


@pytest.mark.slow
def test_nodes_with_an_older_upriver_run_the_drivers_or_refuse(cluster: RayCluster, expected: list[str]) -> None:
    older = cluster.shared / "older"
    for folder in code_folders():
        shutil.copytree(folder, older / folder.name, ignore=shutil.ignore_patterns("__pycache__", "safetensors"))
    with (older / "actors" / "upscaler.py").open("a") as file:
        file.write("\nraise RuntimeError('an older Upriver')\n")
    node = cluster.add_node("node-d", code=older)
    try:
        result = cluster.shared / "driver.mp4"
        film = str(cluster.shared / "film.mp4")
        done = cluster.upriver("restore", film, str(result), *OPTIONS, "--actors", "3", "--keep")
        assert done.returncode == 0, done.stderr
        assert frame_hashes(result) == expected  # and node-d, which was asked, does not run what it has
        # As in a job of a job server that does not take the code along.
        refused = cluster.upriver(
            "restore", film, str(cluster.shared / "refused.mp4"), *OPTIONS, RAY_JOB_CONFIG_JSON_ENV_VAR="{}"
        )
        assert refused.returncode == 2 and "Install one version on every node" in refused.stderr, refused.stderr
    finally:
        node.kill()


@pytest.mark.slow
def test_a_cluster_says_that_it_wants_a_token(cluster: RayCluster) -> None:
    film = str(cluster.shared / "film.mp4")
    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = cluster.upriver("restore", film, str(cluster.shared / "none.mp4"), *OPTIONS, **environment)
        assert done.returncode == 2 and "RAY_AUTH_TOKEN" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "0" * 64 not in done.stderr


@pytest.mark.slow
def test_a_model_in_a_bucket_is_fetched_once_a_node(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors on each of two nodes start at once; each node reaches the store through a counter of its own."""
    bucket = use(seaweedfs, monkeypatch)
    film = make_film(tmp_path / "film.mp4", SHOTS)
    storage_for(bucket).publish(film, f"{bucket}/film.mp4")
    for path in sorted(save_random_model(tmp_path / "model").rglob("*")):
        if path.is_file():
            storage_for(bucket).publish(path, f"{bucket}/model/{path.relative_to(tmp_path / 'model')}")
    names = [one.place for one in storage_for(bucket).list(f"{bucket}/model")]
    with FaultyStore(seaweedfs) as head_store, FaultyStore(seaweedfs) as node_store:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", head_store.endpoint)
        monkeypatch.setenv("UPRIVER_MODEL_CACHE", str(tmp_path / "cache"))
        with ray_cluster(tmp_path_factory.mktemp("cluster"), cpus=2) as made:
            made.add_node("node-b", cpus=2, AWS_ENDPOINT_URL_S3=node_store.endpoint, UPRIVER_MODEL_CACHE="/tmp/cache")
            options = (*OPTIONS, "--actors", "4", "--model", f"{bucket}/model", "--keep")
            done = made.upriver("restore", f"{bucket}/film.mp4", f"{bucket}/out.mp4", *options)
    assert done.returncode == 0, done.stderr
    use(seaweedfs, monkeypatch)
    records = [
        json.loads(storage_for(bucket).read(one.place))
        for one in storage_for(bucket).list(f"{bucket}/out.mp4.upriver")
        if "/segments/" in one.place and one.place.endswith(".json")
    ]
    assert len({record["host"] for record in records}) == 2
    for name in names:
        key = name.removeprefix("s3://")
        assert (head_store.count(f"GET /{key}"), node_store.count(f"GET /{key}")) == (1, 1), name
