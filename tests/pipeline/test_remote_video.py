"""Videos that are no local files: the same pictures, streams and results as from a path, and every handle closed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline.fingerprint import fingerprint
from pipeline.video import EncoderOptions, UnreadableVideo, VideoReader, VideoWriter, probe
from tests.video_files import make_bad_files, make_video_files


class Remote:
    """A stand-in for an object of a store: the handles that were opened are kept."""

    def __init__(self, path: Path, *, fails_after: int | None = None) -> None:
        self.name = path.name
        self.handles: list[Handle] = []
        self._content = path.read_bytes()
        self._fails_after = fails_after

    def open(self) -> BinaryIO:
        self.handles.append(Handle(self._content, self._fails_after))
        return self.handles[-1]

    @property
    def all_closed(self) -> bool:
        return bool(self.handles) and all(handle.closed for handle in self.handles)


class Handle(io.BytesIO):
    def __init__(self, content: bytes, fails_after: int | None) -> None:
        super().__init__(content)
        self._left = fails_after

    def read(self, size: int | None = -1) -> bytes:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise ConnectionError("the store does not answer")
        return super().read(size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


def test_every_container_reads_from_a_handle_as_from_a_path(files: dict[str, Path]) -> None:
    compared = 0
    for name, path in files.items():
        if path.is_dir():
            continue
        remote = Remote(path)
        assert replace(probe(remote), path=path) == probe(path), name
        with VideoReader(path, threads=1) as here, VideoReader(remote, threads=1) as there:
            for one, other in zip(here, there, strict=True):
                assert one.pts == other.pts and (one.rgb_HWC == other.rgb_HWC).all(), name
                compared += 1
            assert here.damage == there.damage
        assert fingerprint(remote) == fingerprint(path), name
        assert remote.all_closed and len(remote.handles) == 7, name
    assert compared >= 200


def test_a_range_is_read_without_the_whole(files: dict[str, Path]) -> None:
    remote = Remote(files["offset_ts"])
    info = probe(remote)
    with VideoReader(files["offset_ts"], info=info) as reader:
        frames = list(reader)
    with VideoReader(remote, info=info, start_pts=frames[4].pts, stop_pts=frames[9].pts) as part:
        for one, other in zip(frames[4:9], part, strict=True):
            assert one.pts == other.pts and (one.rgb_HWC == other.rgb_HWC).all()
    assert remote.all_closed


def test_the_writer_copies_streams_from_a_handle(files: dict[str, Path], tmp_path: Path) -> None:
    remote = Remote(files["multi_mkv"])
    info = probe(remote)
    options = EncoderOptions(preset="ultrafast", threads=1, bit_exact=True)
    for dst, source in ((tmp_path / "a.mkv", remote), (tmp_path / "b.mkv", files["multi_mkv"])):
        with (
            VideoReader(remote, info=info, threads=1) as reader,
            VideoWriter(dst, info, width=info.width, height=info.height, options=options, source_path=source) as writer,
        ):
            for frame in reader:
                writer.write(frame)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()
    assert remote.all_closed


def test_bad_content_is_named_and_released(tmp_path: Path) -> None:
    bad = make_bad_files(tmp_path)
    for name in ("empty", "text", "corrupt_header", "playlist", "concat"):
        remote = Remote(bad[name])
        with pytest.raises(UnreadableVideo, match=bad[name].name) as caught:
            probe(remote)
        assert caught.value.remedy and remote.all_closed


def test_an_error_of_the_store_is_not_damage_of_the_video(files: dict[str, Path]) -> None:
    """Otherwise a lost connection would shorten a film."""
    path = files["prores_mov"]
    info = probe(path)
    for after in (0, 1, 3):
        remote = Remote(path, fails_after=after)
        with pytest.raises(ConnectionError), VideoReader(remote, info=info, threads=1) as reader:
            list(reader)
        assert remote.all_closed
