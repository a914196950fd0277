"""Flow estimators that `benchmarks.flow` measures beside those of the package: what was tried and is not in it.

Each has the form of `pipeline.flow.FlowEstimator`; the measuring needs no `to`.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.degrade import to_uint8
from pipeline.flow import RAFTFlow, _grey_levels, upscale_flow
from pipeline.flow_net import warp

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


class OtherDIS:
    """DIS at input size in the ways that the package does not use: faster presets, or a start from the pair before.

    Neither is part of the package. The faster presets do not always give the same flow twice. What starts from the pair
    before depends on it, so a stream that is resumed from its saved state would go on with other numbers; pairs must
    come in order, and `reset` before each clip.

    Args:
        preset: ``"ultrafast"``, ``"fast"`` or ``"medium"``; the last goes on to full size, as the package's own.
        warm: whether the flow of the pair before is the start.
    """

    def __init__(self, preset: str = "medium", *, warm: bool = False) -> None:
        self.preset, self.warm = preset, warm
        self.reset()

    def reset(self) -> None:
        """Forget the flow of the pair before."""
        self._flow: np.ndarray | None = None

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (1,2,4h,4w)."""
        grey = _grey_levels(torch.cat([current_B3hw, previous_B3hw])).numpy()
        estimator: Any = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}"))
        if self.preset == "medium":
            estimator.setFinestScale(0)
        start = self._flow.copy() if self.warm and self._flow is not None else None
        self._flow = estimator.calc(grey[0], grey[1], start)
        return upscale_flow(torch.from_numpy(self._flow).permute(2, 0, 1)[None].clone())


class CodecMotion:
    """The motion vectors of an H.264 stream, one per macroblock or part of one: nothing is computed but copied.

    A bitstream is made of the pair here: x264, preset medium, the current frame a P frame. Blocks without a vector
    (intra) get zero. `ms` in a table is that of decoding with vectors exported, and of spreading them.
    """

    name = "H.264 motion vectors"

    def __init__(self, crf: int = 23) -> None:
        self.crf = crf

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (1,2,4h,4w)."""
        height, width = current_B3hw.shape[-2:]
        return self.read(self.written(current_B3hw, previous_B3hw), height, width)

    def written(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> bytes:
        """Return the bitstream of the pair."""
        frames = to_uint8((torch.cat([previous_B3hw, current_B3hw]) + 1) / 2)
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="matroska") as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(25))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(self.crf), "preset": "medium", "threads": "1", "bf": "0", "sc_threshold": "0"}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return buffer.getvalue()

    def read(self, written: bytes, height: int, width: int) -> Tensor:
        """Decode the bitstream and spread its vectors over their blocks."""
        field = np.zeros((2, height, width), np.float32)
        with av.open(io.BytesIO(written), "r", format="matroska") as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.options = {"flags2": "+export_mvs"}
            stream.thread_count = 1
            for frame in container.decode(stream):
                side: Any = frame.side_data.get("MOTION_VECTORS")
                if side is None:
                    continue
                for v in side.to_ndarray():
                    left, top = int(v["dst_x"]) - int(v["w"]) // 2, int(v["dst_y"]) - int(v["h"]) // 2
                    block = (slice(max(top, 0), top + int(v["h"])), slice(max(left, 0), left + int(v["w"])))
                    field[0][block] = v["motion_x"] / v["motion_scale"]
                    field[1][block] = v["motion_y"] / v["motion_scale"]
        return upscale_flow(torch.from_numpy(field)[None])


class SpyNet(nn.Module):
    """SpyNet at input size (Ranjan and Black, arXiv 1611.00850), a yardstick: five times the weights of `net`.

    Args:
        path: a safetensors file with the ``spynet.*`` weights of a BasicVSR, six levels of five convolutions, without
            that prefix.
    """

    name = "SpyNet"

    def __init__(self, path: str) -> None:
        super().__init__()

        weights = load_file(path)
        self.means, self.deviations = weights.pop("mean").flatten(), weights.pop("std").flatten()
        layers = sorted(
            (name for name in weights if name.endswith("weight")),
            key=lambda name: [int(part) for part in name.split(".") if part.isdigit()],
        )
        self.levels = nn.ModuleList()
        for level in range(len(layers) // 5):
            convolutions: list[nn.Module] = []
            for name in layers[5 * level : 5 * level + 5]:
                width, below = weights[name].shape[:2]
                convolution = nn.Conv2d(below, width, 7, padding=3)
                convolution.weight.data.copy_(weights[name])
                assert convolution.bias is not None
                convolution.bias.data.copy_(weights[name.replace("weight", "bias")])
                convolutions += [convolution, nn.ReLU()]
            self.levels.append(nn.Sequential(*convolutions[:-1]))
        self.eval().requires_grad_(False)

    def forward(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,4h,4w)."""
        height, width = current_B3hw.shape[-2:]
        sides = (-(-height // 32) * 32, -(-width // 32) * 32)
        frames = [
            F.interpolate((x / 2 + 0.5), size=sides, mode="bilinear", align_corners=False)
            for x in (current_B3hw, previous_B3hw)
        ]
        frames = [(x - self.means.view(1, 3, 1, 1)) / self.deviations.view(1, 3, 1, 1) for x in frames]
        pyramids = [[x] for x in frames]
        for pyramid in pyramids:
            for _ in range(len(self.levels) - 1):
                pyramid.insert(0, F.avg_pool2d(pyramid[0], 2))
        flow = pyramids[0][0].new_zeros((len(current_B3hw), 2, *pyramids[0][0].shape[-2:]))
        for level, (body, current, previous) in enumerate(zip(self.levels, *pyramids, strict=True)):
            if level:
                flow = 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True)
            flow = flow + body(torch.cat([current, warp(previous, flow), flow], dim=1))
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
        return upscale_flow(flow * torch.tensor([width / sides[1], height / sides[0]]).view(1, 2, 1, 1))


def random_raft(folder: Path) -> dict[str, RAFTFlow]:
    """Return RAFT in its variants with random weights, for cost alone; none where torchvision is not installed.

    Beside a torch without CUDA, torchvision may lie in a folder of its own (`make venv` puts it there) and lack its
    compiled operators, of which RAFT uses none; two are looked up by name when it is imported.
    """
    apart = Path(sys.prefix, "torchvision-for-tests")
    if apart.is_dir():
        sys.path.append(str(apart))
        _OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    elif importlib.util.find_spec("torchvision") is None:
        return {}
    from torchvision.models.optical_flow import raft_large, raft_small

    files = {"large": folder / "raft_large.safetensors", "small": folder / "raft_small.safetensors"}
    save_file(raft_large(weights=None).state_dict(), files["large"])
    save_file(raft_small(weights=None).state_dict(), files["small"])
    estimators = {
        "raft (output size, 12 updates)": RAFTFlow("output", files["large"]),
        "raft, 4 updates": RAFTFlow("output", files["large"], updates=4),
        "raft at input size": RAFTFlow("input", files["large"]),
        "raft at input size, 4 updates": RAFTFlow("input", files["large"], updates=4),
        "raft-small (input size)": RAFTFlow("input", files["small"], variant="small"),
        "raft-small at output size": RAFTFlow("output", files["small"], variant="small"),
    }
    frame = torch.zeros(1, 3, 16, 16)
    for estimator in estimators.values():
        estimator(frame, frame)  # reads the weights, while the files are there
    return estimators
