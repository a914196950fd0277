"""Modes of files that libraries write more privately than is meant.

Knows: files. Does not know: what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def follow_umask(files: Iterable[Path]) -> None:
    """Give each file the mode of any new file in its folder, as the process's umask says.

    safetensors lets the owner alone read what it writes, whatever the umask; weights are often read by another user.
    The umask itself can only be read by changing it for all threads, so a new file tells it.

    Raises:
        OSError: a folder cannot be written.
    """
    for file in files:
        sample = file.with_name(f".{file.name}.{os.getpid()}.mode")
        sample.touch()
        try:
            file.chmod(sample.stat().st_mode)
        finally:
            sample.unlink()
