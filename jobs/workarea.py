"""The place for everything unfinished: `DST.upriver/<run>/` beside a file, `DST/.upriver/<run>/` inside a folder.

It is on the destination's file system, so that a finished file gets its name by a rename. At the end, however the job
ends, nothing of it is left, except for a ledger of failures in a folder.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from infra.storage import storage_for

LEDGER = "ledger.jsonl"


class WorkArea:
    """A context manager that makes the work area and removes it again.

    `ledger_kept` is the ledger's path afterwards when it was worth keeping, else None.
    """

    def __init__(self, root: Path, *, is_folder: bool, job_id: str) -> None:
        self.ledger_kept: Path | None = None
        self._is_folder = is_folder
        self._top = root / ".upriver" if is_folder else root.with_name(f"{root.name}.upriver")
        self.folder = self._top / job_id
        self.ledger_path = self.folder / LEDGER
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        self._made = [folder for folder in self.folder.parents if not folder.exists()]
        storage = storage_for(str(self.folder))
        storage.delete(str(self.folder))  # left by a run that was killed
        storage.make_folder(str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        storage = storage_for(str(self.folder))
        if self._is_folder and self.ledger_path.exists():
            self.ledger_kept = self.ledger_path
            for entry in self.folder.iterdir():
                if entry != self.ledger_path:
                    storage.delete(str(entry))
            return
        storage.delete(str(self.folder))
        for folder in dict.fromkeys([self._top, *self._made]):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def file_for(self, destination: str, number: int) -> Path:
        """Return where the unfinished file of a row lies; it has the ending of its destination."""
        return self.folder / f"{number:06d}{Path(destination).suffix}"
