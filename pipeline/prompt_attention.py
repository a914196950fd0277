"""Attention to the prompt, which never changes: its keys and values are computed once per model instead of every step.

Knows: which attention layers look at the prompt and nothing else that would change its keys. Does not know: the prompt.

Shapes: B batch, L places of the picture, T tokens, C width, N heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class PromptAttention:
    """Takes the place of diffusers' processor in one attention layer; the numbers are equal.

    What it is given as ``encoder_hidden_states`` must be the same for every call and every stream.
    """

    def __init__(self) -> None:
        self._keys: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Return the layer's output (B,L,C) for ``hidden_states`` (B,L,C), looking at the prompt (B,T,D)."""
        batch = hidden_states.shape[0]
        key, value = self._key_and_value(attn, encoder_hidden_states)
        query = _heads(attn.to_q(hidden_states), attn.heads)
        shape = (batch, *(-1 for _ in range(3)))
        seen = F.scaled_dot_product_attention(query, key.expand(shape), value.expand(shape))
        return attn.to_out[1](attn.to_out[0](seen.transpose(1, 2).flatten(2)))

    def forget(self) -> None:
        """Compute keys and values anew: weights or prompt were moved or cast."""
        self._keys.clear()

    def _key_and_value(self, attn: Attention, prompt_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (1,N,T,C/N) of the first row, which all others equal."""
        at = (prompt_BTD.device, prompt_BTD.dtype)
        if at not in self._keys:
            one = prompt_BTD[:1]
            self._keys[at] = (_heads(attn.to_k(one), attn.heads), _heads(attn.to_v(one), attn.heads))
        return self._keys[at]


def attend_to_constant_prompt(networks: Iterable[nn.Module]) -> list[PromptAttention]:
    """Give every attention layer of `networks` that looks at the prompt a processor that remembers its keys."""
    processors = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, Attention) and module.is_cross_attention and _is_plain(module):
                processors.append(PromptAttention())
                module.set_processor(processors[-1])
    return processors


def _is_plain(attn: Attention) -> bool:
    """Whether keys depend on the prompt alone and nothing happens to the output but the projection."""
    additions = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k)
    changed = attn.norm_cross or attn.residual_connection or attn.rescale_output_factor != 1
    return all(one is None for one in additions) and not changed


def _heads(x_BTC: Tensor, heads: int) -> Tensor:
    return x_BTC.unflatten(2, (heads, -1)).transpose(1, 2)
