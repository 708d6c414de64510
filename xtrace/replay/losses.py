"""What a recording lost or never wrote, gathered from its events: the part of the loss ledger that has a time or a hypercall."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.schema import ARGS, KINDS

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ("Losses", "Span")

_CODE: Final = {name: i for i, name in enumerate(KINDS)}
_ENTRIES: Final = [_CODE[k] for k in ("hypercall", "vmmcall", "subcall")]

#: Spans kept to be shown; later ones are counted.
KEEP: Final = 20


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch in which the recorder dropped records.

    Attributes:
        pcpu: where; None where the input does not say.
        first_tsc: when dropping began; None where the recorder does not say (before Xen 3.4).
        last_tsc: when recording went on.
        records: how many were dropped.
        offset, line: the record that says so.
    """

    pcpu: int | None
    first_tsc: int | None
    last_tsc: int | None
    records: int | None
    offset: int | None
    line: int | None


@dataclass(slots=True)
class Losses:
    """Losses of one input.

    Args:
        intervals: keep every span's bounds, for :meth:`overlaps` (memory grows with the number of losses).

    Attributes:
        spans: the first `KEEP`.
        count: how many there are.
        ticks: TSC ticks that they cover, each pCPU's on its own; None while no span has a known begin.
        without_arguments: hypercall number -> entries of it of which no argument was recorded.
        unknown_vcpus: entries whose domain or vCPU is unknown.
    """

    intervals: bool = False
    spans: list[Span] = field(default_factory=list)
    count: int = 0
    ticks: int | None = None
    without_arguments: dict[int, int] = field(default_factory=dict)
    unknown_vcpus: int = 0
    _bounds: list[npt.NDArray[np.uint64]] = field(default_factory=list)

    def feed(self, events: pl.DataFrame) -> None:
        """Take one batch of ``schema.EVENTS``."""
        kind = events.get_column("kind").to_physical().to_numpy()
        lost = np.flatnonzero(kind == _CODE["lost"])
        if len(lost):
            self._lost(events[lost])
        entry = np.isin(kind, _ENTRIES)
        if not entry.any():
            return
        rows = events if entry.all() else events.filter(pl.Series(entry))
        unknown = pl.col("domid").is_null() | pl.col("vcpu").is_null()
        self.unknown_vcpus += int(rows.select(unknown.sum()).item())
        bare = rows.filter(pl.all_horizontal(pl.col(a).is_null() for a in ARGS) & pl.col("op").is_not_null())
        for op, n in bare.get_column("op").value_counts().iter_rows():
            self.without_arguments[op] = self.without_arguments.get(op, 0) + n

    def _lost(self, rows: pl.DataFrame) -> None:
        first, last = rows.get_column("arg0"), rows.get_column("tsc")
        known = rows.filter(first.is_not_null() & last.is_not_null() & (first <= last)).select(first="arg0", last="tsc")
        if len(known):
            self.ticks = (self.ticks or 0) + int((known["last"] - known["first"]).cast(pl.Int128).sum())
        if self.intervals:
            some = rows.filter(last.is_not_null()).select(
                pl.min_horizontal(pl.coalesce("arg0", "tsc"), "tsc").alias("first"), last="tsc"
            )
            self._bounds.append(some.to_numpy())
        self.count += len(rows)
        for row in rows.head(max(KEEP - len(self.spans), 0)).select("pcpu", "arg0", "tsc", "result", "offset", "line").iter_rows():
            self.spans.append(Span(*row))

    def overlaps(self, begin: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Say which windows (TSC, both ends included) some loss falls into."""
        if not self._bounds:
            return np.zeros(len(begin), bool)
        bounds = np.concatenate(self._bounds)
        bounds = bounds[np.argsort(bounds[:, 0], kind="stable")]
        reach = np.maximum.accumulate(bounds[:, 1])  # the latest end among the losses that began by then
        at = np.searchsorted(bounds[:, 0], end, side="right") - 1
        out: npt.NDArray[np.bool_] = (at >= 0) & (reach[np.maximum(at, 0)] >= begin)
        return out
