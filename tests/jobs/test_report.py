from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from jobs.observation import read_manifests
from jobs.report import FailureRow, Judged, Report, VideoRow, collect, sample_names, write_report
from jobs.report_page import render, shown, size
from pipeline.video import EncoderOptions, VideoReader, VideoWriter, probe
from tests.video_files import picture
from tests.work_area import Job

FRAMES = 30


def make_source(path: Path) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(FRAMES):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
        output.mux(stream.encode(None))


def make_result(source: Path, result: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    import cv2

    info = probe(source)
    result.parent.mkdir(parents=True, exist_ok=True)
    options = EncoderOptions(preset="ultrafast", threads=1)
    with (
        VideoReader(source, info=info, threads=1) as reader,
        VideoWriter(result, info, width=384, height=256, options=options, source_path=source) as writer,
    ):
        for frame in reader:
            large = cv2.resize(frame.rgb_HWC, (384, 256), interpolation=cv2.INTER_CUBIC).astype(np.float64)
            writer.write(replace(frame, rgb_HWC=change(large).clip(0, 255).astype(np.uint8)))
        writer.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three results (one boils, one has other colours), a failure, and a report of the driver's."""
    root = tmp_path_factory.mktemp("archive")
    names = ["boils.mp4", "colours.mp4", "deep/good.mp4", "empty.mp4"]
    job = Job(str(root / "out"), dict.fromkeys(names, [FRAMES]), source=str(root / "in"))  # noqa: RUF024 - never changed
    chance = np.random.default_rng(1)
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "boils.mp4": lambda x: x + chance.normal(0, 40, x.shape),
        "colours.mp4": lambda x: x * (0.8, 1.0, 1.0),
        "deep/good.mp4": lambda x: x,
    }
    for name, change in changes.items():
        make_source(root / "in" / name)
        make_result(root / "in" / name, root / "out" / name, change)
        job.write_result(name, content=None)
    job.write_result("colours.mp4", content=None, damage=["a packet is incomplete"], warnings=["no chapters in MP4"])
    job.write_failure("empty.mp4", attempt=1, final=False)
    job.write_failure("empty.mp4", attempt=2)
    job.write_failure("deep/good.mp4", failure_class="lost-actor")  # of an earlier run: it was restored since
    job.write_job("finished", exit_code=4)
    job.write_progress(frames_left=0, frames_done=90, history=[(0.0, 0), (20.0, 0), (40.0, 60), (50.0, 90)])
    return job


class Parser(HTMLParser):
    """Collects what a page would load, and checks that its elements are closed."""

    VOID = frozenset({"meta", "img", "input", "br", "rect", "line", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_says_what_happened_and_loads_nothing(job: Job, tmp_path: Path) -> None:
    before = sorted(str(path) for path in Path(job.dst).rglob("*"))
    assert main(["report", job.dst, "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    parsed = Parser(page)
    assert parsed.open == []
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in parsed.addresses)
    assert "url(" not in page and "@import" not in page
    assert len(re.findall('src="data:', page)) == 4  # two videos, source and result: too small for a detail
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "2 restored",
        "1 restored from damaged sources",
        "1 failed",
        "empty.mp4 is empty (0 bytes)",
        "no chapters",
    ):
        assert words in text, words
    assert sorted(str(path) for path in Path(job.dst).rglob("*")) == before


def test_the_worst_and_the_median_are_shown(job: Job) -> None:
    report = collect(job.dst)
    assert [one.name for one in report.judged] == ["boils.mp4", "colours.mp4", "deep/good.mp4"]
    boils, colours, good = report.judged
    assert good.agreement_db > 35 and good.steadiness > 0.6
    assert boils.steadiness < 0.3 and colours.agreement_db < good.agreement_db - 10
    assert [(one.label, one.judged.name) for one in report.shown] == [
        ("Lowest score", "boils.mp4"),
        ("Median score", "colours.mp4"),
    ]
    for still in report.shown[0].pictures.whole:
        assert (still.width, still.height) == (384, 256)


def test_figures(job: Job) -> None:
    report = collect(job.dst, samples=0)
    assert (report.count("restored"), report.count("damaged"), report.count("failed")) == (2, 1, 1)
    assert report.total("frames") == 3 * FRAMES and report.total("duration_s") == pytest.approx(3 * FRAMES / 25)
    assert [(one.name, one.attempts) for one in report.failures] == [("empty.mp4", 2)]
    assert report.shown == [] and report.judged == []
    assert sum(fps for _, fps in report.throughput) / len(report.throughput) == pytest.approx(90 / 50)


def test_json_has_every_row(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", job.dst, "-o", str(tmp_path / "r.html"), "--json", "--samples", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [video["name"] for video in told["videos"]] == ["boils.mp4", "colours.mp4", "deep/good.mp4", "empty.mp4"]
    assert told["videos"][3]["status"] == "failed" and len(told["judged"]) == 1


def test_without_any_record_of_the_job_manifests_suffice(job: Job, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(job.dst, tmp_path / "out", ignore=shutil.ignore_patterns(".upriver"))
    report = collect(str(tmp_path / "out"), samples=1)
    assert [video.name for video in report.videos] == ["boils.mp4", "colours.mp4", "deep/good.mp4"]
    assert report.throughput and report.wall_s is not None and len(report.judged) == 1


def test_a_source_that_is_gone_is_named(job: Job, tmp_path: Path) -> None:
    own = Job(str(tmp_path / "out"), {"a.mp4": [5]}, source=str(tmp_path / "in"))
    own.write_result("a.mp4")
    report = collect(own.dst)
    assert report.not_judged == ["a.mp4"] and "Not to be read for judging" in render(report)


def test_a_running_job(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "out"), {"a.mp4": [50], "b.mp4": [50], "c.mp4": [50]})
    job.write_job(skipped=["c.mp4"])
    job.write_plan("a.mp4")
    job.write_segment("a.mp4", 0, 0)
    job.write_progress(running={"a.mp4": 10}, frames_done=10)
    report = collect(job.dst)
    assert [(video.name, video.status, video.frames) for video in report.videos] == [
        ("a.mp4", "running", 50),
        ("b.mp4", "waiting", None),
    ]
    assert "running" in render(report)


def test_a_single_file(job: Job, tmp_path: Path) -> None:
    source, result = Path(job.source, "deep/good.mp4"), tmp_path / "film.mp4"
    result.write_bytes(Path(job.destination("deep/good.mp4")).read_bytes())
    one = Job(str(result), {"good.mp4": [FRAMES]}, source=str(source.parent), is_folder=False)
    one.write_result("good.mp4", content=None)
    report = collect(one.dst)
    assert [video.name for video in report.videos] == ["film.mp4"] and len(report.shown) == 1


def test_a_report_never_replaces_a_result(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path(job.destination("boils.mp4"))
    before = place.read_bytes()
    assert main(["report", job.dst, "-o", str(place)]) == 2
    assert place.read_bytes() == before and "is a restored video" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path) -> None:
    assert main(["report", str(tmp_path / "none"), "-o", str(tmp_path / "r.html")]) == 5
    assert not (tmp_path / "r.html").exists()


def test_ten_thousand_videos_with_long_names_fit_on_the_page() -> None:
    hostile = "<\"&'>" * 60
    videos = [
        VideoRow(
            f"{k:05d}{hostile}",
            "failed" if k % 4 == 0 else "restored",
            *(1000, 40.0, 10**9, 10**10, 2880, 2304, 300.0, 250.0, 3.3, "cuda:0"),
            damage=[hostile * 4] * 9,
        )
        for k in range(10_000)
    ]
    failures = [FailureRow(v.name, "decode", hostile * 4, hostile, 3, "h", "t") for v in videos if v.status == "failed"]
    report = Report(
        *("s3://b/out", "s3://b/in", "tiny", "2026-01-01T00:00:00Z", "finished", "2026-01-01T00:00:00Z", 1e6, 5.0),
        *(videos, failures, [(10.0 * k, 5.0) for k in range(60)], [Judged("a", 1, 1, 1, 1)], [], []),
    )
    page = render(report)
    assert len(page.encode()) < 5_000_000
    assert (
        "of 10\N{NARROW NO-BREAK SPACE}000 videos are listed" in page and "of 2\N{NARROW NO-BREAK SPACE}500 are" in page
    )
    short = render(replace(report, videos=[replace(v, name=v.name[:5], damage=[]) for v in videos], failures=[]))
    assert short.count('<tr data-s="') == 2000


def test_samples_are_spread_and_hold_damaged_videos(job: Job, tmp_path: Path) -> None:
    many = Job(str(tmp_path / "out"), {f"{k:03d}.mp4": [5] for k in range(100)})
    for k, name in enumerate(many.videos):
        many.write_result(name, damage=["hole"] if k in (7, 8) else [])
    places = [f"{many.destination(name)}.manifest.json" for name in many.videos]
    found = {Path(place).name[:7]: manifest for place, manifest in read_manifests(places).items()}
    names = sample_names(found, 6)
    assert len(names) == 6 and {"007.mp4", "008.mp4"} < set(names)
    assert max(names) > "080" and sample_names(found, 6) == names and len(sample_names(found, 500)) == 100
    assert sample_names(found, 0) == []


def test_names_are_shown_without_tricks() -> None:
    assert shown("a\x1b[2J\u202eb") == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b"
    assert len(shown("x" * 500)) == 161


@pytest.mark.parametrize(
    ("bytes_", "text"), [(0, "0 B"), (999, "999 B"), (3_400_000, "3.4 MB"), (2 * 10**12, "2.0 TB")]
)
def test_sizes(bytes_: int, text: str) -> None:
    assert size(bytes_) == text


def test_write_report_is_what_other_commands_call(job: Job, tmp_path: Path) -> None:
    report = write_report(job.dst, tmp_path / "deep" / "r.html", samples=0)
    assert (tmp_path / "deep" / "r.html").exists() and report.destination == job.dst
