"""What has to be installed before Upriver's code: `requirements.py pyproject.toml kserve,otel` prints it.

A step of the Dockerfile, which runs it alone with the base image's Python: packages are then installed in a layer that
does not change with the code.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Return the dependencies of the project and of its `extras`, without the project itself.

    Raises:
        SystemExit: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    offered: dict[str, list[str]] = project.get("optional-dependencies", {})
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        if extra not in offered:
            raise SystemExit(f"{pyproject} has no extra {extra!r}; it has {', '.join(sorted(offered))}.")
        for wanted in offered[extra]:
            inner = re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", wanted)  # extras made of extras
            found += requirements(pyproject, inner[1].split(",")) if inner else [wanted]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name])))
