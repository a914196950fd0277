"""`upriver submit`: runs `upriver restore` on a Ray cluster as a job that outlives this terminal.

What the command line, the environment and the configuration file say here holds there. Knows how places look that
every node of a cluster can see; the job server itself is spoken to by `infra/ray_jobs.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.ray_jobs import ENDED, JobInfo, JobServer, python_command
from infra.settings import load_settings
from jobs.errors import ExitCode, UsageError

app = typer.Typer(
    name="submit",
    help="Run `upriver restore` on a Ray cluster as a job that outlives this terminal.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Address = Annotated[
    str | None,
    typer.Option(
        help="Job server of the cluster, http://host:8265. [default: RAY_API_SERVER_ADDRESS, or this machine]",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(help="What `upriver submit restore` printed.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command(context_settings={"ignore_unknown_options": True})
def restore(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="SRC DST [OPTIONS]", help="As `upriver restore` takes them.", show_default=False),
    ],
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show what the job prints until it ends.")] = True,
    shared_files: Annotated[
        bool, typer.Option("--shared-files", help="Every node sees the same files under the local paths given.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Submit a restoration; its exit status is the job's. Interrupting this command does not stop the job."""
    command, environment, metadata = job_of(arguments, shared_files=shared_files)
    server = JobServer(address)
    job_id = server.submit(command, environment=environment, metadata=metadata)
    if not wait:
        _tell(server.info(job_id), as_json)
        return int(ExitCode.DONE)
    print(f"job {job_id} at {server.address}", file=sys.stderr)
    return _follow(server, job_id, as_json)


@app.command()
def status(job_id: JobId, address: Address = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """Show whether a job waits, runs or has ended; `upriver status DST` shows how far it is."""
    _tell(JobServer(address).info(job_id), as_json)
    return int(ExitCode.DONE)


@app.command()
def logs(
    job_id: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, and end as it did.")] = False,
    debug: Debug = False,
) -> int:
    """Show what a job has printed."""
    server = JobServer(address)
    if follow:
        return _follow(server, job_id, as_json=False)
    sys.stdout.write(server.output(job_id))
    return int(ExitCode.DONE)


@app.command()
def stop(job_id: JobId, address: Address = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """Ask a job to stop; submitted again with the same arguments it goes on."""
    server = JobServer(address)
    server.stop(job_id)
    _tell(server.info(job_id), as_json)
    return int(ExitCode.DONE)


def job_of(arguments: Sequence[str], *, shared_files: bool) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Return command, environment and metadata of the job that does what `upriver restore ARGUMENTS` would do here.

    Raises:
        UsageError: a place that other machines cannot see.
        SettingsError: as from `upriver restore`. The parser's own errors pass through.
    """
    from typer.main import get_command

    from jobs.cli import app as upriver

    parser: Any = get_command(upriver)
    context = parser.commands["restore"].make_context("upriver restore", list(arguments))
    typed = context.params
    given = {name: value for name, value in typed.items() if value is not None}
    loaded = load_settings({name: value for name, value in given.items() if name in _settings()}, given.get("config"))
    model = loaded.values.model
    for what, place in (
        ("SRC", typed["src"]),
        ("DST", typed["dst"]),
        ("--truth", given.get("truth")),
        ("--plan", given.get("plan")),
        ("model", model),
    ):
        if place is not None and (what != "model" or Path(model).exists()):
            _require_visible(what, str(place), shared_files)
    command = python_command(["restore", *_without_config(arguments)])
    return command, loaded.environment(), {"source": str(typed["src"]), "destination": str(typed["dst"])}


def _settings() -> set[str]:
    from infra.settings import Settings

    return set(Settings.model_fields)


def _require_visible(what: str, place: str, shared_files: bool) -> None:
    if "://" in place:
        return
    if not shared_files:
        raise UsageError(
            f"The nodes of a cluster may not see {what} {place}, which is a path on this machine.",
            code="place-not-shared",
            remedy="Give s3://bucket/key, or --shared-files if every node sees the same files there.",
        )
    if not Path(place).is_absolute():
        raise UsageError(
            f"{what} {place} is relative to a folder of this machine.",
            code="place-relative",
            remedy="Give the whole path.",
        )


def _without_config(arguments: Sequence[str]) -> list[str]:
    """The arguments less the configuration file: what it says travels in the environment."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument == "--config" or argument.startswith("--config="):
            skip = argument == "--config" and not skip
            continue
        kept.append(argument)
    return kept


def _follow(server: JobServer, job_id: str, as_json: bool) -> int:
    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        info = server.follow(job_id, write)
    except KeyboardInterrupt:
        print(f"The job goes on. To stop it: upriver submit stop {job_id}", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    if as_json:
        _tell(info, as_json)
    if info.state == "STOPPED":
        return int(ExitCode.TERMINATED)
    if info.state == "SUCCEEDED":
        return int(ExitCode.DONE)
    return int(ExitCode.INTERNAL) if info.exit_code is None else info.exit_code


def _tell(info: JobInfo, as_json: bool) -> None:
    if as_json:
        told = {"job_id": info.job_id, "state": info.state, "exit_code": info.exit_code, "ended": info.state in ENDED}
        print(json.dumps(told))
    else:
        ended = "" if info.exit_code is None else f", exit status {info.exit_code}"
        print(f"{info.job_id}  {info.state.lower()}{ended}")
