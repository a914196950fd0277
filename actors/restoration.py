"""The restoration of one row: a reader, the model and a writer, each in a thread of its own, and the stream's state.

Knows one stream and no cluster. The state is the engine's; the cut detector looks at each frame as decoded, before the
model does, and resets it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from actors.comparison import Comparison
from actors.output import encoder_options, output_size
from actors.overlap import ReadAhead, WriteBehind
from actors.pictures import Picture, resize
from pipeline.frames import frame_to_tensor, tensor_to_frame
from pipeline.shots import CutDetector
from pipeline.video import Limits, VideoFrame, VideoReader, VideoWriter
from pipeline.video_errors import UnreadableVideo

if TYPE_CHECKING:
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline

QUEUE_DEPTH = 4  # frames between decoder and model, and between model and encoder


class Restoration:
    """A context manager around the restoration of one row; leaving it by an error removes what was written.

    Args:
        row: see `jobs.plan.Row`.
        options: see `jobs.plan.RowOptions`.
        threads: CPU threads that decoder and encoder may use each.

    Attributes (complete after the context has been left):
        frames_done, width, height; cuts: indices of first frames of shots; damage, warnings: sentences for people;
        seconds: where the time went; comparison_files: paths of what `compare` made.

    Raises:
        PipelineError, ActorsError: the source cannot be read, or the options do not go together.
    """

    def __init__(
        self,
        pipe: StreamDiffVSRPipeline,
        row: dict[str, Any],
        options: dict[str, Any],
        *,
        threads: int,
        max_pixels: int,
    ) -> None:
        self.frames_done = 0
        self.cuts: list[int] = []
        self.damage: list[str] = []
        self.warnings: list[str] = []
        self.comparison_files: list[str] = []
        self.seconds: dict[str, float] = {}
        self._pipe = pipe
        self._options = options
        self._model_s = 0.0
        self._state = pipe.start(seed=row["seed"], index=row["first_index"])
        encoder = encoder_options(options)
        self._reader = VideoReader(
            row["source"],
            deinterlace=options["deinterlace"],
            limits=Limits(max_pixels=max_pixels),
            threads=threads,
            start_pts=row["pts_start"] if row["pts_start"] >= 0 else None,
            stop_pts=row["pts_end"] if row["pts_end"] >= 0 else None,
            first_index=row["first_index"],
        )
        info = self._reader.info
        self.width, self.height = output_size(info, options["scale"], options["height"])
        work_file = Path(row["work_file"])
        self._writer = VideoWriter(
            work_file, info, width=self.width, height=self.height, options=encoder, source_path=row["source"]
        )
        self._comparison: Comparison | None = None
        if options["compare"]:
            stem = work_file.with_suffix("")
            self._comparison = Comparison(stem, info, width=self.width, height=self.height, truth=options["truth"])
        self._frames = ReadAhead(self._frames_with_cuts(), QUEUE_DEPTH)
        self._results = WriteBehind(self._write, QUEUE_DEPTH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
                return
            except BaseException:
                self._abandon()
                raise
        self._abandon()

    def run(self) -> Iterator[int]:
        """Restore frame after frame; yields the number of frames done after each."""
        for frame, is_cut in self._frames:
            if is_cut:
                self._state.reset()
                self.cuts.append(frame.index)
            began = time.perf_counter()
            restored = self._step(frame.rgb_HWC)
            self._model_s += time.perf_counter() - began
            self._results.put((frame, restored))
            self.frames_done += 1
            yield self.frames_done

    def _frames_with_cuts(self) -> Iterator[tuple[VideoFrame, bool]]:
        detector = CutDetector() if self._options["cuts"] else None
        for frame in self._reader:
            yield frame, detector is not None and detector.update(frame.rgb_HWC)

    def _step(self, rgb_HWC: Picture) -> Picture:
        output_13HW = self._pipe.step(frame_to_tensor(rgb_HWC), [self._state], steps=self._options["steps"])
        picture: Picture = tensor_to_frame(output_13HW[0], rgb_HWC.dtype)  # type: ignore[assignment]  # its own type
        return picture

    def _write(self, pair: tuple[VideoFrame, Picture]) -> None:
        frame, restored = pair
        picture = resize(restored, self.width, self.height)
        self._writer.write(dataclasses.replace(frame, rgb_HWC=picture))
        if self._comparison is not None:
            self._comparison.write(frame, picture)

    def _finish(self) -> None:
        self._results.finish()
        if self.frames_done == 0:
            raise UnreadableVideo(
                f"{self._reader.info.path.name}: no picture in it can be decoded.",
                remedy="Recover it or use another copy.",
            )
        report = self._writer.close()
        if self._comparison is not None:
            self.comparison_files = self._comparison.close()
        self._reader.close()
        self.damage = list(self._reader.damage)
        self.warnings = list(report.warnings)
        self.seconds = {
            "model": self._model_s,
            "waited_for_decoder": self._frames.waited_s,
            "waited_for_encoder": self._results.waited_s,
        }

    def _abandon(self) -> None:
        self._frames.close()
        self._results.close()
        self._reader.close()
        self._writer.abort()
        if self._comparison is not None:
            self._comparison.abort()
