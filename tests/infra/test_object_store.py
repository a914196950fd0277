"""Against SeaweedFS and against rclone's server, which ignores conditions and answers ranges differently."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from infra.errors import StorageError
from infra.object_store import ObjectStore
from infra.storage import RemoteFile, join, parent, storage_for, video_source
from tests.object_stores import BUCKET, READ_ONLY_KEY, READ_ONLY_SECRET, SECRET_KEY, Server, free_ports, use

STORE = ObjectStore()
CONTENT = random.Random(0).randbytes(3 << 20)


@pytest.fixture(params=["seaweedfs", "rclone"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each real store in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix on each store in turn."""
    return use(server, monkeypatch)


def key_of(place: str) -> str:
    return place.removeprefix(f"s3://{BUCKET}/")


def test_what_is_written_is_read(place: str, tmp_path: Path) -> None:
    name = f"{place}/tape 7 + Ünïcode %41.mp4"
    assert STORE.stat(name) is None
    STORE.write(name, CONTENT)
    assert STORE.read(name) == CONTENT
    STORE.fetch(name, tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == CONTENT
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["copy"]
    info = STORE.stat(name)
    assert info is not None and info.size_bytes == len(CONTENT)
    assert list(STORE.list(place)) == [info] and info.version
    STORE.write(name, b"")
    changed = STORE.stat(name)
    assert STORE.read(name) == b"" and changed is not None and changed.version != info.version


def test_a_handle_seeks_and_travels(place: str) -> None:
    STORE.write(f"{place}/a.mp4", CONTENT)
    source = video_source(f"{place}/a.mp4")
    assert isinstance(source, RemoteFile) and source.name == "a.mp4"
    with pickle.loads(pickle.dumps(source)).open() as file:
        assert file.read(10) == CONTENT[:10]
        assert file.seek(-10, 2) == len(CONTENT) - 10 and file.read() == CONTENT[-10:] and file.read(1) == b""
        assert file.seek(2_000_000) and file.read(300_000) == CONTENT[2_000_000:2_300_000]
        assert file.tell() == 2_300_000 and file.seek(-2_300_000, 1) == 0 and file.read() == CONTENT
    with STORE.open(f"{place}/a.mp4") as file:
        assert file.read() == CONTENT


def test_a_file_that_changes_while_it_is_read_is_noticed(place: str) -> None:
    STORE.write(f"{place}/a", CONTENT)
    with STORE.open(f"{place}/a") as file:
        file.read(10)
        STORE.write(f"{place}/a", CONTENT[::-1])
        file.seek(2 << 20)
        with pytest.raises(StorageError) as caught:
            file.read(10)
    assert caught.value.code == "storage-changed"


def test_lists_are_deep_complete_and_of_folders(place: str, server: Server) -> None:
    for name in ("films/b.mp4", "films/a/c.mp4", "films/a/b/d.mp4", "films2/e.mp4"):
        STORE.write(f"{place}/{name}", b"1")
    server.client().put_object(Bucket=BUCKET, Key=f"{key_of(place)}/films/empty/", Body=b"")
    for folder in (f"{place}/films", f"{place}/films/"):
        found = [info.place for info in STORE.list(folder) if not info.place.endswith("empty")]
        assert found == [f"{place}/films/{name}" for name in ("a/b/d.mp4", "a/c.mp4", "b.mp4")]
    assert {f"{place}/films", f"{place}/films2"} == set(STORE.folders(place))
    assert list(STORE.list(f"{place}/none")) == [] == list(STORE.folders(f"{place}/none"))
    tree = STORE.stat(f"{place}/films2")
    assert tree is not None and tree.size_bytes == 1 and STORE.stat(f"{place}/films3") is None


def test_long_lists_come_in_pages_and_are_deleted_in_batches(
    place: str, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    for number in range(25):
        STORE.write(f"{place}/many/{number:02d}", b"1")
    STORE.write(f"{place}/many2", b"1")
    monkeypatch.setattr("infra.object_store._PAGE", 10)
    monkeypatch.setattr("infra.object_store._MOST_PER_DELETE", 10)
    assert len(list(STORE.list(f"{place}/many"))) == 25
    STORE.delete(f"{place}/many")
    assert [info.place for info in STORE.list(place)] == [f"{place}/many2"]
    for name in ("many", "many2"):
        STORE.delete(f"{place}/{name}")
    assert list(STORE.list(place)) == []


def test_if_absent_refuses_and_keeps_what_is_there(place: str, tmp_path: Path) -> None:
    STORE.write(f"{place}/a.json", b"first", if_absent=True)
    made = tmp_path / "made"
    made.write_bytes(b"second")
    for refused in (
        lambda: STORE.write(f"{place}/a.json", b"second", if_absent=True),
        lambda: STORE.publish(made, f"{place}/a.json", if_absent=True),
    ):
        with pytest.raises(StorageError) as caught:
            refused()
        assert caught.value.code == "destination-exists" and f"{place}/a.json" in caught.value.message
    assert STORE.read(f"{place}/a.json") == b"first" and made.exists()
    STORE.publish(made, f"{place}/a.json")
    assert STORE.read(f"{place}/a.json") == b"second" and not made.exists()


def test_large_files_go_in_parts(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr("infra.uploads.PART_BYTES", 5 << 20)
    content = random.Random(1).randbytes(12 << 20)
    for if_absent in (False, True):
        made = tmp_path / "film.mkv"
        made.write_bytes(content)
        STORE.publish(made, f"{place}/{if_absent}.mkv", if_absent=if_absent)
        assert not made.exists() and STORE.read(f"{place}/{if_absent}.mkv") == content
    made.write_bytes(content[::-1])
    with pytest.raises(StorageError) as caught:
        STORE.publish(made, f"{place}/True.mkv", if_absent=True)
    assert caught.value.code == "destination-exists" and STORE.read(f"{place}/True.mkv") == content
    assert not server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=key_of(place)).get("Uploads")


def test_orphans_of_killed_uploads_are_found_and_aborted(place: str, server: Server) -> None:
    client = server.client()
    for name in ("unfinished/a", "unfinished/b", "other/c"):
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=f"{key_of(place)}/{name}")["UploadId"]
        client.upload_part(
            Bucket=BUCKET, Key=f"{key_of(place)}/{name}", UploadId=upload, PartNumber=1, Body=b"1" * (5 << 20)
        )
    assert sorted(STORE.abort_uploads(f"{place}/unfinished/")) == [f"{place}/unfinished/a", f"{place}/unfinished/b"]
    left = client.list_multipart_uploads(Bucket=BUCKET, Prefix=key_of(place))["Uploads"]
    assert [item["Key"] for item in left] == [f"{key_of(place)}/other/c"]
    assert list(STORE.abort_uploads(f"{place}/unfinished/")) == []


def test_a_folder_of_pictures_is_published(place: str, tmp_path: Path) -> None:
    for round_ in ("old", "new"):
        (tmp_path / "frames" / "deep").mkdir(parents=True)
        (tmp_path / "frames" / "deep" / f"{round_}.png").write_bytes(b"1")
        STORE.publish(tmp_path / "frames", f"{place}/frames")
    assert [info.place for info in STORE.list(place)] == [f"{place}/frames/deep/new.png"]
    (tmp_path / "frames").mkdir()
    with pytest.raises(StorageError, match="exists"):
        STORE.publish(tmp_path / "frames", f"{place}/frames", if_absent=True)


def test_objects_have_the_type_of_their_ending(
    place: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "master.m3u8": "application/vnd.apple.mpegurl", "film.mp4": "video/mp4", "film.MKV": "video/x-matroska",
        "audio-1.m4a": "audio/mp4", "film.mp4.manifest.json": "application/json", "film.mp4.sha256": "text/plain",
    }  # fmt: skip
    for name in expected:
        STORE.write(f"{place}/{name}", b"1")
    (tmp_path / "large.mp4").write_bytes(bytes(6 << 20))
    monkeypatch.setattr("infra.uploads.PART_BYTES", 5 << 20)
    STORE.publish(tmp_path / "large.mp4", f"{place}/large.mp4")
    for name, kind in {**expected, "large.mp4": "video/mp4"}.items():
        found = server.client().head_object(Bucket=BUCKET, Key=f"{key_of(place)}/{name}")["ContentType"]
        assert found.partition(";")[0] == kind, name


def test_check_writable_leaves_nothing_behind(place: str) -> None:
    STORE.check_writable(f"{place}/new/film.mp4")
    assert list(STORE.list(place)) == []


REFUSALS = {
    "no such bucket": ({}, "s3://no-such-bucket/a", "storage-bucket-missing"),
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "", "storage-credentials"),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "AKNOBODY"}, "", "storage-credentials"),
    "no credentials": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "", "storage-credentials"),
    "no such profile": ({"AWS_PROFILE": "nobody"}, "", "storage-credentials"),
    "nobody listens": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:{free_port}"}, "", "storage-unreachable"),
    "password in the endpoint": (
        {"AWS_ENDPOINT_URL_S3": f"http://me:{SECRET_KEY}@127.0.0.1:{{free_port}}"},
        "",
        "storage-unreachable",
    ),
    "unknown name": ({"AWS_ENDPOINT_URL_S3": "http://store.invalid"}, "", "storage-unreachable"),
    "endpoint without scheme": ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, "", "storage-endpoint"),
    "bucket name": ({}, "s3://No Bucket/a", "storage-place"),
    "no bucket": ({}, "s3:///a", "storage-place"),
    "password in the place": ({}, f"s3://me:{SECRET_KEY}@bucket/a", "storage-place"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_used_is_said_in_one_sentence(case: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, other, code = REFUSALS[case]
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(free_port=free_ports(1)[0]))
    with pytest.raises(StorageError) as caught:
        STORE.check_writable(other or f"{place}/a")
    assert caught.value.code == code and caught.value.remedy
    for secret in (SECRET_KEY, "wrong", "AKNOBODY"):
        assert secret not in str(caught.value).replace("key is wrong", "").replace("is wrong", "")
    if not environment or "AWS_ENDPOINT_URL_S3" not in environment:
        with pytest.raises(StorageError) as caught:
            STORE.stat(other or f"{place}/a")
        assert caught.value.code == code


def test_a_key_that_may_only_read(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    STORE.write(f"{s3_bucket}/a", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READ_ONLY_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READ_ONLY_SECRET)
    assert STORE.read(f"{s3_bucket}/a") == b"1"
    for refused in (
        lambda: STORE.check_writable(f"{s3_bucket}/b"),
        lambda: STORE.write(f"{s3_bucket}/b", b"1"),
        lambda: STORE.delete(f"{s3_bucket}/a"),
    ):
        with pytest.raises(StorageError) as caught:
            refused()
        assert caught.value.code == "storage-denied" and READ_ONLY_SECRET not in str(caught.value)


def test_a_missing_object_is_named(place: str, tmp_path: Path) -> None:
    for use_it in (
        lambda: STORE.read(f"{place}/a"),
        lambda: STORE.open(f"{place}/a"),
        lambda: STORE.fetch(f"{place}/a", tmp_path / "a"),
        lambda: video_source(f"{place}/a"),
    ):
        with pytest.raises(StorageError) as caught:
            use_it()
        assert caught.value.code == "storage-missing" and f"{place}/a" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_whole_bucket_is_never_deleted(place: str) -> None:
    STORE.write(f"{place}/a", b"1")
    for bucket in (f"s3://{BUCKET}", f"s3://{BUCKET}/"):
        with pytest.raises(StorageError):
            STORE.delete(bucket)
    assert STORE.read(f"{place}/a") == b"1"


def test_places() -> None:
    assert join("s3://b/x/", "y", "z") == "s3://b/x/y/z" and join("s3://b", "y") == "s3://b/y"
    assert join("/a", "b") == "/a/b" and join("/", "b") == "/b" and join("", "b") == "b"
    assert parent("s3://b/x/y") == "s3://b/x" and parent("s3://b/x") == "s3://b" == parent("s3://b")
    assert parent("/a/b") == "/a" and parent("b") == "."
    assert video_source("/a/b.mp4") == Path("/a/b.mp4")
    assert not storage_for("s3://b/x").is_local and storage_for("/a").is_local
    assert storage_for("s3://b/x").free_bytes("s3://b/x") is None and (storage_for("/a").free_bytes("/a/new") or 0) > 0
