"""ST-LPIPS: how different two pictures look, measured by a network that forgives shifts of a pixel.

The distance of Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (ECCV 2022), which is LPIPS (Zhang et
al., CVPR 2018) on a trunk whose down-sampling steps are low-pass filtered and whose first convolution has stride 1. Two
trunks exist: VGG16 (the perceptual loss of our training) and AlexNet (the judge of our evaluation: a network that was
the loss cannot be the judge).

This module knows the architecture and reads weights as safetensors. It does not know where weights come from: the
command `upriver assets fetch nets` downloads the authors' package and calls `convert` once.

Shape suffixes: B batch, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CheckpointError, InputError
from pipeline.file_modes import follow_umask

Trunk = Literal["vgg", "alex"]

# Mean and deviation of ImageNet's pictures, expressed for pictures in [-1, 1] (LPIPS' input normalisation).
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Below this squared norm a feature vector counts as empty; keeps the gradient finite where all channels are zero.
_EMPTY = 1e-12


def asset_folder() -> Path:
    """Folder of everything that is fetched rather than shipped: `UPRIVER_CACHE`, else `~/.cache/upriver/assets`."""
    chosen = os.environ.get("UPRIVER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "upriver" / "assets"


def weights_file(trunk: Trunk, folder: str | Path | None = None) -> Path:
    """Where `convert` puts, and `STLPIPS.load` looks for, the weights of one trunk."""
    return (Path(folder) if folder is not None else asset_folder() / "nets") / f"stlpips_{trunk}.safetensors"


def pack(folder: Path, source: Path | None = None) -> int:
    """Write the weights of both trunks in half precision into ``folder/nets``; returns their size in bytes.

    Half the size to carry; distances change in the fourth digit. `STLPIPS.load` takes them as they are.

    Args:
        source: folder of the weights; None: `nets` inside `asset_folder()`.

    Raises:
        CheckpointError: they have not been fetched.
    """
    from safetensors.torch import load_file, save_file

    (folder / "nets").mkdir(parents=True, exist_ok=True)
    size = 0
    for trunk in get_args(Trunk):
        STLPIPS.load(trunk, source)  # refuses what is missing or wrong
        target = weights_file(trunk, folder / "nets")
        save_file({name: x.half() for name, x in load_file(weights_file(trunk, source)).items()}, target)
        follow_umask([target])
        size += target.stat().st_size
    return size


class BlurPool(nn.Module):
    """Halves a feature map: the 3x3 binomial low-pass filter at stride 2, after a reflected border of 2.

    (B, C, H, W) -> (B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1). Separable, written as sums of slices: on a CPU that is
    several times faster than a depth-wise convolution.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.pad(x_BCHW, (2, 2, 2, 2), mode="reflect")
        rows = (x_BCHW.shape[2] - 3) // 2 + 1
        columns = (x_BCHW.shape[3] - 3) // 2 + 1
        # 1-2-1 over rows, keeping every second one, then the same over columns.
        top, middle, bottom = (x_BCHW[:, :, k : k + 2 * rows - 1 : 2] for k in range(3))
        x_BCHW = (top + bottom) * 0.25 + middle * 0.5
        left, centre, right = (x_BCHW[:, :, :, k : k + 2 * columns - 1 : 2] for k in range(3))
        return (left + right) * 0.25 + centre * 0.5


def _vgg_stages() -> list[nn.Sequential]:
    """VGG16 up to relu5_3; each pooling is a dense maximum over 2x2 followed by the low-pass halving."""
    stages: list[nn.Sequential] = []
    channels_in = 3
    for stage, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers: list[nn.Module] = [] if stage == 0 else [nn.MaxPool2d(2, stride=1), BlurPool()]
        for _ in range(depth):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU()]
            channels_in = channels
        stages.append(nn.Sequential(*layers))
    return stages


def _alex_stages() -> list[nn.Sequential]:
    """AlexNet up to relu5; the first convolution runs at stride 1, its stride of 4 became two low-pass halvings."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), BlurPool(), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, stride=1), BlurPool(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, stride=1), BlurPool(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


class STLPIPS(nn.Module):
    """The ST-LPIPS distance. Frozen, but differentiable with respect to both pictures.

    Args:
        trunk: `"vgg"` or `"alex"`.

    Sizes: any of at least 32x32. `.to(torch.bfloat16)` runs the trunk in bf16; norms, heads and the mean stay fp32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk: Trunk = trunk
        stages = _vgg_stages() if trunk == "vgg" else _alex_stages()
        self.stages = nn.ModuleList(stages)
        widths = [[m for m in stage if isinstance(m, nn.Conv2d)][-1].out_channels for stage in stages]
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(width)) for width in widths])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, trunk: Trunk = "alex", folder: str | Path | None = None) -> STLPIPS:
        """The network with its weights, in fp32 on the CPU.

        Args:
            trunk: `"vgg"` or `"alex"`.
            folder: where `stlpips_<trunk>.safetensors` lies; None: `nets` inside `asset_folder()`.

        Raises:
            CheckpointError: the file is missing or holds other tensors.
        """
        from safetensors.torch import load_file

        path = weights_file(trunk, folder)
        if not path.is_file():
            raise CheckpointError(
                f"The ST-LPIPS weights {path} do not exist.",
                code="perceptual-weights-missing",
                remedy="Fetch them with `upriver assets fetch nets`.",
            )
        network = cls(trunk)
        found, expected = load_file(path), network.state_dict()
        wrong = [k for k in expected if k not in found or found[k].shape != expected[k].shape]
        if wrong or len(found) != len(expected):
            raise CheckpointError(
                f"{path} does not hold the {len(expected)} tensors of ST-LPIPS ({trunk}); first difference: "
                f"{(wrong or sorted(set(found) - set(expected)))[0]}.",
                code="perceptual-weights-wrong",
                remedy="Delete the file and run `upriver assets fetch nets`.",
            )
        network.load_state_dict(found)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # the faster layout for convolutions on CPUs
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return network

    def features(self, x_B3HW: Tensor, layers: int = 5) -> list[Tensor]:
        """Unit-length feature vectors of the first `layers` of the five stages, shallow first.

        Args:
            x_B3HW: RGB in [-1, 1], any float dtype; cast to the weights' dtype.
            layers: 1 to 5. The distances of fewer layers are cheaper and smaller, and comparable with themselves only.

        Returns:
            one (B, C, h, w) tensor per stage, in the weights' dtype. Keep those of a fixed target and pass them to
            `distance` as often as needed.

        Raises:
            InputError: `layers` out of range, not three channels, or a side below 32.
        """
        if not 1 <= layers <= len(self.stages):
            raise InputError(f"layers is {layers}.", code="perceptual-layers", remedy="Choose 1 to 5.")
        if x_B3HW.ndim != 4 or x_B3HW.shape[1] != 3 or min(x_B3HW.shape[2:]) < 32:
            raise InputError(
                f"ST-LPIPS compares (B, 3, H, W) pictures of at least 32x32; got {tuple(x_B3HW.shape)}.",
                code="perceptual-shape",
                remedy="Pass larger RGB pictures.",
            )
        x_BCHW = ((x_B3HW - self.shift.to(x_B3HW.dtype)) / self.scale.to(x_B3HW.dtype)).to(self.heads[0].dtype)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        found = []
        for stage in self.stages[:layers]:
            x_BCHW = stage(x_BCHW)
            energy_B1HW = x_BCHW.float().square().sum(dim=1, keepdim=True)
            found.append(x_BCHW * torch.rsqrt(energy_B1HW + _EMPTY).to(x_BCHW.dtype))
        return found

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Distance of two results of `features` (equal layers and sizes) -> (B,) fp32, 0 for equal pictures."""
        terms = []
        for a_BCHW, b_BCHW, head_C in zip(a, b, self.heads, strict=False):
            squared_BCHW = (a_BCHW.float() - b_BCHW.float()).square()
            terms.append((squared_BCHW.mean(dim=(2, 3)) * head_C.float()).sum(dim=1))
        return torch.stack(terms).sum(dim=0)

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor, layers: int = 5) -> Tensor:
        """Distance of two batches of pictures, RGB in [-1, 1] -> (B,) fp32; lower is more alike."""
        return self.distance(self.features(a_B3HW, layers), self.features(b_B3HW, layers))


def convert(source: str | Path, target: str | Path, trunk: Trunk) -> Path:
    """Turns the authors' `.pth` file into our safetensors file, tensor by tensor, and returns its path.

    Read with `weights_only=True`, so that nothing in the file is executed.

    Raises:
        CheckpointError: the file holds other tensors than the published one.
    """
    from safetensors.torch import save_file

    published: dict[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    # The published names carry the layer's number inside the whole trunk; the order inside a stage is the same as ours.
    network = STLPIPS(trunk)
    tensors: dict[str, Tensor] = {}
    for number, stage in enumerate(network.stages):
        prefix = f"net.slice{number + 1}."
        for kind in ("weight", "bias"):
            theirs = [k for k in published if k.startswith(prefix) and k.endswith(kind)]
            ours = [f"stages.{number}.{k}" for k, _ in stage.named_parameters() if k.endswith(kind)]
            theirs.sort(key=lambda k: int(k.split(".")[2]))
            tensors |= {mine: published[k] for mine, k in zip(ours, theirs, strict=False)}
        head = f"lin{number}.model.1.weight"
        if head in published:
            tensors[f"heads.{number}"] = published[head].flatten()
    wrong = [k for k, v in network.state_dict().items() if k not in tensors or tensors[k].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"{source} is not the published ST-LPIPS ({trunk}) file: nothing fits {wrong[0]}.",
            code="perceptual-weights-wrong",
            remedy="Fetch the package again with `upriver assets fetch nets`.",
        )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    half_written = target.with_name(target.name + ".partial")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, half_written)
    follow_umask([half_written])
    half_written.replace(target)
    return target
