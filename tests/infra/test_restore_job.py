"""What may be asked for over the network, and that nothing else gets into a command."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.main import get_command

from infra.refusals import BadMessage, Forbidden, Refusal
from infra.restore_job import JobOptions, JobRules

RULES = JobRules(
    sources=("s3://tapes/in/", "s3://shared/{tenant}/", "/films"),
    destinations=("s3://tapes/out/{tenant}",),
    models=("tiny", "hub/model"),
)
SOURCE, DESTINATION = "s3://tapes/in/a.mov", "s3://tapes/out/ann/a.mp4"
EVERYTHING = JobOptions(
    model="hub/model", steps=2, seed=3, height=720, codec="hevc", crf=20, preset="slow", pix_fmt="yuv420p10",
    fragmented=True, framemd5=False, hls="720,480", cuts=False, overwrite=True,
)  # fmt: skip


def parsed(command: list[str]) -> dict[str, object]:
    """What `upriver` understands; also what a shell makes of it, because Ray starts commands through one."""
    from jobs.cli import app

    assert shlex.split(shlex.join(command)) == command
    assert command[:4] == ["python", "-m", "jobs.cli", "restore"]
    parser = get_command(app).commands["restore"]  # type: ignore[attr-defined]
    return dict(parser.make_context("upriver restore", command[4:]).params)


def test_a_job_is_the_command_that_a_person_would_type() -> None:
    params = parsed(RULES.command("ann", SOURCE, DESTINATION, EVERYTHING))
    assert (params["src"], params["dst"]) == (SOURCE, DESTINATION)
    for name, value in EVERYTHING.model_dump().items():
        assert params[name] == (str(value) if name == "steps" else value), name  # "auto" is a number of steps too
    plain = parsed(["python", "-m", "jobs.cli", "restore", SOURCE, DESTINATION])
    assert parsed(RULES.command("ann", SOURCE, DESTINATION, JobOptions())) == plain


def test_steps_may_be_left_to_the_policy() -> None:
    asked = JobOptions.model_validate_json('{"steps": "auto"}')
    assert parsed(RULES.command("ann", SOURCE, DESTINATION, asked))["steps"] == "auto"
    for wrong in ('{"steps": "automatic"}', '{"steps": 0}', '{"steps": 51}', '{"steps": "auto --overwrite"}'):
        with pytest.raises(ValidationError):
            JobOptions.model_validate_json(wrong)


@pytest.mark.parametrize(
    "source", ["s3://tapes/in", "s3://tapes/in/", "s3://tapes/in/deep/er", "/films/a.mov", "/films"]
)
def test_places_under_the_prefixes_are_allowed(source: str) -> None:
    assert RULES.command("ann", source, DESTINATION, JobOptions())[-2:] == [source, DESTINATION]


@pytest.mark.parametrize(
    ("source", "destination", "code"),
    [
        ("s3://tapes-of-others/in/a.mov", DESTINATION, "job-source"),
        ("s3://tapes/in-of-others/a.mov", DESTINATION, "job-source"),
        ("s3://tapes/a.mov", DESTINATION, "job-source"),
        ("s3://shared/bob/a.mov", DESTINATION, "job-source"),
        ("s3://shared/{tenant}/a.mov", DESTINATION, "job-source"),
        ("/etc/passwd", DESTINATION, "job-source"),
        ("/filmsx/a.mov", DESTINATION, "job-source"),
        (SOURCE, "s3://tapes/out/bob/a.mp4", "job-destination"),
        (SOURCE, "s3://tapes/out/annex/a.mp4", "job-destination"),
        (SOURCE, "s3://tapes/in/a.mp4", "job-destination"),
    ],
)
def test_others_are_forbidden_and_the_allowed_ones_named(source: str, destination: str, code: str) -> None:
    with pytest.raises(Forbidden) as caught:
        RULES.command("ann", source, destination, JobOptions())
    assert caught.value.code == code and "s3://tapes/" in caught.value.limit and "bob" not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "", "-", "--config=/etc/passwd", "a.mov", "films/a.mov", "../a.mov", "/films/../etc/passwd", "/films/./a",
        "/films//a", "s3://tapes/in/../secret", "s3:///in", "s3://", "file:///films/a.mov", "http://10.0.0.1/a.mov",
        "S3://tapes/in/a", "s3://tapes/in/*.mov", "s3://tapes/in/a?.mov", "s3://tapes/in/[a].mov", "/films/.upriver",
        "s3://tapes/in/a\nb", "s3://tapes/in/a\0b", " s3://tapes/in/a", "s3://tapes/in/a ", "s3://tapes/in/--overwrite",
        "s3://tapes/in/a.upriver/x", "s3://tapes/in/list.csv", "s3://tapes/in/list.JSONL", "s3://tapes/in/l.parquet/",
        "s3://tapes/in/" + "x" * 2000, "https://key:sesame@tapes/in/a.mov",
    ],
)  # fmt: skip
def test_what_could_be_taken_for_something_else_is_refused(place: str) -> None:
    with pytest.raises(BadMessage) as caught:
        RULES.command("ann", place, DESTINATION, JobOptions())
    assert "sesame" not in str(caught.value)


def test_nothing_is_allowed_by_itself() -> None:
    with pytest.raises(Forbidden):
        JobRules().command("ann", SOURCE, DESTINATION, JobOptions())
    for tenant in ("", "..", "ann/../bob", "a/b"):
        for destination in (f"s3://tapes/out/{tenant}/a.mp4", "s3://tapes/out/x", "s3://tapes/out/ann/a.mp4"):
            with pytest.raises((Forbidden, BadMessage)):
                RULES.command(tenant, SOURCE, destination, JobOptions())
    with pytest.raises(Forbidden) as caught:
        RULES.command("ann", SOURCE, DESTINATION, JobOptions(model="s3"))
    assert caught.value.code == "job-model"


@pytest.mark.parametrize("prefix", ["", "s3://", "/", "films", "http://host/", "file:///films"])
def test_prefixes_that_allow_everything_or_nothing_are_no_settings(prefix: str) -> None:
    with pytest.raises(ValidationError):
        JobRules(sources=(prefix,))


@pytest.mark.parametrize(
    "options",
    [
        {"config": "/etc/passwd"}, {"plan": "x"}, {"device": "cpu"}, {"model": "--debug"}, {"model": "a b"},
        {"model": ";ls"}, {"codec": "h264 --debug"}, {"crf": "--debug"}, {"hls": "720;480"}, {"hls": "721"},
        {"seed": -1}, {"height": 8},
        {"scale": 2, "height": 720}, {"overwrite": "--debug"},
    ],
)  # fmt: skip
def test_options_are_a_closed_set(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        JobOptions(**options)  # type: ignore[arg-type]


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "s3://tapes/in/", "s3://tapes/in", "/films/", "-", "s3://"]))
def test_whatever_is_asked_for_is_refused_or_is_one_argument_behind_all_options(rest: str, start: str) -> None:
    try:
        command = RULES.command("ann", start + rest, DESTINATION, EVERYTHING)
    except Refusal:
        return
    assert command[-3:] == ["--", start + rest, DESTINATION] and shlex.split(shlex.join(command)) == command
    assert (start + rest).startswith(("s3://tapes/in", "/films")) and ".." not in (start + rest).split("/")
