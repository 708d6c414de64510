"""The guest memory behind the calls of the bare guests: the words of ``mem=`` named by the structure that a call points to."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("PDONE_OPS", "named")

#: mmu_update and mmuext_op count what is done at the address in their third argument.
PDONE_OPS: Final = (1, 26)


@cache
def _layouts() -> tuple[tuple[int, tuple[int, ...], int, tuple[tuple[str, int, int, int], ...], int], ...]:
    """Return (op, commands, bytes a word, fields as (name, word, shift, bits), words needed) per structure."""
    text = files("xtrace.ingest").joinpath("layouts", "bare_structs.toml").read_text(encoding="utf-8")
    out = []
    for table in tomllib.loads(text).values():
        for width in (8, 4):
            words = table.get(f"words{width}")
            if words is None:
                continue
            fields: list[tuple[str, int, int, int]] = []
            for index, word in enumerate(words):
                shift = 0
                for item in word.split():
                    name, bits = item.split(":")
                    fields.append((name, index, shift, int(bits)))
                    shift += int(bits)
            out.append((int(table["op"]), tuple(table.get("commands", ())), width, tuple(fields), len(words)))
    return tuple(out)


def named(rows: pl.DataFrame) -> pl.Series:
    """Name the words of memory.

    Args:
        rows: ``op``, ``cmd`` (as issued, null: unknown), ``width`` (bytes a word), ``pdone``, ``mem`` (list of UInt64, null: a
            word that is no number).

    Returns:
        ``schema.MEMORY``, null where no structure is known or it is longer than what was printed.
    """
    import pyarrow as pa

    n = len(rows)
    op, width = rows["op"].to_numpy(), rows["width"].to_numpy()
    cmd, told = rows["cmd"].fill_null(0).to_numpy(), rows["cmd"].is_not_null().to_numpy()
    size = rows["mem"].list.len().fill_null(0).to_numpy().astype(np.intp)
    begin = np.cumsum(size) - size
    flat = rows["mem"].filter(pl.Series(size > 0)).explode()
    words, missing = flat.fill_null(0).to_numpy(), flat.is_null().to_numpy()

    names: list[str] = ["pdone"]
    counts = np.zeros(n, dtype=np.intp)
    parts: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint64], NDArray[np.bool_]]] = []
    at = np.flatnonzero(np.isin(op, PDONE_OPS))
    counts[at] = 1
    parts.append((at, np.zeros(1, dtype=np.intp), rows["pdone"].to_numpy()[at][:, None], np.zeros((len(at), 1), dtype=bool)))
    for number, commands, bytes_, fields, needed in _layouts():
        here = (op == number) & (width == bytes_) & (size >= needed)
        if commands:
            here &= told & np.isin(cmd, commands)
        at = np.flatnonzero(here)
        if not len(at):
            continue
        place = begin[at][:, None] + np.array([index for _, index, _, _ in fields])
        values = words[place] >> np.array([shift for _, _, shift, _ in fields], dtype=np.uint64)
        values &= np.array([(1 << bits) - 1 for *_, bits in fields], dtype=np.uint64)
        counts[at] = len(fields)
        parts.append((at, np.arange(len(fields)) + len(names), values, missing[place]))
        names += [name for name, *_ in fields]

    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    field, value, null = np.zeros(offsets[-1], np.intp), np.zeros(offsets[-1], np.uint64), np.zeros(offsets[-1], bool)
    for at, numbers, values, gone in parts:
        place = offsets[at][:, None] + np.arange(len(numbers))
        field[place], value[place], null[place] = numbers, values, gone
    items = pa.StructArray.from_arrays(
        [pa.array(names, pa.large_string()).take(pa.array(field)), pa.array(value, mask=null)], names=["field", "value"]
    )
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), items, mask=pa.array(counts == 0))
    return pl.Series("memory", lists, dtype=schema.MEMORY)
