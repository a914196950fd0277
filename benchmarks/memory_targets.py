"""Memory that a model of the published size needs on a GPU, by estimate: `python -m benchmarks.memory_targets`.

Nothing is computed: the engine runs on tensors that have sizes but no data (`pipeline.memory`). Prints Markdown. RAFT
needs torchvision.
"""

from __future__ import annotations

import torch

from jobs.bench_model import random_model
from pipeline.errors import FlowError, MemoryLimitError
from pipeline.flow import FlowSize, make_flow
from pipeline.memory import estimate, fits

SIZES = {"1280x720": (180, 320), "1920x1080": (270, 480)}
LIMITS_GB = {"1280x720": 8, "1920x1080": 12}
FLOWS: tuple[tuple[str, FlowSize | None, str], ...] = (
    ("dis", None, "DIS, at input size"),
    ("raft", "input", "RAFT, at input size"),
    ("raft", "output", "RAFT, at output size (published)"),
)
BATCHES = (1, 4)


def main() -> None:
    """Print the table."""
    pipe = random_model("published", device="meta", dtype=torch.bfloat16, flow="zero")
    print("| output | flow | streams | weights GB | step GB | together GB | limit GB | within it |")
    print("|---|---|---|---|---|---|---|---|")
    for output, (height, width) in SIZES.items():
        for name, size, words in FLOWS:
            try:
                pipe.flow = make_flow(name, size=size)
            except FlowError as error:
                print(f"| {output} | {words} | not estimated: {error} |")
                continue
            for batch in BATCHES:
                found = estimate(pipe, height, width, batch=batch)
                try:
                    plan = fits(pipe, LIMITS_GB[output] * 10**9, height, width, batch=batch)
                    parts = {"decoder": plan.decoder, "U-Net": plan.unet, "flow": plan.flow}
                    tiles = [f"{part} in tiles of {side}" for part, side in parts.items() if side is not None]
                    within = ", ".join(tiles) or "whole"
                except MemoryLimitError:
                    within = "no"
                numbers = (found.weights / 1e9, found.step / 1e9, found.total / 1e9)
                told = " | ".join(f"{number:.2f}" for number in numbers)
                print(f"| {output} | {words} | {batch} | {told} | {LIMITS_GB[output]} | {within} |")


if __name__ == "__main__":
    main()
