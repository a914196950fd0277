"""How good a restoration is where no original exists: does it agree with its source, and is what it adds steady?

Two questions that need no ground truth. Shrunk to the size of its source, a result should be its source again. And
what a result adds to a plain enlargement should move with the picture: detail does, boiling noise does not.

What this cannot see is sharpness: a plain enlargement agrees with its source and adds nothing that could boil. It finds
results that went wrong (other colours, invented things, flicker), not results that are merely soft; and a source whose
noise was rightly removed loses some agreement by it. Compare videos of one job, not models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError
from pipeline.metrics import dis_flow, psnr, reliable, sample

MOST_DB = 60.0  # agreement beyond this is rounding
LEAST_STEADINESS = 0.01
_LEVEL = (1 / 255) ** 2  # what is added counts where it is more than one 8-bit level


@dataclass(frozen=True, slots=True)
class Consistency:
    """How far a result can be trusted, by its source alone.

    Attributes:
        agreement_db: PSNR over RGB of the result, shrunk by averaging areas, to its source; at most 60 dB.
        steadiness: how much of the detail that the result adds follows the motion of its source: 1 is all of it (or
            nothing is added), 0 is as random as noise. nan where no motion can be followed.
        score: agreement plus 10 log10(steadiness), in dB; steadiness counts as at least 0.01.
    """

    agreement_db: float
    steadiness: float
    score: float


def consistency(source_T3HW: Tensor, result_T3HW: Tensor) -> Consistency:
    """Compare frames that follow each other, in [0, 1], with their restorations of any larger size.

    The added detail d_t is the result less its source enlarged by bicubic interpolation; w_t is d_t-1, moved along the
    motion between the two enlarged source frames (DIS). Steadiness is 2 sum(d w) / sum(d^2 + w^2) over the pixels whose
    motion is reliable: the correlation of the detail with itself, one frame later.

    Raises:
        InputError: less than two frames, or another number of them in the result.
    """
    if source_T3HW.shape[:2] != result_T3HW.shape[:2] or source_T3HW.shape[0] < 2:
        raise InputError(
            f"Consistency needs the same two or more frames; got {tuple(source_T3HW.shape)} and "
            f"{tuple(result_T3HW.shape)}.",
            code="metric-shape",
            remedy="Give each source frame with its restoration.",
        )
    shrunk = F.interpolate(result_T3HW, size=source_T3HW.shape[2:], mode="area")
    agreement = float(psnr(shrunk, source_T3HW).clamp(max=MOST_DB).mean())
    plain = F.interpolate(source_T3HW, size=result_T3HW.shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
    added = result_T3HW - plain
    each = [
        _followed(before, after, *_motion(*pictures))
        for (before, after), pictures in zip(pairwise(added), pairwise(plain), strict=True)
    ]
    known = [value for value in each if not math.isnan(value)]
    steadiness = min(1.0, max(0.0, math.fsum(known) / len(known))) if known else math.nan
    loss = 0.0 if math.isnan(steadiness) else 10 * math.log10(max(LEAST_STEADINESS, steadiness))
    return Consistency(agreement, steadiness, agreement + loss)


def _motion(before_3HW: Tensor, after_3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Flow from the later frame to the earlier one, and where it can be trusted."""
    flow_2HW = dis_flow(after_3HW, before_3HW)
    return flow_2HW, reliable(flow_2HW, dis_flow(before_3HW, after_3HW))


def _followed(before_3HW: Tensor, after_3HW: Tensor, flow_2HW: Tensor, mask_HW: Tensor) -> float:
    moved_3HW, _ = sample(before_3HW, flow_2HW)
    pixels = 3 * mask_HW.sum()
    both = ((after_3HW.square() + moved_3HW.square()) * mask_HW).sum() / pixels
    common = (2 * after_3HW * moved_3HW * mask_HW).sum() / pixels
    return float((common + _LEVEL) / (both + _LEVEL))
