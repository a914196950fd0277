"""Precision and recall of the cut detector on films whose cuts are known, because this script cuts them.

    upriver assets fetch
    python -m benchmarks.shot_detection --group heldout --seed 1

Films are made of real clips and of camera moves over photographs: hard cuts in several treatments (compressed, grey,
dark, noisy), and what only looks like cuts: flashes, fast pans, zooms, dissolves, fades, objects that pass the camera,
titles. A cut counts as found when it is reported at exactly its frame; every other report is false. In a fade through
black to another scene one report is allowed, since a new scene does begin there. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np

from pipeline.perceptual import asset_folder
from pipeline.shots import CutDetector

WIDTH, HEIGHT = 384, 216
_MOST_FRAMES = 200  # of one clip
_BIG = 1600  # columns of a photograph that a camera moves over
# First frames of the shots of clips that are edited themselves, by eye.
_CUTS_INSIDE = {"bikes": (30, 76, 137, 187, 242), "city": (116,), "ocean": (144,)}
# Dissolves and edits that are no cuts inside these clips: left out.
_UNUSED = {"drawing", "drone"}

Frames = list[np.ndarray]


@dataclass(slots=True)
class Film:
    """A made film: `cuts` are first frames of shots, `either` ranges in which one report is neither right nor wrong."""

    kind: str
    frames: Frames = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    either: list[range] = field(default_factory=list)

    def cut_to(self, shot: Frames) -> None:
        """Append a shot after a hard cut."""
        if self.frames:
            self.cuts.append(len(self.frames))
        self.frames += shot


class Material:
    """The shots that films are made of: pieces of clips and moves over pictures, by a seeded choice."""

    def __init__(self, group: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        root = asset_folder()
        paths = sorted([*root.glob("heldout/*")] if group == "heldout" else [*root.glob("train/clips/*")])
        scenes = [(path.stem.partition("_")[0], scene) for path in paths for scene in _scenes(path)]
        self.scenes = [scene for _, scene in scenes]
        self._places = [place for place, _ in scenes]  # several cameras may have looked at one place
        pictures = sorted(root.glob("train/pictures/*"))
        self.pictures = pictures[::2] if group == "heldout" else pictures[1::2]  # no picture is in both groups
        self._last = ""
        self._last_picture = -1

    def shot(self, length: int, *, moves: float = 0.5) -> Frames:
        """A shot unlike the one before: of a clip, or with probability `moves` a slow move over a picture."""
        if self.rng.random() < moves:
            return self.move(length, speed=self.rng.uniform(0, 0.03), zoom=self.rng.uniform(-0.01, 0.01))
        at = int(self.rng.choice([at for at, place in enumerate(self._places) if place != self._last]))
        self._last, scene = self._places[at], self.scenes[at]
        length = min(length, len(scene))
        start = int(self.rng.integers(0, len(scene) - length + 1))
        return scene[start : start + length]

    def move(self, length: int, *, speed: float, zoom: float = 0.0, blur: bool = False) -> Frames:
        """A camera over a photograph; `speed` in widths per frame, `zoom` in shares per frame."""
        others = [at for at in range(len(self.pictures)) if at != self._last_picture]
        self._last_picture = int(self.rng.choice(others))
        picture = _picture(self.pictures[self._last_picture])
        high, wide = picture.shape[:2]
        at_x, at_y, angle = self.rng.uniform(0, 1), self.rng.uniform(0, 1), self.rng.uniform(-0.3, 0.3)
        way = float(self.rng.choice([-1, 1]))
        width = min(wide, high * WIDTH / HEIGHT) * (0.35 if speed > 0.05 else 0.6)
        frames, x, y = [], at_x * wide, at_y * high
        for _ in range(length):
            height = width * HEIGHT / WIDTH
            x, y = x % (2 * wide), y % (2 * high)
            frames.append(_window(picture, x, y, width, height, way * speed * width if blur else 0.0))
            x, y = x + way * speed * width * np.cos(angle), y + speed * width * np.sin(angle)
            width = float(np.clip(width * (1 - zoom), 120, min(wide, high * WIDTH / HEIGHT)))
        return frames


def _scenes(path: Path) -> Iterator[Frames]:
    if path.stem in _UNUSED:
        return
    frames: Frames = []
    with av.open(str(path)) as container:
        for picture in container.decode(container.streams.video[0]):
            wide = min(picture.width, round(picture.height * WIDTH / HEIGHT))
            high = min(picture.height, round(picture.width * HEIGHT / WIDTH))
            rgb = picture.to_ndarray(format="rgb24")
            top, left = (picture.height - high) // 2, (picture.width - wide) // 2
            frames.append(_resize(rgb[top : top + high, left : left + wide]))
            if len(frames) >= _MOST_FRAMES:
                break
    bounds = [0, *(cut for cut in _CUTS_INSIDE.get(path.stem, ()) if cut < len(frames)), len(frames)]
    yield from (frames[a:b] for a, b in pairwise(bounds) if b - a >= 12)


@cache
def _picture(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    scale = _BIG / image.shape[1]
    size = (_BIG, round(image.shape[0] * scale))
    return cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


def _resize(rgb: np.ndarray) -> np.ndarray:
    return cv2.resize(rgb, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


def _window(picture: np.ndarray, x: float, y: float, width: float, height: float, smear: float) -> np.ndarray:
    """A part of a picture that goes on mirrored beyond its borders, smeared along the way that the camera moves."""
    scale = WIDTH / width
    matrix = np.array([[scale, 0, -x * scale], [0, scale, -y * scale]])
    shown = cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    taps = int(abs(smear) * scale / 2)  # half a frame's time of exposure
    return cv2.blur(shown, (taps, 1)) if taps > 1 else shown


# --- treatments -----------------------------------------------------------------------------------------------------


def _coded(frames: Frames, codec: str, options: dict[str, str], bit_rate: int | None = None) -> Frames:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if bit_rate:
            stream.bit_rate = bit_rate
        for at, rgb in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(rgb)
            picture.pts, picture.time_base = at, Fraction(1, 25)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as coded:
        return [picture.to_ndarray(format="rgb24") for picture in coded.decode(video=0)]


def _levels(frames: Frames, change: Callable[[np.ndarray], np.ndarray]) -> Frames:
    return [np.clip(change(rgb.astype(np.float32)), 0, 255).astype(np.uint8) for rgb in frames]


def treatments(rng: np.random.Generator) -> dict[str, Callable[[Frames], Frames]]:
    """Ways in which a film may have suffered, by name."""

    def tape(rgb: np.ndarray) -> np.ndarray:
        grey = rgb.mean(axis=2, keepdims=True)
        colour = cv2.blur(rgb - grey, (15, 3)) * 0.6
        return grey * 0.8 + 24 + colour + rng.normal(0, 12, rgb.shape).astype(np.float32)

    return {
        "plain": lambda frames: frames,
        "h264 crf 36": lambda frames: _coded(frames, "libx264", {"crf": "36", "preset": "veryfast", "threads": "1"}),
        "mpeg2 300 kbit/s": lambda frames: _coded(frames, "mpeg2video", {"g": "15"}, 300_000),
        "grey": lambda frames: [np.repeat(rgb.mean(2, keepdims=True), 3, 2).astype(np.uint8) for rgb in frames],
        "dark": lambda frames: _levels(frames, lambda rgb: rgb * 0.2 + rng.normal(0, 2, rgb.shape)),
        "tape": lambda frames: _levels(frames, tape),
    }


# --- films ----------------------------------------------------------------------------------------------------------


def hard_cuts(material: Material, kind: str, shots: int, length: tuple[int, int], moves: float = 0.5) -> Film:
    """Shots one after the other."""
    film = Film(kind)
    for _ in range(shots):
        film.cut_to(material.shot(int(material.rng.integers(*length)), moves=moves))
    return film


def dissolve(material: Material) -> Film:
    """Two shots that run into each other within 8 to 30 frames."""
    film, count = Film("dissolve"), int(material.rng.integers(8, 31))
    one, two = material.shot(count + 12, moves=1), material.shot(count + 12, moves=1)
    film.frames = one[:12]
    for k in range(count):
        share = (k + 1) / (count + 1)
        film.frames.append((one[12 + k] * (1 - share) + two[k] * share).astype(np.uint8))
    film.frames += two[count:]
    return film


def fade(material: Material) -> Film:
    """A shot that goes to black, and another that comes out of it."""
    film, count = Film("fade"), int(material.rng.integers(5, 25))
    one, two = (material.shot(count + 12, moves=1) for _ in range(2))
    film.frames = [*one[:12], *((one[12 + k] * (1 - (k + 1) / count)).astype(np.uint8) for k in range(count))]
    film.frames += [np.zeros_like(one[0])] * int(material.rng.integers(1, 12))
    film.either = [range(len(film.frames), len(film.frames) + count)]
    film.frames += [*((two[k] * ((k + 1) / count)).astype(np.uint8) for k in range(count)), *two[count:]]
    return film


def flash(material: Material) -> Film:
    """Photographers' flashes: brighter by an offset, a gain, or burnt out in a part; one to three frames long."""
    film = Film("flash", list(material.shot(60, moves=0.3)))
    at = 5
    while at < len(film.frames) - 5:
        gain, offset = material.rng.uniform(1, 3), material.rng.uniform(20, 150)
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
        centre = material.rng.uniform(0, 1, 2) * (WIDTH, HEIGHT)
        near = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (material.rng.uniform(0.2, 2) * WIDTH) ** 2)
        for k in range(int(material.rng.integers(1, 4))):
            lit = film.frames[at + k] * (1 + (gain - 1) * near[..., None]) + offset * near[..., None]
            film.frames[at + k] = np.clip(lit, 0, 255).astype(np.uint8)
        at += int(material.rng.integers(4, 15))
    return film


def strobe(material: Material) -> Film:
    """Light that goes on and off every few frames."""
    film, every = Film("strobe", list(material.shot(50, moves=0.5))), int(material.rng.integers(1, 4))
    for at in range(8, len(film.frames)):
        if at // every % 2:
            film.frames[at] = np.clip(film.frames[at] * 0.35, 0, 255).astype(np.uint8)
    return film


def pan(material: Material) -> Film:
    """A pan that speeds up to 4 to 35 % of the width per frame and slows down again, with motion blur."""
    film = Film("fast pan")
    film.frames = material.move(30, speed=material.rng.uniform(0.04, 0.35), blur=bool(material.rng.integers(2)))
    return film


def zoom(material: Material) -> Film:
    """In or out by up to 8 % per frame."""
    way = material.rng.choice([-1, 1])
    return Film("zoom", material.move(30, speed=0.005, zoom=way * material.rng.uniform(0.01, 0.08)))


def passer_by(material: Material) -> Film:
    """Something large, dark or bright that crosses the picture close to the camera within 6 to 14 frames."""
    film = Film("passer-by", [frame.copy() for frame in material.shot(40, moves=0.3)])
    width, count = material.rng.uniform(0.3, 0.9) * WIDTH, int(material.rng.integers(6, 15))
    colour = material.rng.uniform(10, 220, 3)
    texture = cv2.GaussianBlur(material.rng.normal(0, 40, (HEIGHT, WIDTH, 3)).astype(np.float32), (0, 0), 6) * 4
    for k in range(min(count, len(film.frames) - 12)):
        left = int(-width + (k + 1) / (count + 1) * (WIDTH + width))
        a, b = max(0, left), min(WIDTH, int(left + width))
        film.frames[8 + k][:, a:b] = np.clip(colour + texture[:, : b - a], 0, 255).astype(np.uint8)
    return film


def title(material: Material) -> Film:
    """Up to four lines of large text that appear and disappear over a shot."""
    film, lines = Film("title", [frame.copy() for frame in material.shot(40, moves=0.5)]), material.rng.integers(1, 5)
    for frame in film.frames[10:28]:
        for line in range(lines):
            where = (20, 190 - 45 * line)
            cv2.putText(frame, "RESTORED FILM 1931", where, cv2.FONT_HERSHEY_SIMPLEX, 1.1, (250, 250, 240), 4)
    return film


def films(group: str, seed: int) -> Iterator[Film]:
    """All films of a set; equal for equal arguments."""
    material = Material(group, seed)
    for name, treat in treatments(material.rng).items():
        for kind, shots, length, moves in [
            ("clips", 10, (8, 40), 0.0),
            ("clips and pictures", 14, (8, 40), 0.6),
            ("short shots", 16, (4, 9), 0.5),
        ]:
            film = hard_cuts(material, f"cuts: {kind}, {name}", shots, length, moves)
            film.frames = treat(film.frames)
            yield film
    for make in (dissolve, fade, flash, strobe, pan, zoom, passer_by, title):
        for _ in range(12):
            yield make(material)
    for scene in material.scenes:
        yield Film("whole clips", scene)


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Score:
    """Counts of one kind of film."""

    films: int = 0
    frames: int = 0
    cuts: int = 0
    found: int = 0
    false: int = 0

    def add(self, film: Film) -> tuple[list[int], list[int]]:
        """Run the detector over a film; returns (missed, false) frame numbers."""
        detector = CutDetector()
        reported = [at for at, frame in enumerate(film.frames) if detector.update(frame)]
        allowed = {next((at for at in reported if at in span), None) for span in film.either}
        wrong = [at for at in reported if at not in film.cuts and at not in allowed]
        missed = [at for at in film.cuts if at not in reported]
        self.films += 1
        self.frames += len(film.frames)
        self.cuts += len(film.cuts)
        self.found += len(film.cuts) - len(missed)
        self.false += len(wrong)
        return missed, wrong


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def main() -> None:
    """Judge the detector on a set and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--group", choices=["train", "heldout"], default="heldout", help="which clips and pictures")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print each miss and each false report")
    options = parser.parse_args()
    scores: dict[str, Score] = defaultdict(Score)
    for film in films(options.group, options.seed):
        missed, wrong = scores[film.kind].add(film)
        if options.show and (missed or wrong):
            print(f"{film.kind}: missed {missed}, false {wrong}, cuts {film.cuts}", flush=True)
    print(f"Set: {options.group}, seed {options.seed}\n")
    print("| films | number | frames | hard cuts | found | false | recall | precision |\n" + "|---" * 8 + "|")
    hard, other = Score(), Score()
    for kind, score in scores.items():
        total = hard if score.cuts else other
        for name in ("films", "frames", "cuts", "found", "false"):
            setattr(total, name, getattr(total, name) + getattr(score, name))
        _row(kind, score)
    _row("**all with hard cuts**", hard)
    _row("**all without**", other)
    both = hard.false + other.false
    print(
        f"\nPrecision over everything: {_share(hard.found, hard.found + both)}; recall {_share(hard.found, hard.cuts)}"
    )


def _row(kind: str, score: Score) -> None:
    precision = _share(score.found, score.found + score.false) if score.cuts else "-"
    print(
        f"| {kind} | {score.films} | {score.frames} | {score.cuts} | {score.found} | {score.false} | "
        f"{_share(score.found, score.cuts)} | {precision} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
