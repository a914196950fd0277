"""Draws the plots of `docs/speed.md` from the records in `benchmarks/`: `python docs/speed_plots.py`.

Needs matplotlib (the extra `train`). What others published is listed below with where it stands; it was not measured
here, and is drawn hollow.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks"
PICTURES = ROOT / "docs" / "pictures"
COLOURS: Final = {
    "decode": "#b8c4d0", "flow": "#e07b39", "warp": "#f2b872", "unet": "#1f5f8b", "artg": "#4f9bc4", "tpm": "#7bb662",
    "decoder": "#3f7d3a", "other": "#8a8a8a", "encode": "#d5d5d5", "model": "#1f5f8b",
}  # fmt: skip
NAMES: Final = {"unet": "U-Net", "artg": "ARTG", "tpm": "encoder features (TPM)"}
NAMES_IN_TABLES: Final = {"U-Net": "unet", "ARTG": "artg", "TPM": "tpm"}


class Published(NamedTuple):
    """Seconds per frame and the wait for the first frame, in seconds, at 1280x720, as its authors or others state."""

    name: str
    frame_s: float
    wait_s: float
    causal: bool


# arXiv 2512.23709 v2, tables 2 and 4: REDS4, clips of 100 frames. Timings include the flow.
PUBLISHED_4090: Final = (
    Published("Stream-DiffVSR, TensorRT", 0.328, 0.328, True),
    Published("StableVSR", 46.2, 4620, False),
    Published("MGLD-VSR", 43.6, 218, False),
    Published("BasicVSR++, RealViformer", 0.098, 9.8, False),
    Published("RealBasicVSR", 0.064, 6.4, False),
    Published("RVRT", 0.498, 2.49, False),
    Published("TMP", 0.041, 0.041, True),
    Published("", 0.099, 9.9, False),
)
PUBLISHED_PRO_6000: Final = (
    Published("Stream-DiffVSR", 0.243, 0.243, True),
    Published("FlashVSR", 0.283, 1.698, False),
    Published("FlashVSR-tiny", 0.157, 0.942, False),
    Published("SeedVR2", 0.479, 47.84, False),
    Published("DOVE", 0.760, 75.983, False),
)


def speed_records() -> list[dict[str, Any]]:
    """Return all results in `benchmarks/speed-*.json`, oldest record first."""
    paths = sorted(RECORDS.glob("speed-*.json"))
    return [result for path in paths for result in json.loads(path.read_text())["results"]]


def latest_alone(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest result of each model, hardware, size, number of steps and backend for one stream."""
    keys = ("model", "hardware", "size", "steps", "dtype", "backend")
    newest = {tuple(each[key] for key in keys): each for each in results if each["batch"] == 1}
    return list(newest.values())


def earlier_tables() -> list[dict[str, Any]]:
    """Return rows of the newest Markdown record without JSON, of when `upriver bench` wrote none.

    The first of them is left out: the machine was busy, says that record.
    """
    path = [path for path in sorted(RECORDS.glob("speed-*.md")) if not path.with_suffix(".json").exists()][-1]
    tables = [line.strip("| \n").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    names = [NAMES_IN_TABLES.get(name.strip(), name.strip()) for name in tables[0]]
    rows = [dict(zip(names, row, strict=True)) for row in tables[2:] if "again" not in row[0]]
    found = []
    for row in rows:
        dtype, steps = row["dtype, steps"].split(", ")
        times = {stage: float(row[stage]) for stage in COLOURS if stage in row and stage not in ("decode", "encode")}
        found.append({
            "model": "tiny", "size": "640x480", "steps": int(steps), "dtype": dtype, "stages_ms": times,
            "backend": "eager", "hardware": "2 cores", "batch": 1, "device": "cpu",
        })  # fmt: skip
    return found


def counted() -> list[tuple[str, dict[str, float]]]:
    """Return the TFLOP of a step by stage: the full model at 1280x720, and `tiny` at 640x480; counted, not timed."""
    import torch

    from jobs.bench_model import random_model
    from jobs.bench_stages import flops_by_stage

    found = []
    for name, words, height, width in (
        ("published", "full model, 1280x720", 180, 320),
        ("tiny", "tiny, 640x480", 120, 160),
    ):
        pipe = random_model(name, device="meta", dtype=torch.bfloat16, flow="zero")
        flops = {stage: count / 1e12 for stage, count in flops_by_stage(pipe, height, width).items()}
        order = {stage: flops[stage] for stage in COLOURS if stage in flops}
        found.append((f"{words}, 4 steps\nFLOPs: {sum(order.values()):.3g} TFLOP", order))
    return found


def stages(results: Sequence[dict[str, Any]]) -> None:
    """One bar per result, shares of the step's time; then the shares of FLOPs."""
    bars = []
    for each in results:
        output, times = each["size"].split()[-1], each["stages_ms"]
        words = f"{each['model']}, {output}, {each['steps']} step{'s' * (each['steps'] > 1)}"
        bars.append((f"{words}\n{each['dtype']}, {each['hardware']}: {sum(times.values()):.0f} ms", times))
    bars += counted()
    figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.52 * len(bars)), layout="constrained")
    seen = {}
    for number, (_, values) in enumerate(bars):
        start, whole = 0.0, sum(values.values())
        for stage, value in values.items():
            share = 100 * value / whole
            bar = axes.barh(-number, share, left=start, height=0.74, color=COLOURS[stage], edgecolor="white")
            seen.setdefault(stage, bar)
            if share >= 6:
                light = stage in ("flow", "warp", "tpm", "other", "artg", "decode", "encode")
                axes.text(start + share / 2, -number, f"{share:.0f} %", ha="center", va="center", fontsize=8,
                          color="black" if light else "white")  # fmt: skip
            start += share
    axes.set_yticks([-number for number in range(len(bars))], [label for label, _ in bars], fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a step, %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    known = [stage for stage in COLOURS if stage in seen]
    figure.legend(
        [seen[stage] for stage in known], [NAMES.get(stage, stage) for stage in known],
        loc="outside upper center", ncols=len(known), frameon=False, fontsize=8,
    )  # fmt: skip
    save(figure, "speed_stages")


def quality(records: dict[str, Path]) -> None:
    """Time per frame against perceptual distance, by model and number of steps; bicubic as a line."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    slowest = 0.0
    for number, (model, record) in enumerate(records.items()):
        told = json.loads(record.read_text())
        points: dict[str, list[tuple[float, float]]] = {}
        for clip in told["clips"]:
            for method, scores in clip["scores"]["bicubic x4"].items():
                points.setdefault(method, []).append((scores["seconds_per_frame"], scores["stlpips"]))
        if not number:
            bicubic = statistics.fmean(distance for _, distance in points["bicubic"])
            axes.axhline(bicubic, color="#8a8a8a", linestyle="--", linewidth=1)
            axes.text(0.02, bicubic, "bicubic", transform=axes.get_yaxis_transform(), va="bottom", color="#555555",
                      fontsize=9)  # fmt: skip
            axes.set_ylim(0, 1.12 * bicubic)
            axes.set_title(f"mean of {len(told['clips'])} held-out clips, {told['machine']['cores']} CPU cores, "
                           f"{told['dtype']} by torch, {told['date'][:10]}", fontsize=9)  # fmt: skip
        means = [
            tuple(statistics.fmean(values) for values in zip(*points[method], strict=True))
            for method in ("4 steps", "2 steps", "1 step")
        ]
        colour, above = ("#1f5f8b", "#c0392b")[number], number == 0
        axes.plot([1000 * s for s, _ in means], [d for _, d in means], "o-", color=colour, markersize=7, label=model)
        for steps, (seconds, distance) in zip((4, 2, 1), means, strict=True):
            axes.annotate(str(steps), (1000 * seconds, distance), xytext=(0, 9 if above else -16), color=colour,
                          textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
            slowest = max(slowest, seconds)
    axes.set_xlim(0, 1100 * slowest)
    axes.set_xlabel("milliseconds per frame; numbers are steps")
    axes.set_ylabel("ST-LPIPS to the original (lower is better)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "speed_quality")


def newest_quality() -> dict[str, Path]:
    """Return the newest quality record of each built-in model, the default first."""
    found: dict[str, Path] = {}
    for path in sorted(RECORDS.glob("quality-*.json"), key=lambda path: json.loads(path.read_text())["date"]):
        model = json.loads(path.read_text())["model"]["source"]
        if model in ("tiny", "small"):
            found[model] = path
    return dict(sorted(found.items(), reverse=True))


def peers(results: Sequence[dict[str, Any]]) -> None:
    """Frames per second against the wait for the first frame at 1280x720; measured here: filled."""
    figure, all_axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharex=True, sharey=True, layout="constrained")
    for axes, hardware, rows in zip(
        all_axes, ("RTX 4090", "RTX Pro 6000"), (PUBLISHED_4090, PUBLISHED_PRO_6000), strict=True
    ):
        for row in rows:
            ours = row.name.startswith("Stream-DiffVSR")
            colour = "#c0392b" if ours else "#1f5f8b" if row.causal else "#8a8a8a"
            axes.plot(1 / row.frame_s, row.wait_s, "o", markerfacecolor="none", color=colour, markersize=8)
            axes.annotate(
                row.name, (1 / row.frame_s, row.wait_s), xytext=(8, 4), textcoords="offset points", fontsize=8
            )
        axes.set_title(f"as published, {hardware}, 1280x720, 100 frames", fontsize=9)
    here = [each for each in results if each["size"].endswith("1280x720") and each["device"].startswith("cuda")]
    for each in here:
        all_axes[1].plot(each["model_fps"], each["first_frame_warm_ms"] / 1000, "o", color="#c0392b", markersize=8)
        all_axes[1].annotate(f"Upriver {each['model']}, {each['hardware']}, measured",
                             (each["model_fps"], each["first_frame_warm_ms"] / 1000), xytext=(7, -10),
                             textcoords="offset points", fontsize=8)  # fmt: skip
    for axes in all_axes:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.01, 400)
        axes.set_xlabel("frames per second")
        axes.grid(which="major", color="#e8e8e8")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("longest wait for a frame, s")
    save(figure, "speed_peers")


def save(figure: Any, name: str) -> None:
    """Write the picture and say so."""
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    plt.rcParams["font.family"] = "DejaVu Sans"
    found = latest_alone(speed_records())
    stages(found or earlier_tables())
    quality(newest_quality())
    peers(found)
