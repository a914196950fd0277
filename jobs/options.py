"""Arguments and flags that several commands share: their types, their help, their spelling.

Defaults are those of `infra.settings`; a flag that is not given is None here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="A video, a folder of videos or of pictures, a pattern, a list file, or an s3:// place.",
        show_default=False,
    ),
]
Destination = Annotated[
    str,
    typer.Argument(
        help="The file to write, a folder for videos, or a new name without ending for pictures.",
        show_default=False,
    ),
]
Finished = Annotated[
    str,
    typer.Argument(help="The destination that `upriver restore` was given.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Config = Annotated[
    Path | None,
    typer.Option(help="Configuration file (TOML) instead of the user's.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Built-in name, folder or hub id of the model. [default: tiny]",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Denoising steps per frame: 4, 2 or 1, fewer is faster. [default: the model's]",
        show_default=False,
    ),
]
StepsOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="INTEGER|auto",
        help="Denoising steps per frame: 4, 2 or 1, fewer is faster; auto: by what each frame shows. "
        "[default: the model's]",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]", show_default=False),
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(
        help="Number format; auto is bf16 where the hardware computes in it and the model bears it; int8 is faster, by "
        "openvino alone. "
        "[default: auto]",
        show_default=False,
    ),
]
BackendOption = Annotated[
    Literal["auto", "eager", "openvino", "graph", "compiled"] | None,
    typer.Option(
        "--backend",
        help="What runs the model; auto: openvino on a CPU, graph on a GPU. [default: auto]",
        show_default=False,
    ),
]
Flow = Annotated[
    Literal["auto", "dis", "net", "raft", "raft-small", "zero"] | None,
    typer.Option(
        help="Motion estimator; auto is the model's own. [default: auto]",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads of each worker. [default: its share of the cores]",
        show_default=False,
    ),
]
Scale = Annotated[
    Literal["2", "3", "4"] | None,
    typer.Option(
        help="Output size over input size; 2 and 3 are made from 4. [default: 4]",
        show_default=False,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(help="Output height in pixels instead of --scale.", show_default=False),
]


def count_or_word(text: str | None) -> int | str | None:
    """Return what was typed as a number where it is one: so a message shows it as it was typed."""
    return int(text) if text is not None and text.isdecimal() else text


def start_logs() -> None:
    """Log as `UPRIVER_LOG_FORMAT` and `UPRIVER_LOG_LEVEL` say, if they are set.

    Raises:
        SettingsError: they say something else than they can.
    """
    if any(name.startswith("UPRIVER_LOG_") for name in os.environ):
        from infra.structured_logs import start_logs_from_environment

        start_logs_from_environment()
