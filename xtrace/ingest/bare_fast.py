"""Sample lines of the bare guests (``CONT``), a block at once with NumPy.

A sample has the same keys in the same order on every line, so each line is a row of a matrix of tokens: keys are compared, and
numbers read, column by column. Lines that differ in anything are left to the regular expressions of `bare`, which say what is
wrong with them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.ingest.keyvalue import PAD, Bytes, packed

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("samples",)

_SPACE, _EQUALS, _COMMA, _NEWLINE, _X, _ASCII = (np.uint8(ord(c)) for c in " =,\nX\x7f")
#: Digits of ``n`` and ``i``: as the regular expression has it, decimal and below 2**63.
_MAX_DIGITS: Final = 18
#: Lines read at once: the arrays of more do not stay in a processor's cache.
_LINES: Final = 1 << 11


def samples(
    raw: bytes, start: NDArray[np.uint64], keys: tuple[str, ...], numbers: tuple[str, ...]
) -> tuple[pl.DataFrame, NDArray[np.bool_]]:
    """Read sample lines.

    Args:
        raw: a block.
        start: uint64[n], where each of the lines begins in it.
        keys: every key of a line, in order: ``n`` and ``i`` first, ``mem`` last.
        numbers: those whose values are wanted.

    Returns:
        A frame of the lines that were read, ``n`` (Int64), the numbers (UInt64) and ``mem`` (list of UInt64); and bool[n], which
        ones these are.
    """
    edges = [*start[::_LINES].tolist(), len(raw)]
    parts = [
        (raw[edges[i] : edges[i + 1]], start[i * _LINES : (i + 1) * _LINES] - np.uint64(edges[i])) for i in range(len(edges) - 1)
    ]
    if len(parts) < 2:
        return _part(raw, start, keys, numbers)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda part: _part(part[0], part[1], keys, numbers), parts))
    return pl.concat([frame for frame, _ in done]), np.concatenate([good for _, good in done])


def _part(
    raw: bytes, start: NDArray[np.uint64], keys: tuple[str, ...], numbers: tuple[str, ...]
) -> tuple[pl.DataFrame, NDArray[np.bool_]]:
    text = Bytes(raw)
    data = text.data
    # Other blanks, which are not ASCII perhaps, are tokens too, so that no value has one in it; nor the X of 0X, which the
    # guests do not print.
    data = data[: len(data) - PAD + 1]  # behind the text one token only, and room to read on from it
    token = np.flatnonzero((data <= _SPACE) | (data == _EQUALS) | (data == _COMMA) | (data > _ASCII) | (data == _X))
    what = data[token]
    begin = start.astype(np.intp) + PAD
    first = np.searchsorted(token, begin)  # the blank after the word
    good = first + 2 * len(keys) < len(token)
    first = np.where(good, first, 0)
    columns: dict[str, pl.Series] = {}
    values = {}
    for i, key in enumerate(keys):
        blank, sign = first + 2 * i, first + 2 * i + 1
        at = token[blank] + 1
        size = token[sign] - at
        good &= (what[blank] == _SPACE) & (what[sign] == _EQUALS) & (size == len(key))
        good &= (text.words[at] & np.uint64((1 << 8 * len(key)) - 1)) == np.uint64(packed(key))
        if key in numbers or key in ("n", "i"):
            at, end = token[sign] + 1, token[sign + 1]
            value, fine = text.numbers(at, end)
            if key in ("n", "i"):
                fine &= (end - at <= _MAX_DIGITS) & ~_hexed(text, at)
            good &= fine
            values[key] = value
        elif key != "mem":
            good &= token[sign + 1] > token[sign] + 1  # something stands there, up to the next blank
    # The words of mem=, up to the end of the line.
    newline = np.flatnonzero(what == _NEWLINE)
    after = np.searchsorted(newline, first + 2 * len(keys))
    good &= after < len(newline)
    last = newline[np.minimum(after, len(newline) - 1)]
    mem = first + 2 * len(keys)  # the token after its first word
    count = last - mem + 1
    good &= (count > 0) & (count < 1 << 12)
    rows = np.flatnonzero(good)
    count = count[rows]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(count, out=offsets[1:])
    ends = np.repeat(mem[rows] - offsets[:-1], count) + np.arange(offsets[-1])
    words, fine = text.numbers(token[ends - 1] + 1, token[ends])
    fine &= (what[ends] == _COMMA) | (what[ends] == _NEWLINE)
    if not fine.all():
        # Nearly never; their lines go to the other reader.
        wrong = np.zeros(len(start), dtype=bool)
        wrong[np.repeat(rows, count)[~fine]] = True
        keep = np.repeat(~wrong[rows], count)
        words, count, rows = words[keep], count[~wrong[rows]], rows[~wrong[rows]]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(count, out=offsets[1:])
        good &= ~wrong
    columns["n"] = pl.Series(values["n"][rows]).cast(pl.Int64)
    columns.update({key: pl.Series(values[key][rows]) for key in numbers})
    columns["mem"] = _lists(offsets, words)
    return pl.DataFrame(columns), good


def _hexed(text: Bytes, at: NDArray[np.intp]) -> NDArray[np.bool_]:
    second = text.data[at + 1]
    return np.equal(second, np.uint8(ord("x"))) | np.equal(second, np.uint8(ord("X")))


def _lists(offsets: NDArray[np.int64], words: NDArray[np.uint64]) -> pl.Series:
    import pyarrow as pa

    return pl.Series("mem", pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(words)), dtype=pl.List(pl.UInt64))
