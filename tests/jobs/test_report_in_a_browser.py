"""The report as a browser shows it: its script runs under its own security policy, nothing of a file name does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from tests.browser import Page, browser, chromium
from tests.work_area import Job

HOSTILE = ["<img src=x onerror=alert(1)>.mp4", "\"'><script>document.title='taken'</script>.mkv", "a\u202e4pm.exe"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = chromium()
    if program is None:
        pytest.skip("needs chromium")
    with browser(program, tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile names in every place, and videos with 9, 10 and 100 frames."""
    folder = tmp_path_factory.mktemp("archive")
    videos = {"b 2.mp4": [9], "b 10.mp4": [100], "a.mp4": [10], **{name: [5] for name in HOSTILE}}
    job = Job(str(folder / "out"), videos)
    for name in ("b 2.mp4", "b 10.mp4", "a.mp4"):
        job.write_result(name, warnings=[HOSTILE[0]])
    for name in HOSTILE:
        job.write_failure(name, message=f"{name} is empty.", remedy=HOSTILE[1], failure_class="<b>source</b>")
    job.write_job("finished", exit_code=4, source=HOSTILE[1], model=HOSTILE[0])
    job.write_progress(frames_left=0, frames_done=119, history=[(10.0 * k, 12 * k) for k in range(11)])
    assert main(["report", job.dst, "-o", str(folder / "report.html"), "--samples", "0"]) == 0
    return folder / "report.html"


def names(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('#list tbody tr:not([hidden]) th')].map(e => e.textContent)"))


def test_hostile_names_are_text_and_the_page_has_no_problem(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    assert page.problems == []
    assert page.run("document.title").startswith("Restoration of")
    assert page.run("document.querySelectorAll('img, script, iframe, object').length") == 1  # the page's own script
    assert HOSTILE[0] in names(page) and HOSTILE[1] in names(page)
    assert "\u202e" not in page.run("document.body.textContent")


def test_a_script_that_got_in_all_the_same_would_not_run(page: Page, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace("<main>", "<main><script>document.title='taken'</script>", 1))
    page.open(broken, width=1280)
    assert page.run("document.title") != "taken"
    assert any("Content Security Policy" in problem for problem in page.problems)
    page.problems.clear()


def test_sorting_by_numbers_and_by_names(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    click = "document.querySelectorAll('#list thead button')[{}].click()"
    page.run(click.format(2))
    assert names(page)[:3] == ["b 2.mp4", "a.mp4", "b 10.mp4"]  # 9, 10, 100; the failed have no frames
    page.run(click.format(2))
    assert names(page)[:3] == ["b 10.mp4", "a.mp4", "b 2.mp4"]
    assert page.run("document.querySelectorAll('#list thead th')[2].getAttribute('aria-sort')") == "descending"
    page.run(click.format(0))
    order = names(page)
    assert order.index("b 2.mp4") < order.index("b 10.mp4")  # numbers in names count as numbers


def test_finding_and_filtering(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    page.run("var by = (id) => document.getElementById(id)")
    page.run("by('find').value = 'B 1'; by('find').dispatchEvent(new Event('input'))")
    assert names(page) == ["b 10.mp4"] and page.run("by('count').textContent") == "1 of 6"
    page.run("by('find').value = ''; by('which').value = 'failed'; by('which').dispatchEvent(new Event('change'))")
    assert sorted(names(page)) == sorted([HOSTILE[0], HOSTILE[1], "a\N{REPLACEMENT CHARACTER}4pm.exe"])


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_nothing_sticks_out_and_colours_follow_the_reader(page: Page, report: Path, width: int, dark: bool) -> None:
    page.open(report, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(int(part) for part in paper[4:-1].split(",")) < 200) == dark
    assert page.problems == []


def test_a_keyboard_reaches_everything(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    assert page.run("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.role === 'region')")
    assert page.run("[...document.querySelectorAll('#list thead th')].every(e => e.querySelector('button'))")
    assert page.run("[...document.querySelectorAll('table')].every(e => e.querySelector('thead th[scope=col]'))")
    assert page.run("document.documentElement.lang") == "en"
