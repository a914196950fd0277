"""What is asked of an image's Dockerfile beyond what hadolint knows: each rule returns its complaints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from tests.dockerfile import Recipe, Stage, Step, expand, is_ignored

TARGETS: Final = ("cpu", "gpu")
USER: Final = "10001:10001"
_SECRET = re.compile(r"(?i)(token|secret|passw|credential|api_?key|access_?key|private)")
_COMPILERS = re.compile(r"\b(build-essential|gcc|g\+\+|clang|cmake|make|rustc|cargo|golang|nvcc|cuda-\w+|\w+-dev)\b")


def bases_can_be_pinned(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """Every foreign base is an ARG, so that a build can give it by digest; its default has a tag, and not `latest`."""
    for line in re.findall(r"(?m)^FROM\s+(?:--\S+\s+)*(\S+)", text):
        if recipe.stage(line) is None and not re.fullmatch(r"\$\{\w+\}", line):
            yield f"FROM {line} is no argument"
    for stage in recipe.stages:
        tag = stage.base.rpartition("/")[2].partition(":")[2]
        if recipe.stage(stage.base) is None and "@sha256:" not in stage.base and tag in ("", "latest"):
            yield f"{stage.base} has no tag of its own"


def runs_as_nobody_in_particular(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """Targets end as the user that manifests name, by number: Kubernetes cannot tell by a name whether it is root."""
    for stage in _targets(recipe):
        last = [step.words[0] for step in stage.steps if step.instruction == "USER"][-1:]
        if last != [USER]:
            yield f"{stage.name} ends as {last or 'root'}"


def nothing_is_given_to_the_user(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """No file belongs to the user that the image runs as, and no volume makes a writable place by itself."""
    for stage, step in _steps(recipe):
        if step.instruction == "VOLUME":
            yield f"{stage.name}: VOLUME"
        given = (step.flag("chown") or "") + " ".join(re.findall(r"chown\s+(?:-\S+\s+)*(\S+)", step.words[0]))
        if step.instruction in ("COPY", "RUN") and re.search(r"10001|upriver", given):
            yield f"{stage.name}: chown to {given}"
        if step.instruction == "RUN" and re.search(
            r"chmod\s+(?:-\S+\s+)*(?:\d?\d\d[2367]\b|\S*[oa]\S*\+\S*w)", step.words[0]
        ):
            yield f"{stage.name}: others may write"


def no_secret_is_kept(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """ARG and ENV stay in the image's history; secrets are mounted for one step."""
    for stage, step in _steps(recipe):
        if step.instruction in ("ARG", "ENV", "LABEL"):
            yield from (f"{stage.name}: {step.instruction} {name}" for name in step.pairs() if _SECRET.search(name))
    yield from (f"ARG {name}" for name in recipe.arguments if _SECRET.search(name))


def packages_come_as_wheels(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """pip installs tested versions, runs nobody's setup code, and leaves no cache behind."""
    for stage, step in _steps(recipe):
        if step.instruction != "RUN":
            continue
        for command in re.findall(r"-m pip\b[^&|;]*?\b(?:install|wheel)\b[^&|;]*", step.words[0]):
            if "--no-cache-dir" not in command:
                yield f"{stage.name}: pip keeps its cache"
            if "--no-deps" not in command and not re.search(r"-c constraints\.txt", command):
                yield f"{stage.name}: pip installs versions that nobody tested"
            if "--no-deps" not in command and "--only-binary :all:" not in command:
                yield f"{stage.name}: pip may run setup code"


def apt_leaves_nothing(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """apt's lists go in the layer that fetched them; no recommended packages."""
    for stage, step in _steps(recipe):
        if step.instruction == "RUN" and "apt-get install" in step.words[0]:
            if "apt-get update" not in step.words[0] or "rm -rf /var/lib/apt/lists/*" not in step.words[0]:
                yield f"{stage.name}: update, install and clean up belong together"
            if "--no-install-recommends" not in step.words[0]:
                yield f"{stage.name}: recommended packages"


def no_compiler_stays(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """Neither a compiler nor headers come with apt in what targets are built upon, nor pip into their environment."""
    for name in TARGETS:
        for stage in recipe.line_of(name):
            for step in stage.steps:
                if (
                    step.instruction == "RUN"
                    and "apt-get install" in step.words[0]
                    and (m := _COMPILERS.search(step.words[0]))
                ):
                    yield f"{stage.name}: {m[0]}"
    for stage, step in _steps(recipe):
        makes = re.search(r"-m venv\b[^&]*/opt/upriver", step.words[0]) if step.instruction == "RUN" else None
        if makes is not None and "--without-pip" not in makes[0]:
            yield f"{stage.name}: pip stays in the environment"


def code_comes_last(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """What installs the dependencies sees no code: otherwise every change of the code would install them again."""
    for name in ("requirements", *(f"environment-{target}" for target in TARGETS)):
        stage = recipe.stage(name)
        for step in stage.steps if stage else ():
            if step.instruction == "COPY":
                folders = [word for word in step.words[:-1] if word.endswith("/") or word == "."]
                yield from (f"{name} copies {folder}" for folder in folders)


def copies_what_there_is(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """Sources of COPY are let through by the ignore file; stages that are named exist and come before."""
    seen: set[str] = set()
    for stage in recipe.stages:
        for step in stage.steps:
            named = [step.flag("from")] if step.instruction == "COPY" else [each.get("from") for each in step.mounts()]
            for other in filter(None, named):
                if other not in seen:
                    yield f"{stage.name} copies from {other}, which is no stage before it"
            if step.instruction == "COPY" and step.flag("from") is None:
                for word in step.words[:-1]:
                    if is_ignored(word.strip("/"), ignore):
                        yield f"{stage.name}: {word} is ignored"
            if step.instruction == "ADD":
                yield f"{stage.name}: ADD fetches and unpacks; COPY says what is there"
        seen.add(stage.name)


def folders_are_absolute(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """WORKDIR and the targets of copies from other stages do not depend on what was said before."""
    for stage, step in _steps(recipe):
        if step.instruction == "WORKDIR" and not step.words[0].startswith("/"):
            yield f"{stage.name}: WORKDIR {step.words[0]}"
        if step.instruction == "COPY" and step.flag("from") and not step.words[-1].startswith("/"):
            yield f"{stage.name}: COPY --from to {step.words[-1]}"


def pipes_cannot_hide_a_failure(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """A shell without pipefail takes a pipe for good if its last command is; `;` goes on after a failure."""
    for stage, step in _steps(recipe):
        if step.instruction == "RUN" and not step.as_list:
            plain = re.sub(r"\bif\b.*?\bfi\b", "", re.sub(r"'[^']*'|\"[^\"]*\"", "", step.words[0]))
            if re.search(r"(?<!\|)\|(?!\|)", plain):
                yield f"{stage.name}, line {step.line}: a pipe"
            if ";" in plain.replace("\\;", ""):
                yield f"{stage.name}, line {step.line}: `;`"


def starts_as_clusters_expect(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """Lists, not shell strings; an init that reaps and passes signals on; no health check of the image's own."""
    for name in TARGETS:
        steps = {step.instruction: step for stage in recipe.line_of(name) for step in stage.steps}
        for instruction, wanted in (
            ("ENTRYPOINT", ("tini", "--", "upriver")),
            ("CMD", None),
            ("HEALTHCHECK", ("NONE",)),
        ):
            step = steps.get(instruction)
            if step is None:
                yield f"{name} has no {instruction}"
            elif instruction != "HEALTHCHECK" and not step.as_list:
                yield f"{name}: {instruction} is a shell string"
            elif wanted is not None and step.words != wanted:
                yield f"{name}: {instruction} is {step.words}"


def says_what_it_is(recipe: Recipe, text: str, ignore: str) -> Iterator[str]:
    """OCI's annotations, https://github.com/opencontainers/image-spec/blob/main/annotations.md."""
    for stage in _targets(recipe):
        labels: dict[str, str] = {}
        for step in stage.steps:
            labels |= step.pairs() if step.instruction == "LABEL" else {}
        for name in ("title", "description", "licenses", "version", "revision"):
            if not expand(labels.get(f"org.opencontainers.image.{name}", ""), {"VERSION": "1", "REVISION": "1"}):
                yield f"{stage.name} has no label {name}"


RULES: Final[tuple[Callable[[Recipe, str, str], Iterator[str]], ...]] = (
    bases_can_be_pinned,
    runs_as_nobody_in_particular,
    nothing_is_given_to_the_user,
    no_secret_is_kept,
    packages_come_as_wheels,
    apt_leaves_nothing,
    no_compiler_stays,
    code_comes_last,
    copies_what_there_is,
    folders_are_absolute,
    pipes_cannot_hide_a_failure,
    starts_as_clusters_expect,
    says_what_it_is,
)


def _targets(recipe: Recipe) -> Iterator[Stage]:
    for name in TARGETS:
        stage = recipe.stage(name)
        assert stage is not None, f"no target {name}"
        yield stage


def _steps(recipe: Recipe) -> Iterator[tuple[Stage, Step]]:
    for stage in recipe.stages:
        for step in stage.steps:
            yield stage, step
