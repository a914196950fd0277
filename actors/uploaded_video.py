"""A video that arrives in a pipe, as the reader of videos sees it: read as it comes, or from a file it was put into.

What comes once cannot be opened twice, but a video is opened several times before its first picture is restored: for
the sizes that its header declares, for what it is, for its sound. So its beginning is kept, up to a bound, until it is
opened for the last time; until then it looks like a video that ends there.
"""

from __future__ import annotations

import io
import os
import tempfile
from typing import Any, BinaryIO, Final, cast

from actors.byte_pipe import BytePipe
from actors.container_sniff import SNIFFED_BYTES, Container, sniff
from infra.refusals import FrameTooLarge

NAME: Final = "The upload"
_COPIED_BYTES: Final = 1 << 20


class Beginning:
    """The first bytes of a pipe, which can be read again and again; `limit_bytes` bounds how many are kept."""

    def __init__(self, pipe: BytePipe, limit_bytes: int) -> None:
        self.pipe = pipe
        self.kept = bytearray()
        self.limit_bytes = limit_bytes

    def sniff(self) -> Container:
        """Read as far as is needed to tell what it is.

        Raises:
            BadMessage: nothing that is accepted. Whatever the pipe was aborted with.
        """
        while (found := sniff(bytes(self.kept[:SNIFFED_BYTES]))) is None:
            if not self.more(SNIFFED_BYTES - len(self.kept)):
                found = sniff(bytes(self.kept), whole=True)
                assert found is not None
                return found
        return found

    def more(self, size: int) -> bool:
        """Keep at most `size` bytes more; False where the pipe has ended or the limit is reached."""
        piece = self.pipe.read(min(size, self.limit_bytes - len(self.kept))) if size > 0 else b""
        self.kept += piece
        return bool(piece)


class StreamedVideo:
    """A video that is read as it comes.

    Args:
        beginning: of which something may have been read.
        demuxer: libav's name of its container.
    """

    name = NAME
    comes_once = True

    def __init__(self, beginning: Beginning, demuxer: str) -> None:
        self.demuxer = demuxer
        self._beginning = beginning
        self._last = False

    def keep_no_more(self) -> None:
        """The next handle is the last: it goes on behind the beginning, and what it has read is gone."""
        self._last = True

    def open(self) -> BinaryIO:
        """Return a handle at the first byte; one may be used at a time."""
        return cast(BinaryIO, _StreamHandle(self._beginning, self._last))


class SpooledVideo:
    """A video that was put into a file without a name, because it cannot be read as it comes."""

    name = NAME
    comes_once = False

    def __init__(self, beginning: Beginning, demuxer: str, *, limit_bytes: int, folder: str | None = None) -> None:
        """Copy everything that comes.

        Raises:
            FrameTooLarge: more than `limit_bytes`. OSError: no room. Whatever the pipe was aborted with.
        """
        self.demuxer = demuxer
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by close
        try:
            self.size = self._file.write(beginning.kept)
            while piece := beginning.pipe.read(_COPIED_BYTES):
                self.size += self._file.write(piece)
                if self.size > limit_bytes:
                    raise FrameTooLarge(
                        f"This kind of video must be stored before it is read, and has more than {limit_bytes} bytes.",
                        code="upload-spool-full",
                        limit=f"{limit_bytes} bytes",
                        remedy="Send it as MPEG-TS, Matroska, or MP4 with its index in front (-movflags +faststart).",
                    )
            self._file.flush()
            beginning.kept.clear()
        except BaseException:
            self._file.close()
            raise

    def open(self) -> BinaryIO:
        """Return a handle of its own at the first byte."""
        return cast(BinaryIO, io.BufferedReader(_SpoolHandle(os.dup(self._file.fileno()), self.size)))

    def close(self) -> None:
        """Give the room on the disk back, as soon as the last handle is closed."""
        self._file.close()


class _StreamHandle(io.RawIOBase):
    def __init__(self, beginning: Beginning, last: bool) -> None:
        super().__init__()
        self._beginning, self._last = beginning, last
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Return what is there, at least one byte, nothing at the end; the first call waits for all of `size`."""
        wanted = _COPIED_BYTES if size is None or size < 0 else size
        kept = self._beginning.kept
        if self._at == 0:  # demuxers go back to the first byte after a look, and can if they got it in one piece
            while len(kept) < wanted and self._beginning.more(wanted - len(kept)):
                pass
        if self._at >= len(kept):
            if self._last:
                kept.clear()
                return self._beginning.pipe.read(wanted)
            self._beginning.more(wanted)
        piece = bytes(kept[self._at : self._at + wanted])
        self._at += len(piece)
        return piece


class _SpoolHandle(io.RawIOBase):
    """A place in a file that other handles read too."""

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self._number, self._size, self._at = number, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._number, [buffer], self._at)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._number)
        super().close()
