from __future__ import annotations

import typing
from pathlib import Path

import pytest

from infra import settings as module
from infra.errors import SettingsError
from infra.settings import Settings, ladder_heights, load_settings


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "u.toml", 'model = "from-file"\nseed = 3\nsteps = 2\n')
    monkeypatch.setenv("UPRIVER_SEED", "4")
    monkeypatch.setenv("UPRIVER_STEPS", "1")
    loaded = load_settings({"steps": 4, "device": None}, file)
    assert (loaded.values.steps, loaded.values.seed, loaded.values.model) == (4, 4, "from-file")
    assert loaded.origins["steps"] == "flag"
    assert loaded.origins["seed"] == "environment UPRIVER_SEED"
    assert loaded.origins["model"] == f"file {file}"
    assert loaded.origins["device"] == "default" and loaded.values.device == "auto"


def test_the_users_file_is_found_and_another_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "home" / "upriver" / "config.toml", "seed = 8\n")
    assert load_settings().values.seed == 8
    named = write(tmp_path / "other.toml", "seed = 9\n")
    monkeypatch.setenv("UPRIVER_CONFIG", str(named))
    assert load_settings().values.seed == 9


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"scale": 5}, "scale=5"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"dtype": "fp8"}, "dtype='fp8'"),
        ({"seed": -1}, "seed=-1"),
        ({"height": 8}, "height=8"),
        ({"hls": "720,481"}, "hls='720,481'"),
        ({"hls": "720;480"}, "hls='720;480'"),
        ({"hls": "8"}, "hls='8'"),
    ],
)
def test_an_impossible_value_is_named_with_its_origin(flags: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert named in caught.value.message and "(flag)" in caught.value.message
    assert caught.value.remedy


def test_the_heights_of_a_ladder() -> None:
    assert ladder_heights(" 480, 1080,720,480") == (1080, 720, 480)
    assert ladder_heights(None) == ladder_heights("none") == ()


def test_an_impossible_environment_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_CRF", "high")
    with pytest.raises(SettingsError, match="environment UPRIVER_CRF"):
        load_settings()


def test_steps_are_a_number_or_auto_and_a_policy_travels_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPRIVER_STEPS", "2")
    assert load_settings().values.fixed_steps == 2
    monkeypatch.setenv("UPRIVER_STEPS", "auto")
    monkeypatch.setenv("UPRIVER_STEP_POLICY", '{"levels": [4, 1], "shares": [0.1], "static_levels": null}')
    loaded = load_settings()
    assert loaded.values.steps == "auto" and loaded.values.fixed_steps is None
    for name, value in loaded.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings().values.step_policy == {"levels": (4.0, 1.0), "shares": (0.1,), "static_levels": None}
    for wrong in ("some", "0", "51", "-1", "1.5", "²"):
        monkeypatch.setenv("UPRIVER_STEPS", wrong)
        with pytest.raises(SettingsError, match="1 to 50, or auto"):
            load_settings()


def test_an_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="colour"):
        load_settings(config_file=write(tmp_path / "u.toml", "colour = 1\n"))


@pytest.mark.parametrize(("content", "code"), [(None, "config-unreadable"), ("model = tiny", "config-invalid")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None, code: str) -> None:
    path = tmp_path / "u.toml"
    if content is not None:
        write(path, content)
    with pytest.raises(SettingsError) as caught:
        load_settings(config_file=path)
    assert caught.value.code == code and str(path) in caught.value.message


def test_the_encoders_choices_are_those_of_the_encoder() -> None:
    from pipeline import encoder_options

    for name in ("Codec", "Preset", "PixelFormat"):
        assert typing.get_args(getattr(module, name)) == typing.get_args(getattr(encoder_options, name))


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_exact_runs_take_the_reference() -> None:
    chosen = Settings(exact=True, backend="openvino", dtype="bf16", threads=4, slots=2).in_effect()
    assert (chosen.backend, chosen.dtype, chosen.threads, chosen.slots) == ("eager", "fp32", 1, 1)


def test_the_backends_are_those_of_the_engine() -> None:
    from pipeline.backends import BACKENDS

    assert typing.get_args(module.Backend) == BACKENDS
