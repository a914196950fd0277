"""The code of Upriver that this process runs: which it is, and how it gets to the nodes of a cluster.

Two processes run the same Upriver when their fingerprints are equal. Installed versions say less: a node may have no
Upriver of its own, and a checkout changes without its version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

PACKAGES = ("pipeline", "actors", "jobs", "infra")
_EXCLUDED = ["**/__pycache__"]


def code_folders() -> list[Path]:
    """Return the folders of the packages, as this process imports them."""
    folders = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        folders += list(spec.submodule_search_locations or []) if spec else []
    return [Path(folder) for folder in folders]


def code_environment() -> dict[str, Any]:
    """Return the part of a Ray runtime environment that takes this process's Upriver to every node."""
    return {"py_modules": [str(folder) for folder in code_folders()], "excludes": _EXCLUDED}


@functools.cache
def code_fingerprint() -> str:
    """Return 12 hexadecimal digits that are equal where the code is."""
    digest = hashlib.sha256()
    for package in code_folders():
        for folder, folders, names in os.walk(package):
            folders.sort()
            for name in sorted(name for name in names if name.endswith(".py")):
                path = Path(folder) / name
                digest.update(f"{package.name}/{path.relative_to(package).as_posix()}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
