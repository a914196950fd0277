from __future__ import annotations

import hashlib
import json
import re
import stat
import time
from pathlib import Path

import pytest

from infra.api_keys import ApiKeys, read_keys
from infra.tenants import Scope
from jobs.cli import main


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    file = tmp_path / "deep" / "keys.json"
    monkeypatch.setenv("UPRIVER_LIVE_KEYS_FILE", str(file))
    return file


def test_a_key_is_made_shown_once_and_works(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "alice", "--note", "the drone"]) == 0
    told = capsys.readouterr()
    key = told.out.strip()
    assert told.out == f"{key}\n" and re.fullmatch(r"upr_[0-9a-f]{16}_\S{43}", key)  # a script can take it
    assert key not in told.err and str(path) in told.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in path.read_text() and hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    record = ApiKeys(path).find(key, time.time())
    assert record is not None and record.tenant == "alice" and set(record.scopes) == {Scope.LIVE, Scope.RESTORE}
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert record.id in listed and "the drone" in listed and "active" in listed
    assert key not in listed and record.sha256 not in listed


def test_a_running_service_sees_what_is_made_and_revoked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "alice", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    service = ApiKeys(path)
    assert main(["keys", "create", "bob", "--scope", "admin", "--scope", "jobs", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["scopes"] == ["admin", "jobs"] and second["state"] == "active" and "sha256" not in second
    assert service.find(second["key"], time.time())
    assert main(["keys", "revoke", first["id"]]) == 0
    assert service.find(first["key"], time.time()) is None and service.find(second["key"], time.time())
    capsys.readouterr()
    assert main(["keys", "list", "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert [(key["tenant"], key["state"]) for key in keys] == [("alice", "revoked"), ("bob", "active")]


def test_a_key_with_an_end(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "alice", "--days", "2"]) == 0
    key, now = capsys.readouterr().out.strip(), time.time()
    keys = ApiKeys(path)
    assert keys.find(key, now + 1.9 * 86_400) and keys.find(key, now + 2.1 * 86_400) is None
    assert main(["keys", "create", "alice", "--days", "0"]) == 0
    assert main(["keys", "list"]) == 0
    assert "expired" in capsys.readouterr().out


def test_the_file_of_the_configuration(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPRIVER_LIVE_KEYS_FILE")
    other = tmp_path / "other.json"
    config = tmp_path / "u.toml"
    config.write_text(f'[live]\nkeys_file = "{other}"\n')
    assert main(["keys", "create", "alice", "--config", str(config)]) == 0
    assert len(read_keys(other).keys) == 1
    assert main(["keys", "create", "alice", "--file", str(path)]) == 0
    assert len(read_keys(path).keys) == 1


@pytest.mark.parametrize(
    ("typed", "status", "named"),
    [
        (["create", "../alice"], 2, "tenant"),
        (["create", "alice", "--scope", "root"], 2, "Scopes are live, restore, jobs, admin"),
        (["create", "alice", "--days", "1e300"], 2, "too far"),
        (["create", "alice", "--days", "-1"], 2, ""),
        (["create", "alice", "--note", "x" * 201], 2, "note"),
        (["create"], 2, ""),
        (["list"], 2, "cannot be read"),
        (["revoke", "0" * 16], 2, "cannot be read"),
        (["list", "--file", "/dev/full/keys.json"], 2, "cannot be read"),
        (["create", "alice", "--file", "/proc/keys.json"], 2, "cannot be written"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    path: Path, typed: list[str], status: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *typed]) == status
    told = capsys.readouterr()
    assert named in told.err and "Traceback" not in told.err and "upr_" not in told.out
    assert not path.exists()


def test_an_unknown_id_is_not_repeated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "alice"]) == 0
    key = capsys.readouterr().out.strip()
    before = path.read_bytes()
    assert main(["keys", "revoke", key]) == 2  # the whole key, by mistake: it must not stand in a terminal's log
    told = capsys.readouterr()
    assert key not in told.err + told.out and "upriver keys list" in told.err
    assert path.read_bytes() == before


def test_without_a_file_it_says_how_to_name_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("UPRIVER_LIVE_KEYS_FILE")
    assert main(["keys", "list"]) == 2
    assert "UPRIVER_LIVE_KEYS_FILE" in capsys.readouterr().err


def test_a_broken_file_is_neither_used_nor_replaced(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.write_text("{")
    assert main(["keys", "create", "alice"]) == 2
    told = capsys.readouterr()
    assert "not a keys file" in told.err and told.out == "" and path.read_text() == "{"
