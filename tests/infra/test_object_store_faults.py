"""What real stores do seldom: conflicts, storms of errors, lost answers, connections that break."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import uploads
from infra.errors import StorageError
from infra.object_store import ObjectStore
from tests.faulty_store import Fault, FaultyStore
from tests.object_stores import BUCKET, Rclone, SeaweedFS, Server, use

STORE = ObjectStore()
CONTENT = random.Random(0).randbytes(12 << 20)


@pytest.fixture
def faulty(seaweedfs: SeaweedFS) -> Iterator[FaultyStore]:
    """A man in the middle of SeaweedFS."""
    with FaultyStore(seaweedfs) as store:
        yield store


@pytest.fixture
def place(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix behind the man in the middle; parts are small, and so are pauses."""
    monkeypatch.setattr(uploads, "PART_BYTES", 5 << 20)
    return use(faulty, monkeypatch)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mkv"
    path.write_bytes(CONTENT)
    return path


def key_of(place: str) -> str:
    return place.removeprefix(f"s3://{BUCKET}/")


def unfinished(store: Server, place: str) -> list[str]:
    found = store.client().list_multipart_uploads(Bucket=BUCKET, Prefix=key_of(place))
    return [item["Key"] for item in found.get("Uploads", [])]


def test_a_conflict_is_tried_again_as_a_whole(place: str, faulty: FaultyStore, film: Path) -> None:
    faulty.faults = [Fault("PUT", 2, status=409, code="ConditionalRequestConflict")]
    STORE.write(f"{place}/a", b"1", if_absent=True)
    assert STORE.read(f"{place}/a") == b"1" and faulty.count("PUT") == 3
    faulty.faults = [Fault(f"POST /{BUCKET}/{key_of(place)}/film?uploadId", 1, 409, "ConditionalRequestConflict")]
    STORE.publish(film, f"{place}/film", if_absent=True)
    assert STORE.read(f"{place}/film") == CONTENT and faulty.count("?uploads") == 2
    assert unfinished(faulty, place) == []


def test_a_lasting_conflict_is_reported(place: str, faulty: FaultyStore) -> None:
    faulty.faults = [Fault("PUT", 99, status=409, code="ConditionalRequestConflict")]
    with pytest.raises(StorageError) as caught:
        STORE.write(f"{place}/a", b"1", if_absent=True)
    assert caught.value.code == "storage-conflict" and faulty.count("PUT") == uploads.CONFLICT_ATTEMPTS
    assert STORE.stat(f"{place}/a") is None


@pytest.mark.parametrize("large", [False, True])
def test_a_write_whose_answer_was_lost_knows_its_own_work(
    large: bool, place: str, faulty: FaultyStore, film: Path
) -> None:
    match = f"POST /{BUCKET}/{key_of(place)}/film?uploadId" if large else "PUT"
    faulty.faults = [Fault(match, 1, lose_answer=True)]
    if large:
        STORE.publish(film, f"{place}/film", if_absent=True)
    else:
        STORE.write(f"{place}/film", b"small", if_absent=True)
    assert faulty.count(match) == 2  # the lost one, and the retry that the store refuses
    assert STORE.read(f"{place}/film") == (CONTENT if large else b"small") and unfinished(faulty, place) == []


@pytest.mark.parametrize("large", [False, True])
def test_of_two_writers_one_wins(large: bool, place: str, faulty: FaultyStore, seaweedfs: SeaweedFS) -> None:
    def another(name: str) -> None:
        seaweedfs.client().put_object(Bucket=BUCKET, Key=f"{key_of(place)}/a", Body=b"theirs")

    # Both have looked and seen nothing; the other one's object arrives just before ours.
    faulty.faults = [Fault("a?uploadId" if large else "PUT", 1, before=another)]
    with pytest.raises(StorageError) as caught:
        STORE.write(f"{place}/a", CONTENT if large else b"ours", if_absent=True)
    assert caught.value.code == "destination-exists"
    assert STORE.read(f"{place}/a") == b"theirs" and unfinished(faulty, place) == []


def test_a_store_that_ignores_the_condition_is_looked_at_again(rclone: Rclone, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyStore(rclone) as faulty:
        place = use(faulty, monkeypatch)

        def another(name: str) -> None:
            rclone.client().put_object(Bucket=BUCKET, Key=f"{key_of(place)}/a", Body=b"theirs")

        STORE.write(f"{place}/b", b"ours", if_absent=True)
        # The other one's object replaces ours between our write and our second look.
        faulty.faults = [Fault(f"HEAD /{BUCKET}/{key_of(place)}/a", 1), Fault("HEAD", 1, before=another)]
        with pytest.raises(StorageError) as caught:
            STORE.write(f"{place}/a", b"ours", if_absent=True)
        assert caught.value.code == "destination-exists" and STORE.read(f"{place}/a") == b"theirs"


def test_a_store_that_refuses_the_header_is_used_without_it(place: str, faulty: FaultyStore) -> None:
    faulty.faults = [Fault("PUT", 1, status=501, code="NotImplemented")]
    STORE.write(f"{place}/a", b"ours", if_absent=True)
    with pytest.raises(StorageError, match="exists"):
        STORE.write(f"{place}/a", b"ours", if_absent=True)


def test_a_storm_of_errors_is_survived(place: str, faulty: FaultyStore, film: Path) -> None:
    faulty.faults = [
        Fault("partNumber=2", 2, status=503, code="SlowDown"),
        Fault("PUT", 1, status=500, code="InternalError"),
        Fault("GET", 2, status=503, code="SlowDown"),
    ]
    STORE.publish(film, f"{place}/film")
    assert STORE.read(f"{place}/film") == CONTENT


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(500, "InternalError", "storage-server"), (503, "SlowDown", "storage-busy"), (507, "", "storage-full"),
     (403, "RequestTimeTooSkewed", "storage-clock"), (400, "ExpiredToken", "storage-credentials"),
     (301, "PermanentRedirect", "storage-region"), (405, "MethodNotAllowed", "storage-refused")],
)  # fmt: skip
def test_lasting_refusals_have_codes(
    status: int, code: str, expected: str, place: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faulty.faults = [Fault("PUT", 99, status=status, code=code)]
    with pytest.raises(StorageError) as caught:
        STORE.write(f"{place}/a", b"1")
    assert caught.value.code == expected and "as asked" not in str(caught.value)


@pytest.mark.parametrize("fails", ["partNumber=2", "POST {key}/film?uploadId"])
def test_a_failed_upload_leaves_no_parts(
    fails: str, place: str, faulty: FaultyStore, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faulty.faults = [Fault(fails.format(key=f"/{BUCKET}/{key_of(place)}"), 99, status=500, code="InternalError")]
    with pytest.raises(StorageError):
        STORE.publish(film, f"{place}/film")
    faulty.faults = []
    assert unfinished(faulty, place) == [] and STORE.stat(f"{place}/film") is None and film.exists()


def test_an_interrupted_upload_leaves_no_parts(
    place: str, faulty: FaultyStore, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = uploads._parts_of

    def interrupted(content: Path, length: int) -> Iterator[bytes]:
        yield next(reading(content, length))
        raise KeyboardInterrupt

    monkeypatch.setattr(uploads, "_parts_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STORE.publish(film, f"{place}/film")
    assert faulty.count("?uploads") == 1 and unfinished(faulty, place) == [] and film.exists()


def test_a_connection_that_breaks_while_it_is_read_goes_on_where_it_was(
    place: str, faulty: FaultyStore, tmp_path: Path
) -> None:
    STORE.write(f"{place}/a", CONTENT)
    faulty.faults = [Fault("GET", 1, cut_after=5_000_000), Fault("GET", 1, cut_after=100), Fault("GET", 1, cut_after=0)]
    STORE.fetch(f"{place}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and faulty.count("GET") == 4


def test_a_store_that_knows_no_ranges_is_read_all_the_same(place: str, faulty: FaultyStore) -> None:
    STORE.write(f"{place}/a", CONTENT)
    faulty.faults = [Fault("GET", 99, whole=True)]
    with STORE.open(f"{place}/a") as file:
        file.seek(3_000_000)
        assert file.read(1_000_000) == CONTENT[3_000_000:4_000_000]
    assert STORE.read(f"{place}/a") == CONTENT


def test_a_connection_that_always_breaks_ends(place: str, faulty: FaultyStore, tmp_path: Path) -> None:
    STORE.write(f"{place}/a", CONTENT)
    faulty.faults = [Fault("GET", 99, cut_after=0)]
    with pytest.raises(StorageError) as caught:
        STORE.fetch(f"{place}/a", tmp_path / "a")
    assert caught.value.code == "storage-unreachable" and list(tmp_path.iterdir()) == []


def test_a_store_without_batches_deletes_one_by_one(place: str, faulty: FaultyStore) -> None:
    for number in range(3):
        STORE.write(f"{place}/a/{number}", b"1")
    faulty.faults = [Fault("POST", 1, status=501, code="NotImplemented")]
    STORE.delete(f"{place}/a")
    assert list(STORE.list(place)) == [] and faulty.count("DELETE") == 3


def test_a_store_that_starts_again_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SeaweedFS(tmp_path / "store") as store:
        place = use(store, monkeypatch)
        STORE.write(f"{place}/a", CONTENT)
        store.kill()
        waker = threading.Thread(target=store.start)
        waker.start()
        assert STORE.read(f"{place}/a") == CONTENT
        waker.join()
