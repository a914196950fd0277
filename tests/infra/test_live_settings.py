from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from infra.errors import SettingsError
from infra.live_settings import LiveSettings, describe, load_live_settings
from infra.settings import load_settings
from infra.tenants import Scope

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_the_table_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path / "u.toml",
        'seed = 3\n[live]\nport = 9001\nwindow = 4\nmodels = ["tiny", "film"]\n[live.limits]\nsessions = 3\n',
    )
    monkeypatch.setenv("UPRIVER_LIVE_PORT", "9002")
    monkeypatch.setenv("UPRIVER_LIVE_WINDOW", "5")
    loaded = load_live_settings({"window": 6, "host": None}, file)
    values = loaded.values
    assert (values.host, values.port, values.window, values.models) == ("127.0.0.1", 9002, 6, ("tiny", "film"))
    assert values.limits.sessions == 3 and values.limits.jobs == 2
    assert loaded.origins["window"] == "flag" and loaded.origins["host"] == "default"
    assert loaded.origins["port"] == "environment UPRIVER_LIVE_PORT" and loaded.origins["models"] == f"file {file}"


def test_the_command_lines_settings_and_these_share_a_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "u.toml", "seed = 3\n[live]\nport = 9001\n")
    monkeypatch.setenv("UPRIVER_LIVE_LADDER", "off")
    monkeypatch.setenv("UPRIVER_STEPS", "2")
    assert (load_settings(config_file=file).values.seed, load_settings(config_file=file).values.steps) == (3, 2)
    live = load_live_settings(config_file=file).values
    assert live.port == 9001 and live.ladder is False
    with pytest.raises(SettingsError, match="must be a table"):
        load_live_settings(config_file=write(tmp_path / "v.toml", "live = 1\n"))


def test_lists_and_tables_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_LIVE_MODELS", "tiny, film")
    monkeypatch.setenv("UPRIVER_LIVE_CORS_ORIGINS", "https://A.example:443,http://b.example:81")
    monkeypatch.setenv("UPRIVER_LIVE_JWT_DEFAULT_SCOPES", "live,jobs")
    monkeypatch.setenv("UPRIVER_LIVE_LIMITS", '{"sessions": 1}')
    monkeypatch.setenv("UPRIVER_LIVE_TENANTS", '{"alice": {"sessions": 50, "upload_bytes": 5000}}')
    monkeypatch.setenv("UPRIVER_LIVE_TRUSTED_PROXIES", "10.1.0.0/16")
    monkeypatch.setenv("UPRIVER_LIVE_HOST", "")  # as compose files leave what is not set
    values = load_live_settings().values
    assert values.models == ("tiny", "film") and values.jwt_default_scopes == (Scope.LIVE, Scope.JOBS)
    assert values.cors_origins == ("https://a.example", "http://b.example:81")
    assert values.trusted_proxies == ("10.1.0.0/16",) and values.host == "127.0.0.1"
    assert values.limits_of("bob").sessions == 1
    alice = values.limits_of("alice")
    assert (alice.sessions, alice.upload_bytes, alice.jobs) == (50, 5000, values.limits.jobs)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 0}, "port=0"),
        ({"port": 65536}, "port=65536"),
        ({"window": 0}, "window=0"),
        ({"models": ()}, "models"),
        ({"cors_origins": ("page.example",)}, "cors_origins"),
        ({"cors_origins": ("*", "https://page.example")}, "cors_origins"),
        ({"cors_origins": ("https://page.example/path",)}, "cors_origins"),
        ({"cors_origins": ("null",)}, "cors_origins"),
        ({"trusted_proxies": ("10.0.0.1/8",)}, "trusted_proxies"),
        ({"trusted_proxies": ("everything",)}, "trusted_proxies"),
        ({"job_sources": ("s3://",)}, "job_sources"),
        ({"limits": {"sessions": 0}}, "limits.sessions=0"),
        ({"limits": {"sesions": 1}}, "limits.sesions"),
        ({"tenants": {"alice": {"sessions": -1}}}, "tenants.alice.sessions"),
        ({"tenants": {"alice": {"sesions": 1}}}, "tenants.alice.sesions"),
        ({"tenants": {"../alice": {}}}, "tenants"),
        ({"least_side": 100, "greatest_side": 99}, "least_side=100"),
        ({"greatest_side": 10_000}, "greatest_side=10000"),
        ({"jwt_jwks_url": "https://id.example"}, "jwt_issuer and jwt_audience"),
        ({"jwt_jwks_url": "https://id.example", "jwt_issuer": "i"}, "jwt_issuer and jwt_audience"),
        ({"jwt_jwks_url": "https://id.example", "jwt_issuer": "", "jwt_audience": "a"}, "jwt_issuer and jwt_audience"),
        ({"jwt_issuer": "i", "jwt_audience": "a"}, "jwt_jwks_url or jwt_key_file"),
        ({"jwt_jwks_url": "https://i.example", "jwt_issuer": "i", "jwt_audience": "a", "jwt_algorithms": ("HS256",)},
         "HS algorithms"),
        ({"jwt_jwks_url": "http://i.example", "jwt_issuer": "i", "jwt_audience": "a"}, "https://"),
        ({"keys": "x"}, "Unknown setting 'keys'"),
        ({"jwt_default_scopes": ("root",)}, "jwt_default_scopes"),
    ],
)  # fmt: skip
def test_an_impossible_value_is_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_live_settings(flags)
    assert named in caught.value.message and caught.value.remedy


def test_a_misspelt_variable_is_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_LIVE_KEY_FILE", "keys.json")
    with pytest.raises(SettingsError, match="UPRIVER_LIVE_KEY_FILE"):
        load_live_settings()


def test_a_table_in_the_environment_that_is_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_LIVE_TENANTS", "alice=1")
    with pytest.raises(SettingsError) as caught:
        load_live_settings()
    assert caught.value.code == "settings-invalid" and "tenants" in caught.value.message


def test_a_password_in_a_url_is_not_repeated() -> None:
    url = "https://user:hunter2@id.example"
    with pytest.raises(SettingsError) as caught:
        load_live_settings({"jwt_jwks_url": url, "jwt_issuer": "i", "jwt_audience": "a"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        load_live_settings({"jwt_jwks_url": url + "/x" * 2000})
    assert "hunter2" not in str(caught.value)


def test_the_safe_way_is_the_default() -> None:
    values = LiveSettings()
    assert values.host == "127.0.0.1" and values.grpc_port is None and not values.insecure
    assert values.cors_origins == () and values.job_sources == ()
    assert not values.asks_for_credentials and values.token_options() is None


def test_every_setting_is_described_where_people_look() -> None:
    assert all(what for _, _, what in describe())
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/reference/generate.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = (ROOT / "docs/reference/live_settings.md").read_text()
    assert page == generator.settings_reference(), "run `make docs`"
