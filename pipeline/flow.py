"""Optical flow between an input frame and the one before it, at output size, by an estimator of the caller's choice.

Knows: RAFT (torchvision), DIS (OpenCV), the network of our own (`flow_net.py`), zero flow, and flow that the caller
gives; how small and odd frames are padded; how flow at input size becomes flow at output size. Does not know: streams,
the warp. OpenCV and torchvision are imported only by the estimator that needs them.

Shapes: B batch, h w input size, H W = 4h 4w output size. Frames are in [-1, 1]. Flow is in output pixels, fp32,
channel 0 = dx, 1 = dy, from the current frame to the previous one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import FlowError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALE: Final = 4
FlowName = Literal["raft", "raft-small", "dis", "net", "zero", "given"]
FlowSize = Literal["input", "output"]
NET_WEIGHTS: Final = Path(__file__).parent / "models" / "flow" / "net.safetensors"

_NAMES: Final = "raft, raft-small, dis, net, zero or given"
_RAFT_UPDATES: Final = 12
_RAFT_MULTIPLE: Final = 8
_RAFT_MINIMUM: Final = 128
_DIS_MINIMUM: Final = 32
_LUMA: Final = (299, 587, 114)  # BT.601, in thousandths


@runtime_checkable
class FlowEstimator(Protocol):
    """What the engine asks of a flow estimator; anything with these three members can be handed to it."""

    name: str

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,4h,4w) in output pixels from `current_B3hw` to `previous_B3hw`, on their device."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move whatever the estimator holds to `device`; return the estimator."""
        ...


class ZeroFlow:
    """No motion. For ablations, and for cameras that never move."""

    name = "zero"

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return zeros (B,2,4h,4w)."""
        batch, _, height, width = current_B3hw.shape
        return current_B3hw.new_zeros((batch, 2, height * SCALE, width * SCALE), dtype=torch.float32)

    def to(self, device: torch.device | str) -> Self:
        """Return the estimator: it holds nothing."""
        return self


class GivenFlow:
    """No estimator: the caller of `step` gives the flow of every frame that has a previous one."""

    name = "given"

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Raise FlowError: the flow should have been given."""
        raise FlowError(
            "No flow was given for a frame that has a previous one.",
            code="flow-not-given",
            remedy="Pass flow_B2HW to step, or load the model with flow='dis' or flow='raft'.",
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the estimator: it holds nothing."""
        return self


class DISFlow:
    """Dense inverse search (Kroeger et al., arXiv 1603.03590) by OpenCV, on the CPU; milliseconds at input size.

    Args:
        size: ``"input"`` estimates on the frames as they are and enlarges the vectors; ``"output"`` estimates on frames
            enlarged by bicubic interpolation, sixteen times the work.

    Raises:
        FlowError: OpenCV is not installed.
    """

    name = "dis"

    def __init__(self, size: FlowSize = "input") -> None:
        if importlib.util.find_spec("cv2") is None:
            raise FlowError(
                "The flow estimator 'dis' needs OpenCV.",
                code="flow-dis-missing",
                remedy="Install opencv-python-headless, or choose flow='zero'.",
            )
        self.size = size

    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,4h,4w); the streams of a batch are estimated one after the other."""
        pairs = torch.stack([current_B3hw, previous_B3hw])
        if self.size == "output":
            pairs = upscale_frames(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        height, width = pairs.shape[-2:]
        grey_2Bhw = _grey_levels(_pad(pairs.flatten(0, 1), minimum=_DIS_MINIMUM)).unflatten(0, pairs.shape[:2])
        flow_B2hw = self._search(*grey_2Bhw.numpy())[..., :height, :width].to(current_B3hw.device)
        return flow_B2hw.contiguous() if self.size == "output" else upscale_flow(flow_B2hw)

    def search(self, current_HWC: NDArray[np.integer], previous_HWC: NDArray[np.integer]) -> Tensor:
        """Return what a call with these frames, uint8 or full-scale uint16, finds at input size (1,2,h,w), on the CPU.

        `upscale_flow` of it, on the device of the frames, is what the call returns, bit for bit.
        """
        if self.size != "input":
            raise ValueError("flow at output size is found in enlarged frames, not in arrays")
        height, width = current_HWC.shape[:2]
        edges = [(0, max(0, _DIS_MINIMUM - height)), (0, max(0, _DIS_MINIMUM - width))]
        grey = (np.pad(_grey_of_levels(frame), edges, mode="edge")[None] for frame in (current_HWC, previous_HWC))
        return self._search(*grey)[..., :height, :width]

    def _search(self, current_Bhw: NDArray[np.uint8], previous_Bhw: NDArray[np.uint8]) -> Tensor:
        """Return the flow (B,2,h,w) between grey frames, in their pixels."""
        import cv2

        # an object of its own for every call: it keeps buffers, and calls may come from several threads. The faster
        # presets do not give the same flow every time
        estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        if self.size == "input":
            # the preset stops at half size; on frames this small going on to full size removes a quarter of the error
            estimator.setFinestScale(0)
        flows = [
            torch.from_numpy(estimator.calc(current, previous, None))
            for current, previous in zip(current_Bhw, previous_Bhw, strict=True)
        ]
        return torch.stack(flows).permute(0, 3, 1, 2)

    def to(self, device: torch.device | str) -> Self:
        """Return the estimator: it runs on the CPU and hands its flow to the frames' device."""
        return self


class NetFlow:
    """The network of our own (`flow_net.FlowNet`): at input size, on the frames' device, in torch operations alone.

    So it can live in the graph that the model is compiled into, and costs no trip to the CPU, unlike DIS.

    Args:
        weights: a safetensors file that `upriver train flow` wrote; None takes the one that comes with the package.

    Raises:
        FlowError: the weights cannot be read or do not fit.
    """

    name = "net"

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        from pipeline.flow_net import FlowNet

        path = NET_WEIGHTS if weights is None else Path(weights)
        self._model: torch.nn.Module = FlowNet()
        try:
            stored = {name: value.to(torch.float32) for name, value in _read_weights(path).items()}
            self._model.load_state_dict(stored)
        except (OSError, ValueError, RuntimeError) as error:
            raise FlowError(
                f"The weights of the flow network cannot be loaded from {path}: {error}.",
                code="flow-net-weights",
                remedy="Name a file that `upriver train flow` wrote, or choose flow='dis'.",
            ) from error
        self._model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the flow (B,2,4h,4w); computed in fp32 on the frames' device."""
        model = self._model.to(current_B3hw.device)
        return upscale_flow(model(current_B3hw.to(torch.float32), previous_B3hw.to(torch.float32)))

    def to(self, device: torch.device | str) -> Self:
        """Move the network; return the estimator."""
        self._model.to(device)
        return self

    @property
    def network(self) -> torch.nn.Module:
        """The network: ``network(current_B3hw, previous_B3hw)`` is the flow (B,2,h,w) in input pixels."""
        return self._model

    def without_data(self) -> NetFlow:
        """Return an estimator of this kind whose network has sizes but no data (device "meta"), to count its memory."""
        from pipeline.flow_net import FlowNet

        twin = NetFlow.__new__(NetFlow)
        with torch.device("meta"):
            twin._model = FlowNet().eval().requires_grad_(False)
        return twin


class RAFTFlow:
    """RAFT of torchvision (Teed and Deng, arXiv 2003.12039); published checkpoints were trained with RAFT-large.

    Args:
        size: ``"output"`` estimates on frames enlarged by bicubic interpolation, as published. Its correlation volume
            holds (H/8 W/8)^2 fp32 numbers: 0.8 GiB for 1280x720, 60 GiB for 3840x2160. ``"input"`` estimates on the
            frames as they are and enlarges the vectors: 256 times less memory, other results.
        weights: a safetensors file with the weights of torchvision's ``raft_large`` or ``raft_small``; None takes
            torchvision's default weights from its cache, or downloads them there, at the first call.
        variant: ``"large"``, or ``"small"`` with a fifth of the weights.
        updates: how often the estimate is refined; torchvision's default is 12, fewer is faster.

    Raises:
        FlowError: torchvision is not installed or not for this torch (at once); the weights cannot be had or do not fit
            (at the first call).
    """

    def __init__(
        self,
        size: FlowSize = "output",
        weights: str | os.PathLike[str] | None = None,
        *,
        variant: Literal["large", "small"] = "large",
        updates: int = _RAFT_UPDATES,
    ) -> None:
        _import_raft()  # a missing or mismatched torchvision shows now, not at the second frame
        if updates < 1:
            raise FlowError(
                f"RAFT cannot refine its estimate {updates} times.", code="flow-updates", remedy="Ask for 1 or more."
            )
        self.name = "raft" if variant == "large" else "raft-small"
        self.size = size
        self.weights = weights
        self.variant = variant
        self.updates = updates
        self._model: torch.nn.Module | None = None

    @torch.no_grad()
    def __call__(self, current_B3hw: Tensor, previous_B3hw: Tensor) -> Tensor:
        """Return the last of RAFT's estimates (B,2,4h,4w); computed in fp32 on the frames' device."""
        model = self._loaded().to(current_B3hw.device)
        current, previous = current_B3hw.to(torch.float32), previous_B3hw.to(torch.float32)
        if self.size == "output":
            current, previous = upscale_frames(current), upscale_frames(previous)
        height, width = current.shape[-2:]
        current, previous = (
            _pad(frame, minimum=_RAFT_MINIMUM, multiple=_RAFT_MULTIPLE) for frame in (current, previous)
        )
        flow = model(current, previous, num_flow_updates=self.updates)[-1][..., :height, :width]
        return flow.contiguous() if self.size == "output" else upscale_flow(flow)

    def to(self, device: torch.device | str) -> Self:
        """Move the network, if it is loaded already; return the estimator."""
        if self._model is not None:
            self._model.to(device)
        return self

    def without_data(self) -> RAFTFlow:
        """Return an estimator of this kind whose network has sizes but no data (device "meta"), to count its memory."""
        twin = RAFTFlow(self.size, variant=self.variant, updates=self.updates)
        with torch.device("meta"):
            twin._model = self._built().eval().requires_grad_(False)
        return twin

    def _built(self) -> torch.nn.Module:
        raft = _import_raft()
        model: torch.nn.Module = getattr(raft, f"raft_{self.variant}")(weights=None, progress=False)
        return model

    def _loaded(self) -> torch.nn.Module:
        if self._model is None:
            model = self._built()
            try:
                model.load_state_dict(self._read_weights())
            except RuntimeError as error:
                raise _no_weights(self.weights, f"they do not fit raft_{self.variant}") from error
            self._model = model.eval().requires_grad_(False)
        return self._model

    def _read_weights(self) -> dict[str, Tensor]:
        try:
            if self.weights is not None:
                return _read_weights(self.weights)
            raft = _import_raft()
            published = raft.Raft_Large_Weights if self.variant == "large" else raft.Raft_Small_Weights
            # weights_only: a restricted reader that runs no code from the file
            weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                published.DEFAULT.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
            return weights
        except (OSError, ValueError) as error:
            raise _no_weights(self.weights, str(error)) from error


def make_flow(
    name: str, *, size: FlowSize | None = None, raft_weights: str | os.PathLike[str] | None = None
) -> FlowEstimator:
    """Return the estimator with this name: ``raft``, ``raft-small``, ``dis``, ``net``, ``zero`` or ``given``.

    Further arguments of an estimator are those of its class.

    Args:
        size: where RAFT and DIS estimate; None is each one's default (RAFT: output, RAFT-small and DIS: input).
        raft_weights: of RAFT-large, see `RAFTFlow`.

    Raises:
        FlowError: an unknown name, or an estimator whose library is not installed.
    """
    match name:
        case "raft":
            return RAFTFlow(size or "output", raft_weights)
        case "raft-small":
            return RAFTFlow(size or "input", variant="small")
        case "dis":
            return DISFlow(size or "input")
        case "net":
            return NetFlow()
        case "zero":
            return ZeroFlow()
        case "given":
            return GivenFlow()
    raise FlowError(f"There is no flow estimator {name!r}.", code="flow-unknown", remedy=f"Choose {_NAMES}.")


def upscale_frames(frames_B3hw: Tensor) -> Tensor:
    """Return frames (B,3,4h,4w) for the estimation of flow: bicubic, pixel centres, not clamped (may leave [-1, 1])."""
    return F.interpolate(frames_B3hw, scale_factor=SCALE, mode="bicubic", align_corners=False)


def upscale_flow(flow_B2hw: Tensor) -> Tensor:
    """Return flow at output size (B,2,4h,4w): vectors times four, interpolated linearly between pixel centres."""
    return F.interpolate(flow_B2hw, scale_factor=SCALE, mode="bilinear", align_corners=False) * SCALE


def _pad(frames_BChw: Tensor, *, minimum: int, multiple: int = 1) -> Tensor:
    """Repeat the last row and column until both sides are at least `minimum` and a multiple of `multiple`."""
    height, width = frames_BChw.shape[-2:]
    wanted_h, wanted_w = (-(-max(side, minimum) // multiple) * multiple for side in (height, width))
    if (wanted_h, wanted_w) == (height, width):
        return frames_BChw
    return F.pad(frames_BChw, (0, wanted_w - width, 0, wanted_h - height), mode="replicate")


def _read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; what is none raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _grey_levels(frames_B3hw: Tensor) -> Tensor:
    """Return 8-bit luma (B,h,w) of frames in [-1, 1], on the CPU.

    It is counted in whole numbers, from the levels that a frame had as 8 or 16 bits: so a device that rounds otherwise
    sees the same, and so does who never made a tensor of the frame.
    """
    red, green, blue = ((frames_B3hw.to(torch.float32) + 1) * 32767.5).round().to(torch.int32).unbind(dim=1)
    luma_Bhw = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return torch.div(luma_Bhw + 128_500, 257_000, rounding_mode="floor").clamp(0, 255).to(torch.uint8).cpu()


def _grey_of_levels(frame_HWC: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return what `_grey_levels` returns of the frame (H,W,3) as a tensor: (H,W)."""
    red, green, blue = (frame_HWC[..., channel].astype(np.int32) for channel in range(3))
    luma_HW = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    half, whole = (500, 1000) if frame_HWC.dtype == np.uint8 else (128_500, 257_000)
    grey_HW: NDArray[np.uint8] = ((luma_HW + half) // whole).astype(np.uint8)
    return grey_HW


def _import_raft() -> ModuleType:
    """Import torchvision's optical flow; its compiled part fits one build of torch only, hence the RuntimeError."""
    try:
        return importlib.import_module("torchvision.models.optical_flow")
    except (ImportError, RuntimeError) as error:
        raise FlowError(
            f"The flow estimator 'raft' needs torchvision: {error}.",
            code="flow-raft-missing",
            remedy="Install it for this torch by `pip install 'upriver[raft]'`, or choose flow='dis'.",
        ) from error


def _no_weights(path: str | os.PathLike[str] | None, reason: str) -> FlowError:
    name = "torchvision's default weights" if path is None else str(Path(path))
    return FlowError(
        f"The weights of RAFT cannot be loaded from {name}: {reason}.",
        code="flow-raft-weights",
        remedy="Connect to the network once so that they are cached, give a safetensors file, or choose flow='dis'.",
    )
