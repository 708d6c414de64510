"""Splitting text inputs into blocks of whole lines, and reading numbers from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions

__all__ = (
    "MAX_LINE",
    "LineBlock",
    "RawBlock",
    "block_bytes",
    "block_of",
    "by_value",
    "line_blocks",
    "magnitudes",
    "raw_blocks",
    "split",
)

#: A longer line (bytes, without its newline) is skipped whole: no record is, and memory stays bounded.
MAX_LINE: Final = 1 << 16
_HEX: Final = r"^0[xX][0-9a-fA-F]{1,16}$"
_DEC: Final = r"^[0-9]{1,20}$"
#: A string view holds so many bytes itself.
_INLINE: Final = 12
#: Bytes compared at once: what is made of them stays in a processor's cache.
_CACHED: Final = 1 << 18
#: Fewer values are not worth a look at which are the same.
_FEW: Final = 64
_NEWLINE: Final = np.uint8(0x0A)


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


#: What :func:`raw_blocks` gives.
RawBlock: TypeAlias = "tuple[bytes, int, int, list[tuple[int, int, int]], bool]"


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
    for block in raw_blocks(file, size):
        yield block_of(block)


def raw_blocks(file: IO[bytes], size: int) -> Iterator[RawBlock]:
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
        end = data.rfind(b"\n") + 1
        if end:
            whole, held = b"".join((held, memoryview(data)[:end])), data[end:]
        else:
            whole, held = b"", held + data
        if whole or long:
            yield whole, base, number, long, False
        base, number = base + len(whole), number + _newlines(whole)
        if len(held) > MAX_LINE:
            dropping, dropped, held = True, len(held), b""
    if dropping:
        yield b"", base, number, [(base, number, dropped)], False
    elif held:
        yield held + b"\n", base, number, [], True


def _newlines(raw: bytes) -> int:
    data = np.frombuffer(raw, dtype=np.uint8)
    return sum(int(np.count_nonzero(data[at : at + _CACHED] == _NEWLINE)) for at in range(0, len(data), _CACHED))


def _places(raw: bytes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where each line begins and its length without the newline that ends it."""
    data = np.frombuffer(raw, dtype=np.uint8)
    parts = [np.flatnonzero(data[at : at + _CACHED] == _NEWLINE) for at in range(0, len(data), _CACHED)]
    for i, part in enumerate(parts):
        part += i * _CACHED
    ends = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype=np.intp), *parts])
    starts = np.zeros_like(ends)
    np.add(ends[:-1], 1, out=starts[1:])
    return starts, ends - starts


def block_of(block: RawBlock) -> LineBlock:
    """Split what :func:`raw_blocks` gave into lines."""
    raw, base, number, long, cut = block
    starts, lengths = _places(raw)
    sizes = lengths.view(np.uint64)
    offsets = starts.view(np.uint64) + np.uint64(base)
    lines = np.arange(number, number + len(starts), dtype=np.uint64)
    series = _strings(raw, starts, lengths)
    fits = lengths <= MAX_LINE
    if not fits.all():
        long = list(long)
        long.extend((int(offsets[i]), int(lines[i]), int(sizes[i])) for i in np.flatnonzero(~fits))
        series, offsets, lines, sizes = series.filter(pl.Series(fits)), offsets[fits], lines[fits], sizes[fits]
    return LineBlock(series, offsets, lines, sizes, cut, long, raw, base)


def split(raw: bytes) -> tuple[pl.Series, NDArray[np.int64]]:
    """Split whole lines, the last one with its newline too; return them without, and where each begins."""
    starts, sizes = _places(raw)
    return _strings(raw, starts, sizes), starts


def _strings(raw: bytes, starts: NDArray[np.intp], sizes: NDArray[np.intp]) -> pl.Series:
    """Return the lines of a block as a String series that shares its memory (several times faster than to split it).

    An Arrow string view is four words: the length, the first four bytes, which buffer, where in it; or the length and up
    to twelve bytes themselves (Arrow columnar format, "Variable-size Binary View Layout").

    Args:
        raw: whole lines, each with its newline. starts, sizes: intp[n], where each begins and its length without it.
    """
    n = len(starts)
    try:
        if not raw.isascii():
            raw.decode()
    except UnicodeDecodeError:  # replacing never swallows a newline, so the lines stay those of raw
        raw = raw.decode("utf-8", "replace").encode()
        starts, sizes = _places(raw)
    data = np.frombuffer(raw, dtype=np.uint8)
    views = np.zeros((n, 4), dtype=np.uint32)
    views[:, 0], views[:, 3] = sizes, starts
    if len(data) > _INLINE:
        # Four bytes wherever they begin; lines so short that there are none are among those that follow.
        words = np.ndarray(len(data) - 3, "<u4", data, strides=(1,))
        views[:, 1] = words[np.minimum(starts, len(data) - 4)]
    short = np.flatnonzero(sizes <= _INLINE)
    if len(short):
        at = np.arange(_INLINE)
        inline = data[np.minimum(starts[short, None] + at, len(data) - 1)]
        inline[at >= sizes[short, None]] = 0
        views[short, 1:] = inline.view("<u4").reshape(-1, 3)
    array = pa.Array.from_buffers(pa.string_view(), n, [None, pa.py_buffer(views.astype("<u4", copy=False)), pa.py_buffer(raw)])
    return pl.Series("text", array, dtype=pl.String)


def by_value(values: pl.Series, work: Callable[[pl.Series], pl.DataFrame]) -> pl.DataFrame:
    """Return what ``work`` makes of each value (one row each), done once for each different value where there are few.

    To find the different ones costs a tenth of what a pattern with groups does.
    """
    many = len(values)
    if many < _FEW:
        return work(values)
    coded = pc.dictionary_encode(values.to_arrow(compat_level=pl.CompatLevel.oldest()))
    if 2 * len(coded.dictionary) > many:
        return work(values)
    of = pl.Series(coded.indices.fill_null(len(coded.dictionary)))
    different = pl.concat([pl.Series(coded.dictionary, dtype=pl.String), pl.Series([None], dtype=pl.String)])
    return work(different.alias(values.name))[of]


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
