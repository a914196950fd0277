"""`upriver train`: the stages of the method, the autoencoder before them, growth, the flow network, packing of data.

Imports neither Ray nor OpenCV, so that a lean GPU machine needs torch, diffusers, accelerate and av alone.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from pipeline.flow_training import FlowTrainer
    from pipeline.objectives import TrainConfig
    from pipeline.training import Trainer

app = typer.Typer(
    no_args_is_help=True, help="Train a model: autoencoder, then stage1, stage2, stage3; or the flow network."
)

Data = Annotated[list[Path], typer.Option("--data", help="Folder or file of pictures and videos; repeat for more.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; an unfinished run there is resumed.")]
Init = Annotated[
    Path | None, typer.Option("--init", help="Where to start: a model folder (RUN/model) or a snapshot file.")
]
Snapshot = Annotated[
    Path | None, typer.Option("--snapshot", help="Also write a resumable snapshot of at most 20 MB to this file.")
]
Size = Annotated[str, typer.Option("--size", help="tiny or small; only where nothing is loaded.")]
Iterations = Annotated[int, typer.Option("--iterations", min=1, help="Length of the learning-rate schedule.")]
Minutes = Annotated[float, typer.Option("--minutes", min=0, help="Save and stop after this wall time; 0 = no limit.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Clips per iteration and process.")]
Crop = Annotated[int, typer.Option("--crop", min=32, help="Side of the training square in output pixels.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="Peak learning rate.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field of TrainConfig as NAME=VALUE, for example --set gan=0.05; repeat."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the process.")]


Configuration = TypeVar("Configuration", bound="BaseModel")


def build_config(stage: str, options: dict[str, Any], extra: list[str]) -> TrainConfig:
    """Merge the stage's defaults, the flags and `NAME=VALUE` extras into a `TrainConfig`.

    Raises UsageError naming the option that is wrong.
    """
    from pipeline.objectives import DEFAULTS, TrainConfig

    return _merged(TrainConfig, {"stage": stage} | DEFAULTS[stage] | options, extra)


def _merged(kind: type[Configuration], values: dict[str, Any], extra: list[str]) -> Configuration:
    import json

    from pydantic import ValidationError

    from jobs.errors import UsageError

    values = dict(values)
    for item in extra:
        name, separator, text = item.partition("=")
        if not separator or name not in kind.model_fields:
            raise UsageError(
                f"--set {item!r} names no field of the training configuration.",
                code="train-option",
                remedy=f"Fields: {', '.join(sorted(kind.model_fields))}.",
            )
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first.get('input')!r}).",
            code="train-option",
            remedy="See `upriver train --help`.",
        ) from error


def _reporter() -> tuple[Console, Callable[[int, dict[str, float]], None]]:
    """Return the console of standard error, and what prints a line of figures there."""
    from rich.console import Console

    console = Console(stderr=True)

    def report(iteration: int, figures: dict[str, float]) -> None:
        line = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        console.print(f"{iteration:7d}  {line}", highlight=False, soft_wrap=True)

    return console, report


def run_stage(stage: str, extra: list[str], **options: Any) -> Path:
    """Train one stage and return the folder of its model; progress goes to standard error."""
    from pipeline.training import Trainer

    console, report = _reporter()
    trainer = Trainer(build_config(stage, options, extra), report)
    folder = trainer.run()
    _exit_if_stopped(trainer)
    console.print(f"Model: {folder}", soft_wrap=True)
    return folder


def _exit_if_stopped(trainer: Trainer | FlowTrainer) -> None:
    """Leave with the status of the signal that ended the run, and say that nothing is lost."""
    if trainer.stopped_by is not None:
        name = signal.Signals(trainer.stopped_by).name
        typer.echo(f"Stopped by {name} and saved at iteration {trainer.iteration}; the same command goes on.", err=True)
        raise typer.Exit(128 + trainer.stopped_by)


def _register(stage: str, iterations: int, summary: str) -> None:
    """Add the command of one stage; the stages share every option and differ in defaults."""

    def command(
        data: Data,
        out: Out,
        init: Init = None,
        snapshot: Snapshot = None,
        size: Size = "tiny",
        iterations: Iterations = iterations,
        minutes: Minutes = 0,
        batch: Batch = 4,
        crop: Crop = 96,
        learning_rate: Rate = 1e-3,
        device: Device = "auto",
        mixed_precision: Precision = "no",
        threads: Threads = 1,
        set_: Options = None,
    ) -> None:
        run_stage(
            stage,
            set_ or [],
            data=data,
            out=out,
            init=init,
            snapshot=snapshot,
            size=size,
            iterations=iterations,
            minutes=minutes,
            batch=batch,
            crop=crop,
            learning_rate=learning_rate,
            device=device,
            mixed_precision=mixed_precision,
            threads=threads,
        )

    app.command(stage, help=summary)(command)


_register("autoencoder", 3000, "Train the autoencoder from its closed-form start.")
_register("stage1", 6000, "Distil the U-Net by rollout: every denoising step unrolled, losses on latent and picture.")
_register("stage2", 1000, "Train the decoder's Temporal Processor Modules.")
_register("stage3", 2000, "Train ARTG, the guidance by the warped previous output.")


@app.command()
def flow(
    data: Data,
    out: Out,
    iterations: Iterations = 4500,
    minutes: Minutes = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Clips of three frames per iteration.")] = 4,
    crop: Annotated[int, typer.Option("--crop", min=32, help="Side of a clip in input pixels.")] = 96,
    learning_rate: Rate = 1.5e-3,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Threads = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of FlowTrainConfig as NAME=VALUE; repeat."),
    ] = None,
) -> None:
    """Train the flow network, without labels: on simulated cameras over pictures, and on real clips."""
    from pipeline.flow_training import FlowTrainConfig, FlowTrainer

    flags = {
        "data": data,
        "out": out,
        "iterations": iterations,
        "minutes": minutes,
        "batch": batch,
        "crop": crop,
        "learning_rate": learning_rate,
        "device": device,
        "threads": threads,
    }
    console, report = _reporter()
    trainer = FlowTrainer(_merged(FlowTrainConfig, flags, set_ or []), report)
    weights = trainer.run()
    _exit_if_stopped(trainer)
    console.print(f"Weights: {weights}", soft_wrap=True)


@app.command()
def grow(
    model: Annotated[str, typer.Argument(help="What grows: a model's name, such as tiny, or its folder.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    size: Annotated[str, typer.Option("--size", help="To which size.")] = "small",
) -> None:
    """Make a larger model that restores exactly as a smaller one does, to be trained on by the stages."""
    import json

    from jobs.errors import UsageError
    from pipeline.growth import grow as grow_model
    from pipeline.model_source import OPTIONS, resolve
    from pipeline.restorer import SIZES, Restorer

    if size not in SIZES:
        raise UsageError(
            f"--size {size!r} is unknown.", code="train-option", remedy=f"Choose one of {', '.join(SIZES)}."
        )
    folder = resolve(model)
    options = json.loads((folder / OPTIONS).read_text()) if (folder / OPTIONS).exists() else {}
    grow_model(Restorer.load(folder), SIZES[size]).save(out, options)
    typer.echo(f"Model: {out}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model's name or folder, such as RUN/model.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
) -> None:
    """Write a model with its weights in half precision: half the size, and it computes in any format as before."""
    from pipeline.checkpoint import write_in_half
    from pipeline.model_source import resolve

    size = write_in_half(resolve(model), out)
    typer.echo(f"Model: {out} ({size / 1e6:.1f} MB)")


@app.command()
def pack(
    data: Data,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_mb: Annotated[float, typer.Option(min=1, help="Upper limit of the folder in megabytes.")] = 38,
    max_side: Annotated[int, typer.Option(min=160, help="Longest side of a picture in pixels.")] = 1800,
    max_frames: Annotated[int, typer.Option(min=2, help="Frames kept of every clip.")] = 48,
    max_height: Annotated[int, typer.Option(min=160, help="Rows kept of every clip.")] = 480,
    nets: Annotated[
        Path | None,
        typer.Option(help="Folder for the networks of loss and judge as well, in half precision (34 MB)."),
    ] = None,
) -> None:
    """Pack training data, with the flow of real clips, into a small folder that travels."""
    from pipeline.packing import pack as write
    from pipeline.perceptual import pack as write_networks

    if nets is not None:
        typer.echo(f"{nets}: {write_networks(nets) / 1e6:.1f} MB; UPRIVER_CACHE={nets} where they are used")
    size = write(data, destination, max_mb=max_mb, max_side=max_side, max_frames=max_frames, max_height=max_height)
    typer.echo(f"{destination}: {size / 1e6:.1f} MB")


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, in the order of the stages.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("curves.png"),
) -> None:
    """Plot the validation figures of runs (PSNR and ST-LPIPS against iterations) into one picture."""
    import json

    from jobs.errors import UsageError

    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "matplotlib is not installed.", code="train-plot", remedy='Install it with: pip install "upriver[train]".'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(runs), figsize=(4 * len(runs), 6), squeeze=False)
    for column, run in enumerate(runs):
        file = run / "metrics.jsonl"
        if not file.is_file():
            raise UsageError(f"{file} does not exist.", code="train-plot", remedy="Name the --out folders of runs.")
        records = [json.loads(line) for line in file.read_text().splitlines()]
        points = [(r["iteration"], r["validation"]) for r in records if "validation" in r]
        for row, measure in enumerate(("psnr", "stlpips")):
            names = sorted({name for _, values in points for name in values if name.split("_")[0] == measure})
            for name in names:
                steps = name.removeprefix(measure).strip("_")
                label = {"": "output", "bicubic": "bicubic"}.get(steps, f"{steps} step{'s' * (steps != '1')}, alone")
                style = "--" if steps == "bicubic" else "-"
                axes[row][column].plot([n for n, _ in points], [v[name] for _, v in points], style, label=label)
            axes[row][column].set_title(run.name if row == 0 else "")
            axes[row][column].set_ylabel({"psnr": "PSNR, dB", "stlpips": "ST-LPIPS (Alex)"}[measure])
            axes[row][column].set_xlabel("iteration")
            axes[row][column].legend(fontsize="small")
            axes[row][column].grid(alpha=0.3)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    typer.echo(str(out))
