"""`upriver bench --against PATH`: this engine beside a checkout of the published code.

Both restore the same clip with the same weights, noise and flow network, one after the other, the published code in an
interpreter of its own (`jobs.bench_published`) and with its own settings. It takes in the whole clip and gives out the
whole clip: its first frame comes with its last.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from infra.settings import Settings
from jobs.bench_clip import scene
from jobs.bench_model import PREFIX, open_model, random_model
from jobs.errors import ExitCode, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from jobs.bench import BenchRequest
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

NOISE_SEED: Final = 42
COMPARED: Final = 30  # frames whose pictures are compared
_ERROR_LINES: Final = 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """One clip through both. Milliseconds; `first_*` is the wait from the clip's first frame to the first result.

    Attributes:
        ratio: how many times as many frames Upriver restores in the same time.
        first_ratio: how many times sooner its first frame is there.
        psnr_db: of its pictures to those of the published code, the worst frame; None where the flow differs.
    """

    size: str
    frames: int
    published_ms: float
    upriver_ms: float
    ratio: float
    published_first_ms: float
    upriver_first_ms: float
    first_ratio: float
    published_load_ms: float
    upriver_load_ms: float
    published_memory_mib: int | None
    upriver_memory_mib: int | None
    psnr_db: float | None


def against_command(request: BenchRequest, settings: Settings) -> int:
    """Measure and print; returns the exit status.

    Raises:
        UsageError: there is no such checkout, the model is not one that the published code can run, or it failed.
        CheckpointError, FlowError, ActorsError: the model cannot be set up.
    """
    import torch

    from actors.hardware import choose_device, usable_cores
    from jobs.bench import command_line, input_size, output_sizes
    from jobs.bench_measure import hardware_name
    from jobs.bench_report import aligned, save_record

    assert request.against is not None
    checkout = request.against.resolve()
    if not (checkout / "pipeline" / "stream_diffvsr_pipeline.py").is_file():
        raise UsageError(
            f"--against {request.against} is no checkout of the published code.",
            code="bench-against",
            remedy="Clone github.com/jamichss/Stream-DiffVSR and give the folder of the clone.",
        )
    if request.batches:
        raise UsageError(
            "--batches does not go together with --against.",
            code="bench-batches",
            remedy="Leave it away: the published code restores one stream.",
        )
    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(settings.device)
    sizes = output_sizes(request.sizes) if request.sizes else [input_size(request.size)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings.model_copy(update={"model": str(_checkpoint(settings.model, device, folder))})
        raft = None if settings.flow == "zero" else _raft_weights(request.raft, Path(settings.model), folder)
        python = request.against_python or sys.executable
        told: dict[str, str] = {}
        rows = []
        for size in sizes:
            clip = _Clip(folder, size, request.frames, settings, device, threads, raft)
            rows.append(_compare(clip, checkout, python, told))
    commit = _commit(checkout)
    heading = [
        f"published code{' at ' + commit if commit else ''}: {told['published']}",
        f"Upriver: {told['upriver']}",
        f"{hardware_name()}; the same weights ({_name(request)}), frames and noise; flow: {told['flow']}",
    ]
    cells = [_HEAD, *(_cells(row) for row in rows)]
    document: dict[str, Any] = {
        "command": command_line(request),
        "commit": commit,
        "told": heading,
        "results": [asdict(row) for row in rows],
    }
    print(json.dumps(document, indent=2) if request.as_json else "\n".join([*heading, aligned(cells)]))
    if request.save is not None:
        lines = [f"- {line}" for line in heading]
        lines += ["", "| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
        lines += ["| " + " | ".join(cells) + " |" for cells in map(_cells, rows)]
        save_record(request.save, "against", hardware_name(), "Beside the published code", lines, document)
    return int(ExitCode.DONE)


@dataclass(frozen=True, slots=True)
class _Clip:
    """What both restore, and with what."""

    folder: Path
    size: tuple[int, int]
    frames: int
    settings: Settings
    device: str
    threads: int
    raft: Path | None

    def pictures(self) -> NDArray[np.uint8]:
        import numpy as np

        return np.stack([scene(index, *self.size) for index in range(self.frames)])


def _compare(clip: _Clip, checkout: Path, python: str, told: dict[str, str]) -> Comparison:
    """Run the published code, then this engine; `told` is given the circumstances of both, in words."""
    import numpy as np

    prompt = _prompt_embeds(clip.settings)
    np.save(clip.folder / "prompt.npy", prompt)
    np.save(clip.folder / "frames.npy", clip.pictures())
    theirs = _run_published(clip, checkout, python)
    pipe, load_ms = _open(clip)
    ours_ms, pictures = _run_upriver(pipe, clip)
    same_flow = pipe.flow.name in ("zero", "raft")
    reference = np.load(clip.folder / "restored.npy")
    first_ms, their_ms = ours_ms[0], 1000 * theirs["total_s"]
    mean_ms = statistics.fmean(ours_ms)
    dtype = str(pipe.compute_dtype).removeprefix("torch.")
    told["published"] = (
        f"python {theirs['python']}, torch {theirs['torch']}, diffusers {theirs['diffusers']}, float32 with TF32 "
        f"allowed, {theirs['attention']}"
    )
    told["upriver"] = f"{dtype} on {pipe.device}, backend {pipe.backend}, {clip.threads} threads"
    published_flow = "none (no motion)" if clip.raft is None else "RAFT at output size"
    told["flow"] = f"{published_flow} there, {pipe.flow.name} here"
    memory = theirs["peak_memory_mib"]
    width, height = clip.size
    return Comparison(
        size=f"{width}x{height} -> {4 * width}x{4 * height}",
        frames=clip.frames,
        published_ms=round(their_ms / clip.frames, 2),
        upriver_ms=round(mean_ms, 2),
        ratio=round(their_ms / clip.frames / mean_ms, 3),
        published_first_ms=round(their_ms, 1),
        upriver_first_ms=round(first_ms, 2),
        first_ratio=round(their_ms / first_ms, 1),
        published_load_ms=round(1000 * theirs["load_s"], 1),
        upriver_load_ms=round(load_ms, 1),
        published_memory_mib=memory,
        upriver_memory_mib=None if memory is None else _allocated_mib(),
        psnr_db=round(_worst_psnr(reference, pictures), 2) if same_flow else None,
    )


def _run_published(clip: _Clip, checkout: Path, python: str) -> dict[str, Any]:
    """Run `jobs.bench_published` by `python` and return its answer.

    Raises:
        UsageError: it failed; the last lines that it wrote are in the message.
    """
    from jobs import bench_published
    from pipeline.schedule import DEFAULT_STEPS

    answer = clip.folder / "answer.json"
    request = {
        "checkout": str(checkout),
        "model": clip.settings.model,
        "frames": str(clip.folder / "frames.npy"),
        "prompt": str(clip.folder / "prompt.npy"),
        "restored": str(clip.folder / "restored.npy"),
        "kept": COMPARED,
        "answer": str(answer),
        "steps": clip.settings.fixed_steps or DEFAULT_STEPS,
        "noise_seed": NOISE_SEED,
        "raft": None if clip.raft is None else str(clip.raft),
        "device": clip.device,
        "threads": clip.threads,
    }
    (clip.folder / "request.json").write_text(json.dumps(request))
    command = [python, "-I", str(Path(bench_published.__file__)), str(clip.folder / "request.json")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    except OSError as error:
        raise UsageError(
            f"--against-python {python} cannot be started: {error.strerror or error}.",
            code="bench-against-python",
            remedy="Give the interpreter of an environment with the published code's requirements.",
        ) from error
    if done.returncode != 0:
        last = " ".join(" / ".join(done.stderr.strip().splitlines()[-_ERROR_LINES:]).split())
        raise UsageError(
            f"The published code failed with status {done.returncode}: {last}.",
            code="bench-against-failed",
            remedy="Install what it asks for where --against-python points to (its diffusers is 0.27.2), or use "
            "--flow zero where torchvision is missing.",
        )
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def _run_upriver(pipe: StreamDiffVSRPipeline, clip: _Clip) -> tuple[list[float], list[NDArray[Any]]]:
    """Restore the clip frame by frame, after a few to warm up; returns each frame's milliseconds, and pictures."""
    from jobs.bench_published import WARM_UP_FRAMES
    from pipeline.frames import frame_to_tensor, tensor_to_frame

    frames = clip.pictures()

    def restore(count: int) -> tuple[list[float], list[NDArray[Any]]]:
        state, noise = pipe.start(), _noise(pipe, clip)
        times_ms: list[float] = []
        pictures: list[NDArray[Any]] = []
        for frame in frames[:count]:
            began = time.perf_counter()
            output_B3HW = pipe.step(frame_to_tensor(frame), [state], next(noise), steps=clip.settings.fixed_steps)
            picture = tensor_to_frame(output_B3HW[0], frame.dtype)
            times_ms.append(1000 * (time.perf_counter() - began))
            if len(pictures) < COMPARED:
                pictures.append(picture)
        return times_ms, pictures

    restore(WARM_UP_FRAMES)
    return restore(len(frames))


def _noise(pipe: StreamDiffVSRPipeline, clip: _Clip) -> Any:
    """Yield the initial latents that the published code draws from a generator with this seed, frame after frame."""
    import torch

    generator = torch.Generator("cpu").manual_seed(NOISE_SEED)
    width, height = clip.size
    while True:
        yield torch.randn((1, pipe.vae.config.latent_channels, height, width), generator=generator)


def _open(clip: _Clip) -> tuple[StreamDiffVSRPipeline, float]:
    import torch

    from actors.hardware import choose_formats
    from pipeline.backends import choose_backend
    from pipeline.flow import RAFTFlow

    began = time.perf_counter()
    pipe = open_model(
        clip.settings,
        clip.device,
        choose_formats(clip.settings.dtype, clip.device, choose_backend(clip.settings.backend, clip.device)),
    )
    if pipe.flow.name == "raft":
        pipe.flow = RAFTFlow(weights=clip.raft).to(pipe.device)
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # fp32 weights were there while they were cast
    return pipe, 1000 * (time.perf_counter() - began)


def _checkpoint(model: str, device: str, folder: Path) -> Path:
    """Return the folder of a checkpoint that the published code can run; random weights are written to one first.

    Raises:
        UsageError: the model is of another form.
    """
    import torch

    from infra.model_cache import local_model
    from pipeline.autoencoder import TemporalAutoencoderTiny
    from pipeline.model_source import resolve

    if model == f"{PREFIX}published":
        path = folder / "model"
        random_model("published", device=device, dtype=torch.float32, flow="zero").save_pretrained(path)
        return path
    found = None if model.startswith(PREFIX) else resolve(local_model(model))
    config = TemporalAutoencoderTiny.load_config(found / "vae") if found else {}
    if found is None or config.get("lr_skip") or config.get("temporal_fusion", "pooled") != "pooled":
        raise UsageError(
            f"The published code cannot run {model}: it is of another form.",
            code="bench-against-model",
            remedy=f"Use --model {PREFIX}published, or a checkpoint in the published form.",
        )
    return found


def _raft_weights(given: Path | None, model: Path, folder: Path) -> Path:
    """Return a file with weights for RAFT: the one given, the checkpoint's, or a new one with random weights."""
    import torch
    from safetensors.torch import save_file

    from pipeline.flow import RAFTFlow, _import_raft
    from pipeline.model_source import RAFT_WEIGHTS

    own = model / RAFT_WEIGHTS
    if given is not None or own.is_file():
        return (given or own).resolve()
    RAFTFlow()  # says what to do where torchvision is missing
    with torch.random.fork_rng():
        torch.manual_seed(NOISE_SEED)
        network = _import_raft().raft_large(weights=None, progress=False)
    path = folder / RAFT_WEIGHTS
    save_file(network.state_dict(), path)
    return path


def _prompt_embeds(settings: Settings) -> NDArray[np.float32]:
    """Return the embedding of the empty prompt (1,T,D) that the model's folder holds or makes."""
    from pipeline.checkpoint import load_checkpoint

    embeds_1TD: torch.Tensor | None = load_checkpoint(settings.model).prompt_embeds_1TD
    assert embeds_1TD is not None, "a checkpoint in the published form reads a prompt"
    return embeds_1TD.float().numpy()


def _worst_psnr(reference: NDArray[np.uint8], pictures: list[NDArray[Any]]) -> float:
    """Return the lowest PSNR in dB of any picture; 100 for equal ones."""
    import numpy as np

    worst = 100.0
    for one, other in zip(reference, pictures, strict=True):
        error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
        if error > 0:
            worst = min(worst, 10 * float(np.log10(255**2 / error)))
    return worst


def _allocated_mib() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated() >> 20)


def _commit(checkout: Path) -> str:
    """Return the checkout's commit, short; "" where git or its records are missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _name(request: BenchRequest) -> str:
    return Path(str(request.flags.get("model") or "")).name


_HEAD: Final = (
    "output", "frames", "published ms", "Upriver ms", "times as fast", "published first ms", "Upriver first ms",
    "times sooner", "worst PSNR dB",
)  # fmt: skip


def _cells(row: Comparison) -> tuple[str, ...]:
    return (
        row.size.rpartition(" ")[2], str(row.frames), f"{row.published_ms:.1f}", f"{row.upriver_ms:.1f}",
        f"{row.ratio:.2f}", f"{row.published_first_ms:.0f}", f"{row.upriver_first_ms:.1f}", f"{row.first_ratio:.0f}",
        "" if row.psnr_db is None else f"{row.psnr_db:.1f}",
    )  # fmt: skip
