"""Opening of inputs: files, standard input, compressed streams, all turned into something that can be seeked."""

from __future__ import annotations

import errno as _errno
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, Self, cast

from xtrace.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ("HEAD_BYTES", "Source", "compressed", "is_live")

#: How much of a file the readers may look at to recognise it.
HEAD_BYTES = 1 << 16

#: First bytes of the compressed containers that are opened: xz by Python's lzma, the others by pyarrow.
_MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_MAGIC_BYTES = max(map(len, _MAGIC))

_SPOOL_CHUNK = 1 << 20


def compressed(head: bytes) -> str | None:
    """Return the name of the compressed container that begins so, or None."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def is_live(source: object) -> bool:
    """Say whether an input still grows: then a reader gives what it has, and holds nothing back to be faster."""
    return bool(getattr(source, "live", False))


class Source:
    """One input as a seekable binary file.

    Compressed input (zstd, gzip, bzip2, lz4, recognised by content) and input that cannot be seeked (a pipe, ``-``) is
    spooled to an unnamed temporary file; offsets always count in the decompressed stream.

    Args:
        path: a file name, or ``-`` for standard input.

    Raises:
        InputError: missing, a directory, no permission (exit bit 1); empty or a damaged container (exit bit 16).
    """

    #: Its reads wait for more (`xtrace.ingest.follow`); ask :func:`is_live`.
    live: ClassVar[bool] = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path`` and make it seekable."""
        self.path = os.fspath(path)
        self.damage: str | None = None  # the compressed container ended early
        try:
            raw = self._open_raw()
            self.file: IO[bytes] = self._seekable(raw)
        except OSError as exc:
            raise InputError(self.path, _why(exc)) from exc
        self.size = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        if self.size == 0:
            self.file.close()
            why = self.damage or "the file is empty"
            raise InputError(self.path, why, offset=0, exit_bits=16)

    def _open_raw(self) -> IO[bytes]:
        if self.path == "-":
            return sys.stdin.buffer
        mode = Path(self.path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(self.path, "is a directory, not a trace")
        return Path(self.path).open("rb")

    def _seekable(self, raw: IO[bytes]) -> IO[bytes]:
        # Peek through the raw stream, not the path: a pipe can be read only once.
        head = raw.read(_MAGIC_BYTES)
        kind = compressed(head)
        if kind is None and raw.seekable():
            raw.seek(0)
            return raw
        spool: IO[bytes] = tempfile.TemporaryFile(prefix="xtrace-")  # noqa: SIM115 (closed with the source)
        if kind is not None:
            plain: IO[bytes] = raw
            if not raw.seekable():
                plain = tempfile.TemporaryFile(prefix="xtrace-")  # noqa: SIM115
                plain.write(head)
                _copy(raw, plain)
                plain.flush()
            self._decompress(plain, kind, spool)
        else:
            spool.write(head)
            _copy(raw, spool)
        spool.seek(0)
        return spool

    def _decompress(self, plain: IO[bytes], kind: str, spool: IO[bytes]) -> None:
        # A read that meets the damage gives nothing, not even what came before it: smaller ones then go up to it.
        done = 0
        for step in (_SPOOL_CHUNK, 1 << 10, 1):
            again = os.fdopen(os.dup(plain.fileno()), "rb")  # a duplicate, because pyarrow closes what it is given
            again.seek(0)
            try:
                stream = _unpacked(again, kind)
                for left in range(done, 0, -_SPOOL_CHUNK):
                    stream.read(min(left, _SPOOL_CHUNK))
                while chunk := stream.read(step):
                    done += spool.write(chunk)
                return
            except (OSError, EOFError) as exc:
                if isinstance(exc, OSError) and exc.errno == _errno.ENOSPC:
                    raise
                said = (str(exc).splitlines() or [type(exc).__name__])[0]
                self.damage = f"the {kind} stream is damaged or cut ({said})"

    def wait(self, beyond: int, patience: float | None = None) -> bool | None:
        """Say whether there are more than ``beyond`` bytes: True, or False where there will not be.

        Args:
            beyond: bytes that are known.
            patience: seconds after which a source that grows says None, "not yet"; None: it waits.
        """
        return self.size > beyond

    def head(self) -> bytes:
        """Return the first bytes, for recognition."""
        self.file.seek(0)
        data = self.file.read(HEAD_BYTES)
        self.file.seek(0)
        return data

    def close(self) -> None:
        """Close the file; a spool is deleted with it."""
        if self.path != "-" or self.file is not sys.stdin.buffer:
            self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _unpacked(plain: IO[bytes], kind: str) -> IO[bytes]:
    if kind == "xz":
        import lzma

        class File(lzma.LZMAFile):
            def read(self, size: int | None = -1) -> bytes:
                try:
                    return super().read(size)
                except lzma.LZMAError as exc:
                    raise OSError(str(exc)) from exc

        return cast("IO[bytes]", File(plain))
    import pyarrow as pa

    return cast("IO[bytes]", pa.CompressedInputStream(pa.PythonFile(plain, mode="r"), kind))


def _copy(src: IO[bytes], dst: IO[bytes]) -> None:
    while chunk := src.read(_SPOOL_CHUNK):
        dst.write(chunk)


def _why(exc: OSError) -> str:
    if exc.errno == _errno.ENOENT:
        return "no such file"
    if exc.errno in (_errno.EACCES, _errno.EPERM):
        return "no permission to read it"
    if exc.errno == _errno.EISDIR:
        return "is a directory, not a trace"
    return f"cannot be read ({exc.strerror or exc})"
