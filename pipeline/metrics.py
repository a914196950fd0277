"""How good a restored clip is: fidelity, sharpness and steadiness, each measure with its definition.

Every function takes clips as tensors `x_T3HW`: T frames, RGB, [0, 1]. Measures that compare with the ground truth take
it as the second argument. Nothing here knows models or files; the perceptual distance is `pipeline.perceptual`, and
`pipeline.judge` puts the measures of one clip together.

Which way is better: PSNR, SSIM, VMAF-NEG higher; warping error, tLP, tOF, flicker lower; sharpness ratio near 1.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError, PipelineError

# ITU-R BT.601 luma, the weights of OpenCV's and most papers' grey conversion.
_LUMA = (0.299, 0.587, 0.114)
# A pixel of the ground truth counts as still when it changes by at most this much between two frames.
_STILL = 3 / 255


class VmafUnavailable(PipelineError):
    """No ffmpeg program with libvmaf is installed, or it failed."""


def quantise(x_T3HW: Tensor) -> Tensor:
    """The clip as a viewer gets it: clamped and rounded to 8 bits, still as float in [0, 1]."""
    return (x_T3HW.clamp(0, 1) * 255).round() / 255


def same_clips(a_T3HW: Tensor, b_T3HW: Tensor, frames: int = 1) -> None:
    """Raises InputError unless both are (T, 3, H, W) of one shape with at least `frames` frames."""
    if a_T3HW.shape != b_T3HW.shape or a_T3HW.ndim != 4 or a_T3HW.shape[1] != 3 or a_T3HW.shape[0] < frames:
        raise InputError(
            f"Clips to compare need one shape (T, 3, H, W) with T >= {frames}; got {tuple(a_T3HW.shape)} and "
            f"{tuple(b_T3HW.shape)}.",
            code="metric-shape",
            remedy="Crop or cut both to the same frames and size.",
        )


def psnr(a_T3HW: Tensor, b_T3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over RGB, peak 1 -> (T,). Equal frames give infinity."""
    same_clips(a_T3HW, b_T3HW)
    return -10 * torch.log10((a_T3HW - b_T3HW).square().mean(dim=(1, 2, 3)))


def ssim(a_T3HW: Tensor, b_T3HW: Tensor) -> Tensor:
    """Structural similarity -> (T,), at most 1.

    Wang et al., "Image quality assessment" (IEEE TIP 2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01,
    K2 = 0.03; each of R, G, B alone, averaged; only windows wholly inside the picture.
    """
    same_clips(a_T3HW, b_T3HW)
    taps = [math.exp(-0.5 * ((k - 5) / 1.5) ** 2) for k in range(11)]
    taps = [tap / math.fsum(taps) for tap in taps]

    def windowed(x_T3HW: Tensor) -> Tensor:
        # Sums of shifted slices: a convolution with one channel is ten times slower on a CPU.
        rows, columns = x_T3HW.shape[2] - 10, x_T3HW.shape[3] - 10
        x_T3HW = sum((x_T3HW[:, :, k : k + rows] * tap for k, tap in enumerate(taps)), start=torch.zeros(()))
        return sum((x_T3HW[..., k : k + columns] * tap for k, tap in enumerate(taps)), start=torch.zeros(()))

    mean_a, mean_b = windowed(a_T3HW), windowed(b_T3HW)
    variance_a = windowed(a_T3HW.square()) - mean_a.square()
    variance_b = windowed(b_T3HW.square()) - mean_b.square()
    covariance = windowed(a_T3HW * b_T3HW) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = numerator / ((mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2))
    return similarity.flatten(1).mean(dim=1)


def laplacian_variance(x_T3HW: Tensor) -> Tensor:
    """Variance of the 4-neighbour Laplacian of the luma, in squared 8-bit levels -> (T,): fine detail, or noise.

    The focus measure of Pech-Pacheco et al. (ICPR 2000). Divide by the ground truth's to read it: below 1 is blurred,
    above 1 is over-sharpened or noisy.
    """
    weights = torch.tensor(_LUMA, dtype=x_T3HW.dtype, device=x_T3HW.device).view(1, 3, 1, 1)
    y_THW = (x_T3HW * weights).sum(dim=1) * 255
    inner = y_THW[:, 1:-1, 1:-1]
    around = y_THW[:, :-2, 1:-1] + y_THW[:, 2:, 1:-1] + y_THW[:, 1:-1, :-2] + y_THW[:, 1:-1, 2:]
    return (around - 4 * inner).flatten(1).var(dim=1, correction=0)


def flicker(a_T3HW: Tensor, truth_T3HW: Tensor) -> float:
    """Unwanted change from frame to frame where the ground truth stands still, in 8-bit levels; nan if nothing does.

    mean |(a_t - a_t-1) - (truth_t - truth_t-1)| over the pixels whose ground truth changes by at most 3 levels in
    every channel. Our own measure of boiling: needs no flow, so that no flow error can hide in it.
    """
    same_clips(a_T3HW, truth_T3HW, frames=2)
    wanted = truth_T3HW.diff(dim=0)
    still_T1HW = (wanted.abs().amax(dim=1, keepdim=True) <= _STILL).to(a_T3HW.dtype)
    if still_T1HW.mean() < 0.01:
        return math.nan
    unwanted = (a_T3HW.diff(dim=0) - wanted).abs().mean(dim=1, keepdim=True)
    return float((unwanted * still_T1HW).sum() / still_T1HW.sum() * 255)


def dis_flow(current_3HW: Tensor, previous_3HW: Tensor) -> Tensor:
    """Optical flow from the current frame to the previous one by OpenCV's DIS (medium preset) -> (2, H, W), dx and dy.

    Kroeger et al., "Fast Optical Flow using Dense Inverse Search" (ECCV 2016), on the grey 8-bit pictures.
    """
    import cv2

    def grey(x_3HW: Tensor) -> np.ndarray:
        picture = (x_3HW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
        return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    start_HW2 = np.zeros((*current_3HW.shape[1:], 2), dtype=np.float32)
    flow_HW2 = np.asarray(estimator.calc(grey(current_3HW), grey(previous_3HW), start_HW2))
    return torch.from_numpy(flow_HW2).permute(2, 0, 1).contiguous()


def sample(x_CHW: Tensor, flow_2HW: Tensor) -> tuple[Tensor, Tensor]:
    """Fetches `x` at pixel + flow, bilinear -> (sampled (C, H, W), inside (H, W) bool: the point lies in the picture).

    Zero flow is the identity; this is the measuring warp, not the one that the published network was trained with.
    """
    height, width = x_CHW.shape[1:]
    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x_HW, y_HW = x_HW + flow_2HW[0], y_HW + flow_2HW[1]
    inside_HW = (x_HW >= 0) & (x_HW <= width - 1) & (y_HW >= 0) & (y_HW <= height - 1)
    grid_HW2 = torch.stack([2 * x_HW / (width - 1) - 1, 2 * y_HW / (height - 1) - 1], dim=-1)
    sampled = F.grid_sample(x_CHW[None], grid_HW2[None].to(x_CHW.dtype), align_corners=True, padding_mode="border")
    return sampled[0], inside_HW


def reliable(flow_2HW: Tensor, back_2HW: Tensor) -> Tensor:
    """Where a flow can be trusted to have a counterpart -> (H, W) bool.

    Not occluded, not at a motion boundary (Ruder et al., "Artistic style transfer for videos", GCPR 2016, equations 5
    and 6; the constants are those of the published model's warping error), and not from outside the picture.

    Args:
        flow_2HW: from the current frame to the previous one.
        back_2HW: from the previous frame to the current one.
    """
    returned_2HW, inside_HW = sample(back_2HW, flow_2HW)
    length_HW = flow_2HW.square().sum(dim=0)
    bound_HW = 0.01 * (length_HW + returned_2HW.square().sum(dim=0)) + 0.5
    occluded_HW = (flow_2HW + returned_2HW).square().sum(dim=0) > bound_HW
    down_2HW = F.pad(flow_2HW.diff(dim=1), (0, 0, 0, 1))
    right_2HW = F.pad(flow_2HW.diff(dim=2), (0, 1))
    steep_HW = (down_2HW.square() + right_2HW.square()).sum(dim=0) > 0.01 * length_HW + 0.002
    return inside_HW & ~occluded_HW & ~steep_HW


def warping_error(x_T3HW: Tensor, flows_T2HW: Tensor, masks_THW: Tensor) -> Tensor:
    """Squared difference of each frame to its warped predecessor -> (T - 1,), times 1000.

    1000 * sum((M * (x_t - warp(x_t-1)))^2) / (3 * |M|), the definition of the published model with [0, 1] pictures (its
    printed scale is not known; Lai et al., ECCV 2018, is the usual source). Flow and mask M are the ground truth's, so
    that a blurred result cannot earn itself an easier flow. A blurred clip scores low: read it beside the sharpness.

    Args:
        flows_T2HW: T - 1 flows, number k from frame k + 1 to frame k.
        masks_THW: T - 1 masks of `reliable`. A frame without a reliable pixel gives nan.
    """
    errors = []
    for k, (flow_2HW, mask_HW) in enumerate(zip(flows_T2HW, masks_THW, strict=True)):
        warped_3HW, _ = sample(x_T3HW[k], flow_2HW)
        squared = ((x_T3HW[k + 1] - warped_3HW) * mask_HW).square().sum()
        errors.append(1000 * squared / (3 * mask_HW.sum()))
    return torch.stack(errors)


def flow_difference(a_T3HW: Tensor, truth_flows_T2HW: Tensor) -> float:
    """tOF: mean |flow(a) - flow(truth)| over pixels and components, times 10.

    Chu et al., "Learning temporal coherence via self-supervision" (TOG 2020), with DIS in place of their estimator.
    """
    flows = [dis_flow(a_T3HW[k + 1], a_T3HW[k]) for k in range(a_T3HW.shape[0] - 1)]
    return float((torch.stack(flows) - truth_flows_T2HW).abs().mean() * 10)


def temporal_distance_gap(steps_T: Tensor, truth_steps_T: Tensor) -> float:
    """tLP: mean |d(a_t, a_t-1) - d(truth_t, truth_t-1)| times 100, for a perceptual distance d (Chu et al., TOG 2020).

    Args:
        steps_T: distances between consecutive frames of the restored clip.
        truth_steps_T: the same of the ground truth.
    """
    return float((steps_T - truth_steps_T).abs().mean() * 100)


def vmaf_neg(a_T3HW: Tensor, truth_T3HW: Tensor, fps: float = 25) -> float:
    """VMAF v0.6.1 NEG, mean over the frames, 0 to 100.

    Netflix's measure in the variant that does not reward sharpening ("no enhancement gain"), by the libvmaf inside the
    ffmpeg program of the package imageio-ffmpeg. The program is run, never linked. Both clips go through the same
    conversion to 8-bit 4:2:0.

    Raises:
        VmafUnavailable: imageio-ffmpeg is not installed, or its program failed.
    """
    same_clips(a_T3HW, truth_T3HW)
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise VmafUnavailable(
            "VMAF-NEG needs the ffmpeg program of the package imageio-ffmpeg, which is not installed.",
            code="vmaf-missing",
            remedy="Install it with `pip install 'upriver[vmaf]'`, or leave VMAF-NEG out.",
        ) from error
    height, width = a_T3HW.shape[2:]
    with tempfile.TemporaryDirectory(prefix="upriver-vmaf-") as scratch:
        folder = Path(scratch)
        inputs: list[str] = []
        for name, clip in (("restored", a_T3HW), ("truth", truth_T3HW)):
            raw = (clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
            (folder / name).write_bytes(raw.tobytes())
            inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps}", "-i", name]
        graph = (
            "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];"
            "[a][b]libvmaf=model=version=vmaf_v0.6.1neg:log_fmt=json:log_path=scores.json:n_threads=1"
        )
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", "1", *inputs]
        done = subprocess.run(
            [*command, "-lavfi", graph, "-f", "null", "-"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise VmafUnavailable(
                f"ffmpeg could not compute VMAF-NEG: {(done.stderr.strip().splitlines() or ['no message'])[-1]}.",
                code="vmaf-failed",
                remedy="Install a current imageio-ffmpeg, or leave VMAF-NEG out.",
            )
        scores = json.loads((folder / "scores.json").read_text())
    return float(scores["pooled_metrics"]["vmaf"]["mean"])
