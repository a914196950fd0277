"""Attention to the constant prompt: the same numbers as diffusers' own processor, and keys computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from pipeline import StreamDiffVSRPipeline
from pipeline.prompt_attention import PromptAttention, attend_to_constant_prompt


@pytest.fixture
def attending(parity_folder: Path) -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="zero")


def layers(pipe: StreamDiffVSRPipeline) -> list[Attention]:
    return [m for net in (pipe.unet, pipe.controlnet) for m in net.modules() if isinstance(m, Attention)]


def restore(pipe: StreamDiffVSRPipeline) -> torch.Tensor:
    torch.manual_seed(0)
    states = [pipe.start(seed=seed) for seed in range(2)]
    frames = torch.rand(2, 3, 16, 24) * 2 - 1
    pipe.step(frames, states)
    return pipe.step(frames.roll(1, 3), states)


def test_no_bit_changes(attending: StreamDiffVSRPipeline) -> None:
    found = restore(attending)
    replaced = [layer for layer in layers(attending) if isinstance(layer.processor, PromptAttention)]
    assert replaced and all(layer.is_cross_attention for layer in replaced)
    assert any(not isinstance(layer.processor, PromptAttention) for layer in layers(attending))  # self-attention
    for layer in replaced:
        layer.set_processor(AttnProcessor2_0())
    assert torch.equal(restore(attending), found)


def test_keys_are_computed_once_and_again_after_a_cast(attending: StreamDiffVSRPipeline) -> None:
    layer = next(one for one in layers(attending) if isinstance(one.processor, PromptAttention))
    calls: list[int] = []
    layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    restore(attending)
    restore(attending)
    assert len(calls) == 1
    attending.to(torch.bfloat16)
    restore(attending)
    assert len(calls) == 2


def test_layers_that_do_more_keep_their_processor() -> None:
    plain = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    scaled = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, rescale_output_factor=2.0)
    itself = Attention(8, heads=2, dim_head=4)
    normed = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, qk_norm="layer_norm")
    attend_to_constant_prompt([torch.nn.ModuleList([plain, scaled, itself, normed])])
    kinds = [isinstance(one.processor, PromptAttention) for one in (plain, scaled, itself, normed)]
    assert kinds == [True, False, False, False]
