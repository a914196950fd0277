"""The list of rows that want a GPU can be run as it stands, as far as the time goes, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks.gpu_rows import HEADING, main, rows
from jobs.bench import app


def test_every_row_is_a_command_that_exists(repository: Path) -> None:
    found = rows()
    assert len(found) >= 10 and [row.number for row in found] == list(range(1, len(found) + 1))
    for row in found:
        words = row.argv[1:]
        assert words[0] == "-m", row.command
        if words[1] == "jobs.cli":
            assert words[2] == "bench"
            assert get_command(app).make_context("bench", words[3:]).params["save"] == Path("benchmarks"), row.command
        elif words[1] == "pytest":
            assert [word for word in words if word.startswith("tests/") and not (repository / word).exists()] == []
        else:
            assert (repository / f"{words[1].replace('.', '/')}.py").is_file(), row.command


@pytest.fixture
def page(tmp_path: Path) -> Path:
    table = [
        ("good", f"`make it` or `python -c \"open('{tmp_path}/ran', 'a').write('1')\"`"),
        ("bad", "`python -c \"import sys; print('no GPU'); sys.exit(3)\"`"),
        ("endless", '`python -c "import time; time.sleep(60)"`'),
        ("other", "`upriver bench --against ../no-such-checkout`"),
    ]
    lines = [HEADING, "", "| what | target | command |", "|---|---|---|"]
    path = tmp_path / "gpu.md"
    path.write_text("\n".join(lines + [f"| {what} | | {command} |" for what, command in table]) + "\n\nmore\n")
    return path


def test_what_fails_stops_nothing_and_what_is_done_is_not_repeated(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--minutes", "0.05"], page=page, out=out) == 1
    told = capsys.readouterr().out
    assert "1  done" in told and "2  exit status 3, see 2.log" in told and "3  stopped after" in told
    assert "4  no time" in told
    assert "no GPU" in (out / "gpu_rows" / "2.log").read_text()
    assert next(iter(json.loads((out / "gpu_rows.json").read_text()).values())) == "done"

    assert main(["--minutes", "0.05", "--only", "4"], page=page, out=out) == 1
    assert "../no-such-checkout is missing" in capsys.readouterr().out
    main(["--minutes", "0.03"], page=page, out=out)
    assert (tmp_path / "ran").read_text() == "1", "a row that is done is not run again"
    assert main(["--only", "1"], page=page, out=out) == 0 and (tmp_path / "ran").read_text() == "11"
    capsys.readouterr()
    assert main(["--list"], page=page, out=out) == 0
    assert " 1  done " in capsys.readouterr().out
