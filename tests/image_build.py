"""Builds an image's root file system from a Dockerfile without a container engine, and runs commands in it.

Each stage is one overlay above the root file system of this machine (or of `IMAGE_BASE_ROOT`, a folder with a
Debian that has Python 3.11 with venv), which stands for the base image; steps run in it as they are written, as root,
with its /tmp empty. What is built runs as a cluster would run it: read-only, as the image's user, without capabilities,
with a /tmp of its own, without a network but loopback. Needs root and the right to mount: see `can_build`.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.dockerfile import Recipe, Stage, Step, context_files, expand

BASE_ROOT = "IMAGE_BASE_ROOT"  # tests run without variables that begin with UPRIVER_
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How this machine reaches package indexes: an engine gets the like from its daemon's settings.
_NETWORK = ("PIP_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LOOPBACK_UP = (
    "import fcntl, socket, struct; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1))"  # SIOCSIFFLAGS, IFF_UP
)


@functools.cache
def can_build() -> bool:
    """Whether this machine lets us mount overlays in namespaces of our own."""
    probe = "d=$(mktemp -d) && mount -t tmpfs none $d && mkdir $d/u $d/w $d/m && mount -t overlay o -o "
    probe += "lowerdir=/,upperdir=$d/u,workdir=$d/w $d/m && chroot $d/m setpriv --version"
    command = ["unshare", "--mount", "--pid", "--fork", "--net", "sh", "-c", probe]
    try:
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@dataclass(slots=True)
class Built:
    """A stage after its steps: what it changed of `base`, and the image's configuration."""

    base: Path
    layer: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


class Builder:
    """Builds stages of one Dockerfile, each once.

    Args:
        context: the folder that the build is given; `ignore` says what of it is left out.
        work: an empty folder for layers; its size becomes that of the image, several times.
        arguments: values of ARGs.
        secrets: files of this machine by the ids under which steps mount them.
    """

    def __init__(
        self,
        recipe: Recipe,
        context: Path,
        ignore: str,
        work: Path,
        arguments: Mapping[str, str] | None = None,
        secrets: Mapping[str, Path] | None = None,
    ) -> None:
        self._recipe, self._work, self._arguments = recipe, work, {**recipe.arguments, **(arguments or {})}
        self._secrets = secrets or {}
        self._base = Path(os.environ.get(BASE_ROOT, "/"))
        self._built: dict[str, Built] = {}
        self._context = work / "context"
        for name in context_files(context, ignore):
            (self._context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(context / name, self._context / name)

    def build(self, name: str) -> Built:
        """Return a stage, built with all that it needs.

        Raises:
            AssertionError: a step failed; the message has its line and its output.
        """
        if name not in self._built:
            stage = self._recipe.stage(name)
            assert stage is not None, f"no stage {name}"
            self._built[name] = self._build(stage)
        return self._built[name]

    def _build(self, stage: Stage) -> Built:
        layer = self._work / f"layer-{stage.name}"
        if self._recipe.stage(stage.base) is None:
            layer.mkdir()
            made = Built(self._base, layer)
        else:  # a copy of its layer: the kernel does not stack overlays whose parts lie inside one another
            below = self.build(stage.base)
            subprocess.run(["cp", "-a", below.layer, layer], check=True)
            made = replace(below, layer=layer, environment=dict(below.environment), labels=dict(below.labels))
        known: dict[str, str] = {}  # ARGs that the stage has declared
        for step in stage.steps:
            self._take(step, made, known)
        return made

    def _take(self, step: Step, made: Built, known: dict[str, str]) -> None:
        def put_in(text: str) -> str:
            return expand(text, {**known, **made.environment})

        match step.instruction:
            case "ARG":
                for name, value in step.pairs().items():
                    known[name] = self._arguments.get(name, put_in(value))
            case "ENV":
                made.environment |= {name: put_in(value) for name, value in step.pairs().items()}
            case "LABEL":
                made.labels |= {name: put_in(value) for name, value in step.pairs().items()}
            case "WORKDIR":
                place = os.path.join(made.workdir, put_in(step.words[0]))
                self._within(made, ["mkdir", "-p", place], step)
                made.workdir = place
            case "USER":
                made.user = step.words[0]
            case "ENTRYPOINT":
                made.entrypoint = step.words
            case "CMD":
                made.command = step.words
            case "COPY":
                self._copy(step, made, known)
            case "RUN":
                command = list(step.words) if step.as_list else ["/bin/sh", "-c", step.words[0]]
                through = {name: value for name, value in os.environ.items() if name.upper().startswith(_NETWORK)}
                self._within(made, command, step, {**through, **known}, self._mounts(step))
            case "EXPOSE" | "HEALTHCHECK":
                pass
            case other:
                raise AssertionError(f"line {step.line}: the builder does not know {other}")

    def _mounts(self, step: Step) -> list[tuple[Built | Path, str, str]]:
        found: list[tuple[Built | Path, str, str]] = []
        for mount in step.mounts():
            if mount["type"] == "bind":
                found.append((self.build(mount["from"]), mount["source"], mount["target"]))
            elif mount["type"] == "secret":  # one that is not given is not there
                if mount["id"] in self._secrets:
                    found.append((self._secrets[mount["id"]], "", mount["target"]))
            else:
                raise AssertionError(f"line {step.line}: the builder does not know {mount}")
        return found

    def _copy(self, step: Step, made: Built, known: Mapping[str, str]) -> None:
        *sources, target = (expand(word, {**known, **made.environment}) for word in step.words)
        origin = step.flag("from")
        stage = self._context if origin is None else self.build(origin)
        place = os.path.join(made.workdir, target)
        lines = []
        for source in sources:
            at = shlex.quote("/mnt/from/" + source.strip("/"))
            # A folder's content is copied, not the folder; a file goes into the target if that ends with a slash.
            lines.append(
                f"if [ -d {at} ]; then mkdir -p {place} && cp -a {at}/. {place}; "
                f"else mkdir -p $(dirname {place}x) && cp -a {at} {place}; fi"
            )
        self._within(made, ["/bin/sh", "-ec", "\n".join(lines)], step, mounts=[(stage, "/", "/mnt/from")])

    def _within(
        self,
        made: Built,
        command: Sequence[str],
        step: Step,
        extra: Mapping[str, str] | None = None,
        mounts: Sequence[tuple[Built | Path, str, str]] = (),
    ) -> None:
        workspace = self._work / "workspace"
        workspace.mkdir(exist_ok=True)
        script = [_overlay(made, "$root", workspace), *_system("$root")]
        for number, (other, source, target) in enumerate(mounts):
            place = other if isinstance(other, Path) else Path(f"/mnt/{number}")
            if isinstance(other, Built):
                spare = self._work / f"workspace-{number}"
                spare.mkdir(exist_ok=True)
                script += [f"mkdir {place}", _overlay(other, str(place), spare)]
            script.append(f"mkdir -p $root{os.path.dirname(target)}")
            script.append(f"touch $root{target}" if place.is_file() else f"mkdir -p $root{target}")
            script.append(f"mount --bind {place}{source} $root{target}")
        environment = {"PATH": _SYSTEM_PATH, "HOME": "/root", **(extra or {}), **made.environment}
        script.append(_enter(command, environment, made.workdir))
        told = _in_namespaces(script, timeout=1200)
        for left in self._work.glob("workspace*"):
            shutil.rmtree(left)
        assert told.returncode == 0, (
            f"line {step.line}: {' '.join(step.words)[:200]}\nended with {told.returncode}:\n"
            f"{told.stdout[-3000:]}{told.stderr[-3000:]}"
        )


def run_image(
    image: Built,
    arguments: Sequence[str],
    *,
    entrypoint: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[str, Path] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run a container of the image as a careful cluster does, and return how it ended.

    Args:
        arguments: behind the entry point. `entrypoint`: another one.
        mounts: folders of this machine by the places where the container may write to them.
    """
    uid, _, gid = image.user.partition(":")
    workspace = image.layer.with_name("workspace")
    workspace.mkdir(exist_ok=True)
    script = [_overlay(image, "$root", workspace, "ro"), *_system("$root"), "chmod 1777 $root/tmp"]
    for target, source in (mounts or {}).items():
        script.append(f"mount --bind {source} $root{target}")
    command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    command += ["--bounding-set=-all", "--inh-caps=-all", "--"]
    command += [*(image.entrypoint if entrypoint is None else entrypoint), *arguments]
    script.append(_enter(command, {**image.environment, **(environment or {})}, image.workdir))
    return _in_namespaces(script, timeout=timeout, network=False)


def _overlay(image: Built, place: str, workspace: Path, options: str = "rw") -> str:
    parts = f"lowerdir={image.base},upperdir={image.layer},workdir={workspace}"
    return f"mount -t overlay overlay -o {options},{parts} {place}"


def _system(root: str) -> list[str]:
    """What every container has besides its files."""
    return [
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
        f"mount -t tmpfs tmpfs {root}/dev/shm",
        f"mount --rbind /sys {root}/sys",
        f"mount -t tmpfs tmpfs {root}/tmp",
    ]


def _enter(command: Sequence[str], environment: Mapping[str, str], workdir: str) -> str:
    settings = [f"{name}={value}" for name, value in environment.items()]
    words = ["env", "-i", *settings, "/bin/sh", "-c", f'cd {shlex.quote(workdir)} && exec "$@"', "sh", *command]
    return f"exec chroot $root {shlex.join(words)}"


def _in_namespaces(script: Sequence[str], *, timeout: float, network: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script in namespaces of its own: its mounts, and all that it starts, end with it."""
    start = ["set -e", "mount --make-rprivate /"]
    if not network:
        start.append(f"{shlex.quote(sys.executable)} -c {shlex.quote(_LOOPBACK_UP)}")
    # A place to mount on, which goes with the namespace.
    start += ["mount -t tmpfs tmpfs /mnt", "mkdir /mnt/root", "root=/mnt/root"]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc"]
    command += [] if network else ["--net"]
    return subprocess.run(
        [*command, "sh", "-c", "\n".join([*start, *script])],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
