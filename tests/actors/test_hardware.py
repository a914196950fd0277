"""Number formats to try, by what the hardware is fast in."""

from __future__ import annotations

import pytest
import torch

from actors.hardware import choose_formats

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "formats"), [((9, 0), (BF16, FP16, FP32)), ((8, 0), (BF16, FP16, FP32)), ((7, 5), (FP32,))]
)
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], formats: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_formats("auto", "cuda:0", "graph") == formats
    assert choose_formats("fp16", "cuda:0", "graph") == (FP16,)


@pytest.mark.parametrize(
    ("flags", "backend", "formats"),
    [
        ({"amx_bf16", "avx512_bf16"}, "eager", (BF16, FP32)),
        ({"avx512_bf16"}, "openvino", (BF16, FP32)),
        ({"avx512_bf16"}, "eager", (FP32,)),
        ({"bf16"}, "eager", (BF16, FP32)),
        ({"avx2"}, "openvino", (FP32,)),
    ],
)
def test_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], backend: str, formats: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr("pipeline.backends.processor_flags", lambda: frozenset(flags))
    assert choose_formats("auto", "cpu", backend) == formats
    assert choose_formats("int8", "cpu", backend) == (torch.int8,)


def test_elsewhere_and_what_was_asked_for() -> None:
    assert choose_formats("auto", "mps") == (FP32,)
    assert choose_formats("bf16", "cpu") == (BF16,)
