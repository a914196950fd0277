"""`upriver bench --against`: a stand-in takes the place of the published code, whose checkout is not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.random_model import save_random_model

# Takes what the published pipeline takes, and gives out what it gives out: all pictures at the end, each in a list.
STAND_IN = """
if FAILS:
    raise RuntimeError("out of patience")
import time
import types
from diffusers import ControlNetModel, UNet2DConditionModel
import util.notes

class StreamDiffVSRPipeline:
    def __init__(self, vae, unet, controlnet, scheduler, **others):
        assert others == dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
                              requires_safety_checker=False)
        assert unet.config.in_channels == 7 and vae == "autoencoder"
    def to(self, device):
        return self
    def set_progress_bar_config(self, disable):
        pass
    def __call__(self, prompt, images, prompt_embeds, num_inference_steps, guidance_scale, generator, of_model):
        assert prompt is None and prompt_embeds.shape == (1, 1, 8) and num_inference_steps == 2 and guidance_scale == 0
        assert generator.initial_seed() == 42
        time.sleep(0.1 * len(images))
        large = [image.resize((4 * image.width, 4 * image.height)) for image in images]
        return types.SimpleNamespace(images=[[image] for image in large])
"""
AUTOENCODER = """
class TemporalAutoencoderTiny:
    @classmethod
    def from_pretrained(cls, folder):
        assert folder.endswith("vae")
        return "autoencoder"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    return save_random_model(tmp_path_factory.mktemp("model") / "random")


def checkout(folder: Path, *, fails: bool = False) -> Path:
    """A folder that looks like a checkout; as there, its packages have no __init__.py."""
    for name, text in {
        "pipeline/stream_diffvsr_pipeline.py": f"FAILS = {fails}\n{STAND_IN}",
        "temporal_autoencoder/autoencoder_tiny.py": AUTOENCODER,
        "util/notes.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def typed(model: Path, folder: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--size", "32x32", "--frames", "5", "--steps", "2", "--flow", "zero"]
    return ["bench", "--against", str(folder), *options, "--device", "cpu", "--threads", "1", *more]


def test_both_restore_the_same_and_are_set_side_by_side(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkout(tmp_path / "published")
    assert main(typed(model, folder, "--json", "--save", str(tmp_path / "records"))) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["results"]
    assert 100 <= row["published_ms"] < 1000 and row["frames"] == 5
    assert row["published_first_ms"] == pytest.approx(5 * row["published_ms"], rel=0.01), "it gives all at the end"
    assert row["ratio"] == pytest.approx(row["published_ms"] / row["upriver_ms"], rel=0.02)
    assert row["first_ratio"] == pytest.approx(row["published_first_ms"] / row["upriver_first_ms"], rel=0.02)
    assert 0 < row["psnr_db"] < 60, "the stand-in restores nothing"
    assert any("xformers is not installed" in line for line in told["told"])
    page = next((tmp_path / "records").glob("against-*.md")).read_text()
    assert "xformers is not installed" in page and str(tmp_path) not in page


def test_its_failure_is_told_in_its_own_words(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed(model, checkout(tmp_path, fails=True))) == 2
    assert "RuntimeError: out of patience" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--model", "tiny"), "cannot run tiny"),
        (("--model", "random:small"), "cannot run random:small"),
        (("--batches", "2"), "--batches does not go together"),
        (("--against", "nowhere"), "is no checkout"),
        (("--against-python", "nowhere/python"), "cannot be started"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: Path, tmp_path: Path, change: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*typed(model, checkout(tmp_path)), *change]) == 2
    assert words in capsys.readouterr().err
