"""Columns of numbers, as NumPy has them, put into a frame of ``schema.EVENTS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from xtrace import schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("Columns",)


class Columns:
    """Gathers columns of numbers, gives a frame of ``schema.EVENTS``."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._series: dict[str, pl.Series] = {}
        self._exprs: list[pl.Expr] = []

    def put(self, name: str, values: NDArray[Any], there: NDArray[np.bool_] | None = None) -> None:
        """Add a column; null where there is no value. Enumerations come as the numbers of their names."""
        dtype = schema.EVENTS[name]
        some = there is None or bool(there.any())
        if not some:
            self._exprs.append(pl.lit(None, dtype).alias(name))
            return
        if dtype == pl.Int64:
            values = values.view(np.int64)
        self._series[name] = pl.Series(name, values)
        value = pl.col(name)
        if there is not None and not there.all():
            self._series[f"{name}?"] = pl.Series(f"{name}?", there)
            value = pl.when(f"{name}?").then(value)
        if isinstance(dtype, pl.Enum):
            value = pl.lit(pl.Series(dtype.categories, dtype=dtype)).gather(value)
        self._exprs.append(value.cast(dtype).alias(name))

    def frame(self, **more: pl.Series) -> pl.DataFrame:
        """Return the frame, with further columns as they are; what is missing is null."""
        done = {e.meta.output_name() for e in self._exprs} | set(more)
        missing = [pl.lit(None, dtype).alias(name) for name, dtype in schema.EVENTS.items() if name not in done]
        frame = pl.DataFrame({**self._series, **{f"={name}": series for name, series in more.items()}})
        return frame.select(*self._exprs, *(pl.col(f"={name}").alias(name) for name in more), *missing).select(
            schema.EVENTS.names()
        )
