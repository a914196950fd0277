"""What a predictor says of itself and of its models, as REST and gRPC tell it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from actors.inference import Inference
from actors.oip import INPUTS, OUTPUTS, VERSION
from actors.predictor_backend import OwnEngine

if TYPE_CHECKING:
    from infra.predictor_settings import PredictorSettings

NAME: Final = "upriver"
PLATFORM: Final = "upriver"
EXTENSIONS: Final = (
    "binary_tensor_data", "model_configuration", "model_repository", "parameters", "sequence", "statistics",
)  # fmt: skip


def server_metadata() -> dict[str, Any]:
    """Return what the server is."""
    try:
        found = version(NAME)
    except PackageNotFoundError:  # a checkout that is not installed
        found = "0"
    return {"name": NAME, "version": found, "extensions": list(EXTENSIONS)}


def model_metadata(model: str, fingerprint: str) -> dict[str, Any]:
    """Return what a model takes and gives; `fingerprint` is empty where it is not known yet."""
    return {
        "name": model,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [dict(each) for each in INPUTS],
        "outputs": [dict(each) for each in OUTPUTS],
        "properties": {"model_sha256": fingerprint},
    }


def model_config(model: str, settings: PredictorSettings) -> dict[str, Any]:
    """Return the part of Triton's model configuration that says something here."""
    return {
        "name": model,
        "platform": PLATFORM,
        "backend": "python",
        "max_batch_size": 0,
        "input": [
            {
                "name": each["name"],
                "data_type": _data_type(str(each["datatype"])),
                "dims": each["shape"],
                "optional": True,
            }
            for each in INPUTS
        ],
        "output": [
            {"name": each["name"], "data_type": _data_type(str(each["datatype"])), "dims": each["shape"]}
            for each in OUTPUTS
        ],
        "sequence_batching": {"max_sequence_idle_microseconds": round(1e6 * settings.sequence_idle_s)},
    }


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


async def model_index(inference: Inference, *, ready_only: bool) -> list[dict[str, str]]:
    """Return all models, served or only allowed to be loaded."""
    backend, settings = inference.backend, inference.settings
    ready = await inference.is_ready()
    served = backend.models()
    index = [
        {"name": name, "version": VERSION, "state": "READY" if ready else "UNAVAILABLE", "reason": ""}
        for name in served
    ]
    if isinstance(backend, OwnEngine):
        others = [name for name in settings.sources(settings.loadable) if name not in served]
        index += [{"name": name, "version": VERSION, "state": "UNAVAILABLE", "reason": "unloaded"} for name in others]
    return [each for each in index if each["state"] == "READY" or not ready_only]
