"""`upriver train`: the three stages of the method, the autoencoder before them, and packing of training data.

Imports neither Ray nor OpenCV, so that a lean GPU machine needs torch, diffusers, accelerate and av alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Train a model: autoencoder, then stage1, stage2, stage3.")

Data = Annotated[list[Path], typer.Option("--data", help="Folder or file of pictures and videos; repeat for more.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; an unfinished run there is resumed.")]
Init = Annotated[Path | None, typer.Option("--init", help="Model folder to start from (RUN/model of the stage before).")]
Snapshot = Annotated[Path | None, typer.Option("--snapshot", help="Also write a resumable snapshot of at most 15 MB here.")]
Iterations = Annotated[int, typer.Option("--iterations", min=1, help="Length of the learning-rate schedule.")]
Minutes = Annotated[float, typer.Option("--minutes", min=0, help="Save and stop after this wall time; 0 = no limit.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Clips per iteration and process.")]
Crop = Annotated[int, typer.Option("--crop", min=32, help="Side of the training square in output pixels.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate; default: the stage's own.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of TrainConfig as NAME=VALUE (JSON), for example --set gan=0.05."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the process.")]


def build_config(stage: str, options: dict[str, Any], extra: list[str]) -> Any:
    """Merge the stage's defaults, the flags and `NAME=VALUE` extras into a `TrainConfig`.

    Raises JobsError naming the option that is wrong.
    """
    import json

    from pydantic import ValidationError

    from jobs.errors import UsageError
    from pipeline.objectives import DEFAULTS, TrainConfig

    values: dict[str, Any] = {"stage": stage} | DEFAULTS[stage]
    values |= {name: value for name, value in options.items() if value is not None}
    for item in extra:
        name, separator, text = item.partition("=")
        if not separator or name not in TrainConfig.model_fields:
            raise UsageError(
                f"--set {item!r} is no field of the training configuration",
                code="train-option", remedy=f"Fields: {', '.join(sorted(TrainConfig.model_fields))}.",
            )
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first.get('input')!r})",
            code="train-option", remedy="See `upriver train --help`.",
        ) from error


def _run(stage: str, extra: list[str] | None, **options: Any) -> None:
    from rich.console import Console

    from pipeline.training import Trainer

    console = Console(stderr=True)

    def report(iteration: int, figures: dict[str, float]) -> None:
        console.print(f"{iteration:7d}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), highlight=False)

    config = build_config(stage, options, extra or [])
    folder = Trainer(config, report).run()
    console.print(f"Model: {folder}")


@app.command()
def autoencoder(
    data: Data, out: Out, init: Init = None, snapshot: Snapshot = None, iterations: Iterations = 3000, minutes: Minutes = 0,
    batch: Batch = 4, crop: Crop = 96, learning_rate: Rate = None, device: Device = "auto", mixed_precision: Precision = "no",
    threads: Threads = 1, size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny", set_: Options = None,
) -> None:  # fmt: skip
    """Train the autoencoder from its closed-form start."""
    _run(
        "autoencoder", set_, data=data, out=out, init=init, snapshot=snapshot, iterations=iterations, minutes=minutes,
        batch=batch, crop=crop, learning_rate=learning_rate, device=device, mixed_precision=mixed_precision, threads=threads,
        size=size,
    )  # fmt: skip


@app.command()
def stage1(
    data: Data, out: Out, init: Init = None, snapshot: Snapshot = None, iterations: Iterations = 6000, minutes: Minutes = 0,
    batch: Batch = 4, crop: Crop = 96, learning_rate: Rate = None, device: Device = "auto", mixed_precision: Precision = "no",
    threads: Threads = 1, set_: Options = None,
) -> None:  # fmt: skip
    """Distil the U-Net by rollout: all denoising steps unrolled, losses on the final latent and picture."""
    _run(
        "stage1", set_, data=data, out=out, init=init, snapshot=snapshot, iterations=iterations, minutes=minutes,
        batch=batch, crop=crop, learning_rate=learning_rate, device=device, mixed_precision=mixed_precision, threads=threads,
    )  # fmt: skip


@app.command()
def stage2(
    data: Data, out: Out, init: Init = None, snapshot: Snapshot = None, iterations: Iterations = 1000, minutes: Minutes = 0,
    batch: Batch = 4, crop: Crop = 96, learning_rate: Rate = None, device: Device = "auto", mixed_precision: Precision = "no",
    threads: Threads = 1, set_: Options = None,
) -> None:  # fmt: skip
    """Train the decoder's Temporal Processor Modules."""
    _run(
        "stage2", set_, data=data, out=out, init=init, snapshot=snapshot, iterations=iterations, minutes=minutes,
        batch=batch, crop=crop, learning_rate=learning_rate, device=device, mixed_precision=mixed_precision, threads=threads,
    )  # fmt: skip


@app.command()
def stage3(
    data: Data, out: Out, init: Init = None, snapshot: Snapshot = None, iterations: Iterations = 2000, minutes: Minutes = 0,
    batch: Batch = 4, crop: Crop = 96, learning_rate: Rate = None, device: Device = "auto", mixed_precision: Precision = "no",
    threads: Threads = 1, size: Annotated[str, typer.Option(help="tiny or small.")] = "tiny", set_: Options = None,
) -> None:  # fmt: skip
    """Train ARTG, the guidance by the warped previous output."""
    _run(
        "stage3", set_, data=data, out=out, init=init, snapshot=snapshot, iterations=iterations, minutes=minutes,
        batch=batch, crop=crop, learning_rate=learning_rate, device=device, mixed_precision=mixed_precision, threads=threads,
        size=size,
    )  # fmt: skip


@app.command()
def pack(
    data: Data,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    max_mb: Annotated[float, typer.Option(min=1, help="Upper limit of the folder in megabytes.")] = 38,
    max_side: Annotated[int, typer.Option(min=160, help="Longest side of a picture in pixels.")] = 1800,
    max_frames: Annotated[int, typer.Option(min=2, help="Frames kept of every clip.")] = 48,
    max_height: Annotated[int, typer.Option(min=160, help="Rows kept of every clip.")] = 480,
) -> None:
    """Pack training data, with the flow of real clips, into a small folder that travels."""
    from pipeline.packing import pack as write

    size = write(
        data, destination, max_mb=max_mb, max_side=max_side, max_frames=max_frames, max_height=max_height
    )
    typer.echo(f"{destination}: {size / 1e6:.1f} MB")
