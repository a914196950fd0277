"""Object stores that really run: started on loopback for a test session, with keys of their own, data in its folder.

`s3_bucket` is what most tests want: an empty `s3://bucket/prefix` on SeaweedFS with `AWS_*` set for this process and
those it starts. A test that kills its store makes one itself: `with SeaweedFS(tmp_path) as store: ... store.kill()`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "AKUPRIVERTESTS", "a-secret-that-no-message-may-show"
READ_ONLY_KEY, READ_ONLY_SECRET = "AKREADSONLY", "another-secret-that-no-message-may-show"
BUCKET = "archive"
_PROBE = "started"
START_TIMEOUT_S = 60.0


class Server:
    """A store in a process of its own. The same object can be killed and started again on the same ports and data."""

    def __init__(self, folder: Path, ports: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ports = free_ports(ports)
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self._process: subprocess.Popen[bytes] | None = None
        self._filled = False

    def command(self) -> list[str]:
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether it answers, and gives back what was put into it before it was killed."""
        try:
            urllib.request.urlopen(f"{self.endpoint}/{BUCKET}", timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                return False
        except OSError:
            return False
        if not self._filled:
            return True
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return bool(self.client().get_object(Bucket=BUCKET, Key=_PROBE)["Body"].read() == _PROBE.encode())
        except (BotoCoreError, ClientError):
            return False

    def start(self) -> None:
        """Start it and wait until it answers."""
        # A shell that waits for the end of its input ends the store with the tests that started it, even killed ones.
        command = ["sh", "-c", '{ "$@"; kill -9 0; } & read -r _; kill -9 0', "sh", *self.command()]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        limit = time.monotonic() + START_TIMEOUT_S
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise RuntimeError((self.folder / "server.log").read_text(errors="replace")[-4000:])
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    stop = kill  # nothing that it holds is wanted after the tests

    def environment(self) -> dict[str, str]:
        """What a process needs to use it: nothing else of the user's configuration is looked at."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, access_key: str = ACCESS_KEY, secret: str = SECRET_KEY) -> Any:
        """A plain client, to look at what the code under test did."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, response_checksum_validation="when_required"),
        )

    def __enter__(self) -> Any:
        self.start()
        self.client().create_bucket(Bucket=BUCKET)
        self.client().put_object(Bucket=BUCKET, Key=_PROBE, Body=_PROBE.encode())
        self._filled = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class SeaweedFS(Server):
    """Answers ranges with 206, honours `If-None-Match: *`, knows a key that may only read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ports=8)
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [
            {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": rights},
            {
                "name": "reader",
                "credentials": [{"accessKey": READ_ONLY_KEY, "secretKey": READ_ONLY_SECRET}],
                "actions": ["Read", "List"],
            },
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir(exist_ok=True)

    def command(self) -> list[str]:
        names = (
            "s3.port", "s3.port.grpc", "master.port", "master.port.grpc",
            "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
        )  # fmt: skip
        ports = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        return [
            _program("weed"), "-logtostderr", "server", f"-dir={self.folder / 'data'}", "-filer", "-s3",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self.folder / 's3.json'}", *ports,
            f"-filer.localSocket={self.folder / 'filer.sock'}", f"-s3.localSocket={self.folder / 's3.sock'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-master.telemetry=false",
            "-master.peers=none", "-volume.max=100", "-master.volumeSizeLimitMB=256", "-volume.minFreeSpace=1MiB",
        ]  # fmt: skip

    def stop(self) -> None:
        super().stop()
        for service in ("s3", "master", "volume", "filer"):  # it leaves them where it has no option for the place
            for port in self.ports:
                Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)


class Rclone(Server):
    """Answers ranges with 200 and ignores `If-None-Match`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ports=1)
        (folder / "data").mkdir(exist_ok=True)

    def command(self) -> list[str]:
        return [
            _program("rclone"), "serve", "s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", os.devnull,
            "--addr", f"127.0.0.1:{self.ports[0]}", str(self.folder / "data"),
        ]  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Return numbers of ports on loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _program(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The session's SeaweedFS, with the bucket `archive`."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    """The session's rclone, with the bucket `archive`."""
    with Rclone(tmp_path_factory.mktemp("rclone")) as store:
        yield store


@pytest.fixture
def s3_bucket(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty `s3://bucket/prefix` of this test's own; `AWS_*` is set for this process and those it starts."""
    return use(seaweedfs, monkeypatch)


def use(store: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point `AWS_*` at `store` and return an empty prefix in it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
