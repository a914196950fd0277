"""A model's folder in the published layout, read and checked. Safetensors only.

Knows: what must be in it, how weights are read and compared with what the configuration asks for, and the fingerprint
by which streams know their model. Does not know: how a name becomes a folder (`pipeline.model_source`), or how a frame
is restored.

Layout: ``unet/``, ``controlnet/`` and ``vae/`` with ``config.json`` and ``diffusion_pytorch_model.safetensors`` each,
``scheduler/scheduler_config.json``; ``prompt_embeds.safetensors`` or else ``tokenizer/`` and ``text_encoder/``;
optionally ``upriver.json`` (see `pipeline.options`) and ``raft_large.safetensors``. ``model_index.json`` is not read:
the published one names classes of another program.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.autoencoder import TemporalAutoencoderTiny
from pipeline.errors import CheckpointError
from pipeline.file_modes import follow_umask
from pipeline.model_source import OPTIONS, PICKLES, PROMPT, RAFT_WEIGHTS, WEIGHTS, pickled, resolve
from pipeline.options import ModelOptions
from pipeline.prompt import load_prompt_embeds, save_prompt_embeds

# Conditioning by class (the noise level of the x4 upscaler) is not used by this method; files may still carry its
# weights.
_STRAY: Final = "class_embedding."

logger = logging.getLogger(__name__)

Network = TypeVar("Network", UNet2DConditionModel, ControlNetModel, TemporalAutoencoderTiny)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory, fp32 as stored, on the CPU.

    Attributes:
        folder: where it was read from.
        prompt_embeds_1TD: embedding of the empty prompt; None where no network has cross-attention and none is stored.
        model_sha256: see `fingerprint`.
        raft_weights: weights for the flow estimator that came with the checkpoint.
        notes: what was ignored, in words.
    """

    folder: Path
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: TemporalAutoencoderTiny
    scheduler: DDIMScheduler
    prompt_embeds_1TD: Tensor | None
    options: ModelOptions
    model_sha256: str
    raft_weights: Path | None
    notes: tuple[str, ...]


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Read a checkpoint, and check every tensor against its configuration.

    Args:
        source, revision, cache_dir, local_files_only: see `resolve`.

    Raises:
        CheckpointError: it cannot be found or fetched, a file is missing or unreadable, weights are pickled, or a
            tensor is missing, unknown or of the wrong shape (tensor, both shapes and file are named).
    """
    folder = resolve(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    notes: list[str] = []
    options = _read_options(folder)
    unet = _load_network(UNet2DConditionModel, folder / "unet", notes)
    controlnet = _load_network(ControlNetModel, folder / "controlnet", notes)
    vae = _load_network(TemporalAutoencoderTiny, folder / "vae", notes)
    scheduler = DDIMScheduler.from_config(_read_json(folder / "scheduler" / "scheduler_config.json"))
    prompt_embeds_1TD = None
    if _reads_text(unet) or _reads_text(controlnet) or (folder / PROMPT).is_file():
        prompt_embeds_1TD = load_prompt_embeds(folder, unet.config.cross_attention_dim)
    raft_weights = folder / RAFT_WEIGHTS
    for note in notes:
        logger.info(note)
    return Checkpoint(
        folder=folder,
        unet=unet,
        controlnet=controlnet,
        vae=vae,
        scheduler=scheduler,
        prompt_embeds_1TD=prompt_embeds_1TD,
        options=options,
        model_sha256=fingerprint(unet, controlnet, vae, scheduler, options),
        raft_weights=raft_weights if raft_weights.is_file() else None,
        notes=tuple(notes),
    )


def save_extras(folder: str | os.PathLike[str], prompt_embeds_1TD: Tensor, options: ModelOptions) -> None:
    """Write what diffusers does not: ``prompt_embeds.safetensors`` and ``upriver.json``."""
    save_prompt_embeds(Path(folder) / PROMPT, prompt_embeds_1TD)
    (Path(folder) / OPTIONS).write_text(options.model_dump_json(indent=2, exclude_defaults=True) + "\n")


def fingerprint(
    unet: nn.Module, controlnet: nn.Module, vae: nn.Module, scheduler: DDIMScheduler, options: ModelOptions
) -> str:
    """Return a SHA-256 over all that decides what a stream looks like: weights, noise schedule, warp, noise, timesteps.

    It is made from values, not from file bytes, so that a checkpoint keeps its fingerprint when it is saved again. The
    precision counts: compute it before networks are cast. Ablation switches, the flow estimator and notes do not count.
    """
    digest = hashlib.sha256()
    for name, network in (("unet", unet), ("controlnet", controlnet), ("vae", vae)):
        _add_weights(digest, name, network)
    digest.update(scheduler.alphas_cumprod.numpy().tobytes())
    config = scheduler.config
    decisive = {
        "scheduler": [config.prediction_type, config.timestep_spacing, config.steps_offset, config.set_alpha_to_one],
        "options": options.model_dump(mode="json", exclude_defaults=True, include={"warp", "noise", "schedules"}),
    }
    digest.update(json.dumps(decisive, sort_keys=True).encode())
    return digest.hexdigest()


def write_in_half(folder: Path, out: Path) -> int:
    """Write a copy of a model whose networks' weights are in half precision; returns the bytes of its weights.

    Everything else, the prompt's embedding among it, is copied as it is. What loads the copy has the weights in fp32.

    Raises:
        CheckpointError: `out` exists, a file is not safetensors, or a weight is too large for half precision.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists.", code="checkpoint-exists", remedy="Name a folder that does not.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(folder, partial)
        for path in sorted(partial.glob(f"*/{WEIGHTS}")):
            tensors = _read_weights(path)
            halves = {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}
            if large := [name for name, x in halves.items() if not x.isfinite().all()]:
                raise CheckpointError(
                    f"{large[0]} in {path.parent.name} has weights beyond 65504, the largest number of half precision.",
                    code="checkpoint-half",
                    remedy="Keep the model as it is.",
                )
            save_file(halves, path, metadata={"format": "pt"})
        follow_umask(sorted(partial.rglob("*.safetensors")))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*.safetensors"))


def weights_sha256(network: nn.Module) -> str:
    """Return a SHA-256 over the weights of one network."""
    digest = hashlib.sha256()
    _add_weights(digest, type(network).__qualname__, network)
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, name: str, network: nn.Module) -> None:
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _load_network(kind: type[Network], folder: Path, notes: list[str]) -> Network:
    """Build a network from its configuration and fill it with the weights beside it."""
    config: dict[str, Any] = _read_json(folder / "config.json")
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        config |= {"num_class_embeds": None, "class_embed_type": None}
        notes.append(f"{folder / 'config.json'} asks for class conditioning, which this method does not use; it is off")
    if kind is TemporalAutoencoderTiny:
        config.pop("block_out_channels", None)  # the published file says the widths twice more, once for each half
    try:
        network: Network = kind.from_config(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be used: {error}.",
            code="checkpoint-config",
            remedy="Use the configuration that the checkpoint was published with.",
        ) from error
    path = folder / WEIGHTS
    tensors = _read_weights(path)
    wanted = network.state_dict()
    stray = [name for name in tensors if name.startswith(_STRAY) and name not in wanted]
    for name in stray:
        del tensors[name]
    if stray:
        notes.append(f"{path} carries {', '.join(stray)}, which this method does not use; ignored")
    _compare(path, tensors, wanted)
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _compare(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise CheckpointError where names or shapes of tensors differ from what the configuration asks for."""
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} {what} tensors: {listed}.",
                code="checkpoint-tensors",
                remedy="Weights and config.json must come from one checkpoint.",
            )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"The tensor {name} has shape {tuple(tensor.shape)} in {path}, "
                f"but config.json asks for {tuple(wanted[name].shape)}.",
                code="checkpoint-shape",
                remedy="Weights and config.json must come from one checkpoint.",
            )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = sorted(other for other in path.parent.glob("*") if other.suffix in PICKLES)
        if pickles:
            raise pickled(pickles[0])
        raise _missing(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise _missing(path) from error
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise _unreadable(path, ValueError("not a JSON object"))
    return content


def _read_options(folder: Path) -> ModelOptions:
    path = folder / OPTIONS
    if not path.is_file():
        return ModelOptions()
    try:
        return ModelOptions.model_validate(_read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            code="checkpoint-options",
            remedy="Correct the entry, or use the version of Upriver that the checkpoint was made for.",
        ) from error


def _reads_text(network: UNet2DConditionModel | ControlNetModel) -> bool:
    """Whether any part of the network attends to the prompt."""
    return any(getattr(module, "has_cross_attention", False) for module in network.modules())


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint has no file {path}.",
        code="checkpoint-incomplete",
        remedy="Download the whole checkpoint: unet/, controlnet/, vae/ and scheduler/ are needed.",
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error}.",
        code="checkpoint-unreadable",
        remedy="Download the file again; it may be truncated or a Git LFS pointer.",
    )
