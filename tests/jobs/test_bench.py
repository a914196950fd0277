from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer.main

from jobs.bench import app, output_sizes
from jobs.bench_measure import BenchResult
from jobs.bench_peak import data_sheet_tflops, measured_tflops
from jobs.bench_report import save_record, slug
from jobs.bench_stages import INSIDE, STAGES, StageClock, metered, with_rest
from jobs.bench_streams import carried, carried_lines
from jobs.cli import main
from jobs.errors import UsageError
from tests.random_model import save_random_model

OPTIONS = [
    "--model", "--steps", "--device", "--dtype", "--backend", "--flow", "--threads", "--size", "--sizes", "--batches",
    "--frames", "--save", "--against", "--against-python", "--raft", "--config", "--json", "--debug",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


def test_the_surface_is_the_one_that_is_promised() -> None:
    parameters = typer.main.get_command(app).params
    assert [parameter.opts[0] for parameter in parameters if parameter.param_type_name == "option"] == OPTIONS


def test_commands_in_the_book_can_be_typed(repository: Path) -> None:
    """Those in a table's cells, which are the ones for missing rows; the book's own test reads code blocks."""
    typed = re.findall(r"`upriver bench ([^`]+)`", (repository / "docs/gpu.md").read_text())
    assert len(typed) >= 8
    for words in typed:
        context = typer.main.get_command(app).make_context("bench", words.split())
        assert output_sizes(context.params["sizes"] or "720p") and context.params["batches"].count(",") in (0, 3)
    assert any("--against" in words for words in typed) and any(words.startswith("pipeline") for words in typed)


def test_every_stage_is_timed_and_they_add_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(model), "--size", "48x32", "--frames", "3", "--threads", "1", "--device", "cpu", "--json"]
    assert main(["bench", *options, "--dtype", "fp32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert tuple(told["stages_ms"]) == STAGES
    assert all(told["stages_ms"][name] > 0 for name in STAGES if name != "other")
    inside = sum(value for name, value in told["stages_ms"].items() if name not in ("decode", "encode"))
    # Medians of parts and the median of their sum differ a little.
    assert inside == pytest.approx(told["step_ms"], rel=0.35)
    assert told["size"] == "48x32 -> 192x128" and told["dtype"] == "float32" and told["flow"] == "dis"
    assert told["model_fps"] == pytest.approx(1000 / told["step_ms"], rel=0.01) and len(told["model_sha256"]) == 64
    assert told["first_frame_cold_ms"] > told["load_ms"] > 0 and told["first_frame_warm_ms"] > 0


def test_the_engine_is_as_before_afterwards(model: Path) -> None:
    from pipeline import reference_step as engine

    before = (engine.flow_warp, engine.embed_condition, engine.artg_residuals)
    assert (
        main(["bench", "--model", str(model), "--size", "32x32", "--frames", "2", "--steps", "1", "--threads", "1"])
        == 0
    )
    assert (engine.flow_warp, engine.embed_condition, engine.artg_residuals) == before


def test_one_table_for_sizes_and_numbers_of_streams(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model", str(model), "--sizes", "128x128,192x128", "--batches", "1,3", "--frames", "2", "--flow", "zero",
        "--threads", "1",
    ]  # fmt: skip
    assert main(["bench", *options, "--steps", "2", "--json", "--save", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    results = [BenchResult(**each) for each in told["results"]]
    assert [(each.size.split()[-1], each.batch) for each in results] == [
        ("128x128", 1), ("128x128", 3), ("192x128", 1), ("192x128", 3),
    ]  # fmt: skip
    for each in results:
        assert tuple(each.stages_ms) == INSIDE and each.flow == "zero"
        assert each.model_fps == pytest.approx(1000 * each.batch / each.step_ms, rel=0.01)
        floor_ms = 1000 * sum(each.stages_tflop.values()) / each.peak_tflops
        assert each.floor_ms == pytest.approx(floor_ms, rel=0.02, abs=0.001)
        assert each.of_floor == pytest.approx(each.floor_ms / each.step_ms, rel=0.05, abs=0.001)
        assert (each.fraction_of_floor("unet") or 0) > 0
    one, three = results[0].stages_tflop, results[1].stages_tflop
    assert all(three[stage] == pytest.approx(3 * one[stage], rel=0.01) for stage in ("unet", "artg", "decoder"))

    page = next(tmp_path.glob("speed-*.md")).read_text()
    assert "upriver bench --model random" in page and "--sizes 128x128,192x128 --batches 1,3" in page
    assert str(tmp_path.parent) not in page, "a path of this machine"
    assert json.loads(next(tmp_path.glob("speed-*.json")).read_text())["results"][3]["step_ms"] == results[3].step_ms
    assert page.count("model alone") == 4
    assert page.count("live streams at") == 2 and {row["output"] for row in told["live_streams"]} == {
        "128x128",
        "192x128",
    }


def test_how_many_live_streams_a_curve_means(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(model), "--size", "32x32", "--frames", "2", "--steps", "1", "--threads", "1", "--json"]
    assert main(["bench", *options]) == 0
    measured = BenchResult(**json.loads(capsys.readouterr().out))

    def curve(size: str, ms: dict[int, float]) -> list[BenchResult]:
        return [replace(measured, size=f"a -> {size}", batch=batch, step_ms=value) for batch, value in ms.items()]

    results = curve("1280x720", {1: 12, 2: 14, 4: 18, 8: 26}) + curve("8x8", {1: 120, 2: 240}) + curve("4x4", {2: 1})
    rows = {(row["output"], row["fps"]): row for row in carried(results)}
    assert rows["1280x720", 30] | {"latest_ms": 0} == {
        "output": "1280x720", "fps": 30, "streams": 8, "batch": 8, "latest_ms": 0,
    }  # fmt: skip
    assert rows["1280x720", 10]["streams"] == 30 and rows["8x8", 10]["streams"] == 0 and ("4x4", 10) not in rows
    assert [line.partition(":")[0] for line in carried_lines(results)][1] == "live streams at 8x8"
    assert "8 of 30 frames/s in batches of 8" in next(carried_lines(results))


def test_a_backend_that_runs_all_at_once_is_one_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [
        "--backend",
        "openvino",
        "--model",
        str(model),
        "--batches",
        "1",
        "--size",
        "32x32",
        "--frames",
        "2",
        "--steps",
        "1",
        "--threads",
        "1",
    ]
    assert main(["bench", *options]) == 0
    text = capsys.readouterr().out
    assert "stages cannot be told apart" in text
    stages = [line.split()[-4:] for line in text.splitlines() if " model " in line]
    assert stages and "unet" not in text and " flow " in text


def test_flow_inside_of_the_frame_is_no_row_of_its_own(model: Path) -> None:
    import torch

    from pipeline import StreamDiffVSRPipeline
    from pipeline.cuda_backend import CapturingBackend

    pipe = StreamDiffVSRPipeline.from_pretrained(model, flow="net")
    for backend, seen in ((None, {"flow"}), (CapturingBackend(pipe), set())):
        pipe._backend, clock, state = backend, StageClock(pipe.device), pipe.start()
        with metered(pipe, clock, fused=True):
            for _ in range(2):
                clock.next_frame()
                pipe.step(torch.zeros(1, 3, 16, 16), [state], steps=1)
        assert clock.milliseconds(skip=0).keys() == seen
        assert pipe.flow.name == "net"


def test_what_no_stage_explains() -> None:
    stages = {"flow": 2.0, "unet": 5.0, "encode": 3.0}
    assert with_rest(stages, 10.0, fused=False)["other"] == 3.0
    assert with_rest({"flow": 2.0, "encode": 3.0}, 10.0, fused=True) == {"flow": 2.0, "model": 8.0, "encode": 3.0}


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "large"]) == 2
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
    assert main(["bench", "--sizes", "720p,721x404"]) == 2
    assert "'721x404'" in capsys.readouterr().err
    assert main(["bench", "--batches", "1,none"]) == 2
    assert main(["bench", "pipeline", "--batches", "2"]) == 2


def test_named_sizes_are_output_sizes() -> None:
    assert output_sizes("360p,720p, 1080p") == [(160, 90), (320, 180), (480, 270)]
    with pytest.raises(UsageError, match="no output size"):
        output_sizes("")


def test_the_peak_is_that_of_a_matrix_product() -> None:
    import torch

    found = measured_tflops(torch.device("cpu"), torch.float32, 256)
    assert 1e-4 < found < 100
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3") == 989 and data_sheet_tflops("NVIDIA H100 PCIe") == 756
    assert data_sheet_tflops("NVIDIA L40S") == 362 and data_sheet_tflops("NVIDIA L4") == 121
    assert data_sheet_tflops("AMD EPYC, 2 cores") is None


def test_records_have_names_of_their_own(tmp_path: Path) -> None:
    assert slug("AMD EPYC, 2 cores") == "2-core-cpu" and slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    paths = [
        save_record(tmp_path, "speed", "NVIDIA L4", "Speed", [f"- run {run}"], {"command": "upriver bench", "run": run})
        for run in range(2)
    ]
    assert [path.stem.rpartition("-l4")[2] for path in paths] == ["", "-2"]
    assert "- run 0" in paths[0].read_text() and "`upriver bench`" in paths[1].read_text()
    assert [json.loads(path.with_suffix(".json").read_text())["run"] for path in paths] == [0, 1]


def test_from_file_to_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(model),
        "--size",
        "32x32",
        "--frames",
        "4",
        "--steps",
        "1",
        "--flow",
        "zero",
        "--json",
        "--threads",
        "1",
    ]
    assert main(["bench", "pipeline", *options, "--save", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    (result,) = told["results"]
    assert result["size"] == "32x32 -> 128x128" and result["frames"] == 4
    assert result["ratio"] == pytest.approx(result["pipeline_fps"] / result["model_fps"], rel=0.02)
    assert result["whole_fps"] > 0 and 0 <= result["waited_for_decoder"] < 1 and result["first_frame_ms"] > 0
    assert "upriver bench pipeline" in next(tmp_path.glob("pipeline-*.md")).read_text()


def test_from_file_to_file_flow_is_looked_for_ahead_as_in_a_worker(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.settings import Settings
    from jobs import bench_pipeline
    from jobs.bench_clip import write_clip
    from pipeline import StreamDiffVSRPipeline, flow_ahead

    clip, pipe = tmp_path / "clip.mp4", StreamDiffVSRPipeline.from_pretrained(model)
    write_clip(clip, 32, 32, 8)
    known: list[bool] = []
    step = pipe.step
    monkeypatch.setattr(flow_ahead, "helps", lambda _: True)
    monkeypatch.setattr(
        pipe,
        "step",
        lambda *given, **more: (known.append((more.get("flow_B2HW") or [None])[0] is not None), step(*given, **more))[
            1
        ],
    )
    bench_pipeline._from_file_to_file(pipe, Settings(steps=1), clip, tmp_path / "out.mp4")
    assert len(known) == 8 and sum(known) >= 4


def test_decoder_model_and_encoder_work_at_the_same_time(model: Path, tmp_path: Path) -> None:
    """With an encoder as slow as the model, the clip takes about as long as one of them, not as both."""
    import time

    from infra.settings import Settings
    from jobs import bench_pipeline
    from jobs.bench_clip import write_clip
    from pipeline import video
    from pipeline.engine import StandIn

    class SlowWriter(video.VideoWriter):
        def write(self, frame: video.VideoFrame) -> None:
            time.sleep(0.05)
            super().write(frame)

    clip = tmp_path / "clip.mp4"
    write_clip(clip, 32, 32, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "VideoWriter", SlowWriter)
        run = bench_pipeline._from_file_to_file(
            StandIn("stand-in:50"),
            Settings(),
            clip,
            tmp_path / "out.mp4",  # type: ignore[arg-type]
        )
    assert len(run.done_s) == 12
    assert 0.6 <= run.whole_s < 1.05, "twelve times 0.05 s, not 0.10 s"


@pytest.mark.gpu
def test_stages_on_a_gpu_are_timed_by_events(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "random:tiny", "--sizes", "720p", "--frames", "8", "--device", "cuda", "--flow", "zero"]
    assert main(["bench", *options, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["results"]
    assert told["peak_memory_mib"] > 0 and told["peak_tflops"] > 1
    if told["backend"] == "eager":
        assert all(told["stages_ms"][name] > 0 for name in ("unet", "artg", "tpm", "decoder"))
    assert sum(told["stages_ms"].values()) == pytest.approx(told["step_ms"], rel=0.35)
