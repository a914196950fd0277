"""Start an archive run: a copy of the suspended RayJob that is its pattern, unless the one before is still under way.

What a CronJob runs, with a ServiceAccount that may create, get and list RayJobs. Python's own library is enough for
three requests; KubeRay's RayCronJob would do without this, but is alpha, and off unless the operator is told otherwise.

Environment: PATTERN, the RayJob's name. Exit status: 0 started, or one is running; 1 the API refused.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
OVER = ("Complete", "Failed", "ValidationFailed")  # of status.jobDeploymentStatus
RUN_OF = "upriver/run-of"


class Api:
    """RayJobs of this pod's namespace."""

    def __init__(self) -> None:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        scheme = os.environ.get("KUBERNETES_SERVICE_SCHEME", "https")
        namespace = (ACCOUNT / "namespace").read_text().strip()
        name = f"[{host}]" if ":" in host else host
        self._base = f"{scheme}://{name}:{port}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        ca = ACCOUNT / "ca.crt"
        self._trust = ssl.create_default_context(cafile=str(ca)) if scheme == "https" else None

    def ask(self, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to a GET, or to a POST of `body`."""
        request = urllib.request.Request(  # the API server's address, from the kubelet
            self._base + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Bearer " + (ACCOUNT / "token").read_text().strip(),  # read anew: it is rotated
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=30, context=self._trust) as answer:
            told: dict[str, Any] = json.load(answer)
            return told


def run_from(pattern: dict[str, Any]) -> dict[str, Any]:
    """Return a RayJob that runs, made of the suspended one."""
    about = pattern["metadata"]
    return {
        "apiVersion": pattern["apiVersion"],
        "kind": pattern["kind"],
        "metadata": {
            "generateName": f"{about['name']}-",
            "labels": {**about.get("labels", {}), RUN_OF: about["name"]},
        },
        "spec": {**pattern["spec"], "suspend": False},
    }


def main() -> int:
    """Start a run; return the exit status."""
    api, name = Api(), os.environ["PATTERN"]
    try:
        runs = api.ask(f"?labelSelector={RUN_OF.replace('/', '%2F')}%3D{name}")["items"]
        for run in runs:
            status = run.get("status", {}).get("jobDeploymentStatus", "")
            if status not in OVER:
                print(f"{run['metadata']['name']} is {status or 'new'}: no second run beside it.")
                return 0
        made = api.ask(body=run_from(api.ask(f"/{name}")))
    except urllib.error.HTTPError as error:
        print(f"The Kubernetes API answers {error.code}: {error.read(2000).decode(errors='replace')}", file=sys.stderr)
        return 1
    print(f"Started {made['metadata']['name']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
