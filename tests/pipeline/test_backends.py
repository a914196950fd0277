"""Backends against the reference: the same streams, the same pictures up to what each backend says."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import StreamDiffVSRPipeline
from pipeline.backends import choose_backend
from pipeline.cuda_backend import CapturingBackend, Record, Work, psnr_db
from pipeline.errors import BackendError
from pipeline.flow import ZeroFlow
from pipeline.options import Guidance

LOSSLESS_DB, CLOSE_DB = 55.0, 45.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny() -> StreamDiffVSRPipeline:
    return StreamDiffVSRPipeline.from_pretrained("tiny")


@pytest.fixture(scope="module")
def attending(parity_folder: Path) -> StreamDiffVSRPipeline:
    """The recorded checkpoint: cross-attention, pooled TPMs, the published warp and v-prediction."""
    return StreamDiffVSRPipeline.from_pretrained(parity_folder, flow="dis")


@pytest.fixture
def reset(pipe: StreamDiffVSRPipeline, tiny: StreamDiffVSRPipeline, attending: StreamDiffVSRPipeline) -> Iterator[None]:
    yield
    for one in (pipe, tiny, attending):
        one.use_backend("eager")
        one.guidance = one.options.guidance


pytestmark = pytest.mark.usefixtures("reset")


def clip(frames: int, height: int = 24, width: int = 32) -> list[Tensor]:
    """A texture that moves by a pixel a frame."""
    torch.manual_seed(3)
    scene = torch.nn.functional.interpolate(torch.rand(1, 3, height // 3, width // 3), size=(height, width)) * 2 - 1
    return [torch.roll(scene, moment, dims=3) for moment in range(frames)]


def restore(pipe: StreamDiffVSRPipeline, frames: list[Tensor], steps: int | None = None) -> list[Tensor]:
    state = pipe.start(seed=5)
    return [pipe.step(frame, [state], steps=steps) for frame in frames]


def worst_db(found: list[Tensor], wanted: list[Tensor]) -> float:
    return min(psnr_db(a, b) for a, b in zip(found, wanted, strict=True))


def replaying(work: Work) -> tuple[Work, Tensor]:
    """Record work as a graph does: its buffers are fixed, and its result always lies in the same place."""
    place = work().clone()

    def repeat() -> Tensor:
        place.copy_(work())
        return place

    return repeat, place


def capture(pipe: StreamDiffVSRPipeline, record: Record | None = replaying) -> CapturingBackend:
    pipe._backend = CapturingBackend(pipe, record=record, recorded_from=1)
    return pipe._backend


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"),
    [
        ("auto", "cpu", "openvino"),
        ("auto", "cuda:1", "graph"),
        ("auto", "mps", "eager"),
        ("eager", "cuda", "eager"),
        ("compiled", "cpu", "compiled"),
    ],
)
def test_the_backend_suits_the_device(wanted: str, device: str, chosen: str) -> None:
    assert choose_backend(wanted, device) == chosen


@pytest.mark.parametrize(
    ("wanted", "device", "code"),
    [
        ("tensorflow", "cpu", "backend-unknown"),
        ("openvino", "cuda", "backend-device"),
        ("graph", "cpu", "backend-device"),
    ],
)
def test_what_cannot_be_is_refused(wanted: str, device: str, code: str) -> None:
    with pytest.raises(BackendError) as refused:
        choose_backend(wanted, device)
    assert refused.value.code == code and refused.value.remedy


def test_without_openvino_a_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", "cpu") == "eager"
    with pytest.raises(BackendError, match="not installed"):
        choose_backend("openvino", "cpu")


def test_choosing_is_quick() -> None:
    """A stand-in has no use for diffusers, which takes seconds to import."""
    script = (
        "import sys\nfrom pipeline.backends import choose_backend\n"
        "assert choose_backend('auto', 'cpu') == 'openvino'\nprint('diffusers' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_an_openvino_that_cannot_be_loaded_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr("pipeline.backends.import_openvino", fails)
    assert choose_backend("auto", "cpu") == "eager"
    assert "libtbb" in caplog.text


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("which", ["pipe", "tiny", "attending"])
def test_the_whole_frame_as_one_function_changes_no_picture(
    which: str, steps: int, request: pytest.FixtureRequest
) -> None:
    pipe: StreamDiffVSRPipeline = request.getfixturevalue(which)
    frames = clip(3, 25, 34)
    wanted = restore(pipe, frames, steps)
    capture(pipe)
    found = restore(pipe, frames, steps)
    assert worst_db(found, wanted) > 110


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(artg=False),
        Guidance(tpm=False),
        Guidance(tpm_warped=False),
        Guidance(artg=False, tpm_warped=False),
        Guidance(artg=False, tpm=False),
    ],
)
@pytest.mark.parametrize("backend", ["graph", "openvino"])
def test_every_use_of_the_previous_output(pipe: StreamDiffVSRPipeline, guidance: Guidance, backend: str) -> None:
    frames = clip(3)
    pipe.guidance = guidance
    wanted = restore(pipe, frames)
    if backend == "graph":
        capture(pipe)
    else:
        pipe.use_backend(backend)
    assert worst_db(restore(pipe, frames), wanted) > 90


def test_unlike_streams_share_a_batch(pipe: StreamDiffVSRPipeline) -> None:
    """First and later frames, one, two and four steps: each stream gets what it gets alone."""
    frames = clip(2)
    steps = [4, 1, 4, 2, 4]

    def run() -> list[Tensor]:
        states = [pipe.start(seed=seed) for seed in range(5)]
        for state in states[:3]:
            pipe.step(frames[0], [state])
        return list(pipe.step(torch.cat([frames[1]] * 5), states, steps=steps).split(1))

    wanted = run()
    capture(pipe)
    assert worst_db(run(), wanted) > 110
    pipe.use_backend("openvino")
    assert worst_db(run(), wanted) > 90


def test_outputs_and_states_own_their_memory(pipe: StreamDiffVSRPipeline) -> None:
    """A recording writes to one place, again and again."""
    frames = clip(3)
    for use in (lambda: capture(pipe), lambda: pipe.use_backend("openvino")):
        use()
        state = pipe.start()
        pipe.step(frames[0], [state])
        first = pipe.step(frames[1], [state])
        kept, held = first.clone(), state.prev_output_3HW.clone()  # type: ignore[union-attr]
        other = pipe.start(seed=9)
        pipe.step(frames[2], [other])
        pipe.step(frames[0], [other])
        assert torch.equal(first, kept)
        assert state.prev_output_3HW is not None and torch.equal(state.prev_output_3HW, held)


def test_recordings_are_made_once_and_few_are_kept(pipe: StreamDiffVSRPipeline) -> None:
    made: list[Tensor] = []

    def record(work: Work) -> tuple[Work, Tensor]:
        repeat, place = replaying(work)
        made.append(place)
        return repeat, place

    capture(pipe, record)
    for _ in range(3):
        pipe.step(clip(1)[0], [pipe.start()])
    assert len(made) == 1
    for side in range(16, 32, 2):
        pipe.step(clip(1, side, 18)[0], [pipe.start()])
    pipe.step(clip(1, 30, 18)[0], [pipe.start()])
    assert len(made) == 9  # the latest size is kept
    pipe.step(clip(1)[0], [pipe.start()])
    assert len(made) == 10  # the first one is not
    pipe.to(torch.float32)
    pipe.step(clip(1)[0], [pipe.start()])
    assert len(made) == 11  # the networks may have changed


def test_a_recording_has_slots_of_which_some_may_be_empty(pipe: StreamDiffVSRPipeline) -> None:
    made: list[int] = []

    def record(work: Work) -> tuple[Work, Tensor]:
        repeat, place = replaying(work)
        made.append(len(place))
        return repeat, place

    def run(counts: list[int]) -> list[Tensor]:
        states, outputs = [pipe.start(seed=n) for n in range(8)], []
        for moment, count in enumerate(counts):
            frames_B3HW = torch.cat([torch.roll(frame, n, dims=2) for n, frame in enumerate(clip(8))])[:count]
            outputs.append(pipe.step(frames_B3HW.roll(moment, dims=3), states[:count]))
        return outputs

    counts = [8, 5, 3, 8, 7, 4, 1]
    wanted = run(counts)
    capture(pipe, record)
    found = run(counts)
    assert [len(one) for one in found] == counts
    assert worst_db(found, wanted) > 110
    assert made == [8, 8, 4, 1]  # first frames, and later ones by their slots


def test_what_comes_once_or_twice_is_not_recorded(pipe: StreamDiffVSRPipeline) -> None:
    made: list[int] = []

    def record(work: Work) -> tuple[Work, Tensor]:
        made.append(1)
        return replaying(work)

    frames = clip(6)
    wanted = restore(pipe, frames)
    pipe._backend = CapturingBackend(pipe, record=record)
    assert worst_db(restore(pipe, frames), wanted) > 110
    assert len(made) == 1  # of later frames; there was one first frame


def test_what_cannot_be_recorded_runs_without(pipe: StreamDiffVSRPipeline, caplog: pytest.LogCaptureFixture) -> None:
    frames = clip(3)
    wanted = restore(pipe, frames)

    def fails(work: Work) -> tuple[Work, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def lies(work: Work) -> tuple[Work, Tensor]:
        _, place = replaying(work)
        return (lambda: place.mul_(0.9)), place

    for record, reason in ((fails, "not permitted"), (lies, "differs from the networks")):
        caplog.clear()
        capture(pipe, record)
        assert worst_db(restore(pipe, frames), wanted) > 110
        told = [one.getMessage() for one in caplog.records]
        assert len(told) == 2 and all(reason in one and "\n" not in one for one in told)  # first frames, later frames


def test_running_out_of_memory_is_told(pipe: StreamDiffVSRPipeline) -> None:
    def fails(work: Work) -> tuple[Work, Tensor]:
        raise torch.OutOfMemoryError("no room")

    capture(pipe, fails)
    state = pipe.start()
    with pytest.raises(torch.OutOfMemoryError):
        pipe.step(clip(1)[0], [state])
    assert state.index == 0


def test_callbacks_and_tiles_take_the_reference(pipe: StreamDiffVSRPipeline) -> None:
    used: list[str] = []

    class Watching(CapturingBackend):
        def run(self, *arguments: object) -> Tensor:
            used.append("whole")
            return super().run(*arguments)  # type: ignore[arg-type]

    pipe._backend = Watching(pipe)
    seen: list[int] = []

    def told(pipe: object, number: int, *_: object) -> None:
        seen.append(number)

    pipe.step(clip(1)[0], [pipe.start()], callback_on_step_end=told)
    assert seen == [0, 1, 2, 3] and not used
    pipe.step(clip(1)[0], [pipe.start()])
    assert used == ["whole"]
    pipe.memory_limit_bytes = 8 << 30
    try:
        pipe.step(clip(1)[0], [pipe.start()])
    finally:
        pipe.memory_limit_bytes = None
    assert used == ["whole"], "what a backend needs is not in the estimate that keeps the limit"


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_openvino_over_thirty_frames(tiny: StreamDiffVSRPipeline, dtype: torch.dtype) -> None:
    frames = clip(30, 40, 56)
    wanted = restore(tiny, frames, 2)
    tiny.use_backend("openvino", dtype)
    found = restore(tiny, frames, 2)
    assert worst_db(found, wanted) > (LOSSLESS_DB if dtype == torch.float32 else CLOSE_DB)
    assert tiny.numerics == f"{str(dtype).removeprefix('torch.')} by openvino"
    assert tiny.dtype == torch.float32


@pytest.mark.slow
def test_openvino_serves_every_size_from_one_conversion(
    attending: StreamDiffVSRPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(16, 16), (17, 31), (40, 22)]
    wanted = [restore(attending, clip(2, *size), 2) for size in sizes]
    attending.use_backend("openvino")
    attending.warm_up()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("pipeline.openvino_backend._convert_quietly", never)
    for size, outputs in zip(sizes, wanted, strict=True):
        assert worst_db(restore(attending, clip(2, *size), 2), outputs) > 90
    attending.use_backend("openvino")  # as another process would: from the cache
    assert worst_db(restore(attending, clip(2, *sizes[0]), 2), wanted[0]) > 90


def test_a_damaged_cache_is_made_again(tiny: StreamDiffVSRPipeline, tmp_path: Path) -> None:
    frames = clip(1)
    tiny.use_backend("openvino")
    wanted = restore(tiny, frames, 1)
    for kept in (tmp_path / "cache/upriver/openvino").rglob("model.*"):
        kept.write_bytes(kept.read_bytes()[:100])
    tiny.use_backend("openvino")
    assert worst_db(restore(tiny, frames, 1), wanted) > 90


def test_models_do_not_share_conversions(tiny: StreamDiffVSRPipeline, pipe: StreamDiffVSRPipeline) -> None:
    frames = clip(1)
    tiny.use_backend("openvino")
    wanted = restore(pipe, frames, 1)
    restore(tiny, frames, 1)
    pipe.use_backend("openvino")
    assert worst_db(restore(pipe, frames, 1), wanted) > 90


def test_a_cache_that_cannot_be_written_costs_time_only(
    tiny: StreamDiffVSRPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    frames = clip(1)
    wanted = restore(tiny, frames, 1)
    tiny.use_backend("openvino")
    assert worst_db(restore(tiny, frames, 1), wanted) > 90


def test_openvino_of_a_model_in_bf16_leaves_it_as_it_is(model_folder: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, torch_dtype=torch.bfloat16)
    pipe.use_backend("openvino")
    frames = clip(2)
    restore(pipe, frames, 1)
    assert pipe.unet.dtype == torch.bfloat16 and pipe.numerics == "bfloat16 by openvino"


def test_openvino_does_not_report_its_use(model_folder: Path, tmp_path: Path) -> None:
    script = (
        "import socket, sys, torch\n"
        "def refuse(*a, **k): raise SystemExit('connected')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from pipeline import StreamDiffVSRPipeline\n"
        f"pipe = StreamDiffVSRPipeline.from_pretrained({str(model_folder)!r}, backend='openvino', flow='zero')\n"
        "pipe.step(torch.zeros(1, 3, 16, 16), [pipe.start()], steps=1)\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "print('done')\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "done", told.stderr
    assert "Warning" not in told.stderr


def test_two_threads_share_one_backend(tiny: StreamDiffVSRPipeline) -> None:
    from concurrent.futures import ThreadPoolExecutor

    frames = clip(4)
    tiny.use_backend("openvino")
    wanted = restore(tiny, frames, 1)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: restore(tiny, frames, 1), range(4)):
            assert worst_db(found, wanted) > 110


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["graph", "compiled"])
def test_a_gpu_records_and_compiles(model_folder: Path, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, device="cuda", flow=ZeroFlow())
    frames = clip(4)
    wanted = restore(pipe, frames)
    pipe.use_backend(backend)
    assert worst_db(restore(pipe, frames), wanted) > LOSSLESS_DB
    assert not caplog.records


@pytest.mark.gpu
def test_a_gpu_records_while_other_threads_move_frames(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, device="cuda", flow=ZeroFlow())
    frames, over = clip(6), threading.Event()
    wanted = restore(pipe, frames)
    pipe.use_backend("graph")

    def move() -> None:
        while not over.is_set():
            torch.rand(1 << 20).pin_memory().to("cuda", non_blocking=True).mul(2).cpu()

    others = [threading.Thread(target=move) for _ in range(3)]
    for other in others:
        other.start()
    try:
        assert worst_db(restore(pipe, frames), wanted) > LOSSLESS_DB
    finally:
        over.set()
        for other in others:
            other.join()
    assert not caplog.records


@pytest.mark.slow
def test_compiled_blocks_on_a_cpu(model_folder: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder)
    frames = clip(3)
    wanted = restore(pipe, frames)
    pipe.use_backend("compiled")
    assert worst_db(restore(pipe, frames), wanted) > LOSSLESS_DB
    pipe.use_backend("eager")
    assert all(torch.equal(a, b) for a, b in zip(restore(pipe, frames), wanted, strict=True))
