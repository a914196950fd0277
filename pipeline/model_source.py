"""Where a model comes from: a built-in name, a folder in the published layout, or a hub id.

Knows the names of a model's files, and imports nothing that reads them: finding a model must be quick.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from pipeline.errors import CheckpointError

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
PROMPT: Final = "prompt_embeds.safetensors"
OPTIONS: Final = "upriver.json"
RAFT_WEIGHTS: Final = "raft_large.safetensors"
PICKLES: Final = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

_MODELS: Final = Path(__file__).parent / "models"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STAND_IN: Final = re.compile(r"stand-in:(\d+(?:\.\d+)?)")
_LONGEST_STAND_IN_MS: Final = 600_000.0
# The time that it takes does not change a pixel.
STAND_IN_SHA256: Final = hashlib.sha256(b"stand-in").hexdigest()
_HUB_FILES: Final = [
    *(f"{part}/{name}" for part in ("unet", "controlnet", "vae") for name in ("config.json", WEIGHTS)),
    *("scheduler/*.json", "tokenizer/*", "text_encoder/config.json", "text_encoder/model.safetensors"),
    *("model_index.json", PROMPT, OPTIONS, RAFT_WEIGHTS),
]


def is_stand_in(source: str) -> bool:
    """Return whether a model's name is that of a stand-in: see `pipeline.engine`."""
    return source.startswith("stand-in:")


def stand_in_step_s(source: str) -> float:
    """Return how long a step of the stand-in with this name takes, in seconds.

    Raises:
        CheckpointError: no such name, or more than ten minutes.
    """
    found = _STAND_IN.fullmatch(source)
    if found is None or float(found[1]) > _LONGEST_STAND_IN_MS:
        raise CheckpointError(
            f"{source!r} is no stand-in.",
            code="stand-in-name",
            remedy=f"Write stand-in:40 for one of 40 milliseconds a step; {_LONGEST_STAND_IN_MS:.0f} at most.",
        )
    return float(found[1]) / 1000


def cache_folder() -> Path:
    """Return the folder for what is made from models and can be made again; `XDG_CACHE_HOME` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upriver"


def built_in_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in _MODELS.glob("*/model_index.json"))


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a checkpoint: built-in name, else an existing folder, else a hub id.

    Hub ids are fetched by ``huggingface_hub``; what is in its cache is used without a network. Only the files of the
    layout are fetched.

    Raises:
        CheckpointError: the source is none of these, is a single file, or cannot be fetched.
    """
    name = os.fspath(source)
    if name in built_in_models():
        return _MODELS / name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file() or path.suffix in PICKLES:
        if path.suffix in PICKLES:
            raise pickled(path)
        raise CheckpointError(
            f"The model {name} is a file.", code="checkpoint-file", remedy="Give the folder of a checkpoint."
        )
    if _HUB_ID.fullmatch(name):
        return _fetch(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    raise CheckpointError(
        f"There is no model {name!r}: it is no built-in name ({', '.join(built_in_models())}), no folder, no hub id.",
        code="checkpoint-unknown",
        remedy="Give a built-in name, the path of a checkpoint folder, or a hub id such as owner/name.",
    )


def _fetch(
    name: str, *, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=_HUB_FILES,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"The model {name!r} is no built-in name ({', '.join(built_in_models())}) and no folder, "
            f"and it cannot be fetched from the hub: {reason}",
            code="checkpoint-unknown",
            remedy="Check the name and the network, or download the checkpoint and give its folder.",
        ) from error


def pickled(path: Path) -> CheckpointError:
    """The error for weights in a format that can run code."""
    return CheckpointError(
        f"{path} holds pickled weights, which can run code when they are read; only safetensors are loaded.",
        code="checkpoint-pickle",
        remedy="Convert it where its origin is trusted: read it with torch.load(path, weights_only=True), "
        f"write it with safetensors.torch.save_file as {WEIGHTS}.",
    )
