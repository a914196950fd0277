"""`upriver bench`: how fast this model is on this device, stage by stage, and how far from what the device could do.

One table: milliseconds, FLOPs and the fraction of the floor that each stage reaches (its FLOPs at the speed with which
the device multiplies large matrices), memory, time to the first frame, frames per second; for one size, or for several
sizes and numbers of streams in a step. Imports neither Ray nor OpenCV, so that it runs where only torch, diffusers and
av are. `jobs.bench_measure` measures, `jobs.bench_pipeline` does so from file to file, `jobs.bench_against` beside the
published code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from jobs.errors import ExitCode, UsageError
from jobs.options import AsJson, BackendOption, Config, Debug, Device, Dtype, Flow, Model, Steps, Threads

SCALE: Final = 4
NAMED_SIZES: Final = {"360p": (640, 360), "480p": (640, 480), "720p": (1280, 720), "1080p": (1920, 1080)}

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def bench(
    what: Annotated[
        Literal["model", "pipeline"],
        typer.Argument(help="The model by stage, or the whole way from file to file without Ray."),
    ] = "model",
    model: Model = None,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendOption = None,
    flow: Flow = None,
    threads: Threads = None,
    size: Annotated[str, typer.Option(help="Input size, WIDTHxHEIGHT.")] = "160x120",
    sizes: Annotated[
        str, typer.Option(help="Output sizes instead: 360p, 720p, 1080p or WIDTHxHEIGHT, with commas between them.")
    ] = "",
    batches: Annotated[str, typer.Option(help="Streams in a step, such as 1,2,4,8.")] = "",
    frames: Annotated[int, typer.Option(min=2, help="Frames to measure, after five to warm up.")] = 24,
    save: Annotated[
        Path | None, typer.Option(help="Write a dated record, JSON and Markdown, into this folder.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A checkout of the published code, to run beside this on the same.", show_default=False),
    ] = None,
    against_python: Annotated[
        str | None,
        typer.Option(help="The interpreter for it, with its diffusers. [default: this one]", show_default=False),
    ] = None,
    raft: Annotated[
        Path | None,
        typer.Option(
            help="Weights of RAFT for both, safetensors. [default: random ones, the same for both]", show_default=False
        ),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure speed on this device: milliseconds, FLOPs and what could be, by stage.

    Besides the models that every command takes, random:published, random:small and random:tiny are models of these
    sizes with random weights: enough for speed.
    """
    flags = {
        "model": model, "steps": steps, "device": device, "dtype": dtype, "backend": backend, "flow": flow,
        "threads": threads,
    }  # fmt: skip
    request = BenchRequest(
        flags=flags,
        config=config,
        size=size,
        sizes=sizes,
        batches=batches,
        frames=frames,
        as_json=as_json,
        save=save,
        against=against,
        against_python=against_python,
        raft=raft,
    )
    if what == "pipeline":
        from jobs.bench_pipeline import pipeline_command

        return pipeline_command(request)
    return bench_command(request)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What was typed after `upriver bench`.

    Attributes:
        size: input size, used where `sizes` is empty.
        sizes: output sizes, named (720p) or WIDTHxHEIGHT, with commas between them.
        batches: numbers of streams in a step, with commas between them; empty: 1.
        save: folder for a dated record of the results.
        against: a checkout of the published code, and against_python the interpreter that runs it.
        raft: weights of RAFT for both sides of that comparison.
    """

    flags: Mapping[str, object]
    config: Path | None
    size: str
    frames: int
    as_json: bool
    sizes: str = ""
    batches: str = ""
    save: Path | None = None
    against: Path | None = None
    against_python: str | None = None
    raft: Path | None = None


def bench_command(request: BenchRequest) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: a size or number cannot be read. CheckpointError, FlowError, ActorsError: the model cannot be set
            up.
    """
    from infra.settings import load_settings
    from jobs.bench_measure import measure_all
    from jobs.bench_report import print_results, save_results

    settings = load_settings(request.flags, request.config).values
    if request.against is not None:
        from jobs.bench_against import against_command

        return against_command(request, settings)
    table = bool(request.sizes or request.batches)
    sizes = output_sizes(request.sizes) if request.sizes else [input_size(request.size)]
    results, peaks = measure_all(settings, sizes, batch_numbers(request.batches), request.frames, video=not table)
    print_results(results, peaks, as_json=request.as_json, table=table)
    if request.save is not None:
        save_results(request.save, "speed", results, peaks, command_line(request))
    return int(ExitCode.DONE)


def input_size(text: str) -> tuple[int, int]:
    """Return (width, height) of an input size.

    Raises:
        UsageError: it is not WIDTHxHEIGHT.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise UsageError(f"--size {text} is not WIDTHxHEIGHT.", code="bench-size", remedy="Write it like 160x120.")
    return int(match[1]), int(match[2])


def output_sizes(text: str) -> list[tuple[int, int]]:
    """Return the *input* sizes (width, height) for output sizes with commas between them.

    Raises:
        UsageError: one is neither a known name nor WIDTHxHEIGHT, or no multiple of 4.
    """
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", word.strip())
        width, height = (int(match[1]), int(match[2])) if match else NAMED_SIZES.get(word.strip(), (0, 0))
        if width == 0 or width % SCALE or height % SCALE:
            raise UsageError(
                f"--sizes {text}: {word.strip()!r} is no output size.",
                code="bench-size",
                remedy=f"Write {', '.join(NAMED_SIZES)} or WIDTHxHEIGHT in multiples of {SCALE}, with commas between.",
            )
        found.append((width // SCALE, height // SCALE))
    return found


def batch_numbers(text: str) -> list[int]:
    """Return the numbers of streams in `text`; 1 alone for "".

    Raises:
        UsageError: one is no positive number.
    """
    words = [word.strip() for word in text.split(",")] if text else ["1"]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(
            f"--batches {text} are no numbers of streams.", code="bench-batches", remedy="Write them like 1,2,4,8."
        )
    return [int(word) for word in words]


def command_line(request: BenchRequest, what: str = "") -> str:
    """Return what one would type for the same measurement; of paths only the last part."""
    words = ["upriver bench", what] if what else ["upriver bench"]
    options = {name.replace("_", "-"): value for name, value in request.flags.items()}
    options |= {"sizes": request.sizes, "batches": request.batches, "frames": request.frames}
    if not request.sizes:
        options["size"] = request.size
    options |= {"against": request.against, "raft": request.raft}
    for name, value in options.items():
        if value not in (None, ""):
            words += [f"--{name}", without_folders(str(value))]
    return " ".join(words)


def without_folders(name: str) -> str:
    """Return the last part of a path that exists, and anything else as it is: names of models, hub ids."""
    return Path(name).name if Path(name).exists() else name
