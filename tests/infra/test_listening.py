from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra.api_keys import changing, make_key
from infra.errors import SettingsError
from infra.listening import authenticator_for, is_loopback, origin_policy_for, require_safe_listening
from infra.live_settings import LiveSettings
from infra.origins import LOOPBACK_HOSTS
from infra.refusals import Unauthorized
from tests.identity_provider import AUDIENCE, ISSUER

TOKEN = {"RAY_AUTH_MODE": "token"}
LOOPBACK = [
    "127.0.0.1",
    "127.0.0.2",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "::1",
    "[::1]",
    "::ffff:127.0.0.1",
    "localhost",
]
BEYOND = [
    "0.0.0.0", "0", "", "::", "[::]", "::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "192.0.2.1", "10.0.0.1",
    "2001:db8::1", "fe80::1%1", "no-such-host.invalid", "localhost.invalid", "a" * 70 + ".invalid", "..",
]  # fmt: skip


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    with changing(path) as keys:
        keys.append(make_key("alice")[1])
    return path


def code_of(settings: LiveSettings, environment: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        require_safe_listening(settings, environment)
    assert caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize("host", LOOPBACK)
def test_on_this_machine_nobody_need_be_asked(host: str) -> None:
    assert is_loopback(host)
    require_safe_listening(LiveSettings(host=host), {})


@pytest.mark.parametrize("host", BEYOND)
def test_beyond_it_the_service_asks_for_credentials_and_ray_for_a_token(host: str, keys_file: Path) -> None:
    assert not is_loopback(host)
    assert code_of(LiveSettings(host=host), TOKEN) == "listening-unsafe"
    assert code_of(LiveSettings(host=host, keys_file=keys_file), {}) == "ray-unsafe"
    require_safe_listening(LiveSettings(host=host, keys_file=keys_file), TOKEN)
    require_safe_listening(LiveSettings(host=host, insecure=True), {})


def test_the_name_of_this_machine_is_what_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "inside": ["127.0.1.1", "::1"],
        "half": ["127.0.0.1", "192.0.2.1"],
        "outside": ["192.0.2.1"],
    }

    def look_up(name: str, _: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (address, 0)) for address in found[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)  # names of other machines are not this test's to ask for
    assert is_loopback("inside") and not is_loopback("half") and not is_loopback("outside")


@pytest.mark.parametrize("mode", ["", "disabled", "tokens", "1"])
def test_rays_mode_is_token_or_nothing(keys_file: Path, mode: str) -> None:
    settings = LiveSettings(host="0.0.0.0", keys_file=keys_file)
    assert code_of(settings, {"RAY_AUTH_MODE": mode}) == "ray-unsafe"
    require_safe_listening(settings, {"RAY_AUTH_MODE": "TOKEN"})


def test_without_an_environment_it_is_the_process_own(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LiveSettings(host="0.0.0.0", keys_file=keys_file)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    require_safe_listening(settings)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(SettingsError):
        require_safe_listening(settings)


def test_grpc_listens_everywhere_whatever_the_host(keys_file: Path) -> None:
    with pytest.raises(SettingsError, match="9000") as caught:
        require_safe_listening(LiveSettings(grpc_port=9000), TOKEN)
    assert caught.value.code == "listening-unsafe"
    require_safe_listening(LiveSettings(grpc_port=9000, keys_file=keys_file), TOKEN)


def test_what_to_do_is_said() -> None:
    with pytest.raises(SettingsError) as caught:
        require_safe_listening(LiveSettings(host="0.0.0.0"), TOKEN)
    for word in ("upriver keys create", "keys_file", "jwt_jwks_url", "127.0.0.1", "insecure"):
        assert word in caught.value.remedy
    assert "0.0.0.0:8000" in caught.value.message
    with pytest.raises(SettingsError, match="ray get-auth-token"):
        require_safe_listening(
            LiveSettings(host="::", jwt_jwks_url="https://i.example", jwt_issuer="i", jwt_audience="a"), {}
        )


def test_every_page_may_use_only_what_asks(keys_file: Path) -> None:
    assert code_of(LiveSettings(cors_origins=("*",)), TOKEN) == "origins-unsafe"
    require_safe_listening(LiveSettings(cors_origins=("*",), keys_file=keys_file), {})
    require_safe_listening(LiveSettings(cors_origins=("*",), insecure=True), {})


def test_a_service_that_asks_nobody_goes_by_loopbacks_names(keys_file: Path) -> None:
    assert origin_policy_for(LiveSettings()).hosts == LOOPBACK_HOSTS
    assert origin_policy_for(LiveSettings(keys_file=keys_file)).hosts is None
    assert origin_policy_for(LiveSettings(host="0.0.0.0", insecure=True)).hosts is None
    policy = origin_policy_for(LiveSettings(allowed_hosts=("Video.Example",), cors_origins=("https://page.example",)))
    assert policy.hosts == ("video.example",) and policy.origins == ("https://page.example",)


def test_what_checks_credentials_is_as_configured(keys_file: Path, tmp_path: Path) -> None:
    assert not authenticator_for(LiveSettings()).asks
    with pytest.raises(Unauthorized):
        authenticator_for(LiveSettings(keys_file=keys_file)).authenticate({})
    (tmp_path / "secret").write_text("s" * 40)
    tokens = LiveSettings(
        jwt_key_file=tmp_path / "secret", jwt_algorithms=("HS256",), jwt_issuer=ISSUER, jwt_audience=AUDIENCE
    )
    with pytest.raises(Unauthorized):
        authenticator_for(tokens).authenticate({})
    with pytest.raises(SettingsError):
        authenticator_for(LiveSettings(keys_file=tmp_path / "none"))
