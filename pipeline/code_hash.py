"""A name for this version of the package: what is kept on disk was made by it, or is made again."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def pipeline_code_sha256() -> str:
    """Return a hash over the code of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
