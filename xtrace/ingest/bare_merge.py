"""Merging the rows of several vCPUs, each read in its own pass over the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("merged",)


def merged(streams: list[Iterator[pl.DataFrame]]) -> Iterator[pl.DataFrame]:
    """Merge streams that are each ordered by (boot, top) into one such order; equal keys go by vCPU."""
    keys = ("boot", "top", "rank")
    held: list[pl.DataFrame | None] = [None] * len(streams)
    open_ = [True] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            if open_[i] and held[i] is None:
                held[i] = next(stream, None)
                open_[i] = held[i] is not None
        ready = [frame for frame in held if frame is not None]
        if not ready:
            return
        # Of every stream that may go on, something is held: what is not above the lowest of their last keys is final.
        ends = [frame.select(keys).row(-1) for i, frame in enumerate(held) if frame is not None and open_[i]]
        boot, top, rank = min(ends)
        final = (
            (pl.col("boot") < boot)
            | ((pl.col("boot") == boot) & (pl.col("top") < pl.lit(top, pl.UInt64)))
            | ((pl.col("boot") == boot) & (pl.col("top") == pl.lit(top, pl.UInt64)) & (pl.col("rank") <= rank))
        )
        out = []
        for i, frame in enumerate(held):
            if frame is not None:
                out.append(frame.filter(final))
                rest = frame.filter(~final)
                held[i] = rest if len(rest) else None
        yield pl.concat(out).sort(keys, maintain_order=True)
