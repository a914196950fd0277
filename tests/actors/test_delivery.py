"""Extras of finished results: made once, again after a kill, never in the place of somebody else's files."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

import actors.assemble
import actors.delivery
from actors.assemble import assemble_video, read_draft
from actors.delivery import Delivery, Extras, ResultChanged, attempt_delivery, deliver, extra_places, missing
from actors.records import Delivered
from actors.upscaler import Upscaler
from infra.errors import StorageError
from infra.storage import join, parent, storage_for
from jobs.records import VideoPlan
from tests.actors.test_assemble import assembly_of, plan_of, restore
from tests.films import frame_hashes, make_film
from tests.hls_playlists import read_master, read_media

BOTH = Extras(framemd5=True, hls=(128, 64))


class Killed(BaseException):
    """What no clean-up may catch."""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return make_film(tmp_path / "out.mp4", (30, 25), sound=True)


def delivery(result: str, tmp_path: Path, extras: Extras, **changes: Any) -> Delivery:
    local = result if "://" not in result else str(tmp_path / "out.mp4")
    task = Delivery(
        name="out.mp4", destination=result, place=f"{parent(result)}/area",
        sha256=hashlib.sha256(Path(local).read_bytes()).hexdigest(), before=Delivered(), extras=extras,
        preset="ultrafast", overwrite=False,
    )  # fmt: skip
    return dataclasses.replace(task, **changes)


def names(place: str) -> list[str]:
    return sorted(info.place.removeprefix(f"{place}/") for info in storage_for(place).list(f"{place}/"))


LADDER = sorted(
    [f"out.mp4.hls/{name}" for name in ("64p.m3u8", "64p.mp4", "audio-1.m3u8", "audio-1.m4a", "master.m3u8")]
)


def check(delivered: Delivered, destination: str) -> None:
    for one in delivered.files:
        content = storage_for(destination).read(join(parent(destination), one.name))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one.size_bytes, one.sha256)


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_missing_is_made_and_what_is_there_is_left(
    result: Path, tmp_path: Path, request: pytest.FixtureRequest, remote: bool
) -> None:
    place = str(result)
    if remote:
        place = f"{request.getfixturevalue('s3_bucket')}/out.mp4"
        storage_for(place).write(place, result.read_bytes())
    first = deliver(delivery(place, tmp_path, BOTH))
    assert [one.name for one in first.files] == ["out.mp4.framemd5", *LADDER] and first.hls == [128, 64]
    assert any("128" in warning for warning in first.warnings)
    check(first, place)
    assert names(parent(place)) == sorted(["area/extras.json", "out.mp4", *(one.name for one in first.files)])
    assert not missing(first, BOTH, place, certain=True)
    versions = {info.place: info.version for info in storage_for(place).list(f"{parent(place)}/")}
    assert deliver(delivery(place, tmp_path, BOTH, before=first)) == first
    assert {info.place: info.version for info in storage_for(place).list(f"{parent(place)}/")} == versions
    storage_for(place).delete(join(parent(place), "out.mp4.hls/64p.mp4"))
    assert missing(first, BOTH, place) == Extras(hls=(128, 64))
    again = deliver(delivery(place, tmp_path, BOTH, before=first))
    check(again, place)
    other = deliver(delivery(place, tmp_path, Extras(hls=(32,)), before=again))
    check(other, place)
    assert other.hls == [32] and "out.mp4.hls/32p.mp4" in names(parent(place))
    assert "out.mp4.hls/64p.mp4" not in names(parent(place)) and "out.mp4.framemd5" in names(parent(place))


def test_a_ladder_in_a_bucket_is_served_as_what_it_is(result: Path, tmp_path: Path, s3_bucket: str) -> None:
    from infra.object_store import client_for

    place = f"{s3_bucket}/deep/out.mp4"
    storage_for(place).write(place, result.read_bytes())
    deliver(delivery(place, tmp_path, BOTH))
    bucket = s3_bucket.removeprefix("s3://").partition("/")[0]
    prefix = s3_bucket.removeprefix(f"s3://{bucket}").lstrip("/")
    listed = client_for().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/deep/out.mp4.hls/".lstrip("/"))["Contents"]
    types = {
        one["Key"].rpartition("/")[2]: client_for().head_object(Bucket=bucket, Key=one["Key"])["ContentType"]
        for one in listed
    }
    playlist = "application/vnd.apple.mpegurl"
    assert types == {
        "64p.m3u8": playlist, "audio-1.m3u8": playlist, "master.m3u8": playlist,
        "64p.mp4": "video/mp4", "audio-1.m4a": "audio/mp4",
    }  # fmt: skip
    # Fetched, it plays.
    for info in storage_for(place).list(f"{place}.hls/"):
        storage_for(place).fetch(info.place, tmp_path / "fetched" / info.place.rpartition("/")[2])
    master = read_master(tmp_path / "fetched/master.m3u8")
    assert len(frame_hashes(read_media(tmp_path / "fetched" / master.variants[0]["URI"]).file)) == 55


def test_the_master_playlist_comes_last(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import infra.object_store

    order = []
    real = infra.object_store.upload

    def noting(client: Any, bucket: str, key: str, content: Any, *, if_absent: bool) -> None:
        order.append(key.rpartition("/")[2])
        real(client, bucket, key, content, if_absent=if_absent)

    monkeypatch.setattr(infra.object_store, "upload", noting)
    folder = tmp_path / "ladder"
    folder.mkdir()
    for name in ("master.m3u8", "zulu.mp4", "1080p.m3u8", "1080p.mp4", "audio-1.m3u8"):
        (folder / name).write_text(name)
    storage_for(s3_bucket).publish(folder, f"{s3_bucket}/a.hls")
    assert order == ["1080p.mp4", "zulu.mp4", "1080p.m3u8", "audio-1.m3u8", "master.m3u8"]


def test_somebody_elses_files_are_not_replaced(result: Path, tmp_path: Path) -> None:
    ladder, sums = map(Path, extra_places(str(result)))
    ladder.mkdir()
    (ladder / "mine.txt").write_text("mine")
    sums.write_text("mine too")
    for extras in (Extras(hls=(64,)), Extras(framemd5=True)):
        with pytest.raises(StorageError) as caught:
            deliver(delivery(str(result), tmp_path, extras))
        assert caught.value.code == "destination-exists" and "--overwrite" in str(caught.value)
    told = attempt_delivery(delivery(str(result), tmp_path, BOTH))
    assert told["failure"]["failure_class"] == "storage"
    assert sums.read_text() == "mine too" and (ladder / "mine.txt").exists()
    delivered = deliver(delivery(str(result), tmp_path, BOTH, overwrite=True))
    check(delivered, str(result))
    assert not (ladder / "mine.txt").exists()


def test_extras_are_of_the_file_that_the_manifest_describes(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultChanged):
        deliver(delivery(str(result), tmp_path, BOTH, sha256="0" * 64))
    assert names(str(tmp_path)) == ["out.mp4"]


@pytest.mark.parametrize("remote", [False, True])
def test_killed_anywhere_it_is_whole_after_the_next_run(
    result: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    place = str(result)
    if remote:
        place = f"{request.getfixturevalue('s3_bucket')}/out.mp4"
        storage_for(place).write(place, result.read_bytes())
    task = delivery(place, tmp_path, BOTH)
    calls = 0

    def dying(*given: Any, **named: Any) -> Any:
        """Publishes the ladder and dies before the checksums, which come second."""
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return real(*given, **named)

    store = type(storage_for(place))
    real = store.publish
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(store, "publish", dying)
        deliver(task)
    assert f"{Path(place).name}.framemd5" not in names(parent(place)) and "out.mp4.hls/64p.mp4" in names(parent(place))
    delivered = deliver(task)
    check(delivered, place)
    assert [one.name for one in delivered.files] == ["out.mp4.framemd5", *LADDER]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.random_model import save_random_model

    return save_random_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="module")
def workers(model: Path) -> list[Upscaler]:
    from actors.upscaler import EngineOptions
    from infra.own_code import code_fingerprint

    engine = EngineOptions(
        model=str(model), device="cpu", dtype="fp32", flow="auto", threads=1, max_pixels=10**7,
        version=code_fingerprint(),
    )  # fmt: skip
    return [Upscaler(dataclasses.asdict(engine)) for _ in range(2)]


@pytest.fixture
def ready(tmp_path: Path, workers: list[Upscaler]) -> tuple[VideoPlan, str]:
    """A film of two shots with sound whose segments are all there."""
    source = make_film(tmp_path / "film.mp4", (6, 5), sound=True)
    plan = plan_of(source, str(tmp_path / "results" / "out.mp4"), scale=2)
    restore(plan, str(tmp_path / "area"), workers)
    return plan, str(tmp_path / "area")


def test_an_assembly_that_dies_between_result_and_extras(
    ready: tuple[VideoPlan, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, area = ready
    task = assembly_of(plan, area, extras=BOTH)
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patched.setattr(actors.assemble, "publish_extras", killed)
        assemble_video(task)
    folder = parent(plan.destination)
    assert names(folder) == ["out.mp4"]
    made_at = Path(plan.destination).stat().st_mtime_ns
    storage_for(area).delete(f"{area}/segments")
    draft = assemble_video(task)
    check(draft.extras, plan.destination)
    assert read_draft(area, plan.run_id) == draft and draft.extras.hls == [128, 64]
    assert names(folder) == sorted(["out.mp4", *(one.name for one in draft.extras.files)])
    assert Path(plan.destination).stat().st_mtime_ns == made_at
    assert not list(Path(area).rglob(".assembly-*"))


def test_extras_that_cannot_be_made_leave_nothing(
    ready: tuple[VideoPlan, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, area = ready

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(actors.delivery, "write_ladder", full)
        assemble_video(assembly_of(plan, area, extras=BOTH))
    assert not Path(plan.destination).exists() and names(parent(plan.destination)) == []
    assert not list(Path(area).rglob(".assembly-*"))
    assert assemble_video(assembly_of(plan, area)).extras == Delivered()


def test_an_assembly_in_fragments_has_the_same_pictures(ready: tuple[VideoPlan, str]) -> None:
    plan, area = ready
    assemble_video(assembly_of(plan, area))
    whole = frame_hashes(Path(plan.destination))
    options = {**plan.options, "fragmented": True}
    assemble_video(assembly_of(plan, area, run_id="other", options=options, overwrite=True))
    data = Path(plan.destination).read_bytes()
    # A fragment for each key picture, of which each segment has one at its beginning: 6 and 5 frames in pieces of 4.
    assert data.count(b"moof") >= 4 and data.index(b"moov") < data.index(b"moof") < data.index(b"mdat")
    assert frame_hashes(Path(plan.destination)) == whole
