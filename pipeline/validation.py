"""Validation during training: figures and a picture on held-out photographs and a held-out stretch of motion.

Knows: the `Restorer` and the judges. Does not know: optimisers. The full evaluation on real
clips is `upriver evaluate`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.dataset import TrainingData
from pipeline.objectives import TrainConfig
from pipeline.restorer import SCHEDULES, Restorer, warp_previous

SIDE = 192
SAMPLES = 6


def _psnr(a_B3HW: Tensor, b_B3HW: Tensor) -> float:
    """PSNR in dB of pictures in [-1, 1], clamped, averaged over the batch's error."""
    return float(-10 * torch.log10(((a_B3HW.clamp(-1, 1) - b_B3HW) / 2).square().mean()))


def validate(
    restorer: Restorer, data: TrainingData, config: TrainConfig, device: torch.device, iteration: int
) -> dict[str, float]:
    """Return PSNR and ST-LPIPS(Alex) of the stage's output and of bicubic; write a strip into ``validation/``.

    The strip's rows are samples; its columns bicubic | output | ground truth.
    """
    from pipeline.perceptual import STLPIPS

    judge = STLPIPS.load("alex").to(device)
    rng = np.random.default_rng(7)
    samples = [data.sample_held_out(rng, frames=2, side=SIDE) for _ in range(SAMPLES)]
    hr, lr, flow = (
        torch.stack(parts).to(device)
        for parts in zip(*[(s.hr_T3SS, s.lr_T3ss, s.flow_T2SS) for s in samples], strict=True)
    )
    bicubic = F.interpolate(lr[:, 1], scale_factor=4, mode="bicubic").clamp(-1, 1)
    target = hr[:, 1]
    figures = {"psnr_bicubic": _psnr(bicubic, target), "stlpips_bicubic": float(judge(bicubic, target).mean())}
    if config.stage == "autoencoder":
        output = restorer.vae(target)
        figures |= {"psnr": _psnr(output, target), "stlpips": float(judge(output, target).mean())}
    else:
        noise = torch.randn(restorer.vae.encode(target).shape, generator=torch.Generator().manual_seed(0)).to(device)
        for steps, timesteps in SCHEDULES.items():
            alone = restorer.rollout(lr[:, 1], noise, timesteps).output_B3HW.clamp(-1, 1)
            figures |= {f"psnr_{steps}": _psnr(alone, target), f"stlpips_{steps}": float(judge(alone, target).mean())}
            if steps == 4:
                output = alone
                if config.stage in ("stage2", "stage3"):
                    previous = restorer.rollout(lr[:, 0], noise, timesteps).output_B3HW
                    warped = warp_previous(previous, flow[:, 0])
                    output = restorer.rollout(lr[:, 1], noise, timesteps, warped).output_B3HW.clamp(-1, 1)
                    figures |= {"psnr": _psnr(output, target), "stlpips": float(judge(output, target).mean())}
                    figures |= {
                        "flicker_alone": float((alone - warped).abs().mean()),
                        "flicker": float((output - warped).abs().mean()),
                        "flicker_truth": float((target - warp_previous(hr[:, 0], flow[:, 0])).abs().mean()),
                    }
    strip = torch.cat([bicubic, output.clamp(-1, 1), target], dim=3)
    picture = ((strip + 1) * 127.5).round().byte().permute(0, 2, 3, 1).flatten(0, 1).cpu().numpy()
    folder = config.out / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"{iteration:07d}.png")
    return figures
