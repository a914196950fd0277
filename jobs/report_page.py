"""The page of `upriver report`: from figures to one HTML file that needs nothing else.

Everything that comes from outside (names, messages) goes through the template engine, which escapes it; besides, the
page forbids itself every script and style but its own. Knows nothing of where the figures came from.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.forecast import duration
from jobs.observation import moment
from jobs.report import FailureRow, Report, VideoRow

MOST_BYTES = 4_500_000
_MOST_ROWS = (2000, 1000, 500, 200)  # tried in this order until the page is small enough
_STATUSES = {
    "restored": "restored",
    "damaged": "restored from damaged sources",
    "failed": "failed",
    "running": "begun",
    "waiting": "waiting",
}
_COLUMNS = (
    ("video", False), ("status", False), ("frames", True), ("duration", True), ("source", True), ("result", True),
    ("picture", False), ("speed", True), ("notes", False),
)  # fmt: skip
_NOTES, _NOTE_CHARACTERS, _NAME_CHARACTERS = 3, 160, 160


def render(report: Report) -> str:
    """Return the page, of at most five million bytes: with many videos only some get a row of their own."""
    page = ""
    for most in _MOST_ROWS:
        page = _render(report, most)
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _render(report: Report, most_rows: int) -> str:
    css, js = (files("jobs").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "shown": shown, "number": _number, "duration": duration, "moment": _moment, "cell": _cell, "notes": _notes,
        "steadiness": _steadiness, "percent": _percent,
    }  # fmt: skip
    template = environment.from_string(files("jobs").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    shares = _shares(report)
    return template.render(
        report=report,
        css=Markup(css),
        js=Markup(js),
        css_hash=_hash(css),
        js_hash=_hash(js),
        version=version("upriver"),
        state=report.state,
        state_class={"finished": "finished", "running": "running", "planning": "running"}.get(report.state, "stopped"),
        shares=shares,
        shares_label=", ".join(f"{part['count']} {part['words']}" for part in shares) or "no videos",
        cards=_cards(report),
        chart=_chart(report.throughput),
        judged_of=report.count("restored", "damaged"),
        failures=_some_failures(report, most_rows // 2),
        failure_classes=Counter(one.failure_class for one in report.failures).most_common(),
        columns=_COLUMNS,
        rows=_some_rows(report, most_rows),
    )


def shown(text: str, most: int = _NAME_CHARACTERS) -> str:
    """Return a name or message as a page may show it: no control or direction characters, cut in the middle if long."""
    plain = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in str(text))
    return plain if len(plain) <= most else f"{plain[: most // 2]}…{plain[-most // 2 :]}"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _some_rows(report: Report, most: int) -> list[VideoRow]:
    if len(report.videos) <= most:
        return report.videos
    urgent = {"failed": 0, "damaged": 1, "running": 2}
    chosen = sorted(report.videos, key=lambda video: (urgent.get(video.status, 3), video.name))[:most]
    return sorted(chosen, key=lambda video: video.name)


def _some_failures(report: Report, most: int) -> list[FailureRow]:
    return report.failures[:most]


def _shares(report: Report) -> list[dict[str, Any]]:
    """The bar of how many videos have which status; an existing share is never too thin to be seen."""
    counts = {status: report.count(status) for status in _STATUSES}
    present = {status: count for status, count in counts.items() if count}
    total = sum(present.values())
    widths = {status: max(6.0, 1000 * count / total) for status, count in present.items()}
    parts, x = [], 0.0
    for status, count in present.items():
        width = 1000 * widths[status] / sum(widths.values())
        parts.append(
            {"status": status, "words": _STATUSES[status], "count": count, "x": f"{x:.1f}", "width": f"{width:.1f}"}
        )
        x += width
    return parts


@dataclass(frozen=True, slots=True)
class _Card:
    title: str
    value: str
    unit: str = ""
    note: str = ""


def _cards(report: Report) -> list[_Card]:
    done = [video for video in report.videos if video.status in ("restored", "damaged")]
    frames = sum(video.frames or 0 for video in done)
    known = [video.duration_s for video in done if video.duration_s is not None]
    worker_s = sum(video.worker_s or 0 for video in done)
    model_s = sum(video.model_s or 0 for video in done)
    devices = Counter("GPU" if video.device.startswith("cuda") else "CPU" for video in done if video.device)
    kind = " and ".join(sorted(devices, reverse=True)) or "worker"
    source, result = (sum(getattr(v, f) or 0 for v in done) for f in ("source_bytes", "result_bytes"))
    finished = _Card("Videos", _number(len(done)), note=f"restored, of {_number(len(report.videos))}")
    cards = [finished, _Card("Footage", *_hours(sum(known)), note=_of_known(len(known), len(done)))]
    cards.append(_Card("Frames", _number(frames), note="restored"))
    last = "of the last run" if report.started_at else "from the first video to the last"
    if report.wall_s:
        cards.append(_Card("Wall time", duration(report.wall_s), note=last))
    if report.mean_fps:
        cards.append(_Card("Mean speed", _fps(report.mean_fps), "fps", "all workers together, start-up included"))
    if worker_s:
        share = f"{duration(model_s)} of it in the model" if model_s else ""
        cards.append(_Card(f"{kind} time", duration(worker_s), note=share))
        cards.append(_Card("Speed of a worker", _fps(frames / worker_s), "fps", "while it works on a video"))
    cards.append(_Card("Data", size(result), note=f"from {size(source)}"))
    return cards


def _of_known(known: int, of: int) -> str:
    return "of restored video" if known == of else f"known of {_number(known)} of {_number(of)} videos"


def _hours(seconds: float) -> tuple[str, str]:
    if seconds < 100:
        return f"{seconds:.1f}", "s"
    return (f"{seconds / 60:.1f}", "min") if seconds < 6000 else (f"{seconds / 3600:,.1f}", "h")


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _fps(value: float) -> str:
    return f"{value:.2f}" if value < 100 else _number(value)


def size(size_bytes: float) -> str:
    """Return a size as a person says it, in powers of ten: `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 99.5 else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _moment(stamp: str) -> str:
    return moment(stamp).strftime("%Y-%m-%d %H:%M UTC")


_KINDS = {"number": _number, "clock": _clock, "size": size, "fps": lambda value: f"{_fps(value)} fps"}


def _cell(value: float | None, kind: str) -> Markup:
    if value is None:
        return Markup('<td class="n"></td>')
    return Markup('<td class="n" data-v="{}">{}</td>').format(f"{value:.10g}", _KINDS[kind](value))


def _notes(video: VideoRow) -> Markup:
    notes = [*(f"damage: {text}" for text in video.damage), *video.warnings]
    told = [Markup("<p>{}</p>").format(shown(text, _NOTE_CHARACTERS)) for text in notes[:_NOTES]]
    if len(notes) > _NOTES:
        told.append(Markup("<p>and {} more</p>").format(len(notes) - _NOTES))
    return Markup("").join(told)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def _steadiness(share: float) -> str:
    return "no motion to judge steadiness by" if math.isnan(share) else f"{_percent(share)} steady"


def _chart(throughput: list[tuple[float, float]]) -> dict[str, Any] | None:
    """Positions of everything in the picture of the throughput; None without at least two stretches."""
    if len(throughput) < 2:
        return None
    width, height, left, right, top, bottom = 1000, 260, 64, 990, 24, 222
    step_s = throughput[1][0] - throughput[0][0]
    end = throughput[-1][0] + step_s
    highest = max(fps for _, fps in throughput)
    y_step = _nice(highest / 4) if highest else 1.0
    y_top = y_step * max(1, math.ceil(highest / y_step))
    x_unit, x_words = next(
        (u, w) for u, w in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if end >= 2 * u or u == 1
    )
    x_step = _nice(end / x_unit / 6) * x_unit

    def x_at(seconds: float) -> float:
        return round(left + (right - left) * seconds / end, 1)

    def y_at(fps: float) -> float:
        return round(bottom - (bottom - top) * fps / y_top, 1)

    # A stretch is drawn as a step: its rate holds from its start to its end.
    steps = [f"{x_at(at)},{y_at(fps)} {x_at(at + step_s)},{y_at(fps)}" for at, fps in throughput]
    mean = sum(fps for _, fps in throughput) / len(throughput)
    digits = max(0, -math.floor(math.log10(y_step))) if y_step < 1 else 0
    return {
        "width": width, "height": height, "left": left, "right": right, "bottom": bottom,
        "line": "M" + " L".join(steps),
        "area": f"M{x_at(throughput[0][0])},{bottom} L" + " L".join(steps) + f" L{x_at(end)},{bottom} Z",
        "mean_at": y_at(mean) if mean else None,
        "mean": _fps(mean),
        "y_ticks": [
            {"at": y_at(k * y_step), "words": f"{k * y_step:.{digits}f}"} for k in range(round(y_top / y_step) + 1)
        ],
        "x_ticks": [
            {"at": x_at(k * x_step), "words": f"{k * x_step / x_unit:g} {x_words}"}
            for k in range(math.floor(end / x_step + 1e-9) + 1)
        ],
        "words": f"{_fps(mean)} frames per second on average over {duration(end)}, at most {_fps(highest)}. "
        "Start-up and the last, unevenly loaded minutes are included.",
    }  # fmt: skip


def _nice(value: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
