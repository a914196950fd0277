"""What docs/archives.md says of failures is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.ledger import ATTEMPTS


def test_the_table_of_failures_is_that_of_the_code(repository: Path) -> None:
    rows = re.findall(r"^\| ([a-z-]+) \| [^|]+ \| (\d) \|$", (repository / "docs/archives.md").read_text(), re.M)
    assert dict(rows) == {str(kind): str(attempts) for kind, attempts in ATTEMPTS.items()}
