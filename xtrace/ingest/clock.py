"""Time stamps of text inputs: TSCs carried from record to record, segments, nanoseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("Clock", "nanoseconds")

#: How many groups of one clock are remembered; later ones share one. No machine has as many vCPUs.
_MAX_CLOCKS: Final = 1 << 20
_SHARED_CLOCK: Final = (1 << 64) - 1


class Clock:
    """Carries the TSC and the segment of each group of records (a pCPU, or a vCPU) from block to block."""

    def __init__(self) -> None:
        """Start with no group seen."""
        self._last = pl.DataFrame(schema={"group": pl.UInt64, "last": pl.UInt64, "base": pl.UInt32})

    def advance(self, group: pl.Series, tsc: pl.Series) -> tuple[pl.Series, pl.Series]:
        """Fill and segment the TSCs of the next rows.

        Args:
            group: UInt64[n], which clock each row follows.
            tsc: UInt64[n], null where the record has none.

        Returns:
            UInt64[n] with nulls filled from the row of that group before (null while there is none), and UInt32[n]
            segments, raised by one where the TSC is below the group's previous one.
        """
        frame = pl.DataFrame({"group": self._bounded(group), "tsc": tsc})
        if not tsc.null_count() and tsc.is_sorted() and not frame["group"].null_count():
            # The usual case of text in time order: only the first row of a group can step back.
            frame = frame.join(self._last, on="group", how="left", maintain_order="left")
            if not (frame["tsc"] < frame["last"]).any():
                frame = frame.with_columns(segment=pl.col("base").fill_null(0))
                return frame["tsc"], self._keep(frame)
            frame = frame.select("group", "tsc")
        frame = (
            frame.join(self._last, on="group", how="left", maintain_order="left")
            .with_columns(tsc=pl.coalesce(pl.col("tsc").forward_fill().over("group"), "last"))
            .with_columns(before=pl.coalesce(pl.col("tsc").shift(1).over("group"), "last"))
            .with_columns(step=(pl.col("tsc") < pl.col("before")).fill_null(value=False).cast(pl.UInt32))
            .with_columns(segment=(pl.col("step").cum_sum().over("group") + pl.col("base").fill_null(0)).cast(pl.UInt32))
        )
        return frame["tsc"], self._keep(frame)

    def _keep(self, frame: pl.DataFrame) -> pl.Series:
        """Remember where each group stands; return the segments."""
        now = frame.select("group", last="tsc", base="segment")
        self._last = pl.concat([self._last, now]).unique("group", keep="last", maintain_order=True)
        return frame["segment"]

    def _bounded(self, group: pl.Series) -> pl.Series:
        seen = self._last["group"]
        if len(seen) + len(group) <= _MAX_CLOCKS:
            return group
        fresh = group.unique(maintain_order=True)
        fresh = fresh.filter(~fresh.is_in(seen.implode()))
        late = fresh.slice(max(0, _MAX_CLOCKS - len(seen)))
        return group.to_frame("g").select(
            pl.when(pl.col("g").is_in(late.implode())).then(pl.lit(_SHARED_CLOCK, pl.UInt64)).otherwise("g").alias("g")
        )["g"]


def nanoseconds(tsc: NDArray[np.uint64], khz: NDArray[np.uint64], known: NDArray[np.bool_]) -> pl.Series:
    """Turn TSCs into nanoseconds since TSC 0.

    Args:
        tsc: uint64[n].
        khz: uint64[n], ticks a millisecond, 0 = unknown, below 2**34.
        known: bool[n], whether there is a TSC.

    Returns:
        Int64[n], null where unknown or beyond 63 bits.
    """
    rate = np.where(khz == 0, np.uint64(1), khz)
    ms, rest = tsc // rate, tsc % rate
    fits = known & (khz != 0) & (ms < np.uint64((1 << 63) // 10**6))
    ns = np.where(fits, ms, 0) * np.uint64(10**6) + rest * np.uint64(10**6) // rate
    return pl.select(pl.when(pl.Series(fits)).then(pl.Series(ns)).cast(pl.Int64, strict=False)).to_series()
