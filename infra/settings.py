"""Settings of the command line and where each value came from.

Order of precedence: flags, then `UPRIVER_*` in the environment, then the configuration file, then defaults. The file
is TOML with the same names as below: the one named by `--config` or `UPRIVER_CONFIG`, otherwise `upriver/config.toml`
in the user's configuration folder; its tables `[live]` and `[predictor]` belong to `infra.live_settings` and
`infra.predictor_settings`. Knows nothing of models or videos: only type and range of values are checked.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from infra.errors import SettingsError

ENV_PREFIX = "UPRIVER_"
LIVE_TABLE = "live"  # of the configuration file; `infra.live_settings` reads it
PREDICTOR_TABLE = "predictor"  # `infra.predictor_settings` reads it
_TABLES = (LIVE_TABLE, PREDICTOR_TABLE)
_MOST_STEPS = 50
_LOWEST_RUNG, _HIGHEST_RUNG = 16, 8640  # of an HLS ladder

# The encoder's choices, as `pipeline.encoder_options` has them; a test holds the two together.
Codec = Literal["h264", "hevc", "av1", "vp9", "ffv1", "prores"]
Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
PixelFormat = Literal["auto", "yuv420p", "yuv422p", "yuv444p", "yuv420p10", "yuv422p10", "yuv444p10"]

# What runs the model, as `pipeline.backends` has it; a test holds the two together.
Backend = Literal["auto", "eager", "openvino", "graph", "compiled"]


class LayeredSettings(BaseSettings):
    """Settings whose layers `load_layers` merges itself, because it remembers which of them each value came from."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let nothing through but the values that were merged."""
        return (init_settings,)


class Settings(LayeredSettings):
    """Everything that can be set by a flag, the environment or a file. Build it with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    model: str = Field(default="tiny", description="built-in name, folder or hub id of the model")
    steps: int | Literal["auto"] | None = Field(
        default=None,
        description="denoising steps a frame, 1 to 50; auto: chosen for each; none: the model's default",
    )
    step_policy: dict[str, float | tuple[float, ...] | None] = Field(
        default={}, description="of `steps` auto, where it is to differ from what `pipeline.step_policy` has"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the noise; equal seeds give equal pictures")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="auto, cpu, cuda, cuda:N")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="number format of the model; auto: bf16 where the hardware computes in it and pictures stay near "
        "to those in fp32, on such a GPU else fp16, otherwise fp32; "
        "int8: convolutions in 8 bits, by OpenVINO alone",
    )
    backend: Backend = Field(
        default="auto",
        description="what runs the model; auto: OpenVINO on a CPU where it is installed, CUDA graphs on a GPU",
    )
    flow: Literal["auto", "dis", "net", "raft", "raft-small", "zero"] = Field(
        default="auto", description="motion estimator; auto: the model's"
    )
    scale: int = Field(default=4, ge=2, le=4, description="output size over input size")
    height: int | None = Field(default=None, ge=16, le=16384, description="output height in pixels instead of a scale")
    codec: Codec | None = Field(default=None, description="video codec; none: by the container and the bit depth")
    crf: int | None = Field(default=None, ge=0, le=63, description="quality of the codec, lower is better")
    preset: Preset = Field(default="medium", description="speed of the encoder")
    encoder: Literal["software", "nvenc"] = Field(
        default="software", description="who encodes: libraries on the CPU, or an NVIDIA GPU"
    )
    pix_fmt: PixelFormat = Field(default="auto", description="pixel format; auto: as close to the source as possible")
    fragmented: bool = Field(default=False, description="write MP4 and MOV in fragments, which play while they come")
    framemd5: bool = Field(default=False, description="beside each result the checksums of its pictures")
    hls: str | None = Field(
        default=None, description="beside each result an HLS ladder of even heights, such as 1080,720,480; or none"
    )
    deinterlace: Literal["auto", "on", "off", "pulldown"] = Field(
        default="auto", description="deinterlace before restoring; pulldown: make film of telecined video again"
    )
    cuts: bool = Field(default=True, description="start the stream's memory afresh at each cut")
    segment_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="length of a segment: what a crash can cost at most, in film time"
    )
    split_seconds: float | None = Field(
        default=None, gt=0, le=86400, description="longer shots become parts of about so much film time; none: never"
    )
    warm_up_frames: int = Field(
        default=16, ge=0, le=1000, description="frames before a part that are restored first and thrown away"
    )
    actors: int | None = Field(default=None, ge=1, le=4096, description="workers; none: one per GPU, or one on the CPU")
    min_actors: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="fewest workers; the pool grows to `actors` while shots wait",
    )
    gpus_per_actor: float | None = Field(default=None, ge=0, le=8, description="none: 1 where there is a GPU, else 0")
    threads: int | None = Field(
        default=None, ge=1, le=256, description="CPU threads of each worker; none: all its cores"
    )
    slots: int = Field(
        default=1, ge=1, le=64, description="shots that each worker restores side by side, in shared batches"
    )
    exact: bool = Field(
        default=False, description="the same bits on every run: eager, fp32, one thread, one shot at a time"
    )
    memory_gb: float | None = Field(
        default=None, gt=0, le=4096, description="what a worker may need; larger frames go in tiles; none: no limit"
    )
    stall_seconds: float = Field(
        default=1800.0, gt=0, le=86400, description="a worker that restores no frame for so long is ended"
    )
    max_pixels: int = Field(default=8192 * 4320, ge=256, description="largest frame accepted, in pixels")

    @field_validator("steps", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        if value is None or value == "auto":
            return value
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if not str(number).strip().isdecimal() or not 1 <= int(str(number)) <= _MOST_STEPS:
            raise ValueError(f"it is a whole number from 1 to {_MOST_STEPS}, or auto")
        return int(str(number))

    @field_validator("hls")
    @classmethod
    def _heights(cls, value: str | None) -> str | None:
        ladder_heights(value)
        return value

    @property
    def fixed_steps(self) -> int | None:
        """Steps that every frame gets; None: the model's default, or with `auto` what the policy says."""
        return None if self.steps == "auto" else self.steps

    def in_effect(self) -> Settings:
        """Return the settings as they are used: `exact` decides what would change bits, whatever else is said."""
        if not self.exact:
            return self
        return self.model_copy(
            update={"backend": "eager", "encoder": "software", "dtype": "fp32", "threads": 1, "slots": 1}
        )


def ladder_heights(text: str | None) -> tuple[int, ...]:
    """Return the heights that the setting `hls` names, highest first; none for None and "none".

    Raises:
        ValueError: something else than even numbers of pixels with commas between them.
    """
    if text is None or text.strip().lower() == "none":
        return ()
    heights = {int(part) if part.strip().isdecimal() else 0 for part in text.split(",")}
    wrong = [height for height in heights if height % 2 or not _LOWEST_RUNG <= height <= _HIGHEST_RUNG]
    if wrong:
        raise ValueError(f"heights are even numbers from {_LOWEST_RUNG} to {_HIGHEST_RUNG}, with commas between them")
    return tuple(sorted(heights, reverse=True))


S = TypeVar("S", bound=LayeredSettings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """Settings with the origin of each value: `flag`, `environment UPRIVER_X`, `file PATH` or `default`."""

    values: S
    origins: Mapping[str, str]
    config_file: Path | None

    def environment(self) -> dict[str, str]:
        """Return what the environment and the file say, as variables for a process elsewhere; flags are its own."""
        return {
            f"{ENV_PREFIX}{name.upper()}": _as_text(getattr(self.values, name))
            for name, origin in self.origins.items()
            if origin not in ("flag", "default") and getattr(self.values, name) is not None
        }


LoadedSettings: TypeAlias = Loaded[Settings]


def load_settings(flags: Mapping[str, object] | None = None, config_file: Path | None = None) -> LoadedSettings:
    """Merge flags, environment, configuration file and defaults.

    Args:
        flags: values given on the command line; None values count as not given.
        config_file: a file that must exist; None looks at `UPRIVER_CONFIG`, then at the user's configuration folder.

    Raises:
        SettingsError: an unknown name, a value of the wrong type or range (named with its origin), an unreadable file.
    """
    return load_layers(Settings, flags, config_file)


def load_layers(
    kind: type[S],
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    *,
    table: str | None = None,
) -> Loaded[S]:
    """Do for any kind of settings what `load_settings` does for the command line's.

    Args:
        table: of the configuration file; None: what is outside of the tables that belong to others.

    Raises:
        SettingsError: as `load_settings`.
    """
    prefix = kind.model_config["env_prefix"]
    path = config_file or _default_config_file()
    content = _read_config(path) if path else {}
    if table is None:
        content = {name: value for name, value in content.items() if name not in _TABLES or not isinstance(value, dict)}
    else:
        content = content.get(table, {})
        if not isinstance(content, dict):
            raise SettingsError(
                f"In the configuration file {path}, {table!r} is a value; it must be a table.",
                code="config-invalid",
                remedy=f"Write [{table}] on a line of its own, and its settings below.",
            )
    layers: list[tuple[str, dict[str, Any]]] = [
        ("flag", {name: value for name, value in (flags or {}).items() if value is not None}),
        ("environment", _environment(kind)),
        (f"file {path}", content),
    ]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            if name not in merged:
                merged[name] = value
                origins[name] = f"environment {prefix}{name.upper()}" if origin == "environment" else origin
    try:
        values = kind(**merged)
    except ValidationError as error:
        raise _explain(kind, error, origins) from error
    return Loaded(values, {name: origins.get(name, "default") for name in kind.model_fields}, path)


def _environment(kind: type[LayeredSettings]) -> dict[str, Any]:
    try:
        return dict(EnvSettingsSource(kind)())
    except SourceError as error:
        raise SettingsError(
            f"A value in the environment is no JSON: {error}.",
            code="settings-invalid",
            remedy="Write tables as JSON objects in quotes.",
        ) from error


def _as_text(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default_config_file() -> Path | None:
    named = os.environ.get(f"{ENV_PREFIX}CONFIG")
    if named:
        return Path(named)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = base / "upriver" / "config.toml"
    return path if path.is_file() else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"The configuration file {path} cannot be read: {error.strerror or error}.",
            code="config-unreadable",
            remedy="Correct the path given by --config or UPRIVER_CONFIG.",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The configuration file {path} is not valid TOML: {error}.",
            code="config-invalid",
            remedy='Write one `name = value` per line, strings in quotes, e.g. `codec = "hevc"`.',
        ) from error


def _explain(kind: type[LayeredSettings], error: ValidationError, origins: Mapping[str, str]) -> SettingsError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    origin = origins.get(name, "default")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        message = f"Unknown setting {name!r} ({origin})."
        remedy = "See `upriver doctor` for all names."
    elif not name:
        message = f"These settings do not go together: {first['msg']}."
        remedy = "Correct one of them."
    else:
        place = ".".join(str(part) for part in first["loc"])
        field = kind.model_fields[name]
        value = f"={first['input']!r}" if field.repr else ""  # what is hidden from a repr may hold a password
        message = f"Setting {place}{value} ({origin}) is not possible: {first['msg']}."
        remedy = f"Expected: {field.description}."
    return SettingsError(message, code="settings-invalid", remedy=remedy)
