"""Columns of registers and guest memory, as the codecs read them.

A :class:`States` holds n states of one hypercall and one caller: what a continuation left, or a call as it was issued.
Values are uint64; beside every column stands a mask of what was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from xtrace.schema import ARGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import polars as pl

    U64 = npt.NDArray[np.uint64]
    Mask = npt.NDArray[np.bool_]

__all__ = ("Column", "States", "location", "nullable")

LOW32 = np.uint64(0xFFFFFFFF)


def nullable(name: str, values: npt.NDArray[Any], known: Mask) -> pl.Series:
    """Return a series with nulls where ``known`` is false (through Arrow: Polars takes a mask only value by value)."""
    import polars as pl
    import pyarrow as pa

    return pl.Series(name, pl.from_arrow(pa.array(values, mask=~known)))


def location(name: str) -> str:
    """Return a location with its ``mem.``, which the fact files may leave out."""
    return name if name.startswith(("arg", "mem.")) else f"mem.{name}"


@dataclass(frozen=True, slots=True)
class Column:
    """n unsigned 64-bit values and which of them are known (unknown ones read as 0)."""

    value: U64
    known: Mask

    @classmethod
    def of(cls, values: Sequence[int | None]) -> Column:
        """Build a column from Python numbers; None is unknown."""
        known = np.array([v is not None for v in values], dtype=bool)
        return cls(np.array([(v or 0) & 0xFFFFFFFFFFFFFFFF for v in values], dtype=np.uint64), known)

    @classmethod
    def unknown(cls, n: int) -> Column:
        """Return n unknown values."""
        return cls(np.zeros(n, np.uint64), np.zeros(n, bool))

    @classmethod
    def full(cls, n: int, value: int) -> Column:
        """Return n times the same known value."""
        return cls(np.full(n, value, np.uint64), np.ones(n, bool))

    def take(self, rows: npt.NDArray[np.intp]) -> Column:
        """Return the rows chosen."""
        return Column(self.value[rows], self.known[rows])

    def item(self, i: int) -> int | None:
        """Return value i as a Python number, or None."""
        return int(self.value[i]) if self.known[i] else None

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True, slots=True)
class States:
    """Registers arg0…arg5 and named guest-memory fields of n states."""

    args: tuple[Column, ...]
    memory: Mapping[str, Column] = field(default_factory=dict)
    cut: npt.NDArray[np.uint8] | None = None  # bit k: argument k was recorded as 32 bits only

    def __len__(self) -> int:
        return len(self.args[0])

    def at(self, location: str) -> Column:
        """Return ``arg0``…``arg5`` or ``mem.FIELD``; unknown where nothing was recorded."""
        if location.startswith("arg"):
            return self.args[int(location[3:])]
        found = self.memory.get(location.removeprefix("mem."))
        return found if found is not None else Column.unknown(len(self))

    def take(self, rows: npt.NDArray[np.intp]) -> States:
        """Return the rows chosen."""
        return States(
            tuple(a.take(rows) for a in self.args),
            {k: v.take(rows) for k, v in self.memory.items()},
            None if self.cut is None else self.cut[rows],
        )

    def replace(self, changes: Mapping[str, Column]) -> States:
        """Return a copy with other columns at the given locations."""
        args = list(self.args)
        memory = dict(self.memory)
        for location, column in changes.items():
            if location.startswith("arg"):
                args[int(location[3:])] = column
            else:
                memory[location.removeprefix("mem.")] = column
        return States(tuple(args), memory, self.cut)

    @classmethod
    def concat(cls, parts: Sequence[States]) -> States:
        """Put several groups of states after one another; a field that one of them has not is unknown there."""
        fields = dict.fromkeys(name for p in parts for name in p.memory)

        def join(columns: Sequence[Column]) -> Column:
            return Column(np.concatenate([c.value for c in columns]), np.concatenate([c.known for c in columns]))

        args = tuple(join([p.args[k] for p in parts]) for k in range(6))
        return cls(args, {name: join([p.at(f"mem.{name}") for p in parts]) for name in fields})

    @classmethod
    def of(cls, args: Sequence[Sequence[int | None]], memory: Mapping[str, Sequence[int | None]] | None = None) -> States:
        """Build states from Python rows: one sequence of up to six arguments for each state."""
        rows = [list(a) + [None] * (6 - len(a)) for a in args]
        columns = tuple(Column.of([r[k] for r in rows]) for k in range(6))
        return cls(columns, {k: Column.of(v) for k, v in (memory or {}).items()})

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, *, prefix: str = "") -> States:
        """Build states from a frame with columns arg0…arg5, cut and memory (see ``schema.CONTINUATIONS``)."""
        columns = tuple(_column(frame.get_column(prefix + name)) for name in ARGS)
        cut = None
        if not prefix and "cut" in frame.columns:
            s = frame.get_column("cut")
            cut = (s.fill_null(0) if s.null_count() else s).to_numpy()
        return cls(columns, _memory(frame.get_column(prefix + "memory")), cut)


def _column(s: pl.Series) -> Column:
    """Turn a series into values and a mask; most are wholly recorded or not at all, which needs no look at each value."""
    n, missing = len(s), s.null_count()
    if missing == n:
        return Column(np.zeros(n, np.uint64), np.zeros(n, bool))
    if not missing:
        return Column(s.to_numpy(), np.ones(n, bool))
    return Column(s.fill_null(0).to_numpy(), s.is_not_null().to_numpy())


def _memory(series: pl.Series) -> dict[str, Column]:
    """Turn a list of (field, value) into a column for each field; the last of a doubled field wins."""
    import polars as pl

    n = len(series)
    if series.null_count() == n:
        return {}
    rows = (
        pl.DataFrame({"row": pl.int_range(n, eager=True, dtype=pl.UInt32), "memory": series})
        .filter(pl.col("memory").list.len() > 0)
        .explode("memory")
        .unnest("memory")
        .drop_nulls()
    )
    out: dict[str, Column] = {}
    for (name,), part in rows.group_by("field", maintain_order=True):
        value, known = np.zeros(n, np.uint64), np.zeros(n, bool)
        index = part.get_column("row").to_numpy()
        value[index] = part.get_column("value").to_numpy()
        known[index] = True
        out[str(name)] = Column(value, known)
    return out
