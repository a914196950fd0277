"""What each training stage optimises: which weights, which inputs, which losses (paper, section 3 and appendix C).

Knows: the `Restorer` and the losses. Does not know: files, optimisers, logging.

Shapes: B batch, T frames, S crop side, s = S/4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pipeline.autoencoder import TemporalFusion
from pipeline.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    generator_loss,
    gradient_loss,
    latent_regulariser,
    temporal_loss,
)
from pipeline.restorer import SCHEDULES, Restorer, add_noise, warp_previous

Stage = Literal["autoencoder", "stage1", "stage2", "stage3"]


class TrainConfig(BaseModel):
    """Everything that defines a training run. Weights of losses: 0 switches a loss off.

    Attributes:
        data: folders or files of pictures and videos.
        out: run folder: state to resume from, model, logs, validation pictures.
        init: folder of the model to start from; None builds `size` (autoencoder stage only).
        snapshot: where the small resumable snapshot goes; None writes none.
        iterations: length of the cosine learning-rate schedule; the run ends there.
        minutes: wall time after which the run saves and stops; 0 = no limit.
        crop: training square at full resolution in pixels, a multiple of 16.
        frames: frames of a training clip (stages 2 and 3: the first is restored alone, the rest with guidance).
        severity: how far degradations go beyond bicubic, 0..1.
        clip_share: share of real clips against pictures with simulated motion.
        schedule_weights: probability of each step count in a rollout.
        objective: ``rollout`` unrolls all steps (paper, Alg. 1); ``random-timestep`` is the alternative of Table 13.
        start: a rollout starts from pure ``noise``, as inference does, or from the noised ground truth (``target``:
            paper).
        train_decoder: stage 1 trains the decoder too (without its TPMs), at half the learning rate.
        perceptual_from, gan_from: share of the run after which these losses join.
        workers: processes that prepare batches ahead; 0 prepares them between iterations.
        truth_share: share of stage-2 batches with ground-truth latents and previous pictures (paper: all).
        finetune_decoder: learning rate, relative to the stage's own, at which stages 2 and 3 train the decoder too; a
            loss on the first frame, which no guidance helps, then joins. 0 as in the paper.
        finetune_unet: the same for the U-Net in stage 3.
        temporal_fusion: stage 2 replaces TPMs of another form by fresh ones of this form; None keeps the model's.
        flow_jitter: largest deviation, in pixels, of the smooth error added to the flow of guided frames.
        still_share: share of batches of pictures that do not move, often out of focus (see `TrainingData`).
        tone_share: share of clips that are exposed otherwise, towards black or white (see `dataset.change_tone`).
        longest_past: stage 3 restores a still up to so many times, without gradients, before the frames that train.
        tone: weight of the difference between output and target as means of 8x8 pixels: levels rather than detail.
        drift: weight of a still's distance to its first frame, whatever the past was.
        perceptual_side: side of the square on which the perceptual loss looks; 0 = the whole crop.
    """

    model_config = ConfigDict(extra="forbid")
    stage: Stage
    data: list[Path]
    out: Path
    size: str = "tiny"
    init: Path | None = None
    snapshot: Path | None = None
    iterations: int = Field(default=2000, ge=1)
    minutes: float = Field(default=0.0, ge=0)
    batch: int = Field(default=4, ge=1)
    crop: int = Field(default=96, ge=32, multiple_of=16)
    frames: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    final_learning_rate: float = Field(default=0.02, ge=0, le=1)
    warmup: int = Field(default=50, ge=0)
    clip_norm: float = 1.0
    ema: float = Field(default=0.995, ge=0, lt=1)
    seed: int = 0
    severity: float = Field(default=1.0, ge=0, le=1)
    clip_share: float = Field(default=0.3, ge=0, le=1)
    max_clip_frames: int = 60
    max_clip_height: int = 540
    holdout: int = 3
    schedule_weights: dict[int, float] = {4: 0.5, 2: 0.25, 1: 0.25}
    objective: Literal["rollout", "random-timestep"] = "rollout"
    start: Literal["noise", "target"] = "noise"
    train_decoder: bool = True
    latent: float = 1.0
    pixel: float = 1.0
    gradient: float = 0.0
    perceptual: float = 0.5
    perceptual_from: float = Field(default=0.0, ge=0, le=1)
    perceptual_side: int = 0
    gan: float = 0.025
    gan_from: float = Field(default=0.3, ge=0, le=1)
    discriminator_rate: float = 4e-4
    temporal: float = 4.0
    truth_share: float = Field(default=0.5, ge=0, le=1)
    finetune_decoder: float = Field(default=0.0, ge=0, le=1)
    finetune_unet: float = Field(default=0.0, ge=0, le=1)
    temporal_fusion: TemporalFusion | None = None
    flow_jitter: float = Field(default=0.0, ge=0)
    still_share: float = Field(default=0.0, ge=0, le=1)
    tone_share: float = Field(default=0.0, ge=0, le=1)
    longest_past: int = Field(default=0, ge=0)
    tone: float = Field(default=0.0, ge=0)
    drift: float = Field(default=0.0, ge=0)
    regulariser: float = 0.01
    latent_noise: float = 0.1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: str = "auto"
    threads: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)
    validate_every: int = 500
    save_every: int = 500


DEFAULTS: dict[str, dict[str, object]] = {
    "autoencoder": {"perceptual": 0.1, "perceptual_from": 0.3, "gradient": 0.5, "gan": 0.0, "batch": 4},
    "stage1": {},
    "stage2": {"frames": 2, "clip_share": 0.5, "latent": 0.0},
    "stage3": {"frames": 3, "clip_share": 0.5},
}


class Objective:
    """Losses of one iteration for one stage; every method returns means over the batch.

    Args:
        restorer: the networks; `trainable` decides which parts learn.
        config: weights and options.
        device: where losses run.
    """

    def __init__(self, restorer: Restorer, config: TrainConfig, device: torch.device) -> None:
        self.restorer, self.config, self.device = restorer, config, device
        self.perceptual = PerceptualLoss().to(device) if config.perceptual else None
        self.discriminator = PatchDiscriminator().to(device) if config.gan else None

    def trainable(self) -> list[dict[str, object]]:
        """Freeze everything but the stage's weights; return optimiser groups with relative learning rates."""
        net, stage = self.restorer.requires_grad_(False), self.config.stage
        temporal = {id(p) for p in net.vae.temporal_parameters()}
        decoder = [p for p in net.vae.decoder.parameters() if id(p) not in temporal]
        groups: list[tuple[Iterable[nn.Parameter], float]]
        if stage == "autoencoder":
            groups = [([*net.vae.encoder.parameters(), *decoder], 1.0)]
        elif stage == "stage1":
            groups = [(net.unet.parameters(), 1.0)] + ([(decoder, 0.5)] if self.config.train_decoder else [])
            if net.vae.lr_projection is not None:
                groups.append((net.vae.lr_projection.parameters(), 0.1))
        elif stage == "stage2":
            groups = [(net.vae.temporal_parameters(), 1.0)]
            if self.config.finetune_decoder:
                groups.append((decoder, self.config.finetune_decoder))
        else:
            assert net.controlnet is not None
            zeros = [
                *net.controlnet.controlnet_down_blocks.parameters(),
                *net.controlnet.controlnet_mid_block.parameters(),
            ]
            known = {id(p) for p in zeros}
            groups = [([p for p in net.controlnet.parameters() if id(p) not in known], 1.0), (zeros, 5.0)]
            if self.config.finetune_unet:
                groups.append((net.unet.parameters(), self.config.finetune_unet))
            if self.config.finetune_decoder:
                groups.append(([*decoder, *net.vae.temporal_parameters()], self.config.finetune_decoder))
        result: list[dict[str, object]] = []
        for parameters, ratio in groups:
            chosen = [p.requires_grad_(True) for p in parameters]
            result.append({"params": chosen, "lr": self.config.learning_rate * ratio})
        return result

    def losses(
        self, hr_BT3SS: Tensor, lr_BT3ss: Tensor, flow_BT2SS: Tensor, progress: float, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return named, weighted losses to be summed, and the pictures that the discriminator should judge."""
        run: Callable[..., tuple[dict[str, Tensor], Tensor]] = {
            "autoencoder": self._autoencoder,
            "stage1": self._stage1,
            "stage2": self._stage2,
            "stage3": self._stage3,
        }[self.config.stage]
        return run(hr_BT3SS, lr_BT3ss, flow_BT2SS, progress, rng)

    def picture_losses(self, output_B3SS: Tensor, target_B3SS: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses that compare one output with one target."""
        c = self.config
        losses = {"pixel": c.pixel * F.l1_loss(output_B3SS, target_B3SS)}
        if c.gradient:
            losses["gradient"] = c.gradient * gradient_loss(output_B3SS, target_B3SS)
        if c.tone:
            losses["tone"] = c.tone * F.l1_loss(F.avg_pool2d(output_B3SS, 8), F.avg_pool2d(target_B3SS, 8))
        if self.perceptual is not None and progress >= c.perceptual_from:
            losses["perceptual"] = c.perceptual * self.perceptual(output_B3SS, target_B3SS, c.perceptual_side or None)
        if self.discriminator is not None and progress >= c.gan_from:
            losses["gan"] = c.gan * generator_loss(self.discriminator(output_B3SS))
        return losses

    def draw_schedule(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw a timestep schedule by the configured weights."""
        steps, weights = zip(*self.config.schedule_weights.items(), strict=True)
        return SCHEDULES[int(rng.choice(steps, p=np.array(weights) / sum(weights)))]

    def draw_noise(self, target_BChw: Tensor, rng: np.random.Generator) -> Tensor:
        """Return z at the first timestep: noise alone, or with the trace of the target that the paper leaves."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(target_BChw.shape, generator=generator).to(target_BChw.device)
        if self.config.start == "noise":
            return noise
        return add_noise(target_BChw, noise, self.restorer.alphas[999])

    def _autoencoder(
        self, hr: Tensor, lr: Tensor, flow: Tensor, progress: float, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        target, vae = hr[:, 0], self.restorer.vae
        latent = vae.encode(target)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        strength = float(rng.uniform(0, self.config.latent_noise))
        noisy = latent + strength * torch.randn(latent.shape, generator=generator).to(latent.device)
        output = vae.decode(noisy)
        losses = self.picture_losses(output, target, progress)
        losses["regulariser"] = self.config.regulariser * latent_regulariser(latent)
        return losses, output

    def _stage1(
        self, hr: Tensor, lr: Tensor, flow: Tensor, progress: float, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        target, source = hr[:, 0], lr[:, 0]
        with torch.no_grad():
            latent = self.restorer.vae.encode(target) * self.restorer.vae.config.scaling_factor
        if self.config.objective == "random-timestep":
            return {"denoising": self._denoising_loss(latent, source, rng)}, target
        z = self.draw_noise(latent, rng)
        denoised, output = self.restorer(source, z, self.draw_schedule(rng))
        losses = {"latent": self.config.latent * F.mse_loss(denoised, latent)}
        return losses | self.picture_losses(output, target, progress), output

    def _denoising_loss(self, latent: Tensor, source: Tensor, rng: np.random.Generator) -> Tensor:
        """Plain diffusion loss at a random timestep, in the checkpoint's parameterisation (paper, Table 13)."""
        net = self.restorer
        t = torch.from_numpy(rng.integers(0, 1000, len(latent))).to(latent.device)
        alpha = net.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))).to(latent)
        x = torch.cat([add_noise(latent, noise, alpha), source], dim=1)
        prompt = latent.new_zeros(len(latent), 1, net.unet.config.cross_attention_dim)
        prediction = net.unet(x, t, prompt, return_dict=False)[0]
        if net.vae.lr_projection is not None:
            prediction = prediction + net.vae.lr_projection(source)
        target = {
            "sample": latent,
            "epsilon": noise,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latent,
        }[net.scheduler.config.prediction_type]
        return F.mse_loss(prediction, target)

    def _stage2(
        self, hr: Tensor, lr: Tensor, flow: Tensor, progress: float, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """TPM: the decoder sees features of the warped previous frame; everything else is frozen.

        The paper feeds ground-truth latents and pictures; `truth_share` of the batches do here. The others feed what
        the TPMs meet later: the U-Net's own latents (guided by ARTG if the model has it), and the previous output of
        this very decoder, frame after frame. Gradients stop between frames.
        """
        net, vae = self.restorer, self.restorer.vae
        truth = rng.random() < self.config.truth_share
        schedule = self.draw_schedule(rng)
        with torch.no_grad():
            latents = vae.encode(hr.flatten(0, 1)).unflatten(0, hr.shape[:2])
            shared = self.draw_noise(latents[:, 0], rng)
        previous, guided = hr[:, 0], hr.shape[1] - 1
        total: dict[str, Tensor] = {}
        warped: Tensor | None = None
        for t in range(hr.shape[1]):
            with torch.no_grad():
                latent = latents[:, t] if truth else net.denoise(lr[:, t], shared, schedule, warped)
                features = None if warped is None else vae.encode_temporal(warped)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (t > 0 or self.config.finetune_decoder > 0)):
                output = vae.decode(latent, features)
            if t > 0 or self.config.finetune_decoder:
                losses = self.picture_losses(output, hr[:, t], progress)
                if t > 0:
                    losses["temporal"] = self.config.temporal * temporal_loss(
                        output, previous, hr[:, t], hr[:, t - 1], flow[:, t - 1]
                    )
                for name, value in losses.items():
                    total[name] = total.get(name, torch.zeros((), device=value.device)) + value / guided
            previous = hr[:, t] if truth else output.detach()
            if t + 1 < hr.shape[1]:
                with torch.no_grad():
                    warped = warp_previous(previous, self.disturb(flow[:, t], rng))
        return total, output

    def disturb(self, flow_B2SS: Tensor, rng: np.random.Generator) -> Tensor:
        """Add smooth random displacements of up to `flow_jitter` pixels (deviation, drawn per batch).

        Flow that is estimated from low-resolution frames is never as exact as that of a simulated camera.
        """
        if not self.config.flow_jitter:
            return flow_B2SS
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        coarse = torch.randn(len(flow_B2SS), 2, *(side // 16 + 1 for side in flow_B2SS.shape[2:]), generator=generator)
        smooth = F.interpolate(coarse.to(flow_B2SS), size=flow_B2SS.shape[2:], mode="bicubic")
        return flow_B2SS + float(rng.uniform(0, self.config.flow_jitter)) * smooth

    def _stage3(
        self, hr: Tensor, lr: Tensor, flow: Tensor, progress: float, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """ARTG: each frame is guided by the model's own warped previous output, as at inference.

        One schedule serves the clip. Gradients stop between frames: the previous output is an input, not a variable.
        With `finetune_unet` and `finetune_decoder` the networks that ARTG acts through learn to listen to it.

        What a frame makes up, the next one takes up. In a few frames that is little; on a still it grows for a hundred.
        So stills may get a long past (`longest_past`): what has grown then stands in the input, and is unlearnt.
        """
        alone = self.config.finetune_unet > 0 or self.config.finetune_decoder > 0  # then the first frame learns too
        schedule = self.draw_schedule(rng)
        with torch.no_grad():
            latents = self.restorer.vae.encode(hr.flatten(0, 1)).unflatten(0, hr.shape[:2])
            shared = self.draw_noise(latents[:, 0], rng)
        total: dict[str, Tensor] = {}
        warped: Tensor | None = None
        previous = first = hr[:, 0]
        guided = hr.shape[1] - 1
        still = guided > 0 and not bool(flow.any())
        for t in range(hr.shape[1]):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (t > 0 or alone)):
                denoised, output = self.restorer(lr[:, t], shared, schedule, warped)
            if t > 0 or alone:
                losses = {"latent": self.config.latent * F.mse_loss(denoised, latents[:, t])}
                losses |= self.picture_losses(output, hr[:, t], progress)
                if t > 0:
                    losses["temporal"] = self.config.temporal * temporal_loss(
                        output, previous, hr[:, t], hr[:, t - 1], flow[:, t - 1]
                    )
                    if still and self.config.drift:
                        losses["drift"] = self.config.drift * F.l1_loss(output, first)
                for name, value in losses.items():
                    total[name] = total.get(name, torch.zeros((), device=value.device)) + value / guided
            previous = hr[:, 0] if t == 0 and rng.random() < 0.1 else output.detach()
            if t == 0:
                first = output.detach()
                if still and self.config.longest_past:
                    previous = self.live_through(lr, shared, first, self.draw_past(rng))
            if t + 1 < hr.shape[1]:
                # the flow of a still is known; were it disturbed, drift would teach to distrust the previous output
                warped = warp_previous(previous, flow[:, t] if still else self.disturb(flow[:, t], rng))
        return total, output

    def draw_past(self, rng: np.random.Generator) -> int:
        """Draw how many frames lie behind a still, 0 to `longest_past`: each order of magnitude as often as another."""
        return int((self.config.longest_past + 1) ** rng.random()) - 1

    @torch.no_grad()
    def live_through(self, lr_BT3ss: Tensor, noise_BChw: Tensor, output_B3SS: Tensor, frames: int) -> Tensor:
        """Return what becomes of a still's output after more `frames` of it, by one step each: cheap, and as harmful.

        The clip's frames take turns.
        """
        for number in range(frames):
            source = lr_BT3ss[:, number % lr_BT3ss.shape[1]]
            output_B3SS = self.restorer(source, noise_BChw, SCHEDULES[1], output_B3SS)[1]
        return output_B3SS
