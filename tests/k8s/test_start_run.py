"""What the CronJob of archive runs does, against a server that answers as the Kubernetes API does for RayJobs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from k8s.components.archive.start_run import RUN_OF, run_from
from tests.k8s.manifests import K8S, Manifest, only
from tests.k8s.schemas import DefinitionMissing, problems

SCRIPT = K8S / "components" / "archive" / "start_run.py"
PATH = "/apis/ray.io/v1/namespaces/upriver/rayjobs"


class Api:
    """RayJobs in memory: get, list by label, create with a generated name. Right by a token and the verbs of a Role."""

    def __init__(self, verbs: set[str]) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.verbs, self.token = verbs, "a-token"
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                where = urlsplit(self.path)
                if where.path == PATH:
                    label, _, value = parse_qs(where.query)["labelSelector"][0].partition("=")
                    found = [
                        each for each in api.jobs.values() if each["metadata"].get("labels", {}).get(label) == value
                    ]
                    self._answer("list", {"items": found})
                else:
                    self._answer("get", api.jobs.get(where.path.removeprefix(PATH + "/")))

            def do_POST(self) -> None:
                made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = made["metadata"].setdefault("name", f"{made['metadata'].pop('generateName')}x7f{len(api.jobs)}")
                if "create" in api.verbs:
                    api.jobs[name] = made
                self._answer("create", made)

            def _answer(self, verb: str, body: object) -> None:
                allowed = self.headers["Authorization"] == f"Bearer {api.token}" and verb in api.verbs
                status = 403 if not allowed else 404 if body is None else 200
                text = json.dumps(body if status == 200 else {"message": f"rayjobs.ray.io: cannot {verb}"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    role = only("archive", "Role", "upriver-archive-start").data
    made = Api({verb for rule in role["rules"] if rule["resources"] == ["rayjobs"] for verb in rule["verbs"]})
    made.jobs["upriver-archive"] = copy.deepcopy(only("archive", "RayJob").data)
    yield made
    made.stop()


def start(api: Api, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script as the CronJob does."""
    container = only("archive", "CronJob").data["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "/scripts/start_run.py"]
    (folder / "token").write_text("a-token\n")
    (folder / "namespace").write_text("upriver")
    told = {each["name"]: each["value"] for each in container["env"]}
    kubernetes = {"HOST": "127.0.0.1", "PORT": str(api.port), "SCHEME": "http"}
    told |= {f"KUBERNETES_SERVICE_{name}": value for name, value in kubernetes.items()}
    environment = {"PATH": os.environ["PATH"], "SERVICE_ACCOUNT": str(folder), **told}
    command = [sys.executable, "-I", str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_a_run_is_a_copy_of_the_pattern_that_is_not_suspended(api: Api, tmp_path: Path) -> None:
    pattern = copy.deepcopy(api.jobs["upriver-archive"])
    done = start(api, tmp_path)
    assert done.returncode == 0, done.stderr
    (name,) = set(api.jobs) - {"upriver-archive"}
    assert done.stdout == f"Started {name}.\n" and name.startswith("upriver-archive-")
    run = api.jobs[name]
    assert pattern["spec"]["suspend"] is True and run["spec"] == {**pattern["spec"], "suspend": False}
    assert run["metadata"]["labels"][RUN_OF] == "upriver-archive"
    assert api.jobs["upriver-archive"] == pattern


@pytest.mark.parametrize(
    ("status", "another"), [(None, False), ("Retrying", False), ("Complete", True), ("Failed", True)]
)
def test_there_is_no_second_run_beside_one(api: Api, tmp_path: Path, status: str | None, another: bool) -> None:
    assert start(api, tmp_path).returncode == 0
    (name,) = set(api.jobs) - {"upriver-archive"}
    if status is not None:
        api.jobs[name]["status"] = {"jobDeploymentStatus": status}
    assert start(api, tmp_path).returncode == 0
    assert (len(api.jobs) == 3) is another


@pytest.mark.parametrize("verb", ["create", "get", "list"])
def test_each_verb_of_the_role_is_needed(api: Api, tmp_path: Path, verb: str) -> None:
    api.verbs.remove(verb)
    done = start(api, tmp_path)
    assert done.returncode == 1 and "403" in done.stderr and f"cannot {verb}" in done.stderr
    assert "Traceback" not in done.stderr and set(api.jobs) == {"upriver-archive"}


def test_a_run_is_valid() -> None:
    pattern = only("production", "RayJob")
    run = run_from({**pattern.data, "status": {"jobId": "old"}})
    try:
        assert problems(Manifest("production", run)) == []
    except DefinitionMissing as missing:
        pytest.skip(str(missing))
