"""What was found out about a model and can be found out again: kept on disk as small JSON files.

Knows: names and places. Does not know: what is noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from pipeline.model_source import cache_folder

logger = logging.getLogger(__name__)


class Notes:
    """One file of notes, by everything that they depend on. A place that cannot be read or written is none.

    Args:
        parts: weights, versions, hardware: equal parts find equal notes again.
    """

    def __init__(self, *parts: str) -> None:
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        self._place: Path = cache_folder() / "notes" / f"{name}.json"
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(self._place.read_text())
            self._known = read if isinstance(read, dict) else {}

    def get(self, name: str) -> Any:
        """Return what was noted under this name; None: nothing."""
        return self._known.get(name)

    def put(self, name: str, value: Any) -> None:
        """Note something that JSON can hold, so that a reader sees all of it or nothing."""
        self._known[name] = value
        partial = self._place.with_name(f".{self._place.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._known))
            partial.replace(self._place)
        except OSError as error:
            logger.info("what was found out about the model is not kept: %s", error)
