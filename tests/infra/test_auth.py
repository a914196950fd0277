from __future__ import annotations

import ipaddress
import logging
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from infra.api_keys import ApiKeys, changing, make_key
from infra.auth import ADDRESSES_REMEMBERED, FAILURES_AT_ONCE, LOCAL_TENANT, Authenticator, FailureLimit, client_address
from infra.protocol import Credentials
from infra.refusals import RateExceeded, Unauthorized
from infra.tenants import Scope
from infra.tokens import TokenOptions, TokenVerifier
from tests.identity_provider import AUDIENCE, ISSUER, key_server, public_jwk, rsa_key, token


@dataclass
class Door:
    """An authenticator with a key of alice's and a provider whose tokens count, at a time of its own."""

    auth: Authenticator
    key: str
    key_id: str
    path: Path
    token: str
    now: list[float]
    ticks: list[float]


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    path = tmp_path / "keys.json"
    key, record = make_key("alice", [Scope.LIVE])
    with changing(path) as keys:
        keys.append(record)
    now, ticks = [time.time()], [0.0]
    with key_server() as server:
        server.keys = [public_jwk(rsa_key("one"), "one")]
        tokens = TokenVerifier(TokenOptions(jwks_url=server.url, issuer=ISSUER, audience=AUDIENCE))
        auth = Authenticator(keys=ApiKeys(path), tokens=tokens, clock=lambda: now[0], ticks=lambda: ticks[0])
        signed = token(rsa_key("one"), headers={"kid": "one"}, sub="bob", exp=int(now[0]) + 10**6)
        yield Door(auth, key, record.id, path, signed, now, ticks)


def name(door: Door, presented: Any) -> str:
    return door.auth.authenticate(presented).name


def test_keys_and_tokens_from_all_places(door: Door) -> None:
    key, signed = door.key, door.token
    assert name(door, Credentials(api_key=key)) == "alice"
    assert name(door, Credentials(token=signed)) == "bob"
    assert name(door, {"x-api-key": key}) == "alice"
    assert name(door, {"Authorization": f"Bearer {signed}"}) == "bob"
    assert name(door, {"authorization": f"bearer  {key}"}) == "alice"
    assert name(door, Headers({"X-API-Key": key})) == "alice"
    assert name(door, [(b"host", b"\xff"), (b"x-api-key", key.encode())]) == "alice"  # ASGI
    assert name(door, (("user-agent", "grpc"), ("authorization", f"Bearer {signed}"))) == "bob"  # gRPC


WRONG: dict[str, Callable[[Door], Any]] = {
    "nothing": lambda door: {},
    "empty hello": lambda door: Credentials(),
    "empty key": lambda door: {"x-api-key": ""},
    "wrong key": lambda door: {"x-api-key": door.key[:-2] + "xx"},
    "unknown id": lambda door: {"x-api-key": make_key("alice")[0]},
    "key and token": lambda door: {"x-api-key": door.key, "authorization": f"Bearer {door.token}"},
    "key and token in the hello": lambda door: Credentials(api_key=door.key, token=door.token),
    "the same key twice": lambda door: [("x-api-key", door.key), ("X-Api-Key", door.key)],
    "two authorizations": lambda door: [("authorization", f"Bearer {door.token}")] * 2,
    "basic": lambda door: {"authorization": f"Basic {door.key}"},
    "no scheme": lambda door: {"authorization": door.key},
    "only a scheme": lambda door: {"authorization": "Bearer"},
    "token as a key": lambda door: {"x-api-key": door.token},
    "key as a token": lambda door: Credentials(token=door.key),
    "in the URL": lambda door: {":path": f"/v1/streams?api_key={door.key}"},
    "in a cookie": lambda door: {"cookie": f"x-api-key={door.key}"},
    "unicode": lambda door: {"x-api-key": "ключ"},
    "bytes": lambda door: [(b"authorization", b"Bearer \xff\xfe\x00")],
    "expired token": lambda door: Credentials(token=token(rsa_key("one"), headers={"kid": "one"}, exp=1)),
    "token of others": lambda door: Credentials(token=token(rsa_key("two"), headers={"kid": "one"})),
    "huge": lambda door: {"authorization": "Bearer " + "e" * 1_000_000},
}


@pytest.mark.parametrize("what", WRONG)
def test_every_failure_is_told_in_the_same_words(door: Door, what: str, caplog: pytest.LogCaptureFixture) -> None:
    presented = WRONG[what](door)
    with caplog.at_level(logging.DEBUG), pytest.raises(Unauthorized) as caught:
        door.auth.authenticate(presented)
    assert [entry.levelname for entry in caplog.records if entry.name == "infra.auth"] == ["WARNING"]
    assert "credentials refused" in caplog.text
    with pytest.raises(Unauthorized) as nothing:
        door.auth.authenticate({})
    assert caught.value.to_message() == nothing.value.to_message()
    assert (caught.value.http_status, caught.value.close_code) == (401, 4401)
    # Nor is the cause in what travels with the exception.
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("what", WRONG)
def test_nothing_that_was_presented_is_told_again(door: Door, what: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(Unauthorized) as caught:
        door.auth.authenticate(WRONG[what](door), address="192.0.2.1\nforged line")
    told = caplog.text + repr(caplog.records) + "".join(traceback.format_exception(caught.value))
    told += str(caught.value.to_message()) + repr(door.auth) + repr(vars(door.auth))
    secrets = [door.key, door.key.split("_", 2)[2], door.token, door.token.split(".")[1], door.token.split(".")[2]]
    assert [secret for secret in secrets if secret in told] == []
    assert "\nforged line" not in caplog.text and "192.0.2.1?forged line" in caplog.text


def test_neither_key_nor_hash_is_in_a_tenant(door: Door) -> None:
    tenant = door.auth.authenticate({"x-api-key": door.key})
    assert tenant.key_id == door.key_id
    held = repr(tenant).encode() + pickle.dumps(tenant)
    assert door.key.encode() not in held and door.key.split("_", 2)[2].encode() not in held
    assert "secret" not in repr(Credentials(api_key="secret", token="secret"))


def test_what_is_not_configured_does_not_count(door: Door, tmp_path: Path) -> None:
    only_keys = Authenticator(keys=ApiKeys(door.path))
    assert only_keys.authenticate({"x-api-key": door.key}).name == "alice"
    with pytest.raises(Unauthorized):
        only_keys.authenticate(Credentials(token=door.token))
    (tmp_path / "secret").write_text("s" * 40)
    options = TokenOptions(key_file=tmp_path / "secret", algorithms=("HS256",), issuer=ISSUER, audience=AUDIENCE)
    only_tokens = Authenticator(tokens=TokenVerifier(options))
    assert only_tokens.authenticate(Credentials(token=token("s" * 40, "HS256"))).name == "alice"
    with pytest.raises(Unauthorized):
        only_tokens.authenticate({"x-api-key": door.key})


def test_where_nobody_is_asked_everybody_is_local() -> None:
    auth = Authenticator()
    assert not auth.asks
    tenant = auth.authenticate({"x-api-key": "anything"}, address="127.0.0.1")
    assert tenant is LOCAL_TENANT and tenant.scopes == set(Scope) and auth.still_admits(tenant)


def test_a_revoked_key_works_no_longer_without_a_restart(door: Door) -> None:
    tenant = door.auth.authenticate({"x-api-key": door.key})
    assert door.auth.still_admits(tenant)
    with changing(door.path) as keys:
        keys[0] = keys[0].model_copy(update={"disabled": True})
    assert not door.auth.still_admits(tenant)
    with pytest.raises(Unauthorized):
        door.auth.authenticate({"x-api-key": door.key})


def test_a_token_admits_until_it_ends(door: Door) -> None:
    tenant = door.auth.authenticate(Credentials(token=door.token))
    assert tenant.expires_at_s is not None and door.auth.still_admits(tenant)
    door.now[0] = tenant.expires_at_s
    assert not door.auth.still_admits(tenant)


def test_an_address_that_fails_often_has_to_wait(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    good, wrong, address = {"x-api-key": door.key}, {"x-api-key": "upr_wrong"}, "192.0.2.7"
    for _ in range(FAILURES_AT_ONCE):
        with pytest.raises(Unauthorized):
            door.auth.authenticate(wrong, address=address)
    caplog.clear()
    for presented in (wrong, good):  # not even looked at, so nobody learns whether it is right
        with pytest.raises(RateExceeded) as caught:
            door.auth.authenticate(presented, address=address)
    assert caught.value.http_status == 429 and caplog.records == []  # an attack does not fill the log
    assert door.auth.authenticate(good, address="192.0.2.8").name == "alice"
    assert door.auth.authenticate(good).name == "alice"
    assert caught.value.retry_after_s is not None
    door.ticks[0] += caught.value.retry_after_s
    assert door.auth.authenticate(good, address=address).name == "alice"
    with pytest.raises(Unauthorized):
        door.auth.authenticate(wrong, address=address)
    with pytest.raises(RateExceeded):
        door.auth.authenticate(good, address=address)


def test_who_has_the_right_key_is_never_limited(door: Door) -> None:
    for _ in range(10 * FAILURES_AT_ONCE):
        door.auth.authenticate({"x-api-key": door.key}, address="192.0.2.7")


def test_the_limit_can_be_taken_away(door: Door) -> None:
    auth = Authenticator(keys=ApiKeys(door.path), failures_per_minute=0)
    for _ in range(10 * FAILURES_AT_ONCE):
        with pytest.raises(Unauthorized):
            auth.authenticate({}, address="192.0.2.7")


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"),  # one customer's network
        ("192.0.2.7", "::ffff:192.0.2.7"),  # the same address as a dual-stack socket shows it
        ("::1", "::1"),
    ],
)
def test_one_client_has_one_limit_whatever_its_address_looks_like(one: str, same: str) -> None:
    limit = FailureLimit(60, lambda: 0.0)
    for _ in range(FAILURES_AT_ONCE):
        limit.note(one)
    for address in (one, same):
        with pytest.raises(RateExceeded):
            limit.check(address)
    for other in ("2001:db8:1:3::1", "192.0.2.8", "no address"):
        limit.check(other)


def test_as_many_addresses_as_an_attacker_has_take_bounded_memory() -> None:
    limit = FailureLimit(60, lambda: 0.0)
    for number in range(ADDRESSES_REMEMBERED + 500):
        limit.note(str(ipaddress.IPv4Address(number)))
        limit.note("192.0.2.7") if number % 100 == 0 and number < 100 * FAILURES_AT_ONCE else None
    assert len(limit) == ADDRESSES_REMEMBERED
    with pytest.raises(RateExceeded):
        limit.check("192.0.2.7")  # who goes on failing is not pushed out


PROXIES = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1, 203.0.113.9"], "203.0.113.9"),  # what comes first, the client wrote itself
        ("10.0.0.1", ["198.51.100.1, 203.0.113.9, 10.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        ("::1", ["2001:db8::1"], "2001:db8::1"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # no trusted proxy
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, nonsense"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        (None, ["203.0.113.9"], None),
    ],
)
def test_the_address_behind_proxies(peer: str | None, forwarded: list[str], address: str | None) -> None:
    headers = [("X-Forwarded-For", value) for value in forwarded]
    assert client_address(peer, headers, PROXIES) == address
    assert client_address(peer, headers, []) == peer
