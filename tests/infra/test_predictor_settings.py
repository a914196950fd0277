"""Settings of the predictor: where they come from, and what they refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from infra.errors import SettingsError
from infra.listening import require_asking
from infra.live_settings import LiveSettings, load_live_settings
from infra.predictor_settings import PredictorSettings, load_predictor_settings
from infra.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_has_a_table_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    tables = ("[live]", "sessions = 3", "[predictor]", "max_frames = 7", "[predictor.fetch]", 'hosts = ["x.org"]')
    file.write_text("\n".join(('model = "other"', *tables)))
    monkeypatch.setenv("UPRIVER_PREDICTOR_REQUESTS", "5")
    loaded = load_predictor_settings({"host": "::1"}, file)
    assert (loaded.values.max_frames, loaded.values.requests, loaded.values.host) == (7, 5, "::1")
    assert loaded.values.fetch is not None and loaded.values.fetch.hosts == ("x.org",)
    assert loaded.origins["requests"] == "environment UPRIVER_PREDICTOR_REQUESTS"
    assert load_settings(config_file=file).values.model == "other"
    assert load_live_settings(config_file=file).values.sessions == 3


def test_a_misspelt_name_is_refused_and_kubernetes_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT", "PORT_8080_TCP_ADDR"):  # of a Service named upriver-predictor
        monkeypatch.setenv(f"UPRIVER_PREDICTOR_{name}", "10.0.0.1")
    load_predictor_settings()
    monkeypatch.setenv("UPRIVER_PREDICTOR_MAX_FRAME", "7")
    with pytest.raises(SettingsError, match="UPRIVER_PREDICTOR_MAX_FRAME"):
        load_predictor_settings()


def test_models_have_names_that_fit_into_an_address() -> None:
    sources = PredictorSettings.sources
    assert sources(("tiny", "film=/mnt/models", "/srv/old/", "owner/name")) == {
        "tiny": "tiny", "film": "/mnt/models", "old": "/srv/old/", "name": "owner/name",
    }  # fmt: skip
    for wrong in (("tiny", "tiny=/x"), ("a/b=/x",), ("=x",), ("x=",)):
        with pytest.raises(SettingsError):
            load_predictor_settings({"models": wrong})


@pytest.mark.parametrize("url", ["http://x:1", "ws:/x", "ws://", "ws://user@host:1", "grpc://host:1?token=x"])
def test_a_service_is_an_address_without_secrets(url: str) -> None:
    with pytest.raises(SettingsError):
        load_predictor_settings({"service": url})


def test_where_it_may_listen(tmp_path: Path) -> None:
    asking = LiveSettings(keys_file=tmp_path / "keys.json")
    require_asking(LiveSettings(), "127.0.0.1", insecure=False)
    require_asking(asking, "0.0.0.0", insecure=False)
    require_asking(LiveSettings(), "0.0.0.0", insecure=True)
    for host in ("0.0.0.0", "", "::", "10.1.2.3"):
        with pytest.raises(SettingsError, match="ask nobody"):
            require_asking(LiveSettings(), host, insecure=False)


def test_the_page_of_settings_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/reference/generate.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = (ROOT / "docs/reference/predictor_settings.md").read_text(encoding="utf-8")
    assert page == generator.predictor_settings_reference(), "run `make docs`"
