"""Models come from a name, a folder or the hub's cache, as safetensors, and errors say which tensor and which file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline.model_source
from pipeline import CheckpointError, Guidance, StreamDiffVSRPipeline
from pipeline.checkpoint import load_checkpoint
from pipeline.frames import frame_to_tensor
from pipeline.model_source import WEIGHTS, built_in_models, resolve
from tests.moving_texture import make_clip


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def load_code(source: str | Path) -> str:
    """Return the error code that loading `source` gives."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    assert caught.value.remedy
    return caught.value.code


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_folder_is_found(model_folder: Path) -> None:
    assert resolve(model_folder) == model_folder
    assert resolve(str(model_folder)) == model_folder


def test_a_built_in_name_goes_before_a_folder(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "package"
    shutil.copytree(model_folder, models / "pond")
    monkeypatch.setattr(pipeline.model_source, "_MODELS", models)
    (tmp_path / "pond").mkdir()
    monkeypatch.chdir(tmp_path)
    assert built_in_models() == ["pond"]
    assert resolve("pond") == models / "pond"
    assert resolve("./pond") == Path("pond")
    with pytest.raises(CheckpointError, match=r"'lake'.*\(pond\)"):
        resolve("lake")


def test_the_hub_works_from_its_cache(model_folder: Path, tmp_path: Path) -> None:
    """No network here: what the cache holds is loaded, what it does not hold is an error that says so."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--river"
    shutil.copytree(model_folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    found = resolve("someone/river", cache_dir=tmp_path)
    assert found == repository / "snapshots" / revision
    assert load_checkpoint("someone/river", cache_dir=tmp_path, local_files_only=True).folder == found
    with pytest.raises(CheckpointError, match="'someone/lake'") as caught:
        resolve("someone/lake", cache_dir=tmp_path)
    assert caught.value.code == "checkpoint-unknown"


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "", "missing folder/x y"])
def test_nonsense_is_no_model(name: str) -> None:
    assert load_code(name) == "checkpoint-unknown"


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt", ".pkl"])
def test_pickles_are_refused_and_never_opened(copy: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (os.mkdir, (str(copy / "exploded"),))

    (copy / "unet" / WEIGHTS).unlink()
    torch.save({"weight": Bomb()}, copy / "unet" / f"diffusion_pytorch_model{suffix}")
    with pytest.raises(CheckpointError, match="pickled") as caught:
        load_checkpoint(copy)
    assert caught.value.code == "checkpoint-pickle"
    assert "safetensors.torch.save_file" in caught.value.remedy
    assert load_code(copy / "unet" / f"diffusion_pytorch_model{suffix}") == "checkpoint-pickle"
    assert not (copy / "exploded").exists()


def test_a_single_safetensors_file_is_no_checkpoint(model_folder: Path) -> None:
    assert load_code(model_folder / "unet" / WEIGHTS) == "checkpoint-file"


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(copy)
    assert caught.value.code == "checkpoint-incomplete"


@pytest.mark.parametrize("name", [f"controlnet/{WEIGHTS}", "vae/config.json", "upriver.json"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(copy)
    assert caught.value.code == "checkpoint-unreadable"


def test_a_wrong_shape_names_tensor_shapes_and_file(copy: Path) -> None:
    path = copy / "unet" / WEIGHTS
    change_weights(path, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(8, 4, 3, 3)}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    for part in ("conv_in.weight", "(8, 4, 3, 3)", "(8, 7, 3, 3)", str(path)):
        assert part in str(caught.value)
    assert caught.value.code == "checkpoint-shape"


def test_missing_and_unknown_tensors_are_named(copy: Path) -> None:
    path = copy / "vae" / WEIGHTS
    change_weights(path, lambda tensors: tensors.update({"surprise": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="unknown tensors: surprise"):
        load_checkpoint(copy)
    change_weights(path, lambda tensors: [tensors.pop("surprise"), tensors.pop("encoder.layers.0.bias")])
    with pytest.raises(CheckpointError, match=r"lacks tensors: encoder\.layers\.0\.bias"):
        load_checkpoint(copy)


def test_stray_class_embeddings_are_ignored_with_a_note(copy: Path, model_folder: Path) -> None:
    """In the weights alone, as in some copies, or asked for in the configuration, as in the x4 upscaler's."""
    width = 32
    change_weights(
        copy / "unet" / WEIGHTS, lambda tensors: tensors.update({"class_embedding.weight": torch.zeros(1000, width)})
    )
    config = copy / "controlnet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_class_embeds": 1000}))
    checkpoint = load_checkpoint(copy)
    assert any("class_embedding.weight" in note and "unet" in note for note in checkpoint.notes)
    assert any("controlnet" in note for note in checkpoint.notes)
    assert checkpoint.model_sha256 == load_checkpoint(model_folder).model_sha256


def test_options(copy: Path) -> None:
    (copy / "upriver.json").unlink()
    published = load_checkpoint(copy).options
    assert (published.warp, published.flow, published.noise, published.schedules) == (
        "published",
        "raft",
        "per_frame",
        {},
    )
    written = {"warp": "exact", "flow": "dis", "noise": "fixed", "schedules": {"2": [999, 300]}}
    (copy / "upriver.json").write_text(json.dumps(written))
    options = load_checkpoint(copy).options
    assert (options.warp, options.flow, options.noise, options.schedules) == ("exact", "dis", "fixed", {2: (999, 300)})
    for wrong in ({"warp": "bent"}, {"wrap": "exact"}, {"schedules": {"two": [1]}}):
        (copy / "upriver.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=f"upriver.json: {next(iter(wrong))}"):
            load_checkpoint(copy)


def test_parts_of_different_checkpoints_are_refused(copy: Path) -> None:
    config = copy / "vae" / "config.json"
    vae = load_checkpoint(copy).vae
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
    from pipeline.autoencoder import TemporalAutoencoderTiny

    torch.manual_seed(0)
    TemporalAutoencoderTiny.from_config({**vae.config, "latent_channels": 8}).save_pretrained(copy / "vae")
    with pytest.raises(CheckpointError, match=r"unet\.in_channels is 7.* must be 11"):
        StreamDiffVSRPipeline.from_pretrained(copy)


def test_saving_and_loading_keeps_model_and_output(model_folder: Path, tmp_path: Path) -> None:
    pipe = StreamDiffVSRPipeline.from_pretrained(model_folder, guidance={"tpm": False})
    assert pipe.guidance == Guidance(tpm=False)
    pipe.save_pretrained(tmp_path / "again")
    names = {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert names >= {"model_index.json", f"unet/{WEIGHTS}", f"controlnet/{WEIGHTS}", f"vae/{WEIGHTS}", "upriver.json"}
    assert not any(Path(name).suffix in (".bin", ".pth", ".pt") for name in names)
    again = StreamDiffVSRPipeline.from_pretrained(tmp_path / "again")
    assert again.model_sha256 == pipe.model_sha256
    assert again.guidance == pipe.guidance
    frame = frame_to_tensor(make_clip(1, 16, 20)[0])
    assert torch.equal(pipe.step(frame, [pipe.start()]), again.step(frame, [again.start()]))


def test_the_fingerprint_tells_models_apart(copy: Path, model_folder: Path) -> None:
    original = load_checkpoint(model_folder).model_sha256
    assert load_checkpoint(copy).model_sha256 == original
    change_weights(copy / "vae" / WEIGHTS, lambda tensors: tensors["decoder.layers.0.bias"].add_(1e-6))
    other = load_checkpoint(copy).model_sha256
    assert other != original
    (copy / "upriver.json").write_text(json.dumps({"flow": "dis", "noise": "fixed"}))
    assert load_checkpoint(copy).model_sha256 not in (other, original)


def test_a_pipeline_from_parts_has_the_fingerprint_of_its_checkpoint(model_folder: Path) -> None:
    checkpoint = load_checkpoint(model_folder)
    parts = StreamDiffVSRPipeline(
        checkpoint.unet, checkpoint.controlnet, checkpoint.vae, checkpoint.scheduler, options=checkpoint.options
    )
    assert parts.model_sha256 == checkpoint.model_sha256


# The prompt embedding of a checkpoint with attention (tests/parity compares its numbers)


def test_the_prompt_goes_to_the_users_cache_where_the_folder_is_read_only(
    parity_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.prompt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(parity_folder, tmp_path / "model"))
    stored = folder / "prompt_embeds.safetensors"
    stored.unlink(missing_ok=True)
    stored.mkdir()  # a folder in its place: cannot be written, whoever runs the test
    first = load_checkpoint(folder).prompt_embeds_1TD
    cached = list((tmp_path / "cache" / "upriver" / "prompt_embeds").iterdir())
    assert len(cached) == 1 and cached[0].suffix == ".safetensors"

    def not_again(folder: Path) -> torch.Tensor:
        raise AssertionError("the embedding was computed twice")

    monkeypatch.setattr(pipeline.prompt, "encode_empty_prompt", not_again)
    second = load_checkpoint(folder).prompt_embeds_1TD
    assert first is not None and second is not None and torch.equal(first, second)


def test_who_may_read_the_folder_may_read_the_stored_prompt(tmp_path: Path) -> None:
    """A model is often fetched by one user, root in an image's build, and read by another."""
    from pipeline.prompt import save_prompt_embeds

    usual = tmp_path / "usual"
    usual.touch()
    save_prompt_embeds(tmp_path / "prompt_embeds.safetensors", torch.zeros(1, 2, 3))
    assert (tmp_path / "prompt_embeds.safetensors").stat().st_mode == usual.stat().st_mode


def test_another_pad_token_is_another_embedding(parity_folder: Path, tmp_path: Path) -> None:
    """The trap: with CLIP's usual padding the model would get numbers that it has never seen."""
    from pipeline.prompt import encode_empty_prompt

    folder = Path(shutil.copytree(parity_folder, tmp_path / "model"))
    right = encode_empty_prompt(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer" / name
        path.write_text(path.read_text().replace('"pad_token": "!"', '"pad_token": "<|endoftext|>"'))
    assert (encode_empty_prompt(folder) - right).abs().max() > 0.01


@pytest.mark.parametrize("name", ["tokenizer/merges.txt", "tokenizer/vocab.json", "text_encoder/model.safetensors"])
def test_an_incomplete_text_part_is_named(parity_folder: Path, tmp_path: Path, name: str) -> None:
    """A missing merges.txt makes other loaders take a default tokenizer without a word."""
    folder = Path(shutil.copytree(parity_folder, tmp_path / "model"))
    (folder / "prompt_embeds.safetensors").unlink(missing_ok=True)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(folder)
    assert caught.value.code == "checkpoint-incomplete"


def test_a_prompt_of_another_width_is_refused(parity_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parity_folder, tmp_path / "model"))
    save_file({"prompt_embeds": torch.zeros(1, 77, 1024)}, folder / "prompt_embeds.safetensors")
    with pytest.raises(CheckpointError, match=r"\(1, 77, 1024\).*\(1, tokens, 32\)"):
        load_checkpoint(folder)


def test_a_stored_prompt_needs_no_transformers(parity_folder: Path, repository: Path) -> None:
    import subprocess
    import sys

    load_checkpoint(parity_folder)  # stores the embedding
    code = (
        "import sys; from pipeline import StreamDiffVSRPipeline\n"
        f"StreamDiffVSRPipeline.from_pretrained({str(parity_folder)!r}, flow='zero')\n"
        "print('transformers.models.clip.modeling_clip' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert out.stdout.strip() == "False"
