from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra import tokens as module
from infra.errors import SettingsError
from infra.tenants import Scope
from infra.tokens import KEPT_WHILE_UNREACHABLE_S, LARGEST_KEY_SET, BadToken, TokenOptions, TokenVerifier
from tests.identity_provider import (
    AUDIENCE,
    ISSUER,
    KeyServer,
    claims,
    ec_key,
    key_server,
    public_jwk,
    public_pem,
    rsa_key,
    send,
    token,
)

SECRET = "a secret of more than thirty-two bytes, by far"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with key_server() as running:
        running.keys = [public_jwk(rsa_key("one"), "one")]
        yield running


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(rsa_key("one")))
    return path


def options(**changed: Any) -> TokenOptions:
    return TokenOptions(**({"issuer": ISSUER, "audience": AUDIENCE} | changed))


def of_file(path: Path, **changed: Any) -> TokenVerifier:
    return TokenVerifier(options(key_file=path, **changed))


def of_server(server: KeyServer, clock: Clock | None = None, **changed: Any) -> TokenVerifier:
    return TokenVerifier(options(jwks_url=server.url, **changed), clock=clock or Clock())


def b64(data: bytes | dict[str, Any]) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refused(verifier: TokenVerifier, text: str) -> str:
    with pytest.raises(BadToken) as caught:
        verifier.verify(text)
    return str(caught.value)


def test_a_good_token_is_a_tenant(pem: Path) -> None:
    end = int(time.time()) + 300
    tenant = of_file(pem, leeway_s=5).verify(token(rsa_key("one"), exp=end))
    assert (tenant.name, tenant.scopes, tenant.key_id) == ("alice", {Scope.LIVE}, None)
    assert tenant.expires_at_s == end + 5


@pytest.mark.parametrize("algorithm", ["ES256", "PS256", "RS512"])
def test_other_algorithms_where_configured(tmp_path: Path, algorithm: str) -> None:
    key: Any = ec_key("e") if algorithm.startswith("ES") else rsa_key("one")
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(key))
    assert of_file(path, algorithms=(algorithm,)).verify(token(key, algorithm)).name == "alice"
    assert "algorithm" in refused(of_file(path, algorithms=("RS384",)), token(key, algorithm))


def test_a_shared_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    verifier = of_file(path, algorithms=("HS256",))
    assert verifier.verify(token(SECRET, "HS256")).name == "alice"
    refused(verifier, token(SECRET + "!", "HS256"))
    refused(verifier, token(SECRET * 2, "HS512"))
    path.write_text(SECRET * 2)
    assert of_file(path, algorithms=("HS512",)).verify(token(SECRET * 2, "HS512")).name == "alice"


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", None, [], ["RS256"], {"RS256": 1}, 0, "RS256 "])
@pytest.mark.parametrize("signature", ["", "c2lnbmF0dXJl"])
def test_no_signature_is_no_token(pem: Path, name: object, signature: str) -> None:
    text = f"{b64({'alg': name, 'typ': 'JWT'})}.{b64(claims())}.{signature}"
    refused(of_file(pem), text)
    without = f"{b64({'typ': 'JWT'})}.{b64(claims())}.{signature}"
    refused(of_file(pem), without)


@pytest.mark.parametrize("form", ["pem", "der", "stripped"])
def test_the_public_key_is_no_secret(pem: Path, server: KeyServer, form: str) -> None:
    """HS256 signed with what everybody knows, the classic confusion (RFC 8725, section 2.1)."""
    public = public_pem(rsa_key("one"))
    if form == "der":
        public = (
            rsa_key("one")
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    elif form == "stripped":
        public = public.strip()
    signed = f"{b64({'alg': 'HS256', 'kid': 'one'})}.{b64(claims())}"
    forged = f"{signed}.{b64(hmac.new(public, signed.encode(), hashlib.sha256).digest())}"
    for verifier in (of_file(pem), of_server(server)):
        assert "algorithm" in refused(verifier, forged)


def test_a_configuration_that_would_confuse_is_refused(pem: Path, tmp_path: Path) -> None:
    for algorithms in (("HS256", "RS256"), (), ("none",), ("RS256", "none"), ("rs256",)):
        with pytest.raises(ValidationError):
            options(key_file=pem, algorithms=algorithms)
    with pytest.raises(ValidationError):
        options(jwks_url="https://id.example/keys", algorithms=("HS256",))
    for content in (public_pem(rsa_key("one")), b"ssh-rsa AAAAB3NzaC1yc2E and more than thirty-two bytes"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(SettingsError, match="public key"):
            of_file(tmp_path / "key", algorithms=("HS256",))


@pytest.mark.parametrize(
    ("content", "algorithms"),
    [
        (b"short", ("HS256",)),
        (b"x" * 31, ("HS256",)),
        (b"x" * 63, ("HS256", "HS512")),
        (b"no pem at all, but long enough for a secret", ("RS256",)),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", ("RS256",)),
        (None, ("RS256",)),
    ],
)
def test_a_key_file_that_cannot_be_used_is_an_error_at_the_start(
    tmp_path: Path, content: bytes | None, algorithms: tuple[str, ...]
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        of_file(path, algorithms=algorithms)
    assert caught.value.code == "token-key-unusable" and str(path) in caught.value.message
    assert content is None or content[:8].decode() not in caught.value.message


def test_a_private_key_is_not_left_on_the_server(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(
        rsa_key("one").private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(SettingsError, match="no public key"):
        of_file(path)


NOW = int(time.time())


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": NOW - 60},
        {"exp": None},
        {"exp": "soon"},
        {"exp": []},
        {"exp": 1e400},
        {"exp": float("nan")},
        {"exp": 10**400},
        {"nbf": NOW + 3600},
        {"aud": "another"},
        {"aud": None},
        {"aud": ["another", "yet another"]},
        {"aud": {"upriver": 1}},
        {"aud": "upriver2"},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"iss": "https://id.example/"},
        {"iss": "https://id"},
        {"iss": [ISSUER]},
        {"sub": None},
        {"sub": "../../etc"},
        {"sub": "a\nb"},
        {"sub": ""},
    ],
)
def test_claims_that_are_not_ours(pem: Path, changed: dict[str, Any]) -> None:
    key = rsa_key("one")
    merged = {name: value for name, value in (claims() | changed).items() if value is not None}
    text = jwt.PyJWS().encode(json.dumps(merged).encode(), key, algorithm="RS256")
    refused(of_file(pem), text)


def test_leeway_is_as_configured(pem: Path) -> None:
    late = token(rsa_key("one"), exp=int(time.time()) - 20)
    assert of_file(pem, leeway_s=60).verify(late).name == "alice"
    assert "Expired" in refused(of_file(pem, leeway_s=0), late)


def test_our_audience_among_several(pem: Path) -> None:
    assert of_file(pem).verify(token(rsa_key("one"), aud=["other", AUDIENCE])).name == "alice"


def test_another_key_signs_nothing(pem: Path) -> None:
    refused(of_file(pem), token(rsa_key("another")))


def test_a_changed_token_is_nothing(pem: Path) -> None:
    verifier = of_file(pem)
    head, body, signature = token(rsa_key("one")).split(".")
    refused(verifier, f"{head}.{b64(claims(sub='admin'))}.{signature}")
    refused(verifier, f"{head}.{body}.{signature[:-4]}AAAA")
    refused(verifier, f"{head}.{body}.")
    refused(verifier, f"{head}.{body}")
    refused(verifier, f"{head}.{body}.{signature}.{signature}")


def test_a_huge_token_is_not_even_looked_at(pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = of_file(pem)
    long = token(rsa_key("one"), more="x" * 9000)
    looked = []
    monkeypatch.setattr(jwt, "get_unverified_header", lambda text: looked.append(text))
    assert "longer" in refused(verifier, long)
    assert "longer" in refused(verifier, "e" * 50_000_000)
    assert looked == []


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"], "exp": 1},
        {"crit": []},
        {"b64": False, "crit": ["b64"]},
        {"b64": False},
    ],
)
def test_extensions_that_must_be_understood(pem: Path, header: dict[str, Any]) -> None:
    """RFC 7515, section 4.1.11: who does not understand a critical extension refuses the token."""
    signed = f"{b64({'alg': 'RS256'} | header)}.{b64(claims())}"
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    signature = rsa_key("one").sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    refused(of_file(pem), f"{signed}.{b64(signature)}")
    plain = f"{b64({'alg': 'RS256'})}.{b64(claims())}"
    signature = rsa_key("one").sign(plain.encode(), padding.PKCS1v15(), hashes.SHA256())
    assert of_file(pem).verify(f"{plain}.{b64(signature)}").name == "alice"


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
def test_short_keys_are_no_keys(server: KeyServer) -> None:
    server.keys = [public_jwk(rsa_key("short", 1024), "one")]
    refused(of_server(server), token(rsa_key("short", 1024), headers={"kid": "one"}))


@pytest.mark.parametrize(
    ("told", "scopes"),
    [
        ("live jobs", {Scope.LIVE, Scope.JOBS}),
        (["restore", "admin", "other"], {Scope.RESTORE, Scope.ADMIN}),
        ("openid profile", set()),
        ("", set()),
        ("liveadmin", set()),
        (7, set()),
        ([["live"]], set()),
        ({"live": True}, set()),
        (None, {Scope.RESTORE}),  # no such claim: the default
    ],
)
def test_scopes_come_from_their_claim(pem: Path, told: object, scopes: set[Scope]) -> None:
    verifier = of_file(pem, default_scopes={Scope.RESTORE})
    assert verifier.verify(token(rsa_key("one"), scope=told)).scopes == scopes


def test_claims_of_other_names(pem: Path) -> None:
    verifier = of_file(pem, tenant_claim="org", scope_claim="permissions")
    tenant = verifier.verify(token(rsa_key("one"), org="acme", permissions=["jobs"], scope="admin"))
    assert (tenant.name, tenant.scopes) == ("acme", {Scope.JOBS})


@given(text=st.text(max_size=300) | st.from_regex(r"[A-Za-z0-9_-]{0,80}(\.[A-Za-z0-9_-]{0,80}){0,4}", fullmatch=True))
@settings(max_examples=500, deadline=None)
def test_no_text_is_a_token_by_chance(text: str, verifier: TokenVerifier) -> None:
    with pytest.raises(BadToken):
        verifier.verify(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "scope"])


@given(header=st.dictionaries(st.sampled_from(["kid", "typ", "crit", "b64", "jku", "cty"]), json_values, max_size=4),
       changed=st.dictionaries(names, json_values, max_size=4))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_whatever_a_signed_token_says_it_is_a_tenant_or_refused(
    header: dict[str, Any], changed: dict[str, Any], verifier: TokenVerifier
) -> None:
    signed = f"{b64({'alg': 'HS256'} | header)}.{b64(claims() | changed)}"
    signature = hmac.new(SECRET.encode(), signed.encode(), hashlib.sha256).digest()
    try:
        tenant = verifier.verify(f"{signed}.{b64(signature)}")
    except BadToken:
        return
    assert tenant.name and tenant.expires_at_s is not None


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> TokenVerifier:
    path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text(SECRET)
    return of_file(path, algorithms=("HS256",))


def test_keys_of_a_provider(server: KeyServer) -> None:
    verifier = of_server(server)
    assert server.paths == []  # nothing is fetched before it is needed
    for _ in range(5):
        assert verifier.verify(token(rsa_key("one"), headers={"kid": "one"})).name == "alice"
    assert server.paths == ["/keys"]


def test_the_only_key_needs_no_name(server: KeyServer) -> None:
    assert of_server(server).verify(token(rsa_key("one"))).name == "alice"
    server.keys = [public_jwk(rsa_key("one"))]
    assert of_server(server).verify(token(rsa_key("one"))).name == "alice"
    server.keys = [public_jwk(rsa_key("one"), "one"), public_jwk(rsa_key("two"), "two")]
    refused(of_server(server), token(rsa_key("one")))


def test_a_new_key_of_the_provider_is_fetched_but_not_for_every_token(server: KeyServer) -> None:
    clock = Clock()
    verifier = of_server(server, clock, refresh_s=30)
    verifier.verify(token(rsa_key("one"), headers={"kid": "one"}))
    server.keys.append(public_jwk(rsa_key("two"), "two"))
    new = token(rsa_key("two"), headers={"kid": "two"})
    for _ in range(10):
        refused(verifier, new)
    assert len(server.paths) == 1
    clock.now += 30
    assert verifier.verify(new).name == "alice"
    for number in range(50):
        refused(verifier, token(rsa_key("two"), headers={"kid": f"unknown-{number}"}))
    assert len(server.paths) == 2


def test_a_key_that_the_provider_withdrew_counts_until_the_set_is_old(server: KeyServer) -> None:
    clock = Clock()
    verifier = of_server(server, clock, lifetime_s=300)
    text = token(rsa_key("one"), headers={"kid": "one"})
    verifier.verify(text)
    server.keys = [public_jwk(rsa_key("two"), "two")]
    clock.now += 299
    verifier.verify(text)
    clock.now += 1
    assert "not in the key set" in refused(verifier, text)


@pytest.mark.parametrize(
    "kid",
    ["../../../../etc/passwd", "/dev/null", "file:///etc/passwd", "http://127.0.0.1:1/", "' OR 1=1 --", "one\0", "",
     "x" * 5000, "\0000"],
)  # fmt: skip
def test_the_name_of_a_key_is_only_looked_up(server: KeyServer, kid: str) -> None:
    refused(of_server(server), token(rsa_key("one"), headers={"kid": kid}))
    assert server.paths == ["/keys"]


@pytest.mark.parametrize("kid", [["one"], {"one": 1}, 1, True])
def test_a_name_that_is_no_text(server: KeyServer, kid: object) -> None:
    signed = f"{b64({'alg': 'RS256', 'kid': kid})}.{b64(claims())}"
    refused(of_server(server), f"{signed}.{b64(b'x' * 256)}")


def test_a_token_does_not_say_where_keys_come_from(server: KeyServer) -> None:
    """`jku`, `x5u`, `jwk` and `x5c` of RFC 7515 name or bring keys; they are not read."""
    with key_server() as evil:
        evil.keys = [public_jwk(rsa_key("evil"), "one")]
        for header in (
            {"jku": evil.url, "kid": "one"},
            {"x5u": evil.url, "kid": "one"},
            {"jku": evil.url, "kid": "evil"},
            {"jwk": public_jwk(rsa_key("evil"), "one"), "kid": "one"},
            {"x5c": [b64(public_pem(rsa_key("evil")))], "kid": "one"},
        ):
            refused(of_server(server), token(rsa_key("evil"), headers=header))
        assert evil.paths == []
    # Where the right key signed, they do no harm.
    assert of_server(server).verify(token(rsa_key("one"), headers={"jku": "http://evil.example", "kid": "one"}))


def test_a_key_signs_with_its_own_algorithm_alone(server: KeyServer) -> None:
    server.keys = [public_jwk(rsa_key("one"), "one", alg="RS256"), public_jwk(ec_key("e"), "e")]
    verifier = of_server(server, algorithms=("RS256", "PS256", "ES256"))
    assert verifier.verify(token(rsa_key("one"), headers={"kid": "one"}))
    assert verifier.verify(token(ec_key("e"), "ES256", headers={"kid": "e"}))
    refused(verifier, token(rsa_key("one"), "PS256", headers={"kid": "one"}))
    refused(verifier, token(rsa_key("one"), headers={"kid": "e"}))


def test_secrets_and_encryption_keys_of_a_set_sign_nothing(server: KeyServer) -> None:
    server.keys = [
        {"kty": "oct", "k": b64(SECRET.encode()), "kid": "s", "alg": "HS256"},
        public_jwk(rsa_key("two"), "e", use="enc"),
        {"kty": "RSA", "kid": "broken", "n": "AA", "e": "!"},
        {"kty": "from the future", "kid": "f"},
        "no key",
        public_jwk(rsa_key("one"), "one", use="sig"),
    ]
    verifier = of_server(server)
    assert verifier.verify(token(rsa_key("one"), headers={"kid": "one"}))
    refused(verifier, token(rsa_key("two"), headers={"kid": "e"}))
    refused(verifier, token(SECRET, "HS256", headers={"kid": "s"}))


def good_set() -> bytes:
    return json.dumps({"keys": [public_jwk(rsa_key("one"), "one")]}).encode()


def slowly(request: BaseHTTPRequestHandler) -> None:
    """A set that would be good, but comes byte by byte: each wait is short, all together are not."""
    request.send_response(200)
    request.end_headers()
    for _ in range(50):
        request.wfile.write(b" ")
        request.wfile.flush()
        time.sleep(0.02)
    request.wfile.write(good_set())


ANSWERS = {
    "500": lambda request: send(request, b"", 500),
    "html": lambda request: send(request, b"<html>"),
    "list": lambda request: send(request, b"[]"),
    "empty": lambda request: send(request, b'{"keys": []}'),
    "deep": lambda request: send(request, b"[" * 100_000),
    "large": lambda request: send(request, b" " * LARGEST_KEY_SET + good_set()),
    "slow": slowly,
    "silent": lambda request: request.rfile.read(1),
    "closed": lambda request: request.connection.close(),
    "nonsense": lambda request: request.wfile.write(b"\0" * 100),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_key_set_that_cannot_be_used_lets_nobody_in_and_is_not_asked_for_again_soon(
    server: KeyServer, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_TIMEOUT_S", 0.2)
    server.answer = ANSWERS[what]
    clock = Clock()
    verifier = of_server(server, clock)
    text = token(rsa_key("one"), headers={"kid": "one"})
    for _ in range(5):
        assert "could not be fetched" in refused(verifier, text)
    assert len(server.paths) == 1
    assert [entry.levelname for entry in caplog.records] == ["ERROR"] and "127.0.0.1" in caplog.text
    server.answer = None
    clock.now += 30
    assert verifier.verify(text).name == "alice"


def test_redirects_are_not_followed(server: KeyServer) -> None:
    with key_server() as other:
        other.keys = server.keys
        for status in (301, 302, 307, 308):
            server.answer = lambda request, status=status: send(request, b"", status, Location=other.url)
            refused(of_server(server), token(rsa_key("one"), headers={"kid": "one"}))
        assert other.paths == []


def test_an_outage_of_the_provider_ends_the_service_only_after_an_hour(
    server: KeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    verifier = of_server(server, clock, lifetime_s=300)
    text = token(rsa_key("one"), headers={"kid": "one"})
    verifier.verify(text)
    server.answer = ANSWERS["500"]
    clock.now += 300 + KEPT_WHILE_UNREACHABLE_S - 1
    assert verifier.verify(text).name == "alice"
    assert "status 500" in caplog.text
    clock.now += 1
    assert "could not be fetched" in refused(verifier, text)


def test_known_keys_do_not_wait_for_a_fetch_under_way(server: KeyServer, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    verifier = of_server(server, clock, lifetime_s=300)
    text = token(rsa_key("one"), headers={"kid": "one"})
    verifier.verify(text)
    asked, release = threading.Event(), threading.Event()

    def hold(request: BaseHTTPRequestHandler) -> None:
        asked.set()
        release.wait(10)
        send(request, json.dumps({"keys": server.keys}).encode())

    server.answer = hold
    clock.now += 300
    waiting = threading.Thread(target=verifier.verify, args=(text,))
    waiting.start()
    assert asked.wait(10)
    assert verifier.verify(text).name == "alice"
    assert caplog.text == ""  # who waits for the fetch waits until it has failed, which is logged
    release.set()
    waiting.join(10)
    assert not waiting.is_alive() and len(server.paths) == 2


@pytest.mark.parametrize(
    "url",
    ["http://id.example/keys", "file:///etc/passwd", "ftp://id.example/k", "https://user:word@id.example/k", "keys",
     "https://", "https://id.example/k y", "https://[::1", "http://localhost.evil.example/", "https://id.example\n/"],
)  # fmt: skip
def test_a_key_set_comes_encrypted_or_from_this_machine(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(jwks_url=url)
    assert "https://, or http:// on this machine" in str(caught.value)


def test_either_a_file_or_a_url(pem: Path) -> None:
    for given_ in ({}, {"key_file": pem, "jwks_url": "https://id.example/keys"}):
        with pytest.raises(ValidationError):
            options(**given_)


def test_nothing_of_a_token_is_in_the_reason(pem: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        reason = refused(of_file(pem), token(rsa_key("one"), sub="very/secret", headers={"kid": "hidden-name"}))
        reason += refused(of_file(pem), token(rsa_key("two"), iss="hidden-issuer", headers={"kid": "hidden-name"}))
    assert "secret" not in reason + caplog.text and "hidden" not in reason + caplog.text
