"""`upriver doctor`: what is installed, which device, model and settings are used, and what is wrong, with a remedy."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from infra.model_cache import local_model
from infra.settings import LoadedSettings, load_settings
from jobs.errors import ExitCode, exit_code_of

_PACKAGES = (
    "upriver", "torch", "diffusers", "ray", "av", "numpy", "opencv-python-headless", "safetensors", "huggingface_hub",
    "transformers", "pydantic", "torchvision", "imageio-ffmpeg", "boto3",
)  # fmt: skip
_OPTIONAL = {
    "torchvision": "flow estimator raft",
    "imageio-ffmpeg": "VMAF",
    "transformers": "prompts of foreign models",
}
_ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "av1": "libsvtav1",
    "vp9": "libvpx-vp9",
    "ffv1": "ffv1",
    "prores": "prores_ks",
}
_DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg2video", "ffv1", "prores")
_FREE_BYTES = 2 << 30


@dataclass(slots=True)
class Problem:
    """Something that is wrong, what to do about it, and which exit status it stands for."""

    what: str
    remedy: str
    exit_code: int


@dataclass(slots=True)
class Findings:
    """All that was found, by section; values are plain."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def doctor_command(*, flags: Mapping[str, object], config: Path | None, as_json: bool) -> int:
    """Print the findings; the exit status is 0, or that of the first problem.

    Raises:
        SettingsError: a setting is impossible.
    """
    findings = examine(load_settings(flags, config))
    if as_json:
        print(
            json.dumps({**findings.sections, "problems": [asdict(problem) for problem in findings.problems]}, indent=2)
        )
    else:
        _print(findings)
    return findings.problems[0].exit_code if findings.problems else int(ExitCode.DONE)


def examine(loaded: LoadedSettings) -> Findings:
    """Look at everything a restoration needs. One broken part does not hide the others."""
    findings = Findings()
    parts: dict[str, Callable[[LoadedSettings, Findings], dict[str, Any]]] = {
        "packages": _packages,
        "machine": _machine,
        "device": _device,
        "flow": _flow,
        "video": _video,
        "model": _model,
        "cluster": _cluster,
        "settings": _settings,
    }
    for name, look in parts.items():
        try:
            findings.sections[name] = look(loaded, findings)
        except Exception as error:
            findings.sections.setdefault(name, {})["error"] = str(error).strip() or type(error).__name__
            message = str(getattr(error, "message", "")) or f"{type(error).__name__}: {error}"
            remedy = str(getattr(error, "remedy", "")) or "Reinstall the packages that are named."
            findings.problems.append(Problem(message, remedy, int(exit_code_of(error))))
    return findings


def _packages(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = f"not installed ({_OPTIONAL.get(name, 'needed')})"
            if name not in _OPTIONAL:
                remedy = "Install Upriver again: pip install upriver."
                findings.problems.append(
                    Problem(f"The package {name} is not installed.", remedy, int(ExitCode.INTERNAL))
                )
    return found


def _machine(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    from actors.hardware import usable_cores

    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < _FREE_BYTES:
        findings.problems.append(
            Problem(
                f"{tempfile.gettempdir()} has {free >> 20} MiB free; Ray needs about {_FREE_BYTES >> 20}.",
                "Free some space, or point TMPDIR elsewhere.",
                int(ExitCode.STORAGE),
            )
        )
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "temporary_space_gib": round(free / 2**30, 1),
    }


def _memory_gib() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return round(int(line.split()[1]) / 2**20, 1)
    except OSError:
        pass
    return None


def _device(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    import torch

    from actors.hardware import choose_device, choose_formats, cpu_computes_bf16
    from pipeline.backends import choose_backend
    from pipeline.errors import BackendError

    found: dict[str, Any] = {
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda or "not in this build of torch",
        "cpu_computes_bf16": cpu_computes_bf16(),
    }
    device = choose_device(loaded.values.device)
    found["used"] = device
    backend = "eager"
    try:
        backend = choose_backend(loaded.values.backend, device)
    except BackendError as error:
        findings.problems.append(Problem(error.message, error.remedy, int(ExitCode.MODEL)))
    found["backend_used"] = backend
    formats = [str(dtype).removeprefix("torch.") for dtype in choose_formats(loaded.values.dtype, device, backend)]
    found["dtype_first"] = formats[0]
    if formats[1:]:  # what a model bears is found out when it is loaded
        found["dtype_otherwise"] = ", ".join(formats[1:])
    return found


def _flow(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    torchvision = importlib.util.find_spec("torchvision") is not None
    found = {
        "dis": importlib.util.find_spec("cv2") is not None,
        "net": True,
        "raft": torchvision,
        "raft-small": torchvision,
        "zero": True,
        "asked_for": loaded.values.flow,
    }
    if not found.get(loaded.values.flow, True):
        remedy = (
            "Install torchvision, or use --flow dis." if loaded.values.flow.startswith("raft") else "Install OpenCV."
        )
        findings.problems.append(
            Problem(f"The flow estimator {loaded.values.flow} is not installed.", remedy, int(ExitCode.MODEL))
        )
    return found


def _video(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    import av
    import av.codec

    def has(name: str, mode: Literal["r", "w"]) -> bool:
        try:
            av.codec.Codec(name, mode)
        except av.codec.codec.UnknownCodecError:
            return False
        return True

    encoders = {codec: has(name, "w") for codec, name in _ENCODERS.items()}
    decoders = {name: has(name, "r") for name in _DECODERS}
    wanted = loaded.values.codec or "h264"
    if not encoders[wanted]:
        findings.problems.append(
            Problem(
                f"This build of FFmpeg has no encoder {_ENCODERS[wanted]} for {wanted}.",
                "Install PyAV's own wheel (pip install av), or choose another --codec.",
                int(ExitCode.USAGE),
            )
        )
    return {
        "ffmpeg": {name: ".".join(map(str, numbers)) for name, numbers in av.library_versions.items()},
        "encoders": [name for name, there in encoders.items() if there],
        "decoders": [name for name, there in decoders.items() if there],
        "missing": [name for name, there in {**encoders, **decoders}.items() if not there],
    }


def _model(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    from pipeline.checkpoint import load_checkpoint
    from pipeline.model_source import built_in_models

    found: dict[str, Any] = {"built_in": built_in_models(), "asked_for": loaded.values.model}
    findings.sections["model"] = found
    checkpoint = load_checkpoint(local_model(loaded.values.model))
    parts = {"unet": checkpoint.unet, "controlnet": checkpoint.controlnet, "vae": checkpoint.vae}
    return {
        **found,
        "folder": str(checkpoint.folder),
        "sha256": checkpoint.model_sha256,
        "parameters": {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts.items()},
        "flow": checkpoint.options.flow,
        "notes": list(checkpoint.notes),
    }


def _cluster(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    import os

    return {"address": os.environ.get("RAY_ADDRESS") or "none: Ray is started on this machine for each job"}


def _settings(loaded: LoadedSettings, findings: Findings) -> dict[str, Any]:
    values = loaded.values.model_dump()
    return {
        "config_file": None if loaded.config_file is None else str(loaded.config_file),
        **{name: {"value": value, "origin": loaded.origins[name]} for name, value in values.items()},
    }


def _print(findings: Findings) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True)
    for name, section in findings.sections.items():
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(style="dim", overflow="fold")
        for key, value in section.items():
            if isinstance(value, dict) and set(value) == {"value", "origin"}:
                table.add_row(f"  {key}", Text(_plain(value["value"])), value["origin"])
            else:
                table.add_row(f"  {key}", Text(_plain(value)))
        console.print(Text(name, style="bold"))
        console.print(table)
    if not findings.problems:
        console.print(Text("Nothing is wrong.", style="green"))
    for problem in findings.problems:
        console.print(Text(f"Problem: {problem.what} {problem.remedy}", style="red"))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)
