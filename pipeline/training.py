"""The training loop: one stage, resumable to the iteration, on a CPU or on one or many GPUs.

Knows: optimisers, averages, files of a run. Does not know: what is optimised (`objectives.py`), where data comes from.

A run folder holds ``state.safetensors`` (everything to go on from, to the bit where the machine allows it), ``model/``
(the averaged weights in the published layout), ``metrics.jsonl``, ``log/`` (TensorBoard) and ``validation/``
(pictures).

Distribution is by `accelerate`: start the same command under ``accelerate launch`` or ``torchrun``; each process draws
its own batches and gradients are averaged.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.closed_form import fit_projection, initialise
from pipeline.dataset import TrainingData
from pipeline.errors import PipelineError
from pipeline.losses import discriminator_loss
from pipeline.objectives import Objective, TrainConfig
from pipeline.restorer import SCHEDULES, SIZES, ModelSize, Restorer
from pipeline.stop_signals import StopSignals
from pipeline.training_state import load_optimiser, optimiser_tensors, part, read_tensors, write_tensors

SNAPSHOT_LIMIT_BYTES = 20_000_000
MODEL_CONFIG: dict[str, object] = {
    "warp": "exact",
    "flow": "dis",
    "noise": "fixed",
    "schedules": {str(steps): list(timesteps) for steps, timesteps in SCHEDULES.items()},
}
_AGREE_EVERY = 10  # iterations, where several processes train together
Progress = Callable[[int, dict[str, float]], None]


class TrainingError(PipelineError):
    """A run cannot start, resume or be saved."""


@dataclass
class Average:
    """Exponential moving average of the trainable weights; ramps up so that early weights do not linger."""

    decay: float
    values: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, decay: float) -> Average:
        return cls(decay, {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})

    @torch.no_grad()
    def update(self, module: nn.Module, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        named = {name: p for name, p in module.named_parameters() if name in self.values}
        torch._foreach_lerp_(list(self.values.values()), [named[name] for name in self.values], 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange weights and averages; call twice to get back."""
        for name, parameter in module.named_parameters():
            if name in self.values:
                current = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(current)


def learning_rate_factor(iteration: int, total: int, warmup: int, final: float) -> float:
    """Linear warm-up, then cosine from 1 to `final` at `total`."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    share = min(1.0, (iteration - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))


class Trainer:
    """One run of one stage.

    Args:
        config: what to train; see `TrainConfig`.
        report: called with (iteration, figures) every few seconds by the main process.

    Raises TrainingError when the initial model is missing or the run folder belongs to another configuration.
    """

    def __init__(self, config: TrainConfig, report: Progress | None = None) -> None:
        self.config, self.report = config, report or (lambda iteration, figures: None)
        torch.set_flush_denormal(True)  # discriminators drift into denormals, which are a hundred times slower
        cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
        if cpu:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
        self.device = self.accelerator.device
        self.data = TrainingData(
            config.data,
            max_frames=config.max_clip_frames,
            max_height=config.max_clip_height,
            holdout=config.holdout,
            flow=config.frames > 1,
        )
        self.restorer = self._initial_model()
        self.earlier_iterations = self.restorer.history.get(config.stage, 0)
        self.objective = Objective(self.restorer.to(self.device), config, self.device)
        groups = self.objective.trainable()
        self.rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01)
        self.average = Average.of(self.restorer, config.ema)
        self.judge_optimiser: torch.optim.Optimizer | None = None
        if self.objective.discriminator is not None:
            self.judge_optimiser = torch.optim.AdamW(
                self.objective.discriminator.parameters(), lr=config.discriminator_rate, betas=(0.5, 0.9)
            )
        self.iteration = 0
        self.stopped_by: int | None = None  # the signal that ended the run before its time
        self._resume()
        if self.device.type == "cpu":
            self.restorer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub forgot it
        self.objective.restorer, self.optimiser = self.accelerator.prepare(self.restorer, self.optimiser)
        if self.objective.restorer is not self.restorer:
            self.objective.restorer = _Distributed(self.objective.restorer, self.restorer)  # type: ignore[assignment]

    def _initial_model(self) -> Restorer:
        config = self.config
        if config.init is not None and config.init.is_file():
            restorer = self._from_snapshot(config.init)
        elif config.init is not None:
            if not (config.init / "model_index.json").exists():
                raise TrainingError(
                    f"{config.init} holds no model",
                    code="training-init",
                    remedy="Name a model folder (with model_index.json) or a snapshot file.",
                )
            restorer = Restorer.load(config.init)
        elif config.stage == "autoencoder":
            if config.size not in SIZES:
                raise TrainingError(
                    f"size {config.size!r} is unknown",
                    code="training-size",
                    remedy=f"Choose one of {', '.join(SIZES)}.",
                )
            restorer = Restorer.create(SIZES[config.size])
            pictures = next(self.data.batches(config.seed, batch=48, frames=1, side=128, severity=0, clip_share=0))[0]
            initialise(restorer.vae, pictures[:, 0])
        else:
            raise TrainingError(
                f"{config.stage} starts from a model, and none was named",
                code="training-init",
                remedy="Pass --init with the folder that the stage before wrote (RUN/model).",
            )
        if config.stage == "stage1" and "stage1" not in restorer.history and restorer.vae.lr_projection is not None:
            draw = self.data.batches(config.seed, batch=64, frames=1, side=96, severity=config.severity, clip_share=0.2)
            hr, lr, _ = next(draw)
            fit_projection(restorer.vae.lr_projection, lr[:, 0], restorer.vae.encode(hr[:, 0]).detach())
        if config.stage == "stage2":
            wanted = config.temporal_fusion or restorer.vae.config.temporal_fusion
            fresh = wanted != restorer.vae.config.temporal_fusion
            if fresh:
                restorer.replace_temporal(wanted)
            if fresh or "stage2" not in restorer.history:
                restorer.vae.silence_temporal()
        if config.stage == "stage3" and restorer.controlnet is None:
            restorer.add_guidance(restorer.size.conditioning)
        return restorer

    def _from_snapshot(self, path: Path) -> Restorer:
        """Build the model of a snapshot.

        The same stage goes on from the weights themselves (`_resume` adds averages and discriminator); another stage
        starts from the averages, which are what would have been shipped.
        """
        tensors, metadata = read_tensors(path)
        if "size" not in metadata:
            raise TrainingError(
                f"{path} is no snapshot of a training run", code="training-init", remedy="Write one with --snapshot."
            )
        restorer = Restorer.create(ModelSize.model_validate_json(metadata["size"]))
        restorer.history = json.loads(metadata["history"])
        if "stage3" in restorer.history:
            restorer.add_guidance(restorer.size.conditioning)
        weights = part(tensors, "model.")
        if metadata["stage"] != self.config.stage:
            weights |= part(tensors, "average.")
        restorer.load_state_dict({name: value.float() for name, value in weights.items()})
        return restorer

    def run(self) -> Path:
        """Train until `iterations`, `minutes` or a signal; return the folder of the averaged model.

        After a signal (`stopped_by`) to any of its processes the iteration at hand is finished and everything saved,
        without a validation: who sends it may not wait.
        """
        with StopSignals() as signals:
            self._run(signals)
        return self.config.out / "model"

    def _run(self, signals: StopSignals) -> None:
        config, began, last_report = self.config, time.monotonic(), 0.0
        batches = self.data.batches(
            config.seed + 1000 * self.accelerator.process_index,
            batch=config.batch,
            frames=config.frames,
            side=config.crop,
            severity=config.severity,
            clip_share=config.clip_share,
            still_share=config.still_share,
            tone_share=config.tone_share,
            start=self.iteration,
            workers=config.workers,
        )
        while self.iteration < config.iterations:
            figures = self.step(batches)
            self.iteration += 1
            now = time.monotonic()
            complete = self.iteration >= config.iterations
            time_is_up, stops = self._agree(bool(config.minutes and now - began > 60 * config.minutes), signals)
            finished = complete or time_is_up or stops
            if self.accelerator.is_main_process:
                if now - last_report > 10 or finished:
                    last_report = now
                    self._log(figures)
                validates = (self.iteration % config.validate_every == 0 or finished) and not stops
                if self.iteration % config.save_every == 0 or finished or validates:
                    self.save()
                if validates:
                    self._validate()
            if finished:
                if stops and not complete:
                    self.stopped_by = signals.received or signal.SIGTERM
                break
        self.accelerator.wait_for_everyone()

    def _agree(self, time_is_up: bool, signals: StopSignals) -> tuple[bool, bool]:
        """Return whether time is up and whether a signal came, in any process, and the same in all.

        One that ended alone would have the others wait for its gradients. They ask each other now and then: it costs a
        wait for the device.
        """
        stops = signals.received is not None
        if self.accelerator.num_processes == 1:
            return time_is_up, stops
        if self.iteration % _AGREE_EVERY and self.iteration < self.config.iterations:
            return False, False
        wishes = torch.tensor([time_is_up, stops], dtype=torch.float32, device=self.device)
        late, told = (bool(wish > 0) for wish in self.accelerator.reduce(wishes, "sum").tolist())
        return late, told

    def step(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        """One iteration: generator, average, discriminator. Returns the losses."""
        config = self.config
        progress = self.iteration / config.iterations
        factor = learning_rate_factor(self.iteration, config.iterations, config.warmup, config.final_learning_rate)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        hr, lr, flow = (x.to(self.device, non_blocking=True) for x in next(batches))
        rng = np.random.default_rng([config.seed, self.iteration, self.accelerator.process_index])

        judge = self.objective.discriminator
        if judge is not None:
            judge.requires_grad_(False)
        with self.accelerator.autocast():
            losses, output = self.objective.losses(hr, lr, flow, progress, rng)
            total = torch.stack([value.float() for value in losses.values()]).sum()
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss became {float(total)} at iteration {self.iteration}",
                code="training-diverged",
                remedy="Resume with a lower --learning-rate; the last saved state is intact.",
            )
        self.optimiser.zero_grad()
        self.accelerator.backward(total)
        self.accelerator.clip_grad_norm_(
            [p for g in self.optimiser.param_groups for p in g["params"]], config.clip_norm
        )
        self.optimiser.step()
        self.average.update(self.restorer, self.iteration)

        figures = {name: float(value.detach()) for name, value in losses.items()} | {"lr": factor * self.rates[0]}
        if judge is not None and self.judge_optimiser is not None and progress >= config.gan_from * 0.9:
            judge.requires_grad_(True)
            loss = discriminator_loss(judge(hr[:, -1]), judge(output.detach().float()))
            self.judge_optimiser.zero_grad()
            loss.backward()
            for parameter in judge.parameters():
                if parameter.grad is not None and self.accelerator.num_processes > 1:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            self.judge_optimiser.step()
            figures["discriminator"] = float(loss.detach())
        return figures

    def _log(self, figures: dict[str, float]) -> None:
        self.config.out.mkdir(parents=True, exist_ok=True)
        record = {"iteration": self.iteration, "time": round(time.time(), 1)} | {
            k: round(v, 6) for k, v in figures.items()
        }
        with (self.config.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        writer = self._tensorboard()
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(f"train/{name}", value, self.iteration)
        self.report(self.iteration, figures)

    def _tensorboard(self) -> Any:
        if not hasattr(self, "_writer"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # the extra `train` is not installed: metrics.jsonl has the same figures
                self._writer = None
            else:
                self._writer = SummaryWriter(str(self.config.out / "log"))
        return self._writer

    @torch.no_grad()
    def _validate(self) -> None:
        from pipeline.validation import validate

        self.average.swap(self.restorer)
        try:
            figures = validate(self.restorer, self.data, self.config, self.device, self.iteration)
        finally:
            self.average.swap(self.restorer)
        record = {"iteration": self.iteration, "validation": {k: round(v, 5) for k, v in figures.items()}}
        self.config.out.mkdir(parents=True, exist_ok=True)
        with (self.config.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        writer = self._tensorboard()
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(f"validation/{name}", value, self.iteration)
        self.report(self.iteration, {f"val {k}": v for k, v in figures.items()})

    def save(self) -> None:
        """Write the resumable state, the averaged model, and the snapshot if one is configured."""
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.restorer.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.values.items()}
        tensors |= optimiser_tensors("optimiser", self.optimiser)
        if self.objective.discriminator is not None and self.judge_optimiser is not None:
            tensors |= {f"judge.{k}": v for k, v in self.objective.discriminator.state_dict().items()}
            tensors |= optimiser_tensors("judge_optimiser", self.judge_optimiser)
        self.restorer.history[self.config.stage] = self.earlier_iterations + self.iteration
        metadata = {
            "iteration": str(self.iteration),
            "config": self.config.model_dump_json(),
            "history": json.dumps(self.restorer.history),
        }
        write_tensors(tensors, out / "state.safetensors", metadata)
        self.average.swap(self.restorer)
        try:
            self.restorer.save(out / "model", MODEL_CONFIG)
        finally:
            self.average.swap(self.restorer)
        if self.config.snapshot is not None:
            self.write_snapshot(self.config.snapshot)

    def write_snapshot(self, path: Path) -> None:
        """Write weights and averages as fp16 with step and seed; at most 20 MB, so that runs add up across machines."""
        keep = {k: v for k, v in self.restorer.state_dict().items() if v.is_floating_point()}
        tensors = {f"model.{k}": v.half() for k, v in keep.items()}
        tensors |= {f"average.{k}": v.half() for k, v in self.average.values.items()}
        if self.objective.discriminator is not None:
            tensors |= {f"judge.{k}": v.half() for k, v in self.objective.discriminator.state_dict().items()}
        size = sum(v.numel() * 2 for v in tensors.values())
        if size > SNAPSHOT_LIMIT_BYTES:
            raise TrainingError(
                f"the snapshot would take {size} bytes, the limit is {SNAPSHOT_LIMIT_BYTES}",
                code="training-snapshot",
                remedy="Large models are kept as run folders; pass no --snapshot.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        public = self.config.model_dump(mode="json", exclude={"data", "out", "init", "snapshot", "device", "threads"})
        metadata = {
            "stage": self.config.stage,
            "iteration": str(self.iteration),
            "history": json.dumps(self.restorer.history),
            "size": self.restorer.size.model_dump_json(),
            "config": json.dumps(public),
        }
        write_tensors(tensors, path, metadata)

    def _resume(self) -> None:
        """Go on with the run folder's state; else take averages and discriminator from a snapshot of the same stage."""
        state = self.config.out / "state.safetensors"
        init = self.config.init
        if state.exists():
            tensors, metadata = read_tensors(state)
            stage = json.loads(metadata["config"])["stage"]
            if stage != self.config.stage:
                raise TrainingError(
                    f"{state} is a run of {stage}, not of {self.config.stage}",
                    code="training-resume",
                    remedy="Choose another --out folder, or pass the finished stage's model as --init.",
                )
            self.restorer.load_state_dict(part(tensors, "model."))
            self.iteration = int(metadata["iteration"])
            self.restorer.history = json.loads(metadata["history"])
            self.earlier_iterations = self.restorer.history.get(stage, 0) - self.iteration
            load_optimiser(self.optimiser, part(tensors, "optimiser."))
            if self.judge_optimiser is not None:
                load_optimiser(self.judge_optimiser, part(tensors, "judge_optimiser."))
        elif init is not None and init.is_file():
            tensors, metadata = read_tensors(init)
            if metadata["stage"] != self.config.stage:
                tensors = {key: value for key, value in tensors.items() if key.startswith("judge.")}
        else:
            return
        weights = dict(self.restorer.named_parameters())
        for name, value in part(tensors, "average.").items():
            # what does not learn in this run becomes its average, which is what would have been shipped
            self.average.values.get(name, weights[name].data).copy_(value)
        judge = part(tensors, "judge.")
        if self.objective.discriminator is not None and judge:
            self.objective.discriminator.load_state_dict(judge)


class _Distributed(nn.Module):
    """A wrapped restorer whose forward synchronises gradients and whose other attributes are the plain one's."""

    def __init__(self, wrapped: nn.Module, plain: Restorer) -> None:
        super().__init__()
        self.wrapped = wrapped
        object.__setattr__(self, "plain", plain)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.plain, name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.wrapped(*args, **kwargs)
