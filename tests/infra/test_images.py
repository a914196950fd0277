"""The image: its Dockerfile is sound, every step of it runs, and what comes out works, read-only and as nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import app
from tests.dockerfile import Step, context_files, expand, is_ignored, parse
from tests.hub import hub
from tests.image_build import Builder, Built, can_build, run_image
from tests.image_rules import RULES

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "infra/images"
TEXT = (IMAGES / "Dockerfile").read_text()
IGNORE = (IMAGES / "Dockerfile.dockerignore").read_text()
PACKAGES = ("pipeline", "actors", "jobs", "infra")

# Where pip has been told of places of its own, they have torch for CPUs; elsewhere the Dockerfile's index has it.
ARGUMENTS = {"TORCH_CPU_INDEX": "", "TORCH_GPU_INDEX": ""} if os.environ.get("PIP_FIND_LINKS") else {}

needs_overlays = pytest.mark.skipif(not can_build(), reason="needs root and overlay mounts")


def hadolint(text: str) -> list[str]:
    """The codes of what hadolint finds, by its own rules and shellcheck's."""
    program = Path(sys.executable).with_name("hadolint")
    told = subprocess.run(
        [str(program), "--format", "json", "-"], input=text, capture_output=True, text=True, timeout=60
    )
    assert told.stdout, told.stderr
    return [each["code"] for each in json.loads(told.stdout)]


def complaints(rule: str, text: str, ignore: str = IGNORE) -> list[str]:
    (found,) = [each for each in RULES if each.__name__ == rule]
    return list(found(parse(text), text, ignore))


def changed(text: str, old: str, new: str) -> str:
    assert old in text, f"the Dockerfile has no {old!r} any more"
    return text.replace(old, new)


def test_hadolint_finds_nothing() -> None:
    assert hadolint(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("FROM ${PYTHON_IMAGE} AS runtime", "FROM python AS runtime", "DL3006"),
        ("FROM ${PYTHON_IMAGE} AS runtime", "FROM python:latest AS runtime", "DL3007"),
        ("WORKDIR /data", "WORKDIR data", "DL3000"),
        ("--yes --no-install-recommends", "--yes", "DL3015"),
        (" && rm -rf /var/lib/apt/lists/* \\\n", "", "DL3009"),
        ("COPY constraints.txt ./", "ADD constraints.txt ./", "DL3020"),
        ("apt-get install --yes", "apt-get install", "DL3014"),
        ("RUN apt-get update", "RUN sudo apt-get update", "DL3004"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["tini", "--", "upriver"]', "ENTRYPOINT tini -- upriver", "DL3025"),
        ("mkdir -p /models /data", "cd /models", "DL3003"),
        ('"PATH=/opt/upriver/bin:\\$PATH"', "'PATH=/opt/upriver/bin:$PATH'", "SC2016"),
    ],
)
def test_hadolint_would_find_it(old: str, new: str, code: str) -> None:
    assert code in hadolint(changed(TEXT, old, new))


@pytest.mark.parametrize("rule", [each.__name__ for each in RULES])
def test_the_rules_are_kept(rule: str) -> None:
    assert complaints(rule, TEXT) == []


MUTATIONS = {
    "bases_can_be_pinned": [
        ("FROM ${PYTHON_IMAGE} AS runtime", "FROM python:3.11-slim AS runtime"),
        ("python:3.11-slim-bookworm\n", "python:latest\n"),
    ],
    "runs_as_nobody_in_particular": [("USER 10001:10001", "USER upriver"), ("USER 10001:10001", "")],
    "nothing_is_given_to_the_user": [
        ("COPY --from=environment-gpu", "COPY --chown=10001:10001 --from=environment-gpu"),
        ("WORKDIR /data", "VOLUME /data"),
        ("mkdir -p /models /data", "mkdir -p /models /data && chown -R upriver /models"),
        ("mkdir -p /models /data", "mkdir -p /models /data && chmod 777 /models"),
    ],
    "no_secret_is_kept": [
        ("ARG MODEL=tiny", "ARG MODEL=tiny\nARG HF_TOKEN"),
        ("HOME=/tmp \\", "HOME=/tmp AWS_SECRET_ACCESS_KEY=x \\"),
    ],
    "packages_come_as_wheels": [
        ("install --no-cache-dir --only-binary :all: -c", "install --only-binary :all: -c"),
        ("-c constraints.txt -r requirements.txt", "-r requirements.txt"),
        ("install --no-cache-dir --only-binary :all: -c", "install --no-cache-dir -c"),
    ],
    "apt_leaves_nothing": [
        (" && rm -rf /var/lib/apt/lists/* \\\n", ""),
        ("--yes --no-install-recommends", "--yes"),
    ],
    "no_compiler_stays": [("tini wget", "tini wget build-essential"), ("-m venv --without-pip", "-m venv")],
    "code_comes_last": [("COPY constraints.txt pyproject.toml", "COPY pipeline/ constraints.txt pyproject.toml")],
    "copies_what_there_is": [
        ("COPY jobs/ jobs/", "COPY tests/ tests/"),
        ("COPY --from=environment-cpu", "COPY --from=environment"),
        ("mount=type=bind,from=wheel", "mount=type=bind,from=wheels"),
    ],
    "folders_are_absolute": [
        ("WORKDIR /data", "WORKDIR data"),
        ("/opt/upriver /opt/upriver", "/opt/upriver opt/upriver"),
    ],
    "pipes_cannot_hide_a_failure": [
        ("> requirements.txt", "| tee requirements.txt"),
        ('fi \\\n && upriver doctor --model "$MODEL"', 'fi; upriver doctor --model "$MODEL"; true'),
    ],
    "starts_as_clusters_expect": [
        ('["tini", "--", "upriver"]', '["upriver"]'),
        ('CMD ["--help"]', "CMD --help"),
        ("HEALTHCHECK NONE", "HEALTHCHECK CMD upriver doctor"),
    ],
    "says_what_it_is": [('version="${VERSION}-gpu"', 'version=""')],
}


def test_every_rule_is_broken_once() -> None:
    assert set(MUTATIONS) == {each.__name__ for each in RULES}


@pytest.mark.parametrize(
    ("rule", "old", "new"), [(rule, old, new) for rule, pairs in MUTATIONS.items() for old, new in pairs]
)
def test_a_broken_rule_is_noticed(rule: str, old: str, new: str) -> None:
    assert complaints(rule, changed(TEXT, old, new))


def test_the_build_sees_all_of_the_code_and_nothing_else(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    seen = set(context_files(ROOT, IGNORE))
    assert seen - tracked == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert tracked - seen == set()
    for name in ("keys.toml", ".env", ".git/config", "infra/.env", "jobs/__pycache__/cli.cpython-311.pyc", "film.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    assert context_files(tmp_path, IGNORE) == []


@pytest.mark.parametrize(
    ("rules", "path", "ignored"),
    [
        ("*\n!jobs/", "jobs/cli.py", False),
        ("*\n!jobs/", "tests/jobs/cli.py", True),
        ("**/*.pyc", "a/b/c.pyc", True),
        ("*.pyc", "a/c.pyc", False),
        ("a?c", "abc/d", True),
        ("# *\n", "a", False),
        ("*\n!a\n**/.*", "a/.hidden", True),
    ],
)
def test_ignore_rules_are_docker_s(rules: str, path: str, ignored: bool) -> None:
    assert is_ignored(path, rules) is ignored


def test_variables_are_put_in_as_docker_does() -> None:
    known = {"A": "1", "EMPTY": ""}
    assert expand("$A ${A} ${A:+x}${EMPTY:+x} ${EMPTY:-y}${B:-z}${B}", known) == "1 1 x yz"
    step = parse('FROM x\nENV A="b c" D=e\n').stages[0].steps[0]
    assert step == Step("ENV", ("A", "b c", "D", "e"), (), 2, False) and step.pairs() == {"A": "b c", "D": "e"}


def test_requirements_are_those_of_the_project() -> None:
    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(IMAGES / "requirements.py"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    lines = told("pyproject.toml", "kserve,otel").stdout.splitlines()
    assert {"kserve>=0.21,<0.22", "torch>=2.8,<3"} <= set(lines) and not any("pytest" in line for line in lines)
    assert set(lines) < set(told("pyproject.toml", "all").stdout.splitlines())
    wrong = told("pyproject.toml", "nosuch")
    assert wrong.returncode != 0 and "has no extra 'nosuch'" in wrong.stderr


@needs_overlays
def test_the_builder_does_what_an_engine_does(tmp_path: Path) -> None:
    """Copies, mounts, variables and users, on a small image: what the slow tests below rely on."""
    (tmp_path / "context/folder").mkdir(parents=True)
    (tmp_path / "context/folder/a").write_text("seen\n")
    (tmp_path / "context/folder/b").write_text("ignored")
    (tmp_path / "credentials").write_text("NAME=value\n")
    recipe = parse(
        "ARG BASE=debian:12\n"
        "FROM ${BASE} AS first\nARG WORD=no\nENV SAID=$WORD\nWORKDIR /place\nCOPY folder/ kept/\n"
        'RUN echo $WORD > made && test ! -e kept/b && test -z "$(ls /tmp)"\n'
        "FROM first AS second\nWORKDIR deeper\nCOPY --from=first /place/made /other/\n"
        "RUN --mount=type=bind,from=first,source=/place,target=/mnt/x cat /mnt/x/kept/a > /copied\n"
        "RUN --mount=type=secret,id=c,target=/run/secrets/c . /run/secrets/c && echo $NAME > /named\n"
        'USER 10001:10001\nENTRYPOINT ["sh", "-c"]\n'
    )
    work = tmp_path / "work"
    work.mkdir()
    builder = Builder(
        recipe, tmp_path / "context", "**/b", work, {"WORD": "yes"}, secrets={"c": tmp_path / "credentials"}
    )
    image = builder.build("second")
    told = run_image(
        image,
        [
            "pwd; id -u; echo $SAID; cat /place/made /other/made /copied /named; touch /tmp/t && echo written; "
            "touch /place/x || touch /x || touch $HOME/x || echo refused; grep CapEff /proc/self/status; "
            "cat /proc/net/dev | grep -c :; test -s /run/secrets/c || echo gone"
        ],
        environment={"HOME": "/place"},
    )
    assert told.stdout.split() == [
        "/place/deeper", "10001", "yes", "yes", "yes", "seen", "value", "written", "refused",
        "CapEff:", "0000000000000000", "1", "gone",
    ], told.stderr  # fmt: skip
    assert not Path("/copied").exists()
    with pytest.raises(AssertionError, match="line 3"):
        bad = tmp_path / "bad"
        bad.mkdir()
        Builder(parse("FROM x AS y\nENV A=1\nRUN exit 7\n"), tmp_path / "context", "", bad).build("y")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for layers of some gigabytes, which must not stay with the other results of a run."""
    folder = tmp_path_factory.mktemp("image")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def builder(work: Path) -> Iterator[Builder]:
    """Builds the Dockerfile, with a model from a hub baked in."""
    (work / "build").mkdir()
    credentials = work / "credentials"
    with hub({"night/film": ROOT / "tests/parity/ckpt_a"}) as (url, token):
        credentials.write_text(f"HF_ENDPOINT={url}\nHF_TOKEN={token}\n")
        arguments = {**ARGUMENTS, "MODEL": "night/film", "REVISION": "0123abc"}
        secrets = {"model_credentials": credentials}
        yield Builder(parse(TEXT), ROOT, IGNORE, work / "build", arguments, secrets)


@pytest.fixture(scope="module")
def image(builder: Builder) -> Built:
    """The CPU image: every step of the Dockerfile that leads to it has been run."""
    return builder.build("cpu")


@needs_overlays
@pytest.mark.slow
def test_the_wheel_of_the_image_holds_every_file(builder: Builder) -> None:
    (wheel,) = (builder.build("wheel").layer / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in context_files(ROOT, IGNORE) if "/" in name}
    assert {"actors/page/index.html", "infra/dashboards/alerts.yaml", "infra/live.proto", "jobs/report.css"} < wanted
    assert wanted - names == set()


@needs_overlays
@pytest.mark.slow
def test_the_image_works_read_only_and_as_nobody(image: Built) -> None:
    told = run_image(image, ["-m", "infra.images.smoke", "--hardened"], entrypoint=["python"], timeout=900)
    failed = [line for line in told.stdout.splitlines() if not line.startswith("ok ")][:-1]
    if not any(command.name == "predictor" for command in app.registered_commands):
        failed = [
            line for line in failed if line != "FAILED predictor: this version has no command `upriver predictor`"
        ]
    assert failed == [], told.stdout + told.stderr


@needs_overlays
@pytest.mark.slow
def test_the_image_is_what_was_installed(image: Built) -> None:
    told = run_image(image, ["-m", "infra.images.sbom", "--verify"], entrypoint=["python"])
    assert told.returncode == 0, told.stdout
    document = json.loads((image.layer / "opt/upriver/sbom.cdx.json").read_text())
    assert document["metadata"]["component"]["version"] == "0.1.0"
    purls = {one.get("purl", "").partition("@")[0] for one in document["components"]}
    assert {"pkg:pypi/ray", "pkg:pypi/kserve", "pkg:deb/debian/tini"} < purls
    assert {"pkg:pypi/pip", "pkg:pypi/pytest", "pkg:pypi/hatchling"} & purls == set()
    assert image.labels["org.opencontainers.image.version"] == "0.1.0-cpu"
    assert image.labels["org.opencontainers.image.revision"] == "0123abc"


@needs_overlays
@pytest.mark.slow
def test_a_baked_model_needs_no_network(image: Built) -> None:
    told = run_image(image, ["doctor", "--model", "night/film", "--json"], environment={"HF_HUB_OFFLINE": "1"})
    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(told.stdout)["model"]["folder"].startswith("/models/huggingface/hub/")
    other = run_image(image, ["doctor", "--model", "night/other"], environment={"HF_HUB_OFFLINE": "1"})
    assert other.returncode == 7


@needs_overlays
@pytest.mark.slow
def test_the_credentials_of_the_build_are_not_in_the_image(image: Built) -> None:
    (secret,) = image.layer.parents[1].glob("credentials")
    token = secret.read_text().split("HF_TOKEN=")[1].strip()
    assert token not in json.dumps([image.environment, image.labels])
    found = subprocess.run(
        ["grep", "-rlF", "--", token, *(str(image.layer / part) for part in ("models", "etc", "run", "data", "root"))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout == ""


@needs_overlays
@pytest.mark.slow
def test_the_gpu_target_can_be_resolved(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages are found and fit together; gigabytes of CUDA libraries are not installed for that."""
    monkeypatch.setenv("PIP_DRY_RUN", "1")
    gpu = builder.build("environment-gpu")
    wanted = (gpu.layer / "build/requirements.txt").read_text()
    assert "torchvision" in wanted and "kserve" in wanted
