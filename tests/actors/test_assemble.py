"""From finished segments to a published result; and that a film in shots is the film in one go, without a cluster."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.assemble import Assembly, assemble_video, attempt, is_published, read_draft, write_checksum
from actors.errors import DamagedWork, SourceChanged, UnfaithfulResult
from actors.upscaler import Upscaler
from infra.errors import StorageError
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.records import VideoPlan
from jobs.sources import Item
from tests.films import frame_hashes, make_film, restore_in_one_go

SHOTS = (9, 5, 12, 7, 4, 10, 8)


def plan_of(source: Path, destination: str, **settings: Any) -> VideoPlan:
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), destination, source.name, info.size_bytes, info.version)
    chosen = {"steps": 1, "preset": "ultrafast", "segment_seconds": 0.16, **settings}
    return plan_video(item, plan_options(Settings(**chosen)), "model")


def restore(plan: VideoPlan, area: str, actors: list[Upscaler], seed: int = 0) -> None:
    """Restore every shot, in a random order, each on one of the actors."""
    if storage_for(area).is_local:
        Path(area).mkdir(parents=True, exist_ok=True)
    rows = rows_of(plan, f"{area}/segments", f"{area}/states")
    random.Random(seed).shuffle(rows)
    for number, row in enumerate(rows):
        records = list(actors[number % 2]({name: np.array([value]) for name, value in row.items()}))
        assert records[-1]["kind"][0] == "done", json.loads(records[-1]["details"][0])


def assembly_of(plan: VideoPlan, area: str, **changes: Any) -> Assembly:
    task = Assembly(
        run_id=plan.run_id, name=plan.name, source=plan.source, source_version=plan.source_version,
        destination=plan.destination, place=area, segments=f"{area}/segments",
        shots=tuple(shot.frames for shot in plan.shots), segment_frames=plan.segment_frames,
        width=plan.out_width, height=plan.out_height, deinterlace=plan.deinterlace, options=plan.options,
        max_pixels=10**7, damaged=bool(plan.damage), overwrite=False,
    )  # fmt: skip
    return dataclasses.replace(task, **changes)


@pytest.mark.parametrize("interlaced", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_film_in_shots_is_the_film_in_one_go(
    tmp_path: Path, model: Path, actors: list[Upscaler], interlaced: bool
) -> None:
    source = make_film(tmp_path / "film.mkv", SHOTS, interlaced=interlaced)
    plan = plan_of(source, str(tmp_path / "out.mkv"), codec="ffv1", pix_fmt="yuv444p")
    assert len(plan.shots) >= 6 and plan.frames == sum(SHOTS) and (plan.deinterlace == "auto") is interlaced
    restore(plan, str(tmp_path / "area"), actors)
    draft = assemble_video(assembly_of(plan, str(tmp_path / "area")))
    cuts = [shot.first_index for shot in plan.shots[1:]]
    expected = restore_in_one_go(source, tmp_path / "serial.mkv", model, cuts)
    assert frame_hashes(tmp_path / "out.mkv") == frame_hashes(expected)
    assert draft.frames == sum(SHOTS) and sum(part.frames for part in draft.parts) == sum(SHOTS)


@pytest.fixture
def ready(tmp_path: Path, actors: list[Upscaler]) -> tuple[VideoPlan, str]:
    """A film of two shots with sound whose segments are all there."""
    source = make_film(tmp_path / "film.mp4", (6, 5), sound=True)
    plan = plan_of(source, str(tmp_path / "out.mp4"))
    restore(plan, str(tmp_path / "area"), actors)
    return plan, str(tmp_path / "area")


def test_the_draft_tells_a_published_result_from_any_other(ready: tuple[VideoPlan, str], tmp_path: Path) -> None:
    plan, area = ready
    assert read_draft(area, plan.run_id) is None
    draft = assemble_video(assembly_of(plan, area))
    assert read_draft(area, plan.run_id) == draft and read_draft(area, "other") is None
    assert is_published(draft, plan.destination)
    write_checksum(plan.destination, draft)
    assert Path(f"{plan.destination}.sha256").read_text() == f"{draft.sha256}  out.mp4\n"
    # Again, as after a crash before the manifest: nothing is made anew, even without the segments.
    before = Path(plan.destination).stat().st_mtime_ns
    storage_for(area).delete(f"{area}/segments")
    assert assemble_video(assembly_of(plan, area)) == draft
    assert Path(plan.destination).stat().st_mtime_ns == before
    changed = bytearray(Path(plan.destination).read_bytes())
    changed[-1] ^= 1
    Path(plan.destination).write_bytes(bytes(changed))
    assert not is_published(draft, plan.destination)


def test_somebody_elses_file_is_not_replaced_unless_asked(ready: tuple[VideoPlan, str]) -> None:
    plan, area = ready
    Path(plan.destination).write_text("somebody's own file")
    Path(f"{plan.destination}.manifest.json").write_text("of that file")
    with pytest.raises(StorageError) as caught:
        assemble_video(assembly_of(plan, area))
    assert caught.value.code == "destination-exists"
    assert Path(plan.destination).read_text() == "somebody's own file"
    stale = (f"{plan.destination}.manifest.json",)
    assemble_video(assembly_of(plan, area, overwrite=True, stale=stale))
    assert len(frame_hashes(Path(plan.destination))) == 11
    assert not Path(stale[0]).exists()  # a manifest never stands beside another film than its own


@pytest.mark.parametrize("what", ["byte", "missing", "record"])
def test_damaged_work_is_found_and_forgotten(ready: tuple[VideoPlan, str], actors: list[Upscaler], what: str) -> None:
    plan, area = ready
    (victim,) = Path(area).glob("segments/00001-000000.*.mp4")
    if what == "byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(bytes(content))
    elif what == "missing":
        victim.unlink()
    else:
        (Path(area) / "segments" / "00001-000000.json").write_text("{}")
    with pytest.raises(DamagedWork) as caught:
        assemble_video(assembly_of(plan, area))
    assert caught.value.shots == [1] and not Path(plan.destination).exists()
    restore(plan, area, actors)
    assert assemble_video(assembly_of(plan, area)).frames == 11


def test_a_source_that_was_changed_is_not_mixed_with_what_was_made_of_it(ready: tuple[VideoPlan, str]) -> None:
    plan, area = ready
    with Path(plan.source).open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceChanged):
        assemble_video(assembly_of(plan, area))
    told = attempt(assembly_of(plan, area))
    assert told["failure"]["failure_class"] == "source-unreadable" and told["shots"] == []


def test_a_result_that_lacks_something_is_not_published(
    ready: tuple[VideoPlan, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import actors.assemble

    plan, area = ready
    whole = actors.assemble.assemble
    monkeypatch.setattr(actors.assemble, "assemble", lambda *a, **named: whole(*a, **{**named, "source": None}))
    with pytest.raises(UnfaithfulResult, match="audio"):
        assemble_video(assembly_of(plan, area))
    monkeypatch.setattr(
        actors.assemble,
        "assemble",
        lambda dst, info, files, **named: whole(dst, info, files[:-1], **{**named, "frames": None}),
    )
    with pytest.raises(UnfaithfulResult, match="pictures"):
        assemble_video(assembly_of(plan, area))
    assert not Path(plan.destination).exists()


def test_a_film_in_an_object_store(tmp_path: Path, actors: list[Upscaler], s3_bucket: str) -> None:
    source = make_film(tmp_path / "film.mp4", (6, 5), sound=True)
    local = plan_of(source, str(tmp_path / "out.mp4"))
    restore(local, str(tmp_path / "area"), actors)
    assemble_video(assembly_of(local, str(tmp_path / "area")))
    place = f"{s3_bucket}/film.mp4"
    storage_for(place).write(place, source.read_bytes())
    info = storage_for(place).stat(place)
    assert info is not None
    item = Item(place, f"{s3_bucket}/out.mp4", "film.mp4", info.size_bytes, info.version)
    options = plan_options(Settings(steps=1, preset="ultrafast", segment_seconds=0.16))
    plan = plan_video(item, options, "model")
    restore(plan, f"{s3_bucket}/area", actors)
    draft = assemble_video(assembly_of(plan, f"{s3_bucket}/area"))
    assert is_published(draft, plan.destination)
    storage_for(plan.destination).fetch(plan.destination, tmp_path / "fetched.mp4")
    assert frame_hashes(tmp_path / "fetched.mp4") == frame_hashes(tmp_path / "out.mp4")
    with pytest.raises(StorageError):
        assemble_video(assembly_of(plan, f"{s3_bucket}/area", run_id="other"))
