"""Flow of the next frame is looked for while the model has this one: the same pictures, and no time in the step."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.live_engine import LiveEngine, StepRequest
from actors.records import Row
from actors.restoration import Restoration, step_alone
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import DropReason, Hello, Newest
from infra.settings import Settings
from infra.storage import storage_for
from jobs.plan import plan_options, plan_video, rows_of
from jobs.sources import Item
from pipeline import StreamDiffVSRPipeline
from pipeline.flow import DISFlow
from pipeline.flow_ahead import FlowAhead, flow_ahead
from pipeline.reference_step import ReferenceStep
from tests.live_service import LiveService, live_service, open_live_engine
from tests.moving_texture import make_clip
from tests.random_model import save_random_model
from tests.video_files import write_exactly

POLICY: dict[str, object] = {"settle": 1, "longest_hold": 3, "levels": [2, 1], "shares": [0.1]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained(save_random_model(tmp_path_factory.mktemp("model") / "random"))


def scenes() -> list[NDArray[np.uint8]]:
    """Six frames that move, six that stand still but for a little noise, six in which a square moves before that."""
    moving = make_clip(6, 48, 64)
    noise = np.random.default_rng(2)
    still = [np.clip(moving[-1].astype(int) + noise.integers(-1, 2, moving[-1].shape), 0, 255) for _ in range(12)]
    for picture, left in zip(still[6:], range(8, 32, 4), strict=True):
        picture[16:28, left : left + 10] = (250, 20, 90)
    return [*moving, *(picture.astype(np.uint8) for picture in still)]


def row_of(folder: Path, frames: list[NDArray[np.uint8]], **options: Any) -> Row:
    source = folder / "film.mkv"
    if not source.exists():
        write_exactly(source, frames)
    info = storage_for(str(source)).stat(str(source))
    assert info is not None
    item = Item(str(source), str(folder / "out.mkv"), source.name, info.size_bytes, info.version)
    chosen = Settings(cuts=False, codec="ffv1", pix_fmt="yuv444p", **options)
    area = folder / f"area-{len(list(folder.iterdir()))}"
    (row,) = rows_of(plan_video(item, plan_options(chosen), "model"), f"{area}/segments", f"{area}/states")
    return row


class Restored:
    """What one run gave: outputs, and whether flow was known."""

    def __init__(self, pipe: StreamDiffVSRPipeline, row: Row, *, look_ahead: bool) -> None:
        self.outputs: list[Tensor] = []
        self.known: list[bool] = []

        def step(*arguments: Any, **known: Any) -> Tensor:
            # the reader is as far ahead as it gets: what follows is there to be looked at
            time.sleep(0.02)
            self.outputs.append(step_alone(pipe, *arguments, **known).clone())
            self.known.append("flow_2HW" in known)
            return self.outputs[-1]

        with Restoration(pipe, row, threads=1, max_pixels=10**6, step=step, look_ahead=look_ahead) as task:
            for _ in task.run():
                pass


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": "auto", "step_policy": POLICY},
        {"steps": "auto", "step_policy": {**POLICY, "window_share": 0.6}},
    ],
    ids=["fixed", "held", "windows"],
)
def test_the_pictures_are_the_same(pipe: StreamDiffVSRPipeline, options: dict[str, Any], tmp_path: Path) -> None:
    threads = threading.active_count()
    usual = Restored(pipe, row_of(tmp_path, scenes(), **options), look_ahead=False)
    ahead = Restored(pipe, row_of(tmp_path, scenes(), **options), look_ahead=True)
    assert len(ahead.outputs) == len(usual.outputs)
    assert all(torch.equal(a, b) for a, b in zip(ahead.outputs, usual.outputs, strict=True))
    assert not any(usual.known) and not ahead.known[0]
    assert Counter(ahead.known)[True] >= (15 if options["steps"] == 1 else 4)
    if options["steps"] == 1:
        assert len(ahead.outputs) == 18
    assert threading.active_count() == threads


def test_nothing_is_looked_for_where_it_does_not_help(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DISFlow, "search", lambda *_: pytest.fail("the networks need the processor"))
    with Restoration(pipe, row_of(tmp_path, scenes()[:3], steps=1), threads=1, max_pixels=10**6) as task:
        assert len(list(task.run())) >= 3


STEP_S, FLOW_S = 0.2, 0.15


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and flow take their time elsewhere, as on a device and in OpenCV: Python's lock is free meanwhile."""

    def restore(_: object, frames_B3hw: Tensor, *__: object) -> Tensor:
        time.sleep(STEP_S)
        return torch.zeros(len(frames_B3hw), 3, 4 * frames_B3hw.shape[2], 4 * frames_B3hw.shape[3])

    def search(_: object, current_Bhw: NDArray[np.uint8], previous_Bhw: NDArray[np.uint8]) -> Tensor:
        time.sleep(FLOW_S * len(current_Bhw))
        return torch.zeros(len(current_Bhw), 2, *current_Bhw.shape[1:])

    monkeypatch.setattr(ReferenceStep, "run", restore)
    monkeypatch.setattr(DISFlow, "_search", search)


def timed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Callable[[], float]:
    """Return what tells, and forgets, the median seconds of the calls of a method: a busy machine has few good ones."""
    seconds: list[float] = []
    method = getattr(owner, name)

    def around(*arguments: Any) -> Any:
        began = time.perf_counter()
        outcome = method(*arguments)
        seconds.append(time.perf_counter() - began)
        return outcome

    def median() -> float:
        found = statistics.median(seconds)
        seconds.clear()
        return found

    monkeypatch.setattr(owner, name, around)
    return median


def test_a_step_does_not_wait_for_flow(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch)
    step_s = timed(monkeypatch, Restoration, "_step")
    frames = make_clip(12, 48, 64)
    Restored(pipe, row_of(tmp_path, frames, steps=1), look_ahead=False)
    usual_s = step_s()
    Restored(pipe, row_of(tmp_path, frames, steps=1), look_ahead=True)
    assert usual_s - step_s() > 0.6 * FLOW_S


def test_an_error_of_the_search_is_an_error_of_the_step(
    pipe: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no flow in this")

    monkeypatch.setattr(DISFlow, "search", fails)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no flow in this"):
        Restored(pipe, row_of(tmp_path, scenes(), steps=1), look_ahead=True)
    assert threading.active_count() == threads


# Live streams


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LiveEngine:
    return open_live_engine(str(save_random_model(tmp_path_factory.mktemp("live") / "random")))


@pytest.fixture
def ahead(engine: LiveEngine) -> Iterator[FlowAhead]:
    assert engine.ahead is None, "a model on the processor leaves nothing to be gained"
    engine.ahead = flow_ahead(engine.pipe, threads=2, always=True)
    assert engine.ahead is not None
    yield engine.ahead
    engine.ahead.close()
    engine.ahead = None


async def stream(service: LiveService, frames: list[NDArray[np.uint8]], **hello: Any) -> list[LiveAnswer]:
    """Send everything that the window allows at once, so that frames wait; the eighth begins a scene."""
    height, width = frames[0].shape[:2]
    async with (
        asyncio.timeout(60),
        LiveStream(service.url, Hello(width=width, height=height, codec_in="raw", codec_out="raw", **hello)) as live,
    ):

        async def send() -> None:
            for number, frame in enumerate(frames):
                await live.send_picture(frame, cut=number == 7)
            await live.close()

        sending = asyncio.create_task(send())
        answers = [answer async for answer in live]
        await sending
        return answers


async def streams(service: LiveService, count: int, frames: list[NDArray[np.uint8]], **hello: Any) -> list[Any]:
    return await asyncio.gather(*(stream(service, frames[n:], seed=n, **hello) for n in range(count)))


@pytest.mark.parametrize("policy", ["lossless", "newest"])
def test_live_streams_get_the_same_pictures(
    policy: str, engine: LiveEngine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = list(make_clip(18, 48, 64))
    frames[12:] = [255 - picture[::-1] // 3 for picture in frames[12:]]  # a cut that is found
    seen: list[tuple[bool, bool]] = []
    flow_of = LiveEngine._flow_of

    def noted(self: LiveEngine, request: StepRequest) -> Tensor | None:
        flow = flow_of(self, request)
        seen.append((flow is not None, request.reset))
        return flow

    monkeypatch.setattr(LiveEngine, "_flow_of", noted)
    step = DISFlow._search
    monkeypatch.setattr(DISFlow, "_search", lambda *given: (time.sleep(0.005), step(*given))[1])

    def run() -> list[list[LiveAnswer]]:
        seen.clear()
        with live_service(engine=engine) as service:
            hello: dict[str, Any] = {} if policy == "lossless" else {"policy": Newest()}
            return asyncio.run(streams(service, 2, frames, **hello))

    wanted = run()
    assert not any(known for known, _ in seen)
    request.getfixturevalue("ahead")
    found = run()
    assert not any(known and first for known, first in seen)
    assert policy == "newest" or sum(first for _, first in seen) == 6, "beginning, cut told, cut found; two streams"
    if policy == "newest":  # which frames are dropped is chance
        assert all(answers[-1].header.reason is DropReason.NONE for answers in found)
        return
    assert sum(known for known, _ in seen) >= 8
    for before, after in zip(wanted, found, strict=True):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            # batches of other sizes round otherwise
            assert np.abs(one.picture().astype(int) - other.picture()).max() <= 1


def test_a_live_step_does_not_wait_for_flow(
    engine: LiveEngine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch)
    step_s = timed(monkeypatch, LiveEngine, "step")

    def run() -> float:
        with live_service(engine=engine) as service:
            asyncio.run(stream(service, make_clip(12, 48, 64), cuts=False))
            return step_s()

    usual_s = run()
    request.getfixturevalue("ahead")
    assert usual_s - run() > 0.6 * FLOW_S


def test_a_live_search_that_fails_is_the_failure_of_its_stream_alone(
    engine: LiveEngine, ahead: FlowAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_clip(2, 48, 64)
    states = [engine.pipe.start(seed=seed) for seed in range(3)]
    engine.step([StepRequest(first, state, 1, find_cuts=False) for state in states])
    requests = [StepRequest(second, state, 1, find_cuts=False) for state in states]
    requests[0].search = ahead.start(second, first)
    monkeypatch.setattr(DISFlow, "search", lambda *_: (_ for _ in ()).throw(ValueError("no flow in this")))
    requests[1].search = ahead.start(second, first)
    engine.step(requests)
    assert [type(request.error) for request in requests] == [type(None), ValueError, type(None)]
    assert [state.index for state in states] == [2, 1, 2]
