"""Plans against what a stream would do: the same frames, the same cuts, the exact time stamps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from infra.cluster import connected
from infra.settings import Settings
from infra.storage import storage_for
from jobs.errors import UsageError
from jobs.plan import Planned, PlanOptions, part_lengths, plan_all, plan_options, plan_video, rows_of, run_id
from jobs.records import VideoPlan
from jobs.sources import Item, select
from pipeline.video import UnreadableVideo, VideoReader
from tests.video_files import make_bad_files, make_video_files

SCENES = (12, 7, 9)


def item_for(path: Path, **own: object) -> Item:
    size = path.stat().st_size
    return Item(str(path), str(path.with_name("out.mkv")), path.name, size, "v1", overrides=own)


def options_for(**settings: object) -> PlanOptions:
    return plan_options(Settings(**settings))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {**make_video_files(folder / "good"), **make_bad_files(folder / "bad")}


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of 12, 7 and 9 frames; key frames lie elsewhere than cuts, time stamps start at 5 seconds."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    rng = np.random.default_rng(5)
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "8", "bf": "2", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        count = 0
        for length in SCENES:
            blocks_HWC = rng.integers(20, 235, (24, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            for shift in range(length):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(blocks_HWC[shift : shift + 96, :160]))
                frame.pts, frame.time_base = 125 + count, Fraction(1, 25)
                output.mux(stream.encode(frame))
                count += 1
        output.mux(stream.encode(None))
    return path


def test_a_plan_has_the_shots_of_the_film_with_exact_counts_and_time_stamps(film: Path) -> None:
    plan = plan_video(item_for(film), options_for(segment_seconds=0.2), "model")
    assert plan.frames == 28 and [shot.frames for shot in plan.shots] == list(SCENES)
    assert [shot.first_index for shot in plan.shots] == [0, 12, 19]
    with VideoReader(film) as reader:
        stamps = [frame.pts for frame in reader]
    assert [shot.start_pts for shot in plan.shots] == [stamps[0], stamps[12], stamps[19]]
    assert [shot.stop_pts for shot in plan.shots] == [stamps[12], stamps[19], -1]
    assert plan.segment_frames == 5 and plan.average_rate == "25" and plan.codec == "h264"
    assert plan.duration_s == pytest.approx(28 / 25)
    assert (plan.out_width, plan.out_height) == (640, 384) and plan.deinterlace == "off"
    assert plan.damage == []


def test_without_cuts_a_video_is_one_shot(film: Path) -> None:
    plan = plan_video(item_for(film), options_for(cuts=False), "model")
    assert [(shot.first_index, shot.frames, shot.stop_pts) for shot in plan.shots] == [(0, 28, -1)]


def test_rows_carry_what_an_actor_needs_and_nothing_but_plain_values(film: Path) -> None:
    plan = plan_video(item_for(film), options_for(seed=7), "model")
    rows = rows_of(plan, "/w/segments", "/w/states")
    assert [row["row_id"] for row in rows] == [f"{plan.run_id}-{shot:05d}" for shot in range(3)]
    assert [row["cost"] for row in rows] == [frames * 160 * 96 for frames in SCENES]
    assert all(isinstance(value, str | int | float) for row in rows for value in row.values())
    assert {(row["segments"], row["states"], row["seed"]) for row in rows} == {("/w/segments", "/w/states", 7)}


@pytest.mark.parametrize(
    ("frames", "longest", "lengths"),
    [
        (7, 20, [7]),  # less than a segment
        (20, 20, [20]),
        (29, 20, [29]),  # less than a segment too long
        (30, 20, [20, 10]),
        (31, 20, [20, 11]),
        (50, 40, [30, 20]),  # not 40 and 10
        (109, 40, [40, 30, 39]),  # 40 + 40 + 29 would be no better; the rest is never alone
        (31, 10, [10, 10, 11]),
        (31, 5, [10, 10, 11]),  # a segment at least
    ],
)
def test_parts_are_whole_segments_and_as_equal_as_these_allow(frames: int, longest: int, lengths: list[int]) -> None:
    assert part_lengths(frames, longest, 10) == lengths


def test_long_shots_are_split_and_a_warm_up_never_reaches_before_its_shot(film: Path) -> None:
    """Shots of 12, 7 and 9 frames in segments of 2: parts of 6 and 6; 7, less than a segment too long; 4 and 5."""
    split = options_for(segment_seconds=0.08, split_seconds=0.24, warm_up_frames=5)
    plan = plan_video(item_for(film), split, "model")
    with VideoReader(film) as reader:
        stamps = [frame.pts for frame in reader]
    assert [(shot.first_index, shot.frames, shot.continues, shot.warm_up) for shot in plan.shots] == [
        (0, 6, False, 0), (6, 6, True, 5), (12, 7, False, 0), (19, 4, False, 0), (23, 5, True, 4),
    ]  # fmt: skip
    assert [shot.number for shot in plan.shots] == list(range(5)) and plan.segment_frames == 2
    assert [shot.start_pts for shot in plan.shots] == [stamps[at] for at in (0, 6, 12, 19, 23)]
    assert [shot.stop_pts for shot in plan.shots] == [*(stamps[at] for at in (6, 12, 19, 23)), -1]
    assert [shot.warm_up_pts for shot in plan.shots] == [None, stamps[1], None, None, stamps[19]]
    rows = rows_of(plan, "/w/segments", "/w/states")
    assert [row["warm_up_pts"] for row in rows] == [stamps[at] for at in (0, 1, 12, 19, 19)]
    assert [row["cost"] / (160 * 96) for row in rows] == [6, 11, 7, 4, 9]
    # Without the option nothing is split, whatever the warm-up; and plans kept by versions that knew neither are read.
    whole = plan_video(item_for(film), options_for(segment_seconds=0.08, warm_up_frames=5), "model")
    assert [shot.frames for shot in whole.shots] == list(SCENES)
    old = whole.model_dump(mode="json")
    for shot in old["shots"]:
        del shot["continues"], shot["warm_up"], shot["warm_up_pts"]
    assert VideoPlan.model_validate(old) == whole


def test_parts_shorter_than_a_segment_are_refused() -> None:
    with pytest.raises(UsageError, match="shorter than a segment"):
        options_for(split_seconds=9.9)


def test_interlaced_sources_are_planned_as_the_deinterlacer_presents_them(files: dict[str, Path]) -> None:
    item = item_for(files["mpeg2_interlaced_ts"])
    plan = plan_video(item, options_for(), "model")
    with VideoReader(item.source) as reader:
        presented = [frame.pts for frame in reader]
        assert reader.deinterlaces
    assert plan.deinterlace == "auto" and plan.frames == len(presented) and plan.shots[0].start_pts == presented[0]
    assert plan_video(item, options_for(deinterlace="off"), "model").deinterlace == "off"


@pytest.mark.parametrize("name", ["empty", "text", "nothing_decodes", "no_index"])
def test_what_cannot_be_read_is_refused(files: dict[str, Path], name: str) -> None:
    with pytest.raises(UnreadableVideo):
        plan_video(item_for(files[name]), options_for(), "model")


@pytest.mark.parametrize("name", ["truncated", "holed"])
def test_what_is_damaged_is_told(files: dict[str, Path], name: str) -> None:
    plan = plan_video(item_for(files[name]), options_for(), "model")
    assert plan.damage and 0 < plan.frames < 48


def test_the_run_id_changes_with_whatever_changes_the_result(tmp_path: Path) -> None:
    def named(
        version: str = "v1",
        name: str = "a",
        model: str = "model",
        own: dict[str, object] | None = None,
        **settings: object,
    ) -> str:
        return run_id(Item("a", "b", name, 1, version, overrides=own or {}), options_for(**settings), model)

    base = named()
    assert base == named() and len(base) == 16
    others = [
        named("v2"), named(name="copy"), named(model="other"), named(seed=1), named(dtype="bf16"), named(steps=2),
        named(segment_seconds=5), named(cuts=False), named(deinterlace="on"), named(own={"crf": 9}),
        named(split_seconds=60), named(split_seconds=30), named(split_seconds=60, warm_up_frames=3),
    ]  # fmt: skip
    assert len({base, *others}) == 14
    assert named(warm_up_frames=3) == base  # of no effect without parts
    assert named(own={"seed": 1}) == named(seed=1)
    assert named(max_pixels=1000) == base  # a limit changes no picture


def test_the_policy_of_steps_is_part_of_a_run_where_it_has_an_effect() -> None:
    def named(own: dict[str, object] | None = None, **settings: object) -> str:
        return run_id(Item("a", "b", "a", 1, "v1", overrides=own or {}), options_for(**settings), "model")

    shorter = {"longest_hold": 3}
    assert len({named(), named(steps="auto"), named(steps="auto", step_policy=shorter), named(steps=4)}) == 4
    assert named(step_policy=shorter) == named(), "a policy that nobody asks for tells no runs apart"
    assert named(step_policy=shorter, steps="auto", own={"steps": 2}) == named(steps=2)
    assert named(step_policy=shorter, own={"steps": "auto"}) == named(step_policy=shorter, steps="auto")
    row = options_for(steps="auto", step_policy=shorter).row
    assert row["step_policy"]["longest_hold"] == 3 and row["step_policy"]["levels"] == [4, 2, 1], "defaults as well"
    assert row["step_policy"]["version"] == 1 and "step_policy" not in options_for().row
    with pytest.raises(UsageError, match="holds"):
        options_for(steps="auto", step_policy={"holds": 3})


def test_a_policy_that_no_video_asks_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.restore import RestoreJob

    (tmp_path / "tapes").mkdir()
    (tmp_path / "tapes/a.mp4").write_bytes(b"")
    lists = {}
    for steps in ("auto", "2"):
        lists[steps] = tmp_path / f"{steps}.csv"
        lists[steps].write_text(f"source,steps\n{tmp_path}/tapes/a.mp4,{steps}\n")

    def told(source: Path, **settings: object) -> str:
        RestoreJob(str(source), str(tmp_path / "out"), Settings(**settings))
        return capsys.readouterr().err

    policy = {"longest_hold": 3}
    assert "--steps auto" in told(tmp_path / "tapes", step_policy=policy)
    assert "--steps auto" in told(tmp_path / "tapes", step_policy=policy, steps=2)
    assert "--steps auto" in told(lists["2"], step_policy=policy)
    assert told(tmp_path / "tapes", step_policy=policy, steps="auto") == ""
    assert told(lists["auto"], step_policy=policy) == ""
    assert told(tmp_path / "tapes") == ""


def test_tiles_are_part_of_an_exact_run_and_of_no_other() -> None:
    def named(**settings: object) -> str:
        return run_id(Item("a", "b", "a", 1, "v1"), options_for(**settings), "model")

    assert named(memory_gb=4) == named()  # a job may go on where there is less memory
    exact = [named(exact=True), named(exact=True, memory_gb=4), named(exact=True, memory_gb=5), named()]
    assert len(set(exact)) == 4
    assert named(exact=True, dtype="bf16", threads=3, slots=2) == named(exact=True)  # which exact overrules


def test_copies_of_a_file_are_two_runs() -> None:
    """Copied with its times, or in a bucket, a file has the version of the original."""
    assert len({run_id(Item(name, "o", name, 1, "v1"), options_for(), "model") for name in ("a", "x/a")}) == 2


def test_an_items_own_options_replace_the_jobs(film: Path) -> None:
    plan = plan_video(item_for(film, scale=2, crf=20, seed=3, cuts=False), options_for(height=480), "model")
    assert (plan.out_width, plan.out_height) == (320, 192)
    assert plan.options["crf"] == 20 and plan.seed == 3 and len(plan.shots) == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected(num_cpus=2, quiet=False):
        yield


def test_many_videos_are_planned_by_tasks_and_a_bad_one_stops_nothing(
    cluster: None, film: Path, files: dict[str, Path]
) -> None:
    gone = Item(str(film.with_name("gone.mp4")), "gone.mkv", "gone.mp4", 0, "")
    items = [item_for(film), item_for(files["text"]), gone, item_for(files["odd_mp4"])]
    made = {planned.item.name: planned for planned in plan_all(items, options_for(), "model")}
    assert made["film.mkv"].plan == plan_video(items[0], options_for(), "model")
    assert made["odd.mp4"].plan is not None and made["odd.mp4"].failure is None
    assert {name: planned.failure["code"] for name, planned in made.items() if planned.failure} == {
        "text.mp4": "video-unreadable",
        "gone.mp4": "video-not-found",
    }


def test_a_video_that_kills_its_process_is_given_up_and_the_others_go_on(
    cluster: None, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(item: Item, options: PlanOptions, model_sha256: str) -> Planned:
        if item.name == "deadly":
            os._exit(1)
        return Planned(item, plan_video(item, options, model_sha256), None)

    monkeypatch.setattr("jobs.plan._planned", planned)
    deadly = Item(str(film), "deadly.mkv", "deadly", 1, "v")
    made = {one.item.name: one for one in plan_all([deadly, item_for(film)], options_for(), "model")}
    assert made["film.mkv"].plan is not None
    failure = made["deadly"].failure
    assert failure is not None and failure["failure_class"] == "lost-actor"


def test_what_is_known_is_not_planned_again(film: Path) -> None:
    """One video is left to plan, so that this needs no cluster either."""
    old = plan_video(item_for(film), options_for(), "model")
    other = Item(str(film), "other.mkv", "other", 1, "v2")

    def known(item: Item, run: str) -> VideoPlan | None:
        return old if run == old.run_id else None

    first, second = plan_all([other, item_for(film)], options_for(), "model", known)
    assert first.plan is old and second.plan is not None and second.plan.run_id != old.run_id


def test_a_plan_is_the_same_for_an_object_as_for_a_file(film: Path, s3_bucket: str) -> None:
    place = f"{s3_bucket}/film.mkv"
    storage_for(place).write(place, film.read_bytes())
    (item,) = select(place, f"{s3_bucket}/out.mkv").items
    there, here = plan_video(item, options_for(), "model"), plan_video(item_for(film), options_for(), "model")
    assert there.shots == here.shots and there.source == place and there.source_version == item.version
    assert there.run_id != here.run_id
    gone = Item(f"{s3_bucket}/gone.mkv", "x.mkv", "gone.mkv", 0, "")
    (planned,) = plan_all([gone], options_for(), "model")
    assert planned.failure is not None and planned.failure["failure_class"] == "storage"


def test_new_options_do_not_change_the_runs_of_those_who_do_not_use_them() -> None:
    item = Item("a", "b", "a", 1, "v1")
    plain = run_id(item, options_for(), "model")
    assert plain == "a83a3c53e764e386"  # of version 0.1.0: a change would make finished archives unknown
    assert run_id(item, options_for(framemd5=True, hls="1080,720"), "model") == plain
    assert run_id(item, options_for(fragmented=True), "model") != plain
