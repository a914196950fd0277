"""The embedding of the empty prompt: the only text that this method ever sees, so it is computed once and stored.

Knows: where the embedding may be stored, and how it is made from a checkpoint's tokenizer and text encoder when it is
not. `transformers` is imported only then. Does not know: networks that use it.

The trap: the published tokenizer pads with "!" (id 0), CLIP's usual one with its end token, and the embeddings
differ. A tokenizer whose files are incomplete is replaced silently by a default one in some loaders. So the pad token
of the loaded tokenizer is checked against the one that the checkpoint's files name.

Shapes: T tokens (77), D width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model_source import PROMPT, cache_folder

TENSOR_NAME: Final = "prompt_embeds"

_TOKENIZER_FILES: Final = ("vocab.json", "merges.txt", "tokenizer_config.json")

logger = logging.getLogger(__name__)


def load_prompt_embeds(folder: Path, width: int) -> Tensor:
    """Return the embedding of the empty prompt (1,T,D) in fp32 for the checkpoint in `folder`.

    It is read from ``prompt_embeds.safetensors`` there, or from the user's cache; otherwise it is computed and
    stored: in the folder if that can be written, else in the cache.

    Args:
        folder: checkpoint in the published layout.
        width: D as the networks need it (``cross_attention_dim``).

    Raises:
        CheckpointError: neither the embedding nor what is needed to compute it is there, or it has another width.
    """
    stored = folder / PROMPT
    if stored.is_file():
        return _read(stored, width)
    cached = _cache_folder() / f"{_identity(folder)}.safetensors"
    if cached.is_file():
        return _read(cached, width)
    embeds_1TD = encode_empty_prompt(folder)
    if embeds_1TD.shape[-1] != width:
        raise _wrong_width(folder / "text_encoder", embeds_1TD, width)
    for path in (stored, cached):
        try:
            save_prompt_embeds(path, embeds_1TD)
        except OSError as error:
            logger.debug("the prompt embedding cannot be stored as %s: %s", path, error)
        else:
            logger.info("the embedding of the empty prompt was computed and stored as %s", path)
            break
    return embeds_1TD


def save_prompt_embeds(path: Path, embeds_1TD: Tensor) -> None:
    """Write the embedding as safetensors; a reader sees nothing or the whole file.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()  # safetensors reports an unwritable folder as its own error; this one says OSError
        mode = partial.stat().st_mode
        save_file({TENSOR_NAME: embeds_1TD.detach().to("cpu", torch.float32).contiguous()}, partial)
        partial.chmod(mode)  # safetensors lets the owner alone read: a model is often fetched by another user
        partial.replace(path)
    finally:
        if partial.exists():
            partial.unlink()


def encode_empty_prompt(folder: Path) -> Tensor:
    """Tokenize '' with the checkpoint's tokenizer, pad to the model's length, and return the last hidden state (1,T,D).

    Raises:
        CheckpointError: a file is missing, or the tokenizer does not pad as its files say.
    """
    for name in _TOKENIZER_FILES:
        if not (folder / "tokenizer" / name).is_file():
            raise _incomplete(folder, f"tokenizer/{name}")
    for name in ("config.json", "model.safetensors"):
        if not (folder / "text_encoder" / name).is_file():
            raise _incomplete(folder, f"text_encoder/{name}")
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    length = min(tokenizer.model_max_length, 77)
    ids = tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
    pad = _pad_id(folder / "tokenizer")
    if int(ids[0, -1]) != pad:
        raise CheckpointError(
            f"The tokenizer in {folder / 'tokenizer'} pads with token {int(ids[0, -1])}, but its files say {pad}.",
            code="checkpoint-tokenizer",
            remedy=f"Copy a {PROMPT} into the checkpoint, or use its complete tokenizer folder.",
        )
    encoder: Any = CLIPTextModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    with torch.no_grad():
        embeds: Tensor = encoder.eval()(ids)[0]
    return embeds


def _pad_id(folder: Path) -> int:
    """Return the id of the pad token by the tokenizer's own files."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = folder / "special_tokens_map.json"
    token = config.get("pad_token") or (json.loads(special.read_text()).get("pad_token") if special.is_file() else None)
    if isinstance(token, dict):
        token = token["content"]
    for number, entry in config.get("added_tokens_decoder", {}).items():
        if entry["content"] == token:
            return int(number)
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    if token not in vocabulary:
        raise CheckpointError(
            f"The pad token {token!r} of {folder} is not in its vocabulary.",
            code="checkpoint-tokenizer",
            remedy="Use the checkpoint's complete tokenizer folder.",
        )
    return vocabulary[token]


def _read(path: Path, width: int) -> Tensor:
    try:
        embeds = load_file(path)[TENSOR_NAME].to(torch.float32)
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds no tensor {TENSOR_NAME!r}: {error}.",
            code="checkpoint-unreadable",
            remedy="Delete the file; it is computed again from text_encoder/ and tokenizer/.",
        ) from error
    if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
        raise _wrong_width(path, embeds, width)
    return embeds


def _cache_folder() -> Path:
    return cache_folder() / "prompt_embeds"


def _identity(folder: Path) -> str:
    """Return a hash of all that the embedding depends on, so that one cache serves any number of checkpoints."""
    digest = hashlib.sha256()
    for part in ("tokenizer", "text_encoder"):
        for path in sorted((folder / part).glob("*")):
            digest.update(f"{part}/{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _incomplete(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {folder} has neither {PROMPT} nor {name}.",
        code="checkpoint-incomplete",
        remedy=f"Download the whole checkpoint (text files too), or copy a {PROMPT} into it.",
    )


def _wrong_width(path: Path, embeds: Tensor, width: int) -> CheckpointError:
    return CheckpointError(
        f"The prompt embedding of {path} has shape {tuple(embeds.shape)}; (1, tokens, {width}) is needed.",
        code="checkpoint-shape",
        remedy="Use the text encoder and the networks of one checkpoint.",
    )
