"""Splitting text inputs into blocks of whole lines, and reading numbers from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions

__all__ = ("MAX_LINE", "LineBlock", "block_bytes", "line_blocks", "magnitudes", "raw_blocks", "split")

#: A longer line (bytes, without its newline) is skipped whole: no record is, and memory stays bounded.
MAX_LINE: Final = 1 << 16
_HEX: Final = r"^0[xX][0-9a-fA-F]{1,16}$"
_DEC: Final = r"^[0-9]{1,20}$"
#: A string view holds so many bytes itself.
_INLINE: Final = 12


@dataclass(slots=True)
class LineBlock:
    """Some whole lines of a text input, in order.

    Attributes:
        text: String series of n lines without their newline; bytes that are not UTF-8 are replaced by U+FFFD.
        offset: uint64[n], byte of each line's first byte in the decompressed stream.
        line: uint64[n], line numbers from 1.
        size: uint64[n], length of each line in bytes, without its newline.
        cut: the last line is the last of the input and has no newline.
        long: (offset, line, bytes) of lines of more than `MAX_LINE` bytes; they are not in ``text``.
        raw: the bytes of all the lines, long ones too, each with its newline.
        base: offset of the first of them.
    """

    text: pl.Series
    offset: NDArray[np.uint64]
    line: NDArray[np.uint64]
    size: NDArray[np.uint64]
    cut: bool
    long: list[tuple[int, int, int]]
    raw: bytes = b""
    base: int = 0


def block_bytes(options: ReadOptions) -> int:
    """Return how many bytes to read at once for about ``batch_rows`` records."""
    return min(1 << 22, max(64, options.batch_rows * 128))


def line_blocks(file: IO[bytes], size: int) -> Iterator[LineBlock]:
    """Split ``file`` into blocks of whole lines, reading ``size`` bytes at a time (see :func:`raw_blocks`).

    Args:
        file: a binary file, read from its start.
        size: bytes to read at once.

    Yields:
        Blocks of at least one line, or of long lines only.
    """
    for raw, base, number, long, cut in raw_blocks(file, size):
        yield _block(raw, base, number, long=long, cut=cut)


def raw_blocks(file: IO[bytes], size: int) -> Iterator[tuple[bytes, int, int, list[tuple[int, int, int]], bool]]:
    """Split ``file`` into blocks of whole lines, reading ``size`` bytes at a time.

    Which lines come out, and their places, does not depend on ``size``. At most ``size`` plus `MAX_LINE`
    bytes of the input are held, whatever the length of a line.

    Args:
        file: a binary file, read from its start.
        size: bytes to read at once.

    Of a file that still grows (one with ``read_soon``) what there is is read; where nothing comes for a while an empty block
    is given, a pause in which a reader can tell what it holds back.

    Yields:
        The bytes of whole lines (the last one ends with a newline, if need be one that was added), the offset and the line
        number of the first, the long lines that were met as in `LineBlock`, and whether a newline was added. Lines of more
        than `MAX_LINE` bytes can still be among them.
    """
    at = 0  # several passes may take turns on one file, so each keeps its own place
    held = b""  # an unfinished line
    base = 0  # byte offset of held
    number = 1  # line number of held
    dropping = False  # held began a line that is too long; base stays at its start
    dropped = 0
    read = getattr(file, "read_soon", file.read)
    while True:
        file.seek(at)
        data = read(size)
        if data is None:
            yield b"", base, number, [], False
            continue
        if not data:
            break
        at += len(data)
        long: list[tuple[int, int, int]] = []
        if dropping:
            end = data.find(b"\n")
            if end < 0:
                dropped += len(data)
                continue
            long.append((base, number, dropped + end))
            base, number, dropping = base + dropped + end + 1, number + 1, False
            data = data[end + 1 :]
        data = held + data
        held = data[data.rfind(b"\n") + 1 :]
        whole = data[: len(data) - len(held)]
        if whole or long:
            yield whole, base, number, long, False
        base, number = base + len(whole), number + int(np.count_nonzero(np.frombuffer(whole, dtype=np.uint8) == 0x0A))
        if len(held) > MAX_LINE:
            dropping, dropped, held = True, len(held), b""
    if dropping:
        yield b"", base, number, [(base, number, dropped)], False
    elif held:
        yield held + b"\n", base, number, [], True


def _block(raw: bytes, base: int, number: int, *, long: list[tuple[int, int, int]], cut: bool) -> LineBlock:
    ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0x0A).astype(np.uint64)
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + np.uint64(1)
    sizes = ends - starts
    offsets = starts + np.uint64(base)
    lines = np.arange(number, number + len(ends), dtype=np.uint64)
    series = _strings(raw, starts, sizes)
    fits = sizes <= MAX_LINE
    if not fits.all():
        long.extend((int(offsets[i]), int(lines[i]), int(sizes[i])) for i in np.flatnonzero(~fits))
        series, offsets, lines, sizes = series.filter(pl.Series(fits)), offsets[fits], lines[fits], sizes[fits]
    return LineBlock(series, offsets, lines, sizes, cut, long, raw, base)


def split(raw: bytes) -> tuple[pl.Series, NDArray[np.int64]]:
    """Split whole lines, the last one with its newline too; return them without, and where each begins."""
    ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0x0A)
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    return _strings(raw, starts.astype(np.uint64), (ends - starts).astype(np.uint64)), starts


def _strings(raw: bytes, starts: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> pl.Series:
    """Return the lines of a block as a String series that shares its memory (several times faster than to split it).

    An Arrow string view is four words: the length, the first four bytes, which buffer, where in it; or the length and up
    to twelve bytes themselves (Arrow columnar format, "Variable-size Binary View Layout").

    Args:
        raw: whole lines, each with its newline. starts, sizes: uint64[n], where each begins and its length without it.
    """
    n = len(starts)
    try:
        if not raw.isascii():
            raw.decode()
    except UnicodeDecodeError:  # replacing never swallows a newline, so the lines stay those of raw
        raw = raw.decode("utf-8", "replace").encode()
        ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0x0A).astype(np.uint64)
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1] + np.uint64(1)
        sizes = ends - starts
    data = np.frombuffer(raw + bytes(_INLINE), dtype=np.uint8)
    views = np.zeros((n, 4), dtype=np.uint32)
    views[:, 0], views[:, 3] = sizes, starts
    views[:, 1] = np.ndarray(len(data) - 3, "<u4", data, strides=(1,))[starts.astype(np.intp)]  # four bytes wherever they begin
    short = np.flatnonzero(sizes <= _INLINE)
    at = np.arange(_INLINE, dtype=np.uint64)
    inline = data[starts[short, None] + at]
    inline[at >= sizes[short, None]] = 0
    views[short, 1:] = inline.view("<u4").reshape(-1, 3)
    array = pa.Array.from_buffers(pa.string_view(), n, [None, pa.py_buffer(views.astype("<u4", copy=False)), pa.py_buffer(raw)])
    return pl.Series("text", array, dtype=pl.String)


def magnitudes(text: pl.Expr) -> pl.Expr:
    """Read decimal (up to 20 digits) and ``0x`` hex (up to 16 digits) numbers; null for anything else or above 64 bits.

    Args:
        text: String expression, without sign.

    Returns:
        UInt64 expression.
    """
    return (
        pl.when(text.str.contains(_HEX))
        .then(text.str.slice(2).str.to_integer(base=16, dtype=pl.UInt64, strict=False))
        .when(text.str.contains(_DEC))
        .then(text.cast(pl.UInt64, strict=False))
    )
