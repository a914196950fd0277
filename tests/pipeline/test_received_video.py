"""Videos that somebody sent: of one kind and no other, and perhaps only once."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from pipeline.truncation import early_end
from pipeline.video import ReceivedVideo, UnreadableVideo, VideoReader, probe
from tests.video_files import make_bad_files, make_video_files


class Once(io.RawIOBase):
    """Gives its bytes in order, a few at a time."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        piece = self._content[self._at : self._at + min(size or 0, 40_000)]
        self._at += len(piece)
        return piece


@dataclass
class Received:
    content: bytes
    demuxer: str
    comes_once: bool = True
    name: str = "sent"
    handles: list[BinaryIO] = field(default_factory=list)

    def open(self) -> BinaryIO:
        handle = Once(self.content) if self.comes_once else io.BytesIO(self.content)
        self.handles.append(cast(BinaryIO, handle))
        return self.handles[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize(("name", "demuxer"), [("offset_ts", "mpegts"), ("vp9_opus_webm", "matroska")])
def test_what_cannot_seek_is_read_as_it_comes(files: dict[str, Path], name: str, demuxer: str) -> None:
    video = Received(files[name].read_bytes(), demuxer)
    assert isinstance(video, ReceivedVideo)
    with VideoReader(files[name], threads=1) as here, VideoReader(video, threads=1) as there:
        for ours, theirs in zip(here, there, strict=True):
            assert ours.pts == theirs.pts and np.array_equal(ours.rgb_HWC, theirs.rgb_HWC)
    assert there.damage == [] and all(handle.closed for handle in video.handles)


@pytest.mark.parametrize("once", [True, False])
def test_nothing_is_guessed(files: dict[str, Path], tmp_path: Path, once: bool) -> None:
    """Content of another kind, a playlist among it, is not opened by the demuxer that would fit it."""
    others = [files["offset_ts"].read_bytes(), make_bad_files(tmp_path)["playlist"].read_bytes()]
    for content in others:
        for demuxer in ("matroska", "mov", "flv"):
            with pytest.raises(UnreadableVideo):
                probe(Received(content, demuxer, once))
    assert probe(Received(others[0], "mpegts", once)).container == "mpegts"


def test_what_came_once_is_not_opened_to_be_measured(files: dict[str, Path]) -> None:
    cut = files["mjpeg_avi"].read_bytes()[:-5000]
    assert early_end(Received(cut, "avi", comes_once=False), "avi") is not None
    video = Received(cut, "avi")
    assert early_end(video, "avi") is None and video.handles == []
