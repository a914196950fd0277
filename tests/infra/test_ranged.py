"""How many requests, and how many bytes, it takes to read a film from an object store."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from infra.object_store import ObjectStore
from infra.ranged import FIRST_BYTES, KEPT_BYTES, MOST_BYTES, RangedReader
from infra.storage import RemoteFile, video_source
from tests.faulty_store import FaultyStore
from tests.object_stores import SeaweedFS, use

TIMES = 24


@pytest.fixture(scope="module", params=["mp4", "mkv", "ts"])
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A real clip, many times in a row: about 19 MB; MP4 with its index at the end."""
    path = tmp_path_factory.mktemp("film") / f"film.{request.param}"
    with av.open(str(path), "w") as output:
        stream, shift = None, 0
        for _ in range(TIMES):
            with av.open(str(repository / "tests/data/walk_hr.mp4")) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(video)
                packets = [packet for packet in source.demux(video) if packet.size]
            for packet in packets:
                packet.stream = stream
                packet.pts += shift
                packet.dts += shift
            end = max(packet.pts + packet.duration for packet in packets)
            output.mux(packets)
            shift = end
    return path


@pytest.fixture
def remote(
    film: Path, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[RemoteFile, FaultyStore]]:
    """The film in the store, and who counts the requests."""
    with FaultyStore(seaweedfs) as counting:
        place = f"{use(counting, monkeypatch)}/{film.name}"
        ObjectStore().write(place, film.read_bytes())
        source = video_source(place)
        assert isinstance(source, RemoteFile)
        counting.seen.clear()
        yield source, counting


def times_of(path_or_file: object) -> list[tuple[int | None, int]]:
    with av.open(path_or_file) as container:  # type: ignore[call-overload]
        return [(packet.pts, packet.size) for packet in container.demux(video=0) if packet.size]


def test_in_order_takes_few_requests(film: Path, remote: tuple[RemoteFile, FaultyStore]) -> None:
    source, counting = remote
    with source.open() as file:
        assert times_of(file) == times_of(str(film))
        assert file.fetched_bytes <= 1.2 * source.size + MOST_BYTES  # type: ignore[attr-defined]
    assert counting.count("GET") <= 12


def test_a_late_shot_costs_a_small_part_of_the_film(film: Path, remote: tuple[RemoteFile, FaultyStore]) -> None:
    source, counting = remote
    with source.open() as file, av.open(file) as container, av.open(str(film)) as local:
        frames = []
        for one in (container, local):
            video = one.streams.video[0]
            one.seek(int(0.8 * (video.duration or one.duration * 9 // 100)) + (video.start_time or 0), stream=video)
            frames.append([next(one.decode(video)) for _ in range(5)])
        assert [frame.pts for frame in frames[0]] == [frame.pts for frame in frames[1]]
        assert (frames[0][4].to_ndarray() == frames[1][4].to_ndarray()).all()
        assert file.fetched_bytes < 0.25 * source.size  # type: ignore[attr-defined]
    assert counting.count("GET") <= 12


class Fetched:
    """Content that is fetched, and what was asked for."""

    def __init__(self, size: int) -> None:
        self.content = random.Random(0).randbytes(1 << 20) * (size >> 20)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return self.content[start:stop]


def test_pieces_double_and_never_overlap() -> None:
    fetched = Fetched(64 << 20)
    with RangedReader(fetched, 64 << 20, "film") as file:
        content = bytearray()
        while part := file.read(100_000):
            content += part
    assert content == fetched.content
    lengths = [stop - start for start, stop in sorted(fetched.asked)]
    assert lengths[0] == FIRST_BYTES and max(lengths) == MOST_BYTES and sum(lengths) == 64 << 20
    assert len(lengths) <= 13


def test_going_back_a_little_costs_nothing_and_memory_is_bounded() -> None:
    fetched = Fetched(128 << 20)
    with RangedReader(fetched, 128 << 20, "film") as file:
        for _ in range(1000):
            file.read(100_000)
        asked = len(fetched.asked)
        file.seek(-8 << 20, 1)
        assert file.read(4) == fetched.content[92_000_000 + 8_000_000 - (8 << 20) :][:4]
        assert len(fetched.asked) == asked
        held = sum(len(piece) for _, piece in file._pieces)
        assert held <= KEPT_BYTES


@pytest.mark.parametrize("seed", range(5))
def test_any_order_reads_the_same_bytes(seed: int) -> None:
    chance = random.Random(seed)
    fetched = Fetched(16 << 20)
    with RangedReader(fetched, 16 << 20, "film") as file:
        for _ in range(300):
            if chance.random() < 0.4:
                file.seek(chance.randrange((16 << 20) + 100))
            at, size = file.tell(), chance.choice([1, 1000, 300_000, 3_000_000])
            assert file.read(size) == fetched.content[at : at + size]
        file.seek(5)
        buffer = bytearray(8)
        assert file.readinto(buffer) == 8
        assert bytes(buffer) == fetched.content[5:13]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
