"""Runs a checkout of the published code on given weights, frames, noise and flow network, and writes down its times.

A script for another interpreter, started by `jobs.bench_against` as ``python -I bench_published.py REQUEST.json``:
there torch, torchvision, transformers and the diffusers that the published code was written for are installed, and
nothing of this project. It imports the modules of the checkout and calls what its own ``inference.py`` calls, with its
settings: fp32, TF32 allowed, xformers where it is installed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
import types
from typing import Any

WARM_UP_FRAMES = 3


def main(path: str) -> None:
    """Do what the request asks for; the answer goes to the file that it names."""
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    import numpy as np
    import torch
    from PIL import Image

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    began = time.perf_counter()
    pipeline = load_pipeline(request["checkout"], request["model"]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    attention = choose_attention(pipeline)
    flow = load_flow(request["raft"], device)
    wait(device)
    load_s = time.perf_counter() - began

    frames = [Image.fromarray(frame) for frame in np.load(request["frames"])]
    prompt_embeds = torch.from_numpy(np.load(request["prompt"])).to(device)

    def restore(clip: list[Any]) -> list[Any]:
        output = pipeline(
            None,
            clip,
            prompt_embeds=prompt_embeds,
            num_inference_steps=request["steps"],
            guidance_scale=0,
            generator=torch.Generator("cpu").manual_seed(request["noise_seed"]),
            of_model=flow,
        )
        return [frame[0] for frame in output.images]

    restore(list(frames[:WARM_UP_FRAMES]))
    wait(device)
    began = time.perf_counter()
    restored = restore(list(frames))
    wait(device)
    total_s = time.perf_counter() - began

    np.save(request["restored"], np.stack([np.asarray(frame) for frame in restored[: request["kept"]]]))
    import diffusers

    answer = {
        "load_s": load_s,
        "total_s": total_s,
        "frames": len(restored),
        "attention": attention,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else None,
    }
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(answer, file)


def load_pipeline(checkout: str, model: str) -> Any:
    """Return the checkout's pipeline with the networks of a folder, as its ``inference.py`` puts it together."""
    import_from(checkout)
    theirs = importlib.import_module("pipeline.stream_diffvsr_pipeline")
    autoencoder = importlib.import_module("temporal_autoencoder.autoencoder_tiny").TemporalAutoencoderTiny
    from diffusers import DDIMScheduler

    return theirs.StreamDiffVSRPipeline(
        vae=autoencoder.from_pretrained(os.path.join(model, "vae")),
        text_encoder=None,  # the embedding of the empty prompt is given
        tokenizer=None,
        unet=theirs.UNet2DConditionModel.from_pretrained(os.path.join(model, "unet")),
        controlnet=theirs.ControlNetModel.from_pretrained(os.path.join(model, "controlnet")),
        scheduler=DDIMScheduler.from_pretrained(os.path.join(model, "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def import_from(checkout: str) -> None:
    """Let the checkout's folders be found before packages of the same names, though they have no ``__init__.py``."""
    sys.path.insert(0, checkout)
    for name in ("pipeline", "scheduler", "temporal_autoencoder", "util"):
        folder = os.path.join(checkout, name)
        if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "__init__.py")):
            package = types.ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package


def choose_attention(pipeline: Any) -> str:
    """Turn xformers on as ``inference.py`` does, if it is installed; returns what attention is computed by."""
    try:
        importlib.import_module("xformers")
    except ImportError:
        return "scaled dot product attention of torch (xformers is not installed)"
    pipeline.enable_xformers_memory_efficient_attention()
    return "xformers"


def load_flow(weights: str | None, device: Any) -> Any:
    """Return torchvision's RAFT-large with the weights of a safetensors file; without one, no motion."""
    if weights is None:
        return no_motion
    from safetensors.torch import load_file
    from torchvision.models.optical_flow import raft_large

    model = raft_large(weights=None)
    model.load_state_dict(load_file(weights))
    return model.to(device).eval().requires_grad_(False)


def no_motion(current: Any, previous: Any) -> list[Any]:
    """Return what RAFT returns, all zero: (B,2,H,W), as the last of a list."""
    return [current.new_zeros((current.shape[0], 2, *current.shape[2:]))]


def wait(device: Any) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
