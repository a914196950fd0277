"""The list of what an image holds: valid CycloneDX, complete, the same each time, and able to notice a change."""

from __future__ import annotations

import base64
import hashlib
import json
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from infra.images import sbom

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return sbom.bill_of_materials()


def test_it_is_valid(document: dict[str, Any]) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(document)) is None
    assert validator.validate_str(json.dumps(document | {"specVersion": 1.6})) is not None


def test_every_package_is_listed_with_its_version(document: dict[str, Any]) -> None:
    listed = {one["purl"] for one in [*document["components"], document["metadata"]["component"]] if "purl" in one}
    for package in distributions(path=[sysconfig.get_path("purelib")]):
        name = package.name.lower().replace("_", "-").replace(".", "-")
        assert f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}" in listed


def test_dependencies_lead_to_components(document: dict[str, Any]) -> None:
    known = {one["bom-ref"] for one in document["components"]} | {document["metadata"]["component"]["bom-ref"]}
    assert {one["ref"] for one in document["dependencies"]} <= known
    assert {other for one in document["dependencies"] for other in one["dependsOn"]} <= known
    ours = next(one for one in document["dependencies"] if one["ref"].startswith("pkg:pypi/upriver@"))
    assert {other.partition("@")[0] for other in ours["dependsOn"]} >= {
        "pkg:pypi/ray",
        "pkg:pypi/av",
        "pkg:pypi/torch",
    }


def test_what_lies_inside_packages_is_listed(document: dict[str, Any]) -> None:
    """FFmpeg's libraries in PyAV, and the packages that Ray brings along: neither shows in a list of packages."""
    inside = {one["name"]: [part["name"] for part in one.get("components", ())] for one in document["components"]}
    assert any("libavcodec" in name for name in inside["av"])
    assert {"aiohttp", "psutil"} <= set(inside["ray"])


def test_licences_are_named(document: dict[str, Any]) -> None:
    python = [one for one in document["components"] if one.get("purl", "").startswith("pkg:pypi/")]
    without = [one["name"] for one in python if not one.get("licenses")]
    assert len(without) < len(python) / 20, without
    assert document["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0"}]


def test_it_is_the_same_each_time(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sbom.bill_of_materials() == document and "timestamp" not in document["metadata"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    dated = sbom.bill_of_materials()
    assert dated["metadata"]["timestamp"] == "1970-01-01T00:00:00+00:00"
    assert dated["serialNumber"] != document["serialNumber"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with one package, which carries a model and a library."""
    files = {"film/a.py": b"x = 1\n", "film/model.safetensors": b"weights", "film.libs/libfilm.so.1": b"\x7fELF"}
    record = ["film-1.0.dist-info/RECORD,,", "film-1.0.dist-info/METADATA,,"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}")
    (tmp_path / "film-1.0.dist-info").mkdir()
    (tmp_path / "film-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: Film\nVersion: 1.0\n")
    (tmp_path / "film-1.0.dist-info/RECORD").write_text("\n".join(record))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_models_and_libraries_have_their_hashes(environment: Path) -> None:
    (film,) = [one for one in sbom.bill_of_materials()["components"] if one["name"] == "film"]
    parts = {part["name"]: (part["type"], part["hashes"][0]["content"]) for part in film["components"]}
    assert parts == {
        "film/model.safetensors": ("machine-learning-model", hashlib.sha256(b"weights").hexdigest()),
        "film.libs/libfilm.so.1": ("file", hashlib.sha256(b"\x7fELF").hexdigest()),
    }


def test_a_changed_file_is_noticed(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sbom.main(["--verify"]) == 0
    (environment / "film/a.py").write_text("import os\n")
    (environment / "film/model.safetensors").unlink()
    assert sbom.main(["--verify"]) == 1
    said = capsys.readouterr().out
    assert "Film: film/a.py is not what was installed" in said and "Film: film/model.safetensors is missing" in said


def test_it_writes_a_file(tmp_path: Path) -> None:
    assert sbom.main(["--output", str(tmp_path / "sbom.json")]) == 0
    assert json.loads((tmp_path / "sbom.json").read_text())["bomFormat"] == "CycloneDX"
