from __future__ import annotations

import hashlib
import hmac
import json
import logging
import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra import api_keys
from infra.api_keys import ApiKeys, KeyFile, KeyRecord, changing, make_key, read_keys, write_keys
from infra.errors import SettingsError
from infra.tenants import Scope

NOW = 1_800_000_000.0
UNICODE_KEYS = [
    "",
    "\0",
    "пароль",
    "upr_" + "é" * 16 + "_" + "x" * 43,
    "upr_" + "١" * 16 + "_" + "x" * 43,
    "\ud800",
    "🗝" * 600,
]


def file_of(path: Path, *records: KeyRecord) -> Path:
    write_keys(path, KeyFile(keys=records))
    return path


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_opens_what_its_record_says(path: Path) -> None:
    key, record = make_key("alice", [Scope.LIVE, Scope.JOBS, Scope.LIVE], note="the drone")
    keys = ApiKeys(file_of(path, record))
    found = keys.find(key, NOW)
    assert found == record
    tenant = found.to_tenant()
    assert (tenant.name, tenant.scopes, tenant.key_id) == ("alice", {Scope.LIVE, Scope.JOBS}, record.id)
    assert tenant.expires_at_s is None


def test_keys_are_long_random_and_recognisable() -> None:
    made = [make_key("alice")[0] for _ in range(200)]
    assert len(set(made)) == 200 and len({key.split("_", 2)[1] for key in made}) == 200
    for key in made:
        prefix, key_id, secret = key.split("_", 2)
        assert prefix == "upr" and len(key_id) == 16 and len(secret) == 43  # 43 letters of base64 are 256 bits
    # All bits of the secret move: over 200 keys every place of it has many different letters.
    assert all(len({key[place] for key in made}) > 16 for place in range(21, 63))


def test_only_the_hash_is_at_rest(path: Path) -> None:
    key, record = make_key("alice", note="n")
    file_of(path, record)
    content = path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in content
    secret = key.split("_", 2)[2]
    assert key not in content and secret not in content and secret[:12] not in content
    assert key not in repr(record) and record.sha256 not in repr(record) and record.sha256 not in str(record)


def test_the_file_is_its_owners_alone_and_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = os.umask(0)
    try:
        file_of(path, make_key("alice")[1])
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError) as caught:
        file_of(path, make_key("bob")[1])
    assert caught.value.code == "keys-unwritable"
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path.symlink_to(tmp_path / "real" / "keys.json")
    with changing(path) as keys:
        keys.append(make_key("alice")[1])
    assert path.is_symlink() and len(read_keys(path).keys) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key[:-1] + ("A" if key[-1] != "A" else "B"),
        lambda key: key[:-1],
        lambda key: key + "A",
        lambda key: key.upper(),
        lambda key: " " + key,
        lambda key: key + "\n",
        lambda key: key[4:],
        lambda key: key.replace("_", "-"),
        lambda key: key[:20],
        lambda key: key[:21] + "é" * 43,
        lambda key: key * 100_000,
    ],
)
def test_what_is_not_exactly_the_key_is_nothing(path: Path, change: Any) -> None:
    key, record = make_key("alice")
    keys = ApiKeys(file_of(path, record))
    assert keys.find(change(key), NOW) is None
    assert keys.find(key, NOW) == record


@pytest.mark.parametrize("key", UNICODE_KEYS)
def test_any_text_can_be_presented(path: Path, key: str) -> None:
    assert ApiKeys(file_of(path, make_key("alice")[1])).find(key, NOW) is None


@pytest.fixture(scope="module")
def some_keys(tmp_path_factory: pytest.TempPathFactory) -> ApiKeys:
    return ApiKeys(file_of(tmp_path_factory.mktemp("keys") / "keys.json", make_key("alice")[1]))


@given(text=st.text(max_size=80) | st.from_regex(r"upr_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_no_text_is_a_key_by_chance(text: str, some_keys: ApiKeys) -> None:
    assert some_keys.find(text, NOW) is None


def test_expired_and_revoked_keys_open_nothing(path: Path) -> None:
    ends, record_ends = make_key("alice", expires_at=at(10))
    revoked, record_revoked = make_key("bob")
    keys = ApiKeys(file_of(path, record_ends, record_revoked.model_copy(update={"disabled": True})))
    assert keys.find(ends, NOW + 9) == record_ends and keys.find(ends, NOW + 10) is None
    assert keys.find(revoked, NOW) is None
    assert keys.find_id(record_ends.id, NOW) and not keys.find_id(record_ends.id, NOW + 10)
    assert not keys.find_id(record_revoked.id, NOW) and not keys.find_id("0" * 16, NOW)


def test_whatever_is_wrong_the_same_is_computed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By structure and not by time: each way to fail makes one hash and one comparison of 32 with 32 bytes."""
    good, record = make_key("alice")
    ended, record_ended = make_key("bob", expires_at=at(-1))
    revoked, record_revoked = make_key("carol")
    keys = ApiKeys(file_of(path, record, record_ended, record_revoked.model_copy(update={"disabled": True})))
    unknown, _ = make_key("dave")
    compared: list[tuple[int, int]] = []
    hashed: list[int] = []
    compare, digest = hmac.compare_digest, api_keys._digest

    def comparing(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return compare(left, right)

    def hashing(key: str) -> bytes:
        hashed.append(len(key))
        return digest(key)

    monkeypatch.setattr(hmac, "compare_digest", comparing)
    monkeypatch.setattr(api_keys, "_digest", hashing)
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    for key in (good, wrong, unknown, ended, revoked, "", "no key", *UNICODE_KEYS):
        compared.clear()
        hashed.clear()
        assert (keys.find(key, NOW) is not None) == (key == good)
        assert compared == [(32, 32)] and len(hashed) == 1, key


def test_a_change_of_the_file_counts_at_once(path: Path) -> None:
    key, record = make_key("alice")
    keys = ApiKeys(file_of(path, record))
    assert keys.find(key, NOW)
    with changing(path) as records:
        records[0] = records[0].model_copy(update={"disabled": True})
    assert keys.find(key, NOW) is None and keys.find_id(record.id, NOW) is None
    other, other_record = make_key("bob")
    with changing(path) as records:
        records.append(other_record)
    assert keys.find(other, NOW) == other_record
    with changing(path) as records:
        records.clear()
    assert keys.find(other, NOW) is None


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[]", b'{"version": 2}', b'{"keys": [{}]}', b"\xff\xfe", b'{"keys": 1}', b"[" * 100_000, None],
)
def test_a_broken_file_leaves_the_keys_as_they_were(
    path: Path, broken: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    key, record = make_key("alice")
    keys = ApiKeys(file_of(path, record))
    whole = path.read_bytes()
    with caplog.at_level(logging.INFO):
        path.unlink() if broken is None else path.write_bytes(broken)
        for _ in range(3):
            assert keys.find(key, NOW) == record
    assert [entry.levelname for entry in caplog.records] == ["ERROR"] and str(path) in caplog.text
    assert "stay as they were" in caplog.text
    other, other_record = make_key("bob")
    path.write_bytes(whole)
    with changing(path) as records:
        records[:] = [other_record]
    assert keys.find(key, NOW) is None and keys.find(other, NOW) == other_record


def test_a_broken_file_at_the_start_is_an_error(path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        ApiKeys(path)
    assert caught.value.code == "keys-unreadable" and "upriver keys create" in caught.value.remedy
    path.write_text('{"keys": [{"id": "xyz", "sha256": "very-secret"}]}')
    with pytest.raises(SettingsError) as caught:
        ApiKeys(path)
    assert caught.value.code == "keys-invalid" and "keys.0.id" in str(caught.value)
    assert "very-secret" not in str(caught.value)
    with pytest.raises(SettingsError):
        ApiKeys(path.parent)


def test_two_keys_of_one_id_are_no_keys_file(path: Path) -> None:
    _, record = make_key("alice")
    entry = record.model_dump(mode="json")
    path.write_text(json.dumps({"keys": [entry, entry]}))
    with pytest.raises(SettingsError, match="same id"):
        read_keys(path)


@pytest.mark.parametrize("tenant", ["", "../x", "a b", "x" * 129])
def test_keys_lead_to_proper_names(tenant: str) -> None:
    with pytest.raises(ValidationError, match="tenant"):
        make_key(tenant)


def test_an_exception_while_changing_changes_nothing(path: Path) -> None:
    file_of(path, make_key("alice")[1])
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), changing(path) as keys:
        keys.clear()
        raise ZeroDivisionError
    assert path.read_bytes() == before


def _add(path: Path, count: int) -> None:
    for _ in range(count):
        with changing(path) as keys:
            keys.append(make_key("alice")[1])


def test_processes_that_change_the_file_together_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path, 10)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(read_keys(path).keys) == 40


def test_an_expiry_needs_a_time_zone() -> None:
    with pytest.raises(ValidationError):
        make_key("alice", expires_at=datetime(2030, 1, 1) + timedelta(days=1))
