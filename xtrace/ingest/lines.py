"""Splitting text inputs into blocks of whole lines, and reading numbers from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions

__all__ = ("DEC", "HEX", "MAX_LINE", "LineBlock", "block_bytes", "line_blocks", "magnitudes")

#: A longer line (bytes, without its newline) is skipped whole: no record is, and memory stays bounded.
MAX_LINE: Final = 1 << 16

#: Numbers as text inputs write them: 64 bits, no sign.
HEX: Final = r"^0[xX][0-9a-fA-F]{1,16}$"
DEC: Final = r"^[0-9]{1,20}$"


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
    """

    text: pl.Series
    offset: NDArray[np.uint64]
    line: NDArray[np.uint64]
    size: NDArray[np.uint64]
    cut: bool
    long: list[tuple[int, int, int]]


def block_bytes(options: ReadOptions) -> int:
    """Return how many bytes to read at once for about ``batch_rows`` records."""
    return min(1 << 22, max(64, options.batch_rows * 128))


def line_blocks(file: IO[bytes], size: int) -> Iterator[LineBlock]:
    """Split ``file`` into blocks of whole lines, reading ``size`` bytes at a time.

    Which lines come out, and their places, does not depend on ``size``. At most ``size`` plus `MAX_LINE`
    bytes of the input are held, whatever the length of a line.

    Args:
        file: a binary file, read from its start.
        size: bytes to read at once.

    Yields:
        Blocks of at least one line, or of long lines only.
    """
    at = 0  # several passes may take turns on one file, so each keeps its own place
    held = b""  # an unfinished line
    base = 0  # byte offset of held
    number = 1  # line number of held
    dropping = False  # held began a line that is too long; base stays at its start
    dropped = 0
    while True:
        file.seek(at)
        data = file.read(size)
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
        yield _block(whole, base, number, long=long, cut=False)
        base, number = base + len(whole), number + whole.count(b"\n")
        if len(held) > MAX_LINE:
            dropping, dropped, held = True, len(held), b""
    if dropping:
        yield _block(b"", base, number, long=[(base, number, dropped)], cut=False)
    elif held:
        yield _block(held + b"\n", base, number, long=[], cut=True)


def _block(raw: bytes, base: int, number: int, *, long: list[tuple[int, int, int]], cut: bool) -> LineBlock:
    ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0x0A).astype(np.uint64)
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + np.uint64(1)
    sizes = ends - starts
    offsets = starts + np.uint64(base)
    lines = np.arange(number, number + len(ends), dtype=np.uint64)
    text = raw[:-1].decode("utf-8", "replace")  # never swallows a newline, so the lines stay those of raw
    series = pl.Series("text", [text], dtype=pl.String).str.split("\n").explode() if raw else _no_text()
    fits = sizes <= MAX_LINE
    if not fits.all():
        long.extend((int(offsets[i]), int(lines[i]), int(sizes[i])) for i in np.flatnonzero(~fits))
        series, offsets, lines, sizes = series.filter(pl.Series(fits)), offsets[fits], lines[fits], sizes[fits]
    return LineBlock(series, offsets, lines, sizes, cut, long)


def _no_text() -> pl.Series:
    return pl.Series("text", [], dtype=pl.String)


def magnitudes(text: pl.Expr) -> pl.Expr:
    """Read decimal (up to 20 digits) and ``0x`` hex (up to 16 digits) numbers; null for anything else or above 64 bits.

    Args:
        text: String expression, without sign.

    Returns:
        UInt64 expression.
    """
    return (
        pl.when(text.str.contains(HEX))
        .then(text.str.slice(2).str.to_integer(base=16, dtype=pl.UInt64, strict=False))
        .when(text.str.contains(DEC))
        .then(text.cast(pl.UInt64, strict=False))
    )
