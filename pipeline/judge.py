"""The judge of one clip: keeps what the ground truth alone decides, and scores restorations against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import metrics
from pipeline.perceptual import STLPIPS


@dataclass(frozen=True, slots=True)
class Scores:
    """Measures of one restored clip; definitions in `pipeline.metrics`. None: not measured.

    Attributes:
        psnr: dB. ssim: at most 1. vmaf_neg: 0 to 100.
        stlpips: ST-LPIPS(Alex) to the ground truth, mean over the frames that the judge looks at.
        stlpips_first, stlpips_tenth: of the first and the tenth frame alone (None where it was not looked at).
        sharpness: Laplacian variance relative to the ground truth's.
        warp_error: times 1000. tlp: times 100. tof: times 10. flicker: 8-bit levels, nan where nothing stands still.
    """

    psnr: float
    ssim: float
    stlpips: float
    stlpips_first: float
    stlpips_tenth: float | None
    sharpness: float
    warp_error: float
    tlp: float
    tof: float
    flicker: float
    vmaf_neg: float | None


class ClipJudge:
    """Scores restorations of one ground-truth clip.

    The network is most of the cost. It looks at two neighbouring frames out of every `spacing` (0, 1, 4, 5, 8, 9, ...),
    which serves the distance to the ground truth and the distance from frame to frame alike. All other measures see
    every frame.

    Args:
        truth_T3HW: the ground truth, RGB in [0, 1], at least 2 frames of at least 32x32.
        network: ST-LPIPS; the AlexNet one, because the VGG one is a training loss.
        vmaf: whether VMAF-NEG is measured too.
        fps: of the clip; VMAF-NEG alone is told.
        spacing: 2 or more; with 2 the network looks at every frame.
    """

    def __init__(
        self, truth_T3HW: Tensor, network: STLPIPS, *, vmaf: bool = True, fps: float = 25, spacing: int = 4
    ) -> None:
        self.truth_T3HW = metrics.quantise(truth_T3HW.float())
        self.network, self.vmaf, self.fps = network, vmaf, fps
        steps = range(1, truth_T3HW.shape[0])
        truth = self.truth_T3HW
        self.flows_T2HW = torch.stack([metrics.dis_flow(truth[k], truth[k - 1]) for k in steps])
        back = [metrics.dis_flow(truth[k - 1], truth[k]) for k in steps]
        self.masks_THW = torch.stack(
            [metrics.reliable(flow_2HW, back_2HW) for flow_2HW, back_2HW in zip(self.flows_T2HW, back, strict=True)]
        )
        self.sharpness_T = metrics.laplacian_variance(truth)
        self.looked_at = [k for k in range(truth_T3HW.shape[0]) if k % spacing < 2]
        self._features = self._see(truth)
        self.truth_steps_P = self._steps(self._features)

    @property
    def motion(self) -> float:
        """Mean length of the ground truth's flow in pixels per frame: above about 0.5 a clip counts as moving."""
        return float(self.flows_T2HW.square().sum(dim=1).sqrt().mean())

    @torch.inference_mode()
    def _see(self, x_T3HW: Tensor) -> dict[int, list[Tensor]]:
        return {k: self.network.features(x_T3HW[k : k + 1] * 2 - 1) for k in self.looked_at}

    def _steps(self, features: dict[int, list[Tensor]]) -> Tensor:
        pairs = [(features[k], features[k - 1]) for k in features if k - 1 in features]
        return torch.stack([self.network.distance(later, earlier)[0] for later, earlier in pairs])

    @torch.inference_mode()
    def score(self, restored_T3HW: Tensor) -> Scores:
        """All measures of one restoration: RGB, nominally [0, 1], rounded to 8 bits here, the ground truth's shape."""
        a_T3HW, truth = metrics.quantise(restored_T3HW.float()), self.truth_T3HW
        metrics.same_clips(a_T3HW, truth, frames=2)
        features = self._see(a_T3HW)
        distances = {k: float(self.network.distance(features[k], self._features[k])[0]) for k in self.looked_at}
        warp_T = metrics.warping_error(a_T3HW, self.flows_T2HW, self.masks_THW)
        psnr_T = metrics.psnr(a_T3HW, truth)
        return Scores(
            psnr=float(psnr_T.mean()),
            ssim=float(metrics.ssim(a_T3HW, truth).mean()),
            stlpips=math.fsum(distances.values()) / len(distances),
            stlpips_first=distances[0],
            stlpips_tenth=distances.get(9),
            sharpness=float((metrics.laplacian_variance(a_T3HW) / self.sharpness_T).mean()),
            warp_error=float(warp_T.nanmean()),
            tlp=metrics.temporal_distance_gap(self._steps(features), self.truth_steps_P),
            tof=metrics.flow_difference(a_T3HW, self.flows_T2HW),
            flicker=metrics.flicker(a_T3HW, truth),
            vmaf_neg=metrics.vmaf_neg(a_T3HW, truth, self.fps) if self.vmaf else None,
        )
