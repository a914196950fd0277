"""`upriver keys`: makes, lists and revokes the API keys of the live service.

A key is printed once, when it is made; the file keeps its hash. A running service sees every change of the file with
its next request.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.errors import ExitCode, UsageError
from jobs.options import AsJson, Config, Debug

app = typer.Typer(
    name="keys",
    help="Make, list and revoke the API keys of the live service.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        help="The keys file. [default: `keys_file` of the live service's settings]",
        show_default=False,
    ),
]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="To whom the key leads; may have several.", show_default=False)],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="live, restore, jobs or admin; may be repeated. [default: live and restore]",
            show_default=False,
        ),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(min=0, help="The key expires after so many days. [default: never]", show_default=False),
    ] = None,
    note: Annotated[str, typer.Option(help="What people need to tell keys apart.", show_default=False)] = "",
    file: File = None,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Make a key and print it: once, since only its hash is kept."""
    from pydantic import ValidationError

    from infra.api_keys import changing, make_key

    path = keys_file(file, config)
    try:
        expires_at = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
        key, record = make_key(tenant, scopes_of(scope), expires_at=expires_at, note=note)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(
            f"No key can be made: {first['loc'][0]}: {first['msg']}.", code="key-option", remedy="Correct it."
        ) from error
    except (OverflowError, ValueError) as error:
        raise UsageError(f"--days {days:g} is too far away.", code="key-option", remedy="Leave it out.") from error
    with changing(path) as keys:
        keys.append(record)
    if as_json:
        print(json.dumps({"key": key} | shown(record), indent=2))
        return int(ExitCode.DONE)
    # The key alone on standard output, so that a script can take it from there.
    print(f"Key {record.id} of {tenant} is in {path}. It is shown only now:", file=sys.stderr)
    print(key)
    return int(ExitCode.DONE)


@app.command("list")
def list_keys(file: File = None, config: Config = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """List the keys: to whom they lead, what they are good for, which are revoked or expired."""
    from infra.api_keys import read_keys

    keys = [shown(record) for record in read_keys(keys_file(file, config)).keys]
    if as_json:
        print(json.dumps({"keys": keys}, indent=2))
        return int(ExitCode.DONE)
    for key in keys:
        until = f", until {key['expires_at']}" if key["expires_at"] else ""
        note = f"  {key['note']}" if key["note"] else ""
        print(f"{key['id']}  {key['state']:7}  {key['tenant']}  {' '.join(key['scopes'])}{until}{note}")
    return int(ExitCode.DONE)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key, as `upriver keys list` shows it.")],
    file: File = None,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Revoke a key: from the next request on it opens nothing, and streams that it opened are ended."""
    from infra.api_keys import changing, read_keys

    path = keys_file(file, config)
    read_keys(path)  # a file that is not there is an error here, and not the beginning of one
    with changing(path) as keys:
        places = [place for place, record in enumerate(keys) if record.id == key_id]
        if not places:
            raise UsageError(
                "There is no key with this id.", code="no-such-key", remedy="`upriver keys list` shows all ids."
            )
        record = keys[places[0]] = keys[places[0]].model_copy(update={"disabled": True})
    if as_json:
        print(json.dumps(shown(record), indent=2))
    else:
        print(f"Key {record.id} of {record.tenant} is revoked.")
    return int(ExitCode.DONE)


def keys_file(given: Path | None, config: Path | None) -> Path:
    """Return the keys file that a flag or the settings of the live service name.

    Raises:
        UsageError: none does. SettingsError: the settings cannot be read.
    """
    if given is not None:
        return given
    from infra.live_settings import load_live_settings

    path = load_live_settings(config_file=config).values.keys_file
    if path is None:
        raise UsageError(
            "No keys file is named.",
            code="no-keys-file",
            remedy="Give --file, or set UPRIVER_LIVE_KEYS_FILE, or `keys_file` in the configuration's table [live].",
        )
    return path


def scopes_of(names: list[str] | None) -> list[Any]:
    """Return the scopes that were typed; those of a plain client where none was.

    Raises:
        UsageError: something else was typed.
    """
    from infra.tenants import Scope

    if not names:
        return [Scope.LIVE, Scope.RESTORE]
    try:
        return [Scope(name) for name in names]
    except ValueError as error:
        raise UsageError(
            f"--scope: {error}.", code="key-option", remedy=f"Scopes are {', '.join(each.value for each in Scope)}."
        ) from error


def shown(record: Any) -> dict[str, Any]:
    """Return what is told of a key: everything but its hash."""
    state = "active" if record.is_usable(datetime.now(UTC).timestamp()) else "expired"
    return record.model_dump(mode="json", exclude={"sha256", "disabled"}) | {
        "state": "revoked" if record.disabled else state
    }
