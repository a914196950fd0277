"""Training of the flow network without labels: simulated cameras teach it, real clips keep it honest.

Where the flow is known by construction (simulated cameras) its error is the loss. Where it is not (real clips), the
loss is photometric: the previous frame, warped, must look like the current one by its census transform (Zabih and
Woodfill, ECCV 1994; in the differentiable form of Meister et al., arXiv 1711.07837), outside of what the check of
forward against backward flow calls occluded, and the flow must be smooth where the picture is.

Knows: the network, its data, its losses, a resumable loop. Does not know: the engine.

Shapes: N pairs, s crop side. Flow in input pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.dataset import DatasetError, TrainingData
from pipeline.flow_clips import Pairs, real, simulated
from pipeline.flow_net import FlowNet, warp
from pipeline.stop_signals import StopSignals
from pipeline.training import Average, TrainingError, learning_rate_factor
from pipeline.training_state import load_optimiser, optimiser_tensors, part, read_tensors, write_tensors

VALIDATION_CLIPS = 24
_LEVEL_WEIGHTS = (0.1, 0.15, 0.2, 0.4, 1.0)  # coarsest first
_LUMA = (0.299, 0.587, 0.114)


class FlowTrainConfig(BaseModel):
    """Everything that defines a training run of the flow network.

    Attributes:
        data: folders or files of pictures and videos.
        out: run folder: ``state.safetensors`` to resume from, ``flow.safetensors`` (the averaged weights),
            ``metrics.jsonl``.
        iterations: length of the cosine learning-rate schedule; the run ends there.
        minutes: wall time after which the run saves and stops; 0 = no limit.
        batch: clips of three frames per iteration.
        crop: side of a clip in input pixels, a multiple of 16.
        clip_share: share of real clips in a batch, where there are any.
        severity: how far degradations go, 0..1.
        photometric, smooth: weights of the losses on real clips.
        validate_every: iterations between measurements on held-out pictures, after each of which the run is saved.
    """

    model_config = ConfigDict(extra="forbid")
    data: list[Path]
    out: Path
    iterations: int = Field(default=4500, ge=1)
    minutes: float = Field(default=0.0, ge=0)
    batch: int = Field(default=4, ge=1)
    crop: int = Field(default=96, ge=32, multiple_of=16)
    clip_share: float = Field(default=0.25, ge=0, le=1)
    severity: float = Field(default=1.0, ge=0, le=1)
    photometric: float = Field(default=1.0, ge=0)
    smooth: float = Field(default=0.05, ge=0)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    final_learning_rate: float = Field(default=0.01, ge=0, le=1)
    warmup: int = Field(default=100, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.998, ge=0, lt=1)
    holdout: int = Field(default=4, ge=0)
    seed: int = 0
    threads: int = Field(default=1, ge=1)
    device: str = "cpu"
    validate_every: int = Field(default=500, ge=1)


class FlowTrainer:
    """One run.

    Args:
        config: what to train.
        report: called with (iteration, figures) every few seconds.

    Raises:
        DatasetError: there are no pictures.
        TrainingError: the run folder holds something else.
    """

    def __init__(
        self, config: FlowTrainConfig, report: Callable[[int, dict[str, float]], None] = lambda iteration, figures: None
    ) -> None:
        self.config, self.report = config, report
        torch.set_flush_denormal(True)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.device = torch.device(config.device)
        self.data = TrainingData(config.data, holdout=config.holdout, flow=False)
        if not self.data.pictures:
            raise DatasetError(
                f"no picture under {', '.join(map(str, config.data))}",
                code="dataset",
                remedy="Flow is learned from pictures seen by simulated cameras: name a folder with some.",
            )
        self.net = FlowNet().to(self.device)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=config.learning_rate, weight_decay=1e-4)
        self.average = Average.of(self.net, config.ema)
        self.iteration = 0
        self.stopped_by: int | None = None  # the signal that ended the run before its time
        self._resume()

    def run(self) -> Path:
        """Train until `iterations`, `minutes` or a signal; return the file of the averaged weights.

        After a signal (`stopped_by`) the iteration at hand is finished and everything saved, without a validation.
        """
        with StopSignals() as signals:
            self._run(signals)
        return self.config.out / "flow.safetensors"

    def _run(self, signals: StopSignals) -> None:
        config, began, last_report = self.config, time.monotonic(), 0.0
        config.out.mkdir(parents=True, exist_ok=True)
        finished = self.iteration >= config.iterations
        while not finished:
            figures = self.step()
            self.iteration += 1
            now = time.monotonic()
            finished = self.iteration >= config.iterations or bool(config.minutes and now - began > 60 * config.minutes)
            if now - last_report > 20 or finished:
                last_report = now
                self._log(figures)
            if signals.received is not None and not finished:
                self.save()
                self.stopped_by = signals.received
                return
            if self.iteration % config.validate_every == 0 or finished:
                self.save()
                self._log(self.validate())

    def step(self) -> dict[str, float]:
        """One iteration, which depends on the seed and its number alone. Returns the losses."""
        config = self.config
        rng = np.random.default_rng([config.seed, self.iteration])
        factor = learning_rate_factor(self.iteration, config.iterations, config.warmup, config.final_learning_rate)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * factor
        clips = round(config.batch * config.clip_share) if self.data.clips else 0
        losses = {}
        if config.batch > clips:
            drawn = [
                simulated(self.data, rng, side=config.crop, severity=config.severity)
                for _ in range(config.batch - clips)
            ]
            losses["known"] = known_flow_loss(self.net, _joined(drawn, self.device))
        if clips:
            drawn = [real(self.data, rng, side=config.crop, severity=config.severity) for _ in range(clips)]
            photometric, smooth = photometric_loss(self.net, _joined(drawn, self.device))
            losses |= {"photometric": config.photometric * photometric, "smooth": config.smooth * smooth}
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss became {float(total)} at iteration {self.iteration}",
                code="training-diverged",
                remedy="Resume with a lower --learning-rate; the last saved state is intact.",
            )
        self.optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_norm)
        self.optimiser.step()
        self.average.update(self.net, self.iteration)
        return {name: float(value.detach()) for name, value in losses.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return mean endpoint errors in input pixels on held-out pictures: of the averaged weights, and of no flow."""
        self.average.swap(self.net)
        try:
            rng = np.random.default_rng(11)
            drawn = [
                simulated(self.data, rng, side=128, severity=self.config.severity, held_out=True)
                for _ in range(VALIDATION_CLIPS)
            ]
            pairs = _joined(drawn, self.device)
            error = endpoint_error(self.net(pairs.current * 2 - 1, pairs.previous * 2 - 1), pairs.flow_N2ss)
            still = endpoint_error(torch.zeros_like(pairs.current[:, :2]), pairs.flow_N2ss)
        finally:
            self.average.swap(self.net)
        return {"epe": float(error.mean()), "epe_median": float(error.median()), "epe_zero": float(still.mean())}

    def save(self) -> None:
        """Write the resumable state, and the averaged weights as fp16."""
        tensors = {f"model.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        tensors |= optimiser_tensors("optimiser", self.optimiser)
        metadata = {"iteration": str(self.iteration), "stage": "flow"}
        write_tensors(tensors, self.config.out / "state.safetensors", metadata)
        weights = {name: value.half() for name, value in self.average.values.items()}
        write_tensors(weights, self.config.out / "flow.safetensors", {"iterations": str(self.iteration)})

    def _resume(self) -> None:
        state = self.config.out / "state.safetensors"
        if not state.exists():
            return
        tensors, metadata = read_tensors(state)
        if metadata.get("stage") != "flow":
            raise TrainingError(
                f"{state} is no run of the flow network",
                code="training-resume",
                remedy="Choose another --out folder.",
            )
        self.net.load_state_dict(part(tensors, "model."))
        for name, value in part(tensors, "average.").items():
            self.average.values[name].copy_(value)
        load_optimiser(self.optimiser, part(tensors, "optimiser."))
        self.iteration = int(metadata["iteration"])

    def _log(self, figures: dict[str, float]) -> None:
        record = {"iteration": self.iteration, "time": round(time.time(), 1)}
        with (self.config.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record | {name: round(value, 5) for name, value in figures.items()}) + "\n")
        self.report(self.iteration, figures)


def endpoint_error(flow_N2ss: Tensor, truth_N2ss: Tensor | None) -> Tensor:
    """Return the length of the difference of two flows (N,s,s), in their pixels."""
    assert truth_N2ss is not None
    return (flow_N2ss - truth_N2ss).square().sum(dim=1).sqrt()


def known_flow_loss(net: FlowNet, pairs: Pairs) -> Tensor:
    """Return the error of every level's flow, in input pixels; small errors count for more than their length.

    A quarter of an input pixel is a whole output pixel, so the root of the error is what the fine levels minimise.
    """
    assert pairs.flow_N2ss is not None
    total = pairs.flow_N2ss.new_zeros(())
    flows = net.all_levels(pairs.current * 2 - 1, pairs.previous * 2 - 1)
    for number, (flow, weight) in enumerate(zip(flows, _LEVEL_WEIGHTS, strict=True)):
        scale = 2 ** (len(flows) - 1 - number)
        truth = F.avg_pool2d(pairs.flow_N2ss, scale)
        squared = (flow * scale - truth).square().sum(dim=1)
        power = 0.35 if scale <= 2 else 0.5
        total = total + weight * (squared + 1e-3).pow(power).mean()
    return total


def photometric_loss(net: FlowNet, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the census distance of the warped pair, and the roughness of the flow where the picture is smooth."""
    flow = net(pairs.current * 2 - 1, pairs.previous * 2 - 1)
    with torch.no_grad():
        back = net(pairs.clean_previous * 2 - 1, pairs.clean_current * 2 - 1)
        returned = warp(back, flow)
        bound = 0.01 * (flow.square().sum(dim=1) + returned.square().sum(dim=1)) + 0.5
        seen = ((flow + returned).square().sum(dim=1) < bound) & _inside(flow)
    distance = _census_distance(pairs.clean_current, warp(pairs.clean_previous, flow))
    photometric = (distance * seen).sum() / seen.sum().clamp(min=1)
    rough = torch.zeros((), device=flow.device)
    for dim in (2, 3):
        edges = torch.exp(-20 * pairs.clean_current.diff(dim=dim).abs().mean(dim=1))
        rough = rough + (edges * flow.diff(dim=dim).abs().sum(dim=1)).mean()
    return photometric, rough


def _inside(flow_N2ss: Tensor) -> Tensor:
    height, width = flow_N2ss.shape[-2:]
    x = torch.arange(width, device=flow_N2ss.device) + flow_N2ss[:, 0]
    y = torch.arange(height, device=flow_N2ss.device)[:, None] + flow_N2ss[:, 1]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _census_distance(a_N3ss: Tensor, b_N3ss: Tensor) -> Tensor:
    """Return how many of the 24 comparisons with neighbours differ (N,s,s), softly, as a share."""
    distance = torch.zeros_like(a_N3ss[:, 0])
    signs = [_census(x) for x in (a_N3ss, b_N3ss)]
    for one, other in zip(*signs, strict=True):
        squared = (one - other).square()
        distance = distance + squared / (0.1 + squared)
    return distance / len(signs[0])


def _census(x_N3ss: Tensor) -> list[Tensor]:
    weights = torch.tensor(_LUMA, device=x_N3ss.device).view(1, 3, 1, 1)
    luma = (x_N3ss * weights).sum(dim=1) * 255
    padded = F.pad(luma[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
    height, width = luma.shape[-2:]
    signs = []
    for dy in range(5):
        for dx in range(5):
            if (dy, dx) != (2, 2):
                difference = padded[:, dy : dy + height, dx : dx + width] - luma
                signs.append(difference / (0.81 + difference.square()).sqrt())
    return signs


def _joined(drawn: list[Pairs], device: torch.device) -> Pairs:
    flows = [one.flow_N2ss for one in drawn if one.flow_N2ss is not None]
    return Pairs(
        current=torch.cat([one.current for one in drawn]).to(device),
        previous=torch.cat([one.previous for one in drawn]).to(device),
        clean_current=torch.cat([one.clean_current for one in drawn]).to(device),
        clean_previous=torch.cat([one.clean_previous for one in drawn]).to(device),
        flow_N2ss=torch.cat(flows).to(device) if flows else None,
    )
