"""Training samples from folders of pictures and videos.

Pictures become clips by simulated camera motion with exact flow; videos bring real motion with estimated flow.
Everything is held in memory as 8-bit pictures, so that a sample costs a crop, not a decode.

Knows: files, crops, augmentations. Does not know: models, losses.

Shapes: T frames, S crop side at full resolution (a multiple of 4), s = S/4.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.degrade import BICUBIC, SCALE, degrade, downscale, draw_degradation, gaussian_blur
from pipeline.errors import PipelineError
from pipeline.motion import draw_camera, ellipse_mask, flow_of, render
from pipeline.stop_signals import ignore_stop_signals

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m4v"})
PICTURE_LEVELS = (
    1.0,
    0.7,
    0.5,
    0.35,
)  # each photograph is kept at these sizes: more sharp texture per pixel, fewer blurs
MAX_PICTURE_SIDE = 2800
MIN_SIDE = 160


Batch = tuple[Tensor, Tensor, Tensor]


class DatasetError(PipelineError):
    """Training data is missing or unusable."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A real clip: frames (N,H,W,3) uint8 and flow (N-1,2,H/4,W/4) in full-resolution pixels, current to previous."""

    name: str
    frames_NHW3: np.ndarray
    flow_N2hw: np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """One training clip. `hr_T3SS`, `lr_T3ss` in [-1, 1]; `flow_T2SS` (T-1 entries) current to previous in pixels."""

    hr_T3SS: Tensor
    lr_T3ss: Tensor
    flow_T2SS: Tensor


def list_files(roots: list[Path], suffixes: frozenset[str]) -> list[Path]:
    """Return files below `roots` with one of `suffixes`, each content once, in a stable order."""
    seen: set[str] = set()
    found: list[Path] = []
    for root in roots:
        candidates = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in candidates:
            if path.suffix.lower() not in suffixes:
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                found.append(path)
    return found


def load_picture(path: Path) -> list[np.ndarray]:
    """Return the picture as uint8 (H,W,3) at every level of `PICTURE_LEVELS` with sides of 160 pixels or more."""
    picture = Image.open(path).convert("RGB")
    if max(picture.size) > MAX_PICTURE_SIDE:
        ratio = MAX_PICTURE_SIDE / max(picture.size)
        picture = picture.resize(
            (round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.LANCZOS
        )
    levels = []
    for level in PICTURE_LEVELS:
        size = (round(picture.width * level), round(picture.height * level))
        if min(size) >= MIN_SIDE:
            levels.append(np.asarray(picture if level == 1.0 else picture.resize(size, Image.Resampling.LANCZOS)))
    return levels


def load_clip(path: Path, *, max_frames: int, max_height: int, flow: bool = True) -> Clip:
    """Read the first `max_frames` frames of a video, reduced to at most `max_height` rows, with DIS flow between them.

    `flow=False` leaves flow zero, for stages that look at single frames.

    A file ``NAME.flow.npz`` beside the video (written by `upriver train pack`) is used instead of estimating, so that
    a lean training machine needs no OpenCV.
    """
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            ratio = min(1.0, max_height / frame.height)
            width, height = (int(side * ratio) // SCALE * SCALE for side in (frame.width, frame.height))
            frames.append(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray())
            if len(frames) == max_frames:
                break
    if len(frames) < 2:
        raise DatasetError(
            f"{path}: {len(frames)} frames", code="dataset", remedy="Training clips need two frames or more."
        )
    stored = path.with_name(path.name + ".flow.npz")
    stack = np.stack(frames)
    if not flow:
        fields = np.zeros((len(stack) - 1, 2, stack.shape[1] // SCALE, stack.shape[2] // SCALE), np.float16)
    elif stored.exists():
        from pipeline.packing import read_flow

        fields = read_flow(stored)
    else:
        fields = estimate_flow(stack)
    return Clip(path.stem, stack, fields[: len(stack) - 1])


def estimate_flow(frames_NHW3: np.ndarray) -> np.ndarray:
    """Return DIS flow (N-1,2,H/4,W/4) as float16, estimated on 4x reduced frames, in full-resolution pixels."""
    from pipeline.flow import DISFlow  # needs OpenCV: only where flow is not stored

    estimator = DISFlow()
    lr = [downscale(torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255) * 2 - 1 for f in frames_NHW3]
    flows = [estimator(now, before) for before, now in itertools.pairwise(lr)]
    reduced = [F.interpolate(flow, size=lr[0].shape[2:], mode="area")[0] for flow in flows]
    return torch.stack(reduced).numpy().astype(np.float16)


class TrainingData:
    """Pictures and clips in memory, and a sampler over them.

    Args:
        roots: folders (searched recursively) and files.
        max_frames, max_height: what is kept of every video.
        flow: whether real clips need flow between their frames (stages 2 and 3).
        holdout: number of pictures kept out of training for validation (every n-th of the sorted list).

    Raises DatasetError when nothing usable is found.
    """

    def __init__(
        self, roots: list[Path], *, max_frames: int = 60, max_height: int = 540, holdout: int = 0, flow: bool = True
    ) -> None:
        for root in roots:
            if not root.exists():
                raise DatasetError(
                    f"{root} does not exist", code="dataset", remedy="Name a folder of pictures or videos."
                )
        pictures = [levels for path in list_files(roots, PICTURE_SUFFIXES) if (levels := load_picture(path))]
        holdout = min(holdout, len(pictures) // 4)
        kept_out = {(2 * n + 1) * len(pictures) // (2 * holdout) for n in range(holdout)}
        self.held_out = [p for n, p in enumerate(pictures) if n in kept_out]
        self.pictures = [p for n, p in enumerate(pictures) if n not in kept_out]
        self.clips = [
            load_clip(path, max_frames=max_frames, max_height=max_height, flow=flow)
            for path in list_files(roots, VIDEO_SUFFIXES)
        ]
        if not self.pictures and not self.clips:
            raise DatasetError(
                f"no picture or video under {', '.join(map(str, roots))}",
                code="dataset",
                remedy=f"Known kinds: {', '.join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))}; 160 pixels or more.",
            )

    def sample(
        self,
        rng: np.random.Generator,
        *,
        frames: int,
        side: int,
        severity: float,
        clip_share: float,
        still: bool = False,
        tone_share: float = 0.0,
    ) -> Sample:
        """Draw a clip of `frames` frames and `side` pixels a side, degraded with the given severity (see `degrade`).

        `clip_share`: probability of a real clip where both kinds exist. `still`: instead, a picture that does not move,
        often out of focus. `tone_share`: probability of another exposure, see `change_tone`.
        """
        if still and self.pictures:
            hr, flow = self._still(rng, frames, side)
        elif self.clips and (not self.pictures or rng.random() < clip_share):
            hr, flow = self._from_clip(rng, frames, side)
        else:
            hr, flow = self._from_picture(rng, frames, side)
        hr, flow = _augment(hr, flow, rng)
        if tone_share and rng.random() < tone_share:
            hr = change_tone(hr, rng)
        lr = degrade(hr, draw_degradation(rng, severity), torch.Generator().manual_seed(int(rng.integers(2**62))))
        return Sample(hr * 2 - 1, lr * 2 - 1, flow)

    def sample_held_out(self, rng: np.random.Generator, *, frames: int, side: int) -> Sample:
        """Draw a bicubic-degraded clip from a held-out picture (from the training ones where none is held out)."""
        hr, flow = self._from_picture(rng, frames, side, self.held_out or self.pictures or None)
        return Sample(hr * 2 - 1, degrade(hr, BICUBIC) * 2 - 1, flow)

    def _from_clip(self, rng: np.random.Generator, frames: int, side: int) -> tuple[Tensor, Tensor]:
        clip = self.clips[rng.integers(len(self.clips))]
        count, height, width = clip.frames_NHW3.shape[:3]
        first = int(rng.integers(max(1, count - frames + 1)))
        order = np.minimum(np.arange(first, first + frames), count - 1)
        top = int(rng.integers((height - side) // SCALE + 1)) * SCALE
        left = int(rng.integers((width - side) // SCALE + 1)) * SCALE
        crop = clip.frames_NHW3[order, top : top + side, left : left + side]
        hr = torch.from_numpy(crop).permute(0, 3, 1, 2).float() / 255
        rows, columns = slice(top // SCALE, (top + side) // SCALE), slice(left // SCALE, (left + side) // SCALE)
        small = clip.flow_N2hw[np.minimum(order[1:], count - 1) - 1][:, :, rows, columns].astype(np.float32)
        if frames == 1:
            return hr, torch.zeros(0, 2, side, side)
        return hr, F.interpolate(torch.from_numpy(small), size=(side, side), mode="bilinear")

    def _from_picture(
        self, rng: np.random.Generator, frames: int, side: int, pictures: list[list[np.ndarray]] | None = None
    ) -> tuple[Tensor, Tensor]:
        pictures = pictures or self.pictures
        if not pictures:
            return self._from_clip(rng, frames, side)
        picture = self.crop_around(rng, side, pictures)
        if frames == 1:
            top, left = ((size - side) // 2 for size in picture.shape[1:])
            return picture[None, :, top : top + side, left : left + side], torch.zeros(0, 2, side, side)
        centre = (picture.shape[2] / 2, picture.shape[1] / 2)
        speed = float(rng.choice([0.0, 2.0, 8.0, 20.0]))
        camera = draw_camera(rng, frames, centre, speed, 0.01)
        hr, flow = render(picture, camera, side), flow_of(camera, side)
        if rng.random() < 0.35:  # something moves in front: occlusion and disocclusion
            front = self.crop_around(rng, side, pictures)
            second = draw_camera(rng, frames, (front.shape[2] / 2, front.shape[1] / 2), 8.0, 0.02)
            mask = ellipse_mask(second, side, radius=float(rng.uniform(0.15, 0.35)) * side)
            hr = torch.lerp(hr, render(front, second, side), mask)
            flow = torch.where(mask[1:] > 0.5, flow_of(second, side), flow)
        return hr.clamp(0, 1), flow

    def _still(self, rng: np.random.Generator, frames: int, side: int) -> tuple[Tensor, Tensor]:
        """Return a part of a picture, held for all frames; sharp, out of focus, or with only a part in focus."""
        picture = self.crop_around(rng, side, self.pictures)
        top, left = (int(rng.integers(size - side + 1)) for size in picture.shape[1:])
        hr = picture[None, :, top : top + side, left : left + side]
        focus = rng.random()
        if focus < 0.7:
            soft = gaussian_blur(hr, float(rng.uniform(1.5, 8)))
            if focus < 0.35:
                camera = draw_camera(rng, 1, (side / 2, side / 2), 8.0, 0.0)
                soft = torch.lerp(soft, hr, ellipse_mask(camera, side, radius=float(rng.uniform(0.15, 0.5)) * side))
            hr = soft
        return hr.expand(frames, -1, -1, -1), torch.zeros(frames - 1, 2, side, side)

    def crop_around(self, rng: np.random.Generator, side: int, pictures: list[list[np.ndarray]]) -> Tensor:
        """Return a random picture's crop (3,h,w) in [0, 1], with room for the camera to move where the picture has it.

        Of three places the one with the most detail is taken: much of a photograph is sky or blur that teaches little.
        """
        levels = pictures[rng.integers(len(pictures))]
        picture = levels[rng.integers(len(levels))]
        room = [min(size, side * 2) for size in picture.shape[:2]]
        places = [
            [int(rng.integers(size - use + 1)) for size, use in zip(picture.shape[:2], room, strict=True)]
            for _ in range(3)
        ]
        crops = [picture[top : top + room[0], left : left + room[1]] for top, left in places]
        crop = max(crops, key=lambda c: float(np.abs(np.diff(c[::2, :, 1].astype(np.int16), axis=1)).mean()))
        return torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255

    def batches(
        self,
        seed: int,
        *,
        batch: int,
        frames: int,
        side: int,
        severity: float,
        clip_share: float,
        still_share: float = 0.0,
        tone_share: float = 0.0,
        start: int = 0,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Yield (hr_BT3SS, lr_BT3ss, flow_BT2SS) for ever. Batch n depends on (seed, n) alone: runs can resume.

        `still_share`: probability that a whole batch is still; its flow is then zero everywhere.
        `workers`: processes that draw ahead; 0 draws in the caller's. A GPU needs several.
        """

        def draw(number: int) -> Batch:
            rng = np.random.default_rng([seed, number])
            still = still_share > 0 and rng.random() < still_share
            drawn = [
                self.sample(
                    rng,
                    frames=frames,
                    side=side,
                    severity=severity,
                    clip_share=clip_share,
                    still=still,
                    tone_share=tone_share,
                )
                for _ in range(batch)
            ]
            return (
                torch.stack([s.hr_T3SS for s in drawn]),
                torch.stack([s.lr_T3ss for s in drawn]),
                torch.stack([s.flow_T2SS for s in drawn]),
            )

        numbers = range(start, sys.maxsize)
        # A signal to all processes of a run must not take the workers from under the iteration that it lets finish.
        return iter(
            DataLoader(
                _Drawn(draw),
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                worker_init_fn=ignore_stop_signals if workers else None,
            )
        )


class _Drawn(Dataset[Batch]):
    """Batches by their number."""

    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self.draw = draw

    def __getitem__(self, number: int) -> Batch:
        return self.draw(number)


def _augment(hr_T3SS: Tensor, flow_T2SS: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mirror and transpose at random; the flow follows exactly."""
    if rng.random() < 0.5:
        hr_T3SS, flow_T2SS = hr_T3SS.flip(3), flow_T2SS.flip(3) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    if rng.random() < 0.25:
        hr_T3SS, flow_T2SS = hr_T3SS.transpose(2, 3), flow_T2SS.transpose(2, 3).flip(1)
    return hr_T3SS.contiguous(), flow_T2SS.contiguous()


def change_tone(hr_T3SS: Tensor, rng: np.random.Generator) -> Tensor:
    """Expose a clip in [0, 1] otherwise: darker, brighter until it clips, or moved towards white without clipping.

    Photographs hold few whites and few deep shadows, and a network learns the levels that it sees.
    """
    kind = rng.random()
    if kind < 0.4:
        return hr_T3SS * float(rng.uniform(0.1, 0.7))
    if kind < 0.75:
        return (hr_T3SS * float(rng.uniform(1.2, 2.5))).clamp(max=1)
    return 1 - float(rng.uniform(0.1, 0.7)) * (1 - hr_T3SS)
