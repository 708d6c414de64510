"""Inputs that still grow: a file that a recorder writes to, or a pipe, read as it comes.

A `GrowingSource` looks to a reader like a `Source` whose reads wait for more. It ends when told to (`stop`), when a pipe
ends, or when nothing came for a given time. Only readers that go through their input once, from front to back, can follow
(``Reader.streams``). A reader asks ``source.is_live``, never for this class: what it can do early it then does at once.

What was there when it is told to stop is still read, and no more: an input may grow faster than it is read. Only a pipe is
given a second to end: Ctrl-C reaches ``xentrace`` at its other end too, which then writes what its buffers still hold
(RELEASE-4.17.0:tools/xentrace/xentrace.c:monitor_tbufs, last_read).
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Final, cast

from xtrace.errors import InputError
from xtrace.ingest.source import HEAD_BYTES, Source, compressed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("GrowingSource",)

_CHUNK: Final = 1 << 16
#: How often a file is looked at for growth, in seconds.
POLL: Final = 0.1
#: After so many seconds without growth a reader of text may take what it holds back for complete.
PATIENCE: Final = 1.0
#: Seconds that a pipe has to end after it was told to stop.
GRACE: Final = 1.0


class GrowingSource(Source):
    """One input that still grows.

    Args:
        path: a file name, or ``-`` for standard input.
        idle: seconds without growth after which it ends; None: only when told, or when a pipe ends.
        stopped: asked at every wait whether to end.

    Raises:
        InputError: missing, a directory, no permission (exit bit 1); compressed, or nothing came (exit bit 16).
    """

    live: ClassVar[bool] = True

    def __init__(
        self, path: str | os.PathLike[str], *, idle: float | None = None, stopped: Callable[[], bool] | None = None
    ) -> None:
        """Open ``path`` and wait for its first byte."""
        self.path = os.fspath(path)
        self.damage = None
        self.idle, self._stopped = idle, stopped or (lambda: False)
        self._ended = threading.Event()  # a pipe has ended
        self._limit: int | None = None  # bytes there were when it was told to stop
        self._grown = (time.monotonic(), -1)  # when it was last seen to have grown, and to what
        self._stopping: float | None = None  # when a pipe was told to stop
        self._pipe = pipe = self.path == "-" or not Path(self.path).is_file()
        if pipe and self.path != "-":
            raw = self._opened()  # says what is wrong with it
            self._backing = self._spool(raw)
        elif pipe:
            self._backing = self._spool(sys.stdin.buffer)
        else:
            self._backing = self._opened()
        self.file = cast("IO[bytes]", _Growing(self))
        head = self.head()
        if not head:
            self.close()
            raise InputError(self.path, "nothing was written to it", offset=0, exit_bits=16)
        if (kind := compressed(head)) is not None:
            self.close()
            raise InputError(
                self.path, f"is compressed ({kind}); only a plain file or pipe can be followed", offset=0, exit_bits=16
            )

    def _opened(self) -> IO[bytes]:
        try:
            return self._open_raw()
        except OSError as exc:
            raise InputError(self.path, str(exc.strerror or exc)) from exc

    def _spool(self, raw: IO[bytes]) -> IO[bytes]:
        """Copy a pipe to an unnamed file in the background, so that what came can be read again."""
        spool: IO[bytes] = tempfile.TemporaryFile(prefix="xtrace-")  # noqa: SIM115 (closed with the source)
        fd = spool.fileno()

        def copy() -> None:
            at = 0
            try:
                while data := os.read(raw.fileno(), _CHUNK):
                    at += os.pwrite(fd, data, at)
            except OSError as exc:
                self.damage = f"the pipe could not be read on ({exc.strerror or exc})"
            self._ended.set()

        threading.Thread(target=copy, name="xtrace-spool", daemon=True).start()
        return spool

    @property
    def size(self) -> int:  # type: ignore[override]
        """How many bytes there are by now."""
        if self._limit is not None:
            return self._limit
        return os.fstat(self._backing.fileno()).st_size

    def wait(self, beyond: int, patience: float | None = None) -> bool | None:
        """Wait until there are more than ``beyond`` bytes.

        Returns:
            True, or False when there will not be; None after ``patience`` seconds without any growth.
        """
        begun = time.monotonic()
        while True:
            ended = self._ended.is_set()  # asked before the size: what came last is still read
            now = time.monotonic()
            if self._limit is None and self._stopped():
                self._stopping = self._stopping or now
                if not self._pipe or ended or now - self._stopping >= GRACE:
                    self._limit = self.size
            size = self.size
            if size != self._grown[1]:
                self._grown = (now, size)
            if size > beyond:
                return True
            quiet = now - self._grown[0]
            if ended or self._limit is not None or (self.idle is not None and quiet >= self.idle):
                return False
            if patience is not None and min(quiet, now - begun) >= patience:
                return None
            time.sleep(POLL)

    def read_at(self, at: int, n: int, patience: float | None = None) -> bytes | None:
        """Return up to ``n`` bytes from ``at``, waiting for the first of them; empty at the end; None as :meth:`wait` does."""
        more = self.wait(at, patience)
        if not more:
            return None if more is None else b""
        return os.pread(self._backing.fileno(), min(n, self.size - at), at)

    def head(self) -> bytes:
        """Return the first bytes there are."""
        return self.read_at(0, HEAD_BYTES) or b""

    def snapshot(self) -> Source:
        """Return what is there by now as a source of its own, for a first look."""
        out = Source.__new__(Source)
        out.path, out.damage = self.path, None
        out.file = os.fdopen(os.dup(self._backing.fileno()), "rb")
        out.file.seek(0)
        out.size = self.size
        return out

    def close(self) -> None:
        """Close the file; a spool is deleted with it."""
        self._backing.close()


class _Growing(io.RawIOBase):
    """The file of a growing source: reads return what there is, and wait where there is nothing yet."""

    def __init__(self, source: GrowingSource) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._source._backing.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self._source.read_at(self._at, _CHUNK if size is None or size < 0 else size) or b""
        self._at += len(data)
        return data

    def read_soon(self, size: int) -> bytes | None:
        """Read as `read` does; None where nothing came for a while."""
        data = self._source.read_at(self._at, size, PATIENCE)
        self._at += len(data or b"")
        return data
