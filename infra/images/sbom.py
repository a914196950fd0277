"""What an image holds, as a CycloneDX document: `python -m infra.images.sbom --output sbom.cdx.json`.

Listed are the packages of this Python environment with their licences and dependencies, the shared libraries and the
packages that lie in their wheels (FFmpeg's come with PyAV: a scanner of packages does not see them), the built-in
models, and the packages of the Debian around them. Everything is read from what is installed, not from what was asked
for. The same environment gives the same document, byte for byte; it has a time only where `SOURCE_DATE_EPOCH` says one.

With `--verify`, every installed file is compared with the hash in its package's RECORD
(https://packaging.python.org/en/latest/specifications/recording-installed-packages/) instead.

The format is CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

PROJECT: Final = "upriver"
# uuid5(NAMESPACE_URL, "urn:upriver:sbom"): serial numbers are made of the content below it.
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:upriver:sbom")
_LIBRARY: Final = re.compile(r"\.so(\.\d+)*$")
_DEBIAN_FIELDS: Final = ("${Package}", "${Version}", "${Architecture}", "${source:Package}", "${db:Status-Abbrev}")
_CHUNK: Final = 1 << 20


def bill_of_materials() -> dict[str, Any]:
    """Return the document for this environment and this machine's Debian, as JSON values."""
    packages = {_normal(package.name): package for package in _installed()}
    components = [_python_component(package) for _, package in sorted(packages.items())]
    ours = next((one for one in components if one["name"] == PROJECT), None)
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [{"type": "application", "name": "infra.images.sbom"}]}},
        "components": [*(one for one in components if one is not ours), *_debian()],
        "dependencies": [_dependencies(packages, name) for name in sorted(packages)],
    }
    if ours is not None:
        document["metadata"]["component"] = ours | {"type": "application"}
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        document["metadata"]["timestamp"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"
    return document


def changed_files() -> list[str]:
    """Return the installed files that are missing, or differ from what their package's RECORD says, one a line."""
    found = []
    for package in sorted(_installed(), key=lambda one: _normal(one.name)):
        for file in package.files or ():
            if file.hash is None:
                continue
            place = Path(str(file.locate()))
            if not place.is_file():
                found.append(f"{package.name}: {file} is missing")
            elif _record_hash(place, file.hash.mode) != file.hash.value:
                found.append(f"{package.name}: {file} is not what was installed")
    return found


def _installed() -> list[Distribution]:
    """The packages of this environment, and not those that some of them carry along and put on the path."""
    return list(distributions(path=sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})))


def _python_component(package: Distribution) -> dict[str, Any]:
    name, version = _normal(package.name), package.version
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": _reference(name, version),
        "name": name,
        "version": version,
        "purl": _reference(name, version),
    }
    if summary := _field(package, "Summary"):
        made["description"] = summary
    if licences := _licences(package):
        made["licenses"] = licences
    record = package.read_text("RECORD")
    if record is not None:
        # Not under `hashes`: that would be the hash of the wheel, which nobody knows any more.
        made["properties"] = [{"name": "upriver:record:sha256", "value": hashlib.sha256(record.encode()).hexdigest()}]
    if inside := [part for file in package.files or () if (part := _part(file, made["bom-ref"])) is not None]:
        made["components"] = sorted(inside, key=lambda part: str(part["name"]))
    return made


def _part(file: PackagePath, owner: str) -> dict[str, Any] | None:
    """Return what is worth naming inside a package: somebody else's library or package, or a model's weights."""
    if file.name == "METADATA" and len(file.parts) > 2 and file.parts[-2].endswith(".dist-info"):
        carried = Distribution.at(Path(str(file.locate())).parent)
        reference = _reference(_normal(carried.name), carried.version)
        return {
            "type": "library",
            "bom-ref": f"{owner}#{quote(file.parent.as_posix())}",
            "name": _normal(carried.name),
            "version": carried.version,
            "purl": reference,
        }
    is_library = file.parts[0].endswith(".libs") and _LIBRARY.search(file.name) is not None
    is_model = file.suffix == ".safetensors"
    place = Path(str(file.locate()))
    if not (is_library or is_model) or not place.is_file():
        return None
    return {
        "type": "machine-learning-model" if is_model else "file",
        "bom-ref": f"{owner}#{quote(file.as_posix())}",
        "name": file.as_posix(),
        "hashes": [{"alg": "SHA-256", "content": _digest(place, "sha256").hex()}],
    }


def _licences(package: Distribution) -> list[dict[str, Any]]:
    """Return the licence: an SPDX expression (PEP 639) where there is one, else the names that the package gives."""
    expression = _field(package, "License-Expression")
    if expression:
        return [{"expression": expression}]
    classifiers = [text for text in package.metadata.get_all("Classifier") or () if text.startswith("License ::")]
    named = [text.rpartition(" :: ")[2] for text in classifiers]
    free = (_field(package, "License") or "").strip()
    if not named and free:
        named = [free.splitlines()[0][:200]]  # some put the whole text there
    return [{"license": {"name": name}} for name in named]


def _field(package: Distribution, name: str) -> str | None:
    found = package.metadata.get_all(name)
    return str(found[0]) if found else None


def _dependencies(packages: dict[str, Distribution], name: str) -> dict[str, Any]:
    from packaging.requirements import InvalidRequirement, Requirement

    needed = set()
    for text in packages[name].requires or ():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        other = _normal(wanted.name)
        # What an extra asks for counts where it is installed: nothing says afterwards which extras were chosen.
        if other in packages and (wanted.marker is None or "extra" in text or wanted.marker.evaluate()):
            needed.add(_reference(other, packages[other].version))
    return {"ref": _reference(name, packages[name].version), "dependsOn": sorted(needed)}


def _debian() -> list[dict[str, Any]]:
    """Return the packages of the system; none where it is no Debian."""
    query = shutil.which("dpkg-query")
    if query is None:
        return []
    release = _os_release()
    system, number = release.get("ID", "debian"), release.get("VERSION_ID", "")
    told = subprocess.run(
        [query, "--show", "--showformat", "\\t".join(_DEBIAN_FIELDS) + "\\n"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: list[dict[str, Any]] = [
        {"type": "operating-system", "bom-ref": f"{system}-{number}", "name": system, "version": number}
    ]
    for line in sorted(told.stdout.splitlines()):
        name, version, architecture, source, status = line.split("\t")
        if not status.startswith("ii"):
            continue
        reference = f"pkg:deb/{system}/{quote(name)}@{quote(version, safe=':')}?arch={architecture}"
        reference += f"&distro={system}-{number}"
        found.append(
            {
                "type": "library",
                "bom-ref": reference,
                "name": name,
                "version": version,
                "purl": reference,
                "properties": [{"name": "upriver:debian:source", "value": source}],
            }
        )
    return found


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _normal(name: str) -> str:
    """Return a package's name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _reference(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{quote(version)}"


def _record_hash(file: Path, algorithm: str) -> str:
    return base64.urlsafe_b64encode(_digest(file, algorithm)).rstrip(b"=").decode()


def _digest(file: Path, algorithm: str) -> bytes:
    digest = hashlib.new(algorithm)
    with file.open("rb") as content:
        while part := content.read(_CHUNK):
            digest.update(part)
    return digest.digest()


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the document, or verify the environment; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m infra.images.sbom", description="What this image holds.")
    parser.add_argument("--output", type=Path, help="file to write; without it, standard output")
    parser.add_argument("--verify", action="store_true", help="compare installed files with their recorded hashes")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if chosen.verify:
        changed = changed_files()
        print("\n".join(changed) or "Every installed file is the one that was installed.")
        return 1 if changed else 0
    text = json.dumps(bill_of_materials(), indent=2, sort_keys=True) + "\n"
    if chosen.output is None:
        sys.stdout.write(text)
    else:
        chosen.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
