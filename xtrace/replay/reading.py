"""Decodings as columns that tables and reports can carry, and the continuation inside a multicall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.replay.states import Column, States, nullable
from xtrace.schema import INNER

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from xtrace.replay.hypervisor import Decoded

__all__ = ("MULTICALL", "inner_states", "null_reading", "reading")

#: __HYPERVISOR_multicall, the only hypercall that holds another one.
MULTICALL: Final = 13

_READ: Final = {f.name: f.dtype for f in INNER.fields}


def reading(d: Decoded, inner: pl.Series | None = None) -> pl.Series:
    """Return a decoding as a struct column of type ``READING``."""
    n = len(d.status)
    none = len(d.behaviours)
    which = np.where(d.which >= 0, d.which, none)
    units = pl.Series([*(b.unit for b in d.behaviours), None], dtype=pl.String)
    homes = pl.Series([*(_home(b.codec) for b in d.behaviours), None], dtype=pl.String)
    home = homes.gather(which)
    if (d.special >= 0).any():
        home = pl.select(pl.when(pl.lit(pl.Series(d.special >= 0))).then(pl.lit("hypervisor")).otherwise(home)).to_series()
    frame = pl.DataFrame(
        {
            "hypercall": pl.repeat(d.hypercall.reaches or d.hypercall.name, n, dtype=pl.String, eager=True),
            "subop": operations(d),
            "progress": _series(d.progress),
            "remaining": _series(d.remaining),
            "unit": units.gather(which),
            "total": _series(d.total),
            "home": home,
        },
        schema=dict(_READ),
    )
    frame = frame.with_columns(pl.lit(None, dtype=INNER).alias("inner") if inner is None else inner.alias("inner"))
    return frame.to_struct("reading")


def null_reading(n: int) -> pl.Series:
    """Return n nulls of type ``INNER``."""
    return pl.Series("inner", [None] * n, dtype=INNER)


def operations(d: Decoded) -> pl.Series:
    """Return Xen's name of the sub-operation of each row; null where there is none or it is not known."""
    if not d.hypercall.command or d.hypercall.reaches is not None:
        return pl.Series([None] * len(d.status), dtype=pl.String)
    numbers, back = np.unique(d.number, return_inverse=True)
    known = {b.number: b.operation for b in d.behaviours}
    names = [known.get(int(k), d.hypercall.known_numbers.get(int(k)) if k >= 0 else None) for k in numbers]
    return pl.Series(names, dtype=pl.String).gather(back)


def _home(name: str) -> str:
    from xtrace.replay.codecs import codec

    return codec(name).home


def _series(column: Column) -> pl.Series:
    return nullable("", column.value, column.known)


def inner_states(
    s: States, issued: States | None = None
) -> Iterator[tuple[int, npt.NDArray[np.intp], States, npt.NDArray[np.bool_]]]:
    """Yield the calls that stand in the current multicall entry, by hypercall number.

    Guest memory names the entry ``entry.op``, ``entry.arg0``…, ``entry.result`` and what it points at ``entry.memory.FIELD``.

    Yields:
        number, rows of ``s``, their states, and whether ``result`` holds the number (Xen marks a preempted entry so:
        ``mcs->call.result = mcs->call.op`` in hypercall_create_continuation, since 2005).
    """
    op = s.at("mem.entry.op")
    if not op.known.any():
        return
    result = s.at("mem.entry.result")
    for number in np.unique(op.value[op.known]):
        rows = np.flatnonzero(op.known & (op.value == number))
        if number >= 1 << 32:
            continue
        args = tuple(s.at(f"mem.entry.arg{k}").take(rows) for k in range(6))
        memory = {k.removeprefix("entry.memory."): v.take(rows) for k, v in s.memory.items() if k.startswith("entry.memory.")}
        if "pdone" in s.memory and "pdone" not in memory:
            memory["pdone"] = s.memory["pdone"].take(rows)
        mark = result.known[rows] & (result.value[rows] == number)
        yield int(number), rows, States(args, memory), mark
