"""`upriver evaluate`: how much better than plain resizing a model is, measured on clips that it has never seen.

Every excerpt is degraded in known ways, restored by each method, and scored against its original by
`pipeline.judge.ClipJudge`. The result is one dated JSON file, the same as a Markdown table, strips of pictures and a
side-by-side video. This module knows clips, methods and their order; definitions of the measures are in
`pipeline.metrics`, layout of the report in `jobs.evaluation_report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.heldout import Excerpt
    from pipeline import StreamDiffVSRPipeline

BICUBIC_METHOD = "bicubic"
# Motion of the ground truth, in pixels per frame, from which a clip counts as moving.
MOVING = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to restore: denoising steps, whether each frame stands alone, and the guidance that is switched off.

    Attributes:
        everywhere: measured on every degradation; otherwise on the first one only.
        moving: measured on moving clips only, where guidance matters.
    """

    name: str
    steps: int = 4
    alone: bool = False
    artg: bool = True
    tpm: bool = True
    tpm_warped: bool = True
    everywhere: bool = False
    moving: bool = False


METHODS: tuple[Method, ...] = (
    Method(name="4 steps", everywhere=True),
    Method(name="2 steps", steps=2),
    Method(name="1 step", steps=1),
    Method(name="per frame", alone=True, moving=True),
    Method(name="without ARTG", artg=False, moving=True),
    Method(name="without TPM", tpm=False, moving=True),
    Method(name="TPM unwarped", tpm_warped=False, moving=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one evaluation does; the same in every worker process."""

    model: str | None
    excerpts: tuple[Excerpt, ...]
    methods: tuple[Method, ...]
    degradations: tuple[str, ...]
    frames: int
    device: str
    dtype: Literal["fp32", "bf16"]
    seed: int
    vmaf: bool
    threads: int
    pictures: Path | None
    complete: bool


def degradations() -> dict[str, Any]:
    """The known ways in which originals are made small: x4 bicubic, and the same through H.264 at CRF 28."""
    from pipeline.degrade import BICUBIC, Degradation

    return {"bicubic x4": BICUBIC, "bicubic x4, H.264 CRF 28": Degradation(h264_crf=28)}


def enlarge(lr_T3HW: Tensor) -> Tensor:
    """The baseline: x4 bicubic interpolation, clamped to [0, 1]."""
    import torch.nn.functional as F

    return F.interpolate(lr_T3HW, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def restore(pipe: StreamDiffVSRPipeline, lr_T3HW: Tensor, method: Method, seed: int = 0) -> Tensor:
    """Restores a clip frame by frame: (T, 3, h, w) in [0, 1] -> (T, 3, 4h, 4w), clamped to [0, 1]."""
    import torch

    from pipeline.options import Guidance

    usual, pipe.guidance = pipe.guidance, Guidance(artg=method.artg, tpm=method.tpm, tpm_warped=method.tpm_warped)
    try:
        state = pipe.start(seed=seed)
        outputs = []
        for frame_3HW in lr_T3HW:
            if method.alone:
                state.reset()
            outputs.append(pipe.step(frame_3HW[None] * 2 - 1, [state], steps=method.steps)[0].cpu())
    finally:
        pipe.guidance = usual
    return ((torch.stack(outputs) + 1) / 2).clamp(0, 1)


def load(plan: Plan) -> StreamDiffVSRPipeline | None:
    """The model of a plan, or None when only the baseline is wanted."""
    if plan.model is None:
        return None
    import torch

    from pipeline import StreamDiffVSRPipeline

    dtype = torch.bfloat16 if plan.dtype == "bf16" else torch.float32
    return StreamDiffVSRPipeline.from_pretrained(plan.model, torch_dtype=dtype, device=plan.device)


def applies(method: Method, plan: Plan, degradation: str, moving: bool) -> bool:
    """Whether a method is measured here. A complete evaluation takes about twice as long and leaves nothing out."""
    first = degradation == plan.degradations[0]
    return plan.complete or ((first or method.everywhere) and (moving or not method.moving))


def evaluate_clip(plan: Plan, excerpt: Excerpt, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures every method on one excerpt.

    Returns:
        name, package, size, frames, motion (pixels per frame), and `scores[degradation][method]` as `Scores` fields
        and `seconds_per_frame`.
    """
    import torch

    from jobs.evaluation_report import write_strip
    from jobs.heldout import read
    from pipeline.degrade import degrade
    from pipeline.judge import ClipJudge
    from pipeline.perceptual import STLPIPS

    torch.set_num_threads(plan.threads)
    clip = read(excerpt, plan.frames)
    judge = ClipJudge(clip.truth_T3HW, STLPIPS.load("alex"), vmaf=plan.vmaf, fps=clip.fps)
    moving = judge.motion >= MOVING
    pipe = load(plan)
    scores: dict[str, dict[str, Any]] = {}
    for label in plan.degradations:
        lr_T3HW = degrade(clip.truth_T3HW, degradations()[label])
        scores[label] = {}
        for name, restored_T3HW, seconds in _restorations(pipe, lr_T3HW, plan, label, moving):
            found = asdict(judge.score(restored_T3HW)) | {"seconds_per_frame": seconds / len(lr_T3HW)}
            scores[label][name] = found
            say(f"{excerpt.name:10} {label:26} {name:13} ST-LPIPS {found['stlpips']:.4f}  PSNR {found['psnr']:.2f}")
            if plan.pictures is not None and name in (BICUBIC_METHOD, METHODS[0].name):
                write_strip(plan.pictures, clip, label, name, lr_T3HW, restored_T3HW)
    return {
        "name": excerpt.name,
        "package": excerpt.package,
        "size": f"{clip.truth_T3HW.shape[3]}x{clip.truth_T3HW.shape[2]}",
        "frames": len(clip.truth_T3HW),
        "motion": judge.motion,
        "moving": moving,
        "scores": scores,
    }


def _restorations(
    pipe: StreamDiffVSRPipeline | None, lr_T3HW: Tensor, plan: Plan, label: str, moving: bool
) -> Iterator[tuple[str, Tensor, float]]:
    yield BICUBIC_METHOD, enlarge(lr_T3HW), 0.0
    for method in plan.methods if pipe is not None else ():
        if pipe is not None and applies(method, plan, label, moving):
            started = time.perf_counter()
            restored_T3HW = restore(pipe, lr_T3HW, method, plan.seed)
            yield method.name, restored_T3HW, time.perf_counter() - started


def evaluate(plan: Plan, workers: int = 1, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measures every excerpt of a plan; with more than one worker, in as many processes. Order as in the plan."""
    if workers == 1:
        return [evaluate_clip(plan, excerpt, say) for excerpt in plan.excerpts]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(evaluate_clip, [plan] * len(plan.excerpts), plan.excerpts))


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate_command(
    model: Annotated[str, typer.Option(help="Built-in name, folder or hub id; `none` measures bicubic only.")] = "tiny",
    clips: Annotated[
        Path | None, typer.Option(help="Your own originals: a folder or a file. [default: the held-out clips]")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Held-out clips by name; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods by name; may be repeated. [default: all]")] = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames per clip.")] = 12,
    complete: Annotated[bool, typer.Option("--complete", help="Every method on every clip and degradation.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three clips, ten frames, four steps only.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")] = "cpu",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Number format of the model.")] = "fp32",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    vmaf: Annotated[bool, typer.Option(help="Measure VMAF-NEG too (needs imageio-ffmpeg).")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Clips measured at the same time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each worker.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the JSON and Markdown report.")] = Path("benchmarks"),
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for strips and the side-by-side video. [default: none]")
    ] = None,
    all_pictures: Annotated[
        bool, typer.Option("--all-pictures", help="Also of clips whose licence does not cover publication.")
    ] = False,
) -> None:
    """Measure quality on clips whose original is known, and write a report."""
    from jobs.evaluation_report import assemble_pictures, describe_machine, write_report
    from jobs.heldout import HELDOUT, own_clips

    excerpts = own_clips(clips) if clips is not None else HELDOUT
    excerpts = tuple(e for e in excerpts if (not only or e.name in only) and (not quick or e.quick))
    methods = tuple(m for m in METHODS if (not method or m.name in method) and (not quick or m == METHODS[0]))
    if not excerpts or (method and len(methods) != len(set(method))):
        known = [e.name for e in HELDOUT] if not excerpts else [m.name for m in METHODS]
        raise UsageError(
            f"Nothing to measure for {', '.join(only or method or [])}.",
            code="evaluate-nothing",
            remedy=f"Choose from: {', '.join(known)}.",
        )
    plan = Plan(
        model=None if model == "none" else model,
        excerpts=excerpts,
        methods=methods,
        degradations=tuple(degradations()),
        frames=min(frames, 10) if quick else frames,
        device=device,
        dtype=dtype,
        seed=seed,
        vmaf=vmaf,
        threads=threads,
        pictures=pictures,
        complete=complete,
    )
    started = time.perf_counter()
    results = evaluate(plan, workers, typer.echo)
    pipe = load(plan)
    document = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(device),
        "model": None if pipe is None else {"source": model, "sha256": pipe.model_sha256},
        "frames": plan.frames,
        "dtype": dtype,
        "seed": seed,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "clips": results,
    }
    markdown = write_report(out, document, quick=quick)
    if pictures is not None:
        assemble_pictures(pictures, [e for e in excerpts if e.publishable or all_pictures])
    typer.echo(markdown.read_text(encoding="utf-8"))
    typer.echo(f"written: {markdown} and {markdown.with_suffix('.json')}")
