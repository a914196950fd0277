from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.preflight import check_reachable, check_space, in_words
from tests.object_stores import free_ports


def test_too_little_room_is_refused_and_little_is_said(tmp_path: Path) -> None:
    place = str(tmp_path / "new" / "film.mkv")
    free = shutil.disk_usage(tmp_path).free
    assert check_space(place, free // 2) == []
    (warning,) = check_space(place, int(free * 0.9))
    assert place in warning and "free" in warning
    with pytest.raises(StorageError) as caught:
        check_space(place, 2 * free)
    assert caught.value.code == "storage-full" and in_words(2 * free) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        check_space(str(tmp_path / "file" / "film.mkv"), 1)
    assert caught.value.code == "storage-unwritable"


def test_a_bucket_tells_nothing_of_room(s3_bucket: str) -> None:
    assert check_space(f"{s3_bucket}/film.mkv", 10**18) == []
    with pytest.raises(StorageError) as caught:
        check_space("s3://no-such-bucket/film.mkv", 1)
    assert caught.value.code == "storage-bucket-missing"


def test_a_store_that_does_not_answer_is_reported_soon(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_reachable("/nowhere", f"{s3_bucket}/nothing-there", s3_bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        check_reachable(s3_bucket)
    assert caught.value.code == "storage-unreachable" and time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (123_456_789, "123 MB"), (2_000_000_000_000, "2.0 TB"),
     (5_000_000_000_000_000, "5000 TB")],
)  # fmt: skip
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words
