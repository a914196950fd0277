"""Which products a frame is made of, and on a CUDA device how fast each is in FP8 against bf16.

    python -m benchmarks.fp8_products                      # shares of FLOPs, on any machine
    python -m benchmarks.fp8_products --device cuda        # and times: is FP8 worth it here?

For every shape among the convolutions and linear layers of U-Net and ARTG (published size, 1280x720): the product in
bf16, as the engine has it (cuDNN's convolution for 3x3, a matrix product for the rest), against torch._scaled_mm on
e4m3 with a scale for each row and column. torch has no FP8 convolution: a 3x3 one is a product of its windows, which
have to be laid out in memory first ("lay out"). "round" finds the largest input and rounds. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench_model import random_model
from jobs.bench_stages import flops_by_stage
from pipeline import StreamDiffVSRPipeline
from pipeline.memory import without_data
from pipeline.state import StreamState

REPEATS: Final = 20
_LARGEST: Final = 448.0


@dataclass(frozen=True, slots=True)
class Product:
    """One shape of layer; `height` and `width` are those of its output, 1 and the number of tokens for a linear one."""

    kind: str
    height: int
    width: int
    inputs: int
    outputs: int
    stride: int

    @property
    def taps(self) -> int:
        """Places of the input that an output looks at."""
        return 9 if self.kind == "conv 3x3" else 1

    @property
    def flops(self) -> int:
        """Of one call for one stream; a multiplication with its addition counts as two."""
        return 2 * self.height * self.width * self.inputs * self.taps * self.outputs


def products_of(pipe: StreamDiffVSRPipeline, height: int, width: int) -> dict[Product, int]:
    """Return how often a frame with a past calls each shape, in U-Net and ARTG; `height`, `width` of the input."""
    twin = without_data(pipe)
    calls: dict[Product, int] = defaultdict(int)

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            tokens = output.numel() // layer.out_features
            calls[Product("linear", 1, tokens, layer.in_features, layer.out_features, 1)] += 1
        elif isinstance(layer, nn.Conv2d):
            kind = f"conv {layer.kernel_size[0]}x{layer.kernel_size[1]}"
            sides = (int(output.shape[2]), int(output.shape[3]))
            calls[Product(kind, *sides, layer.in_channels, layer.out_channels, layer.stride[0])] += 1

    for network in (twin.unet, twin.controlnet):
        for layer in network.modules():
            layer.register_forward_hook(count)
    with torch.device("meta"):
        state = StreamState(model_sha256=twin.model_sha256)
        state.advance(torch.empty(3, 4 * height, 4 * width, dtype=twin.unet.dtype), torch.empty(3, height, width))
        noise = torch.empty(1, twin.vae.config.latent_channels, height, width)
        twin.step(torch.empty(1, 3, height, width), [state], noise)
    return dict(calls)


def print_shares(pipe: StreamDiffVSRPipeline, calls: dict[Product, int], height: int, width: int) -> None:
    """Print the FLOPs of a frame by kind of layer."""
    whole = sum(flops_by_stage(pipe, height, width).values())
    by_kind: dict[str, int] = defaultdict(int)
    for product, number in calls.items():
        by_kind[f"U-Net and ARTG, {product.kind}"] += number * product.flops
    by_kind["attention, autoencoder"] = whole - sum(by_kind.values())
    print("| layers | TFLOP a frame | share |\n|---|---|---|")
    for kind, flops in sorted(by_kind.items(), key=lambda entry: -entry[1]):
        print(f"| {kind} | {flops / 1e12:.3f} | {flops / whole:.3f} |")


def rounded_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in e4m3, and what to multiply each with (M,1), fp32."""
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).to(torch.float32).clamp(min=1e-12) / _LARGEST
    return (x_MK / scale_M1).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale_M1


def windows(x_BHWC: Tensor, stride: int) -> Tensor:
    """Return the 3x3 windows (BHW,9C) of a picture in any number format, zeros outside."""
    batch, height, width, channels = x_BHWC.shape
    padded = x_BHWC.new_zeros(batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x_BHWC
    views = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # (B,H,W,C,3,3)
    return views.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)


def rounded_product(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Return (M,N) in bf16 of rounded rows (M,K) and the rounded rows (N,K) of a weight."""
    return torch._scaled_mm(
        rows[0], columns[0].t(), scale_a=rows[1], scale_b=columns[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def measure(product: Product, device: torch.device) -> tuple[float, float, float, float]:
    """Return milliseconds in bf16, and in FP8 of the product, of rounding and of laying out."""
    weight_NK = torch.randn(product.outputs, product.taps * product.inputs, device=device, dtype=torch.bfloat16)
    columns = rounded_rows(weight_NK)
    sides = (product.height * product.stride, product.width * product.stride)
    picture_BHWC = torch.randn(1, *sides, product.inputs, device=device, dtype=torch.bfloat16)
    flat_MK = picture_BHWC.reshape(-1, product.inputs)
    held = picture_BHWC.to(torch.float8_e4m3fn)
    lay_out_ms = 0.0
    if product.kind == "conv 3x3":
        kernel = weight_NK.reshape(product.outputs, 3, 3, product.inputs).permute(0, 3, 1, 2)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        x_BCHW = picture_BHWC.permute(0, 3, 1, 2)
        bf16_ms = timed(lambda: F.conv2d(x_BCHW, kernel, stride=product.stride, padding=1), device)
        as_bytes = held.view(torch.uint8)
        lay_out_ms = timed(lambda: windows(as_bytes, product.stride), device)
        rows_MK = windows(as_bytes, product.stride).view(torch.float8_e4m3fn)
    else:
        bf16_ms = timed(lambda: flat_MK @ weight_NK.t(), device)
        rows_MK = held.reshape(-1, product.inputs)
    rows = (rows_MK, torch.ones(len(rows_MK), 1, device=device))
    fp8_ms = timed(lambda: rounded_product(rows, columns), device)
    return bf16_ms, fp8_ms, timed(lambda: rounded_rows(flat_MK), device), lay_out_ms


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of `work`."""
    for _ in range(3):
        work()
    spent = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


def print_times(calls: dict[Product, int], device: torch.device) -> None:
    """Print the time of each shape, times its calls in a frame, and the sums: all, and with bf16 where it is faster."""
    print("| layer | calls | GFLOP | bf16, ms a frame | FP8: product | round | lay out | times as fast |")
    print("|---|---|---|---|---|---|---|---|")
    sums = [0.0, 0.0, 0.0]
    for product, number in sorted(calls.items(), key=lambda entry: -entry[0].flops * entry[1]):
        if product.inputs % 16 or product.outputs % 16:
            continue  # torch._scaled_mm takes multiples of 16; few FLOPs are in others
        bf16, *parts = (number * ms for ms in measure(product, device))
        fp8 = sum(parts)
        sums = [sums[0] + bf16, sums[1] + fp8, sums[2] + min(bf16, fp8)]
        name = f"{product.kind}, {product.inputs} to {product.outputs}, {product.height}x{product.width}"
        cells = " | ".join(f"{ms:.3f}" for ms in (bf16, *parts))
        print(f"| {name} | {number} | {product.flops / 1e9:.2f} | {cells} | {bf16 / fp8:.2f} |", flush=True)
    print(f"\nbf16 {sums[0]:.2f} ms, FP8 {sums[1]:.2f} ms, the faster of both for each shape {sums[2]:.2f} ms")


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="measure on it: cuda; not given: count only")
    parser.add_argument("--size", default="320x180", help="of the input")
    parser.add_argument("--model", default="published", choices=("published", "small", "tiny"))
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    pipe = random_model(options.model, device="meta", dtype=torch.bfloat16, flow="zero")
    calls = products_of(pipe, height, width)
    print(f"random:{options.model}, {options.size}, 4 steps, torch {torch.__version__}\n")
    print_shares(pipe, calls, height, width)
    if options.device:
        print(f"\n{options.device}, median of {REPEATS}\n")
        with torch.no_grad():
            print_times(calls, torch.device(options.device))


if __name__ == "__main__":
    main()
