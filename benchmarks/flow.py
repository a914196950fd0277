"""Estimators of flow against each other: time, memory, error on known flow, and what it does to the model's output.

    python -m benchmarks.flow [--spynet FILE] [--all] [--parts known clips] [--only net dis] > OUT.md

1. Cost: milliseconds of a processor for one pair (least of three, estimators taking turns, one thread: on an idle
   machine that is the time it takes) and the memory by which a call makes the process grow at its peak. RAFT has random
   weights here: its cost does not depend on them, and its errors are left out; it is called once. At output size it is
   measured up to 320x180, and its memory at 480x270 counted instead, unless `--all` is given.
2. Known flow: simulated cameras (`pipeline.motion`) over frames of the held-out clips, half of them with something
   moving in front; degraded to input size; endpoint error in output pixels.
3. Held-out clips: how well the true previous frame, warped, predicts the true current one; and the built-in model's
   output when it is guided by that flow.

`--spynet FILE`: a safetensors file with the SpyNet of a BasicVSR, see `flow_candidates.SpyNet`.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flow_candidates import CodecMotion, OtherDIS, SpyNet, random_raft
from jobs.assets import fetch
from jobs.evaluation_report import describe_machine
from jobs.heldout import HELDOUT, read
from pipeline import StreamDiffVSRPipeline
from pipeline.degrade import BICUBIC, Degradation, degrade
from pipeline.flow import DISFlow, NetFlow, RAFTFlow, ZeroFlow
from pipeline.flow_clips import blobs
from pipeline.guidance import flow_warp
from pipeline.judge import ClipJudge
from pipeline.memory import allocated_by
from pipeline.motion import Camera, draw_camera, flow_of, render
from pipeline.perceptual import STLPIPS
from pipeline.video import VideoReader

Estimate = Callable[[Tensor, Tensor], Tensor]

SIZES = ((120, 160), (180, 320), (270, 480))
SIDE = 512  # of simulated clips, output pixels
SPEEDS = (3.0, 10.0, 30.0)  # of cameras, output pixels a frame at most
DEGRADATIONS = {"bicubic": BICUBIC, "H.264": Degradation(h264_crf=28)}
SLOW = "raft"  # estimators whose name begins so are called once
BORDER = 16  # output pixels left out of the warped error: what enters the picture cannot be predicted


@dataclass
class Row:
    """What is known of one estimator; a figure that is missing was not measured."""

    ms: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    counted: float | None = None
    errors: dict[str, list[float]] = field(default_factory=dict)
    far: list[float] = field(default_factory=list)
    warped: list[float] = field(default_factory=list)
    output: list[tuple[float, float, float]] = field(default_factory=list)


def estimators(spynet: str | None) -> dict[str, Estimate]:
    """Return the estimators that have weights, by the name of their row."""
    found: dict[str, Estimate] = {
        "zero": ZeroFlow(),
        "dis": DISFlow(),
        "dis, preset fast": OtherDIS("fast"),
        "dis, preset ultrafast": OtherDIS("ultrafast"),
        "dis at output size": DISFlow("output"),
        "dis, previous flow as start": OtherDIS(warm=True),
        "net": NetFlow(),
        CodecMotion.name: CodecMotion(),
    }
    if spynet:
        found["SpyNet (yardstick)"] = SpyNet(spynet)
    return found


def moved_pair(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a pair (1,3,h,w) in [-1, 1] of a held-out frame that moved by three pixels and one."""
    clip = read(HELDOUT[0], 2).truth_T3HW[:1]
    whole = F.interpolate(clip, size=(height + 8, width + 8), mode="bicubic").clamp(0, 1) * 2 - 1
    return whole[:, :, 3 : height + 3, 4 : width + 4].contiguous(), whole[
        :, :, 2 : height + 2, 1 : width + 1
    ].contiguous()


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return by how much the process grows while it does `work`, in MiB, and the milliseconds that it takes."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not at hand again
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.process_time()
    work()
    ms = (time.process_time() - began) * 1000
    return (_resident("VmHWM") - before) / 1024, ms


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_costs(rows: dict[str, Row], known: dict[str, Estimate], rafts: dict[str, RAFTFlow], whole: bool) -> None:
    """Fill in milliseconds and memory at every size."""
    for height, width in SIZES:
        current, previous = moved_pair(height, width)
        size = f"{width}x{height}"
        spent: dict[str, list[float]] = {}
        together = {
            name: estimate
            for name, estimate in {**known, **rafts}.items()
            if whole or (height, width) != SIZES[-1] or not (name.startswith(SLOW) and "input" not in name)
        }
        for turn in range(4):
            for name, estimate in together.items():
                work = _work(estimate, current, previous)
                if turn == 0:
                    rows[name].mib[size], ms = measured(work)
                    if name.startswith(SLOW):
                        spent[name] = [ms]
                elif not name.startswith(SLOW):
                    began = time.process_time()
                    work()
                    spent.setdefault(name, []).append((time.process_time() - began) * 1000)
        for name, times in spent.items():
            rows[name].ms[size] = min(times)
        for name in rafts.keys() - together.keys():
            rows[name].counted = counted_mib(rafts[name], height, width)


def counted_mib(raft: RAFTFlow, height: int, width: int) -> float:
    """Return what RAFT's tensors would take, without computing them."""
    frame = torch.empty(1, 3, height, width, device="meta")
    return allocated_by(lambda: raft.without_data()(frame, frame)) / 2**20


def _work(estimate: Estimate, current: Tensor, previous: Tensor) -> Callable[[], object]:
    if isinstance(estimate, CodecMotion):  # the encoder's work is not the estimator's
        written = estimate.written(current, previous)
        return lambda: estimate.read(written, *current.shape[-2:])
    return lambda: estimate(current, previous)


def sources() -> list[Tensor]:
    """Return one frame (3,H,W) of every held-out clip, as it is in the file."""
    pictures = []
    for path in sorted(fetch(["heldout"])):
        with VideoReader(path) as reader:
            frame = next(iter(reader)).rgb_HWC
        pictures.append(torch.from_numpy(frame).permute(2, 0, 1).float() / 255)
    return pictures


def simulated_clips(seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return clips of three frames (3,3,S,S) in [0, 1] with their flow (2,2,S,S) in output pixels."""
    rng = np.random.default_rng(seed)
    clips = []
    pictures = sources()
    for number, picture in enumerate(pictures):
        for speed in SPEEDS:
            camera = _camera(rng, picture, speed)
            clip, flow = render(picture, camera, SIDE), flow_of(camera, SIDE)
            if (number + SPEEDS.index(speed)) % 2:
                front = pictures[(number + 3) % len(pictures)]
                second = _camera(rng, front, speed)
                mask = render(blobs(rng, front.shape[1:]), second, SIDE)
                clip = torch.lerp(clip, render(front, second, SIDE), mask)
                flow = torch.where(mask[1:] > 0.5, flow_of(second, SIDE), flow)
            clips.append((clip.clamp(0, 1), flow))
    return clips


def _camera(rng: np.random.Generator, picture_3HW: Tensor, speed: float) -> Camera:
    return draw_camera(rng, 3, (picture_3HW.shape[2] / 2, picture_3HW.shape[1] / 2), speed, 0.01)


def measure_known_flow(rows: dict[str, Row], known: dict[str, Estimate]) -> None:
    """Fill in endpoint errors."""
    for clip, flow in simulated_clips():
        for label, how in DEGRADATIONS.items():
            lr = degrade(clip, how) * 2 - 1
            for name, estimate in known.items():
                _forget(estimate)
                for k in (1, 2):
                    error = (estimate(lr[k : k + 1], lr[k - 1 : k]) - flow[k - 1 : k]).square().sum(dim=1).sqrt()
                    rows[name].errors.setdefault(label, []).append(float(error.mean()))
                    if label == "bicubic":
                        rows[name].far.append(float((error > 4).float().mean()) * 100)


def measure_clips(rows: dict[str, Row], known: dict[str, Estimate], names: list[str], frames: int) -> None:
    """Fill in how the held-out clips fare."""
    pipe = StreamDiffVSRPipeline.from_pretrained("tiny")
    network = STLPIPS.load("alex")
    inside = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    for excerpt in HELDOUT:
        if excerpt.name not in names:
            continue
        truth = read(excerpt, frames).truth_T3HW
        judge = ClipJudge(truth, network, vmaf=False)
        lr = degrade(truth, BICUBIC) * 2 - 1
        for name, estimate in known.items():
            _forget(estimate)
            state, outputs = pipe.start(seed=0), []
            for k in range(len(lr)):
                given = estimate(lr[k : k + 1], lr[k - 1 : k]) if k else None
                if given is not None:
                    warped = flow_warp(truth[k - 1 : k], given, "exact")
                    rows[name].warped.append(float((warped - truth[k : k + 1])[inside].abs().mean()) * 255)
                outputs.append(pipe.step(lr[k : k + 1], [state], steps=1, flow_B2HW=given)[0])
            scores = judge.score((torch.stack(outputs) / 2 + 0.5).clamp(0, 1))
            rows[name].output.append((scores.warp_error, scores.stlpips, scores.psnr))


def _forget(estimate: Estimate) -> None:
    if isinstance(estimate, OtherDIS):
        estimate.reset()


def table(rows: dict[str, Row]) -> str:
    """Return the Markdown table."""
    sizes = [f"{width}x{height}" for height, width in SIZES]
    heads = ["estimator", *(f"ms {s}" for s in sizes), *(f"MiB {s}" for s in sizes)]
    heads += [*(f"EPE {label}" for label in DEGRADATIONS), "over 4 px, %", "warped truth"]
    heads += ["output: WarpErr", "ST-LPIPS", "PSNR"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [name]
        cells += [_number(row.ms.get(s), ".1f") for s in sizes] + [_number(row.mib.get(s), ".0f") for s in sizes]
        if row.counted is not None:
            cells[-1] = f"about {row.counted:.0f}"
        cells += [_number(_mean(row.errors.get(label)), ".2f") for label in DEGRADATIONS]
        cells += [_number(_mean(row.far), ".1f"), _number(_mean(row.warped), ".2f")]
        cells += [
            _number(_mean([scores[n] for scores in row.output]), digits)
            for n, digits in enumerate((".4f", ".4f", ".2f"))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list[float] | None) -> float | None:
    return statistics.fmean(values) if values else None


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--spynet", help="safetensors file of the yardstick")
    parser.add_argument("--all", action="store_true", help="also RAFT at an output size of 1920x1080")
    parser.add_argument("--clips", nargs="*", default=["walk", "street", "portrait"])
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="estimators by the names of their rows")
    parser.add_argument("--parts", nargs="*", default=["costs", "known", "clips"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.set_grad_enabled(False)
    began = time.perf_counter()
    known = {n: e for n, e in estimators(options.spynet).items() if not options.only or n in options.only}
    with tempfile.TemporaryDirectory() as scratch:
        rafts = random_raft(Path(scratch))
        rafts = {n: e for n, e in rafts.items() if not options.only or n in options.only}
        rows = {name: Row() for name in [*known, *rafts]}
        if "costs" in options.parts:
            measure_costs(rows, known, rafts, options.all)
    if "known" in options.parts:
        measure_known_flow(rows, known)
    if "clips" in options.parts:
        measure_clips(rows, known, options.clips, options.frames)
    print(
        f"{describe_machine('cpu')}, 1 thread; {time.strftime('%Y-%m-%d')}; clips {', '.join(options.clips)}, ", end=""
    )
    print(f"{options.frames} frames, 1 step; {(time.perf_counter() - began) / 60:.1f} minutes\n\n{table(rows)}")


if __name__ == "__main__":
    main()
