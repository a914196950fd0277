"""What an evaluation leaves behind: a dated JSON file, the same as Markdown, strips of pictures and a short video."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from jobs.heldout import Clip, Excerpt

# (field of Scores, heading, digits)
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("stlpips", "ST-LPIPS ↓", 4),
    ("psnr", "PSNR ↑", 2),
    ("ssim", "SSIM ↑", 4),
    ("vmaf_neg", "VMAF-NEG ↑", 1),
    ("sharpness", "sharpness → 1", 3),
    ("warp_error", "WarpErr ↓", 3),
    ("tlp", "tLP ↓", 2),
    ("tof", "tOF ↓", 2),
    ("flicker", "flicker ↓", 2),
    ("stlpips_first", "first frame", 4),
    ("stlpips_tenth", "tenth frame", 4),
    ("seconds_per_frame", "s/frame", 2),
)
_DEFAULT_MODEL = "tiny"
_PANELS = ("low resolution", "bicubic", "Upriver", "original")
_DETAIL = (160, 120)


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory, GPU and library versions."""
    import torch

    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = found.group(1) if found else processor
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def average(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured: None and nan are left out; None when nothing is left."""
    kept = [v for v in values if v is not None and not math.isnan(v)]
    return math.fsum(kept) / len(kept) if kept else None


def gain(clips: Sequence[dict[str, Any]], label: str, method: str, field: str, base: str) -> float | None:
    """Mean over the clips of the relative reduction of a measure against another method, in per cent."""
    pairs = [(row[method][field], row[base][field]) for row in _rows(clips, label, method, base)]
    return average(None if value is None or before is None else 100 * (1 - value / before) for value, before in pairs)


def difference(clips: Sequence[dict[str, Any]], label: str, method: str, field: str, base: str) -> float | None:
    """Mean over the clips of the absolute difference of a measure to another method."""
    pairs = [(row[method][field], row[base][field]) for row in _rows(clips, label, method, base)]
    return average(None if value is None or before is None else value - before for value, before in pairs)


def _rows(clips: Sequence[dict[str, Any]], label: str, *methods: str) -> list[dict[str, Any]]:
    """The scores by method of those clips on which all of `methods` were measured."""
    return [row for row in (clip["scores"][label] for clip in clips) if all(method in row for method in methods)]


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _averages(clips: Sequence[dict[str, Any]], label: str) -> list[str]:
    methods = list(dict.fromkeys(name for clip in clips for name in clip["scores"][label]))
    rows = []
    for method in methods:
        scores = [clip["scores"][label][method] for clip in clips if method in clip["scores"][label]]
        if len(scores) < len(clips):  # measured on some clips only: a mean beside means of all would mislead
            continue
        rows.append([method, *(_cell(average(s[field] for s in scores), digits) for field, _, digits in _COLUMNS)])
    return _table(["method", *(heading for _, heading, _ in _COLUMNS)], rows)


def _per_clip(clips: Sequence[dict[str, Any]], label: str) -> list[str]:
    rows = []
    for clip in clips:
        for method, scores in clip["scores"][label].items():
            rows.append([clip["name"], method, *(_cell(scores[field], digits) for field, _, digits in _COLUMNS)])
    return _table(["clip", "method", *(heading for _, heading, _ in _COLUMNS)], rows)


def summary(clips: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The questions that an evaluation answers, each with its figure."""
    lines: list[tuple[str, str]] = []
    for label in clips[0]["scores"]:
        present = {name for clip in clips for name in clip["scores"][label]}
        for method in ("4 steps", "2 steps", "1 step"):
            if method not in present:
                continue
            better = sum(
                clip["scores"][label][method]["stlpips"] < clip["scores"][label]["bicubic"]["stlpips"] for clip in clips
            )
            text = (
                f"ST-LPIPS {_cell(gain(clips, label, method, 'stlpips', 'bicubic'), 1)} % lower "
                f"(lower on {better} of {len(clips)} clips), "
                f"PSNR {_signed(difference(clips, label, method, 'psnr', 'bicubic'), 2)} dB, "
                f"VMAF-NEG {_signed(difference(clips, label, method, 'vmaf_neg', 'bicubic'), 2)}"
            )
            lines.append((f"{label}: {method} against bicubic", text))
        if "4 steps" in present:
            first, tenth = (
                _cell(gain(clips, label, "4 steps", field, "bicubic"), 1)
                for field in ("stlpips_first", "stlpips_tenth")
            )
            text = f"ST-LPIPS {first} % and {tenth} % lower than bicubic"
            lines.append((f"{label}: first and tenth frame", text))
        moving = [clip for clip in clips if clip["moving"]]
        if moving and {"4 steps", "per frame"} <= present:
            text = (
                f"WarpErr {_cell(gain(moving, label, '4 steps', 'warp_error', 'per frame'), 1)} % lower, "
                f"sharpness {_signed(difference(moving, label, '4 steps', 'sharpness', 'per frame'), 3)}, "
                f"ST-LPIPS {_cell(gain(moving, label, '4 steps', 'stlpips', 'per frame'), 1)} % lower"
            )
            lines.append((f"{label}: with guidance against per frame, {len(moving)} moving clips", text))
    return lines


def _signed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:+.{digits}f}"


def _model_in_name(model: dict[str, Any] | None) -> str:
    """Return nothing for the default model, the name of another built-in one, and name and weights of all others."""
    from pipeline.model_source import built_in_models

    if model is None or model["source"] == _DEFAULT_MODEL:
        return ""
    if model["source"] in built_in_models():
        return f"-{model['source']}"
    name = re.sub(r"\W+", "-", Path(model["source"]).name).strip("-").lower() or "model"
    return f"-{name}-{model['sha256'][:8]}"


def write_report(folder: Path, document: dict[str, Any], *, quick: bool = False) -> Path:
    """Writes `quality-<date>-<hardware>.json` and `.md` and returns the path of the latter.

    Models other than the default one are named before the date.
    """
    machine = document["machine"]
    hardware = re.sub(r"\W+", "-", machine["gpu"] or f"{machine['cores']}-core cpu").strip("-").lower()
    kind = "baseline" if document["model"] is None else "quick" if quick else "quality"
    path = folder / f"{kind}{_model_in_name(document['model'])}-{document['date'][:10]}-{hardware}.md"
    clips = document["clips"]
    document = {**document, "command": "upriver " + shlex.join(["evaluate", *_typed()]), "summary": summary(clips)}
    model = document["model"]
    lines = [
        "# Quality on held-out clips",
        "",
        f"- date: {document['date']}; command: `{document['command']}`; {document['minutes']} minutes",
        f"- machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores; torch {machine['torch']}",
        "- model: " + ("none" if model is None else f"`{model['source']}`, fingerprint `{model['sha256'][:16]}`"),
        f"- {document['frames']} frames per clip, {document['dtype']}, seed {document['seed']}",
        "- definitions of the measures: `pipeline/metrics.py`; clips and their licences: `jobs/heldout.py`, NOTICE",
        "",
        *_table(["comparison (means over clips)", "result"], document["summary"]),
    ]
    for label in clips[0]["scores"]:
        lines += [f"## {label}: mean of {len(clips)} clips", "", *_averages(clips, label)]
    moving = [clip for clip in clips if clip["moving"]]
    if moving:
        label = next(iter(clips[0]["scores"]))
        names = ", ".join(clip["name"] for clip in moving)
        lines += [f"## {label}: mean of the moving clips ({names})", "", *_averages(moving, label)]
    for label in clips[0]["scores"]:
        lines += [f"## {label}: every clip", "", *_per_clip(clips, label)]
    rows = [[c["name"], c["package"] or "own", c["size"], str(c["frames"]), _cell(c["motion"], 2)] for c in clips]
    lines += ["## Clips", "", *_table(["clip", "package", "size", "frames", "motion, pixels per frame"], rows)]
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _typed() -> list[str]:
    """What was typed after the command's name; nothing when it was called as a function."""
    return sys.argv[2:] if len(sys.argv) > 1 and sys.argv[1] == "evaluate" else []


def _kind(label: str) -> str:
    return "h264" if "264" in label else "bicubic"


def write_strip(folder: Path, clip: Clip, label: str, method: str, lr_T3HW: Tensor, restored_T3HW: Tensor) -> None:
    """Keeps what pictures need of one restoration: all frames, as PNG files below `folder/frames`."""
    from PIL import Image

    from pipeline.degrade import to_uint8

    place = folder / "frames" / clip.excerpt.name / _kind(label)
    place.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Tensor] = {"Upriver" if method != "bicubic" else "bicubic": restored_T3HW}
    if method == "bicubic":
        panels |= {"original": clip.truth_T3HW, "low resolution": lr_T3HW}
    for panel, x_T3HW in panels.items():
        for number, picture in enumerate(to_uint8(x_T3HW)):
            Image.fromarray(picture).save(place / f"{panel}-{number:03d}.png", compress_level=1)


def assemble_pictures(folder: Path, excerpts: Sequence[Excerpt]) -> list[Path]:
    """Turns the kept frames into `strip-*.png` (one row per clip) and `side-by-side.mp4`; removes the frames.

    A strip shows the detail of the last frame, twice enlarged: low resolution | bicubic | Upriver | original.
    """
    import shutil

    written = []
    kept = folder / "frames"
    for kind in ("bicubic", "h264"):
        rows = [_strip_row(kept / e.name / kind, e) for e in excerpts if (kept / e.name / kind).is_dir()]
        if rows:
            written.append(folder / f"strip-{kind}.png")
            _stack(rows, vertical=True).save(written[-1], optimize=True)
    shown = next((e for e in excerpts if (kept / e.name / "bicubic" / "Upriver-000.png").is_file()), None)
    if shown is not None:
        written.append(folder / "side-by-side.mp4")
        _video(kept / shown.name / "bicubic", written[-1])
    shutil.rmtree(kept, ignore_errors=True)
    return written


def _panels(place: Path, number: int, cut: Callable[[Image], Image]) -> list[Image]:
    from PIL import Image as Images

    panels = []
    for panel in _PANELS:
        path = place / f"{panel}-{number:03d}.png"
        if not path.is_file():
            continue
        picture: Image = Images.open(path)
        if panel == "low resolution":
            picture = picture.resize((picture.width * 4, picture.height * 4), Images.Resampling.NEAREST)
        panels.append(_label(cut(picture), panel))
    return panels


def _strip_row(place: Path, excerpt: Excerpt) -> Image:
    from PIL import Image as Images

    last = max(int(p.stem[-3:]) for p in place.glob("original-*.png"))

    def cut(picture: Image) -> Image:
        width, height = min(_DETAIL[0], picture.width), min(_DETAIL[1], picture.height)
        left, top = excerpt.detail or ((picture.width - width) // 2, (picture.height - height) // 2)
        part = picture.crop((left, top, left + width, top + height))
        return part.resize((width * 2, height * 2), Images.Resampling.BICUBIC)

    return _stack(_panels(place, last, cut), vertical=False)


def _label(picture: Image, text: str) -> Image:
    from PIL import ImageDraw

    picture = picture.convert("RGB")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((6, 4), text)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=(0, 0, 0))
    draw.text((6, 4), text, fill=(255, 255, 255))
    return picture


def _stack(pictures: Sequence[Image], *, vertical: bool) -> Image:
    from PIL import Image as Images

    sizes = [p.size for p in pictures]
    width = max(w for w, _ in sizes) if vertical else sum(w for w, _ in sizes)
    height = sum(h for _, h in sizes) if vertical else max(h for _, h in sizes)
    whole = Images.new("RGB", (width, height))
    left = top = 0
    for picture in pictures:
        whole.paste(picture, (left, top))
        left, top = (left, top + picture.height) if vertical else (left + picture.width, top)
    return whole


def _video(place: Path, target: Path, fps: int = 12, loops: int = 3) -> None:
    """A 2x2 video of the four panels, repeated so that short excerpts can be looked at."""
    import av
    import numpy as np

    count = len(list(place.glob("original-*.png")))
    with av.open(str(target), "w") as container:
        stream = None
        for number in [*range(count)] * loops:
            four = _panels(place, number, lambda picture: picture)
            rows = [_stack(four[:2], vertical=False), _stack(four[2:], vertical=False)]
            picture = np.asarray(_stack(rows, vertical=True))
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = picture.shape[0], picture.shape[1], "yuv420p"
                stream.options = {"crf": "20", "preset": "slow", "threads": "1"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode(None))
