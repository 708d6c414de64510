"""Which ABI a caller speaks, where the records do not say it: filled in from what is known, and said aloud.

A V2 hypercall record does not tell 32-bit from 64-bit callers, a sub-call record not even PV from HVM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from xtrace.schema import CALLERS, EVENTS, KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

__all__ = ("CallerFill",)

_PV, _HVM = "pv64", "hvm64"


@dataclass(slots=True)
class CallerFill:
    """Fills the ``caller`` column, batch by batch.

    Args:
        everyone: caller of all domains, as the user says.
        domains: caller of single domains, as the user, the sidecar or the recording says.

    Attributes:
        assumed: (domid, caller) that nothing said and that were assumed.
        used: (domid, caller) seen.
    """

    everyone: str | None = None
    domains: Mapping[int, str] = field(default_factory=dict)
    assumed: set[tuple[int | None, str]] = field(default_factory=set)
    used: set[tuple[int | None, str]] = field(default_factory=set)
    _last: pl.DataFrame | None = None

    def fill(self, events: pl.DataFrame) -> pl.DataFrame:
        """Return the batch with every hypercall, sub-call and sample given a caller."""
        known = pl.col("caller")
        told: pl.Expr = pl.lit(None, dtype=EVENTS["caller"])
        if self.domains:
            told = pl.col("domid").replace_strict(dict(self.domains), default=None, return_dtype=EVENTS["caller"])
        if self.everyone:
            # A domain named on its own goes before the one word for all.
            told = pl.coalesce(told, pl.lit(self.everyone, dtype=EVENTS["caller"]))
        out = events.with_columns(pl.coalesce(told, known).alias("caller"))
        open_ = out.get_column("caller").is_null()
        if open_.any():
            by_kind = (
                pl.when(pl.col("kind") == "hypercall").then(pl.lit(_PV)).when(pl.col("kind") == "vmmcall").then(pl.lit(_HVM))
            ).cast(EVENTS["caller"])
            out = out.with_columns(pl.coalesce("caller", by_kind).alias("caller"))
            if not {c for _, c in self.used | _pairs(out)} <= {_PV}:
                out = self._follow(out)
            out = out.with_columns(
                pl.when(pl.col("kind").is_in(["subcall", "sample", "return"]))
                .then(pl.coalesce("caller", pl.lit(_PV, dtype=EVENTS["caller"])))
                .otherwise("caller")
                .alias("caller")
            )
            self.assumed |= _pairs(out, open_.to_numpy())
        self.used |= _pairs(out)
        return out

    def _follow(self, events: pl.DataFrame) -> pl.DataFrame:
        """Give sub-calls the caller of their multicall: of the last entry of their vCPU."""
        entry = pl.col("kind").is_in(["hypercall", "vmmcall"])
        last = events.filter(entry).group_by("domid", "vcpu").agg(pl.col("caller").last())
        carried = self._last
        self._last = last if carried is None else pl.concat([carried, last]).group_by("domid", "vcpu").agg(pl.col("caller").last())
        if not events.select((pl.col("kind") == "subcall") & pl.col("caller").is_null()).to_series().any():
            return events
        rows = events.select("domid", "vcpu", "kind", "caller")
        old = 0
        if carried is not None:
            rows = pl.concat([carried.with_columns(kind=pl.lit("hypercall", dtype=EVENTS["kind"])).select(rows.columns), rows])
            old = len(carried)
        filled = rows.select(pl.when(entry).then("caller").forward_fill().over("domid", "vcpu")).to_series()[old:]
        return events.with_columns(
            pl.when(pl.col("kind") == "subcall").then(pl.coalesce("caller", filled)).otherwise("caller").alias("caller")
        )


def _pairs(rows: pl.DataFrame, some: npt.NDArray[np.bool_] | None = None) -> set[tuple[int | None, str]]:
    """Return the (domid, caller) of the entries among the rows."""
    kind = rows.get_column("kind").to_physical().to_numpy()
    takes = np.isin(kind, [KINDS.index(k) for k in ("hypercall", "vmmcall", "subcall", "sample")])
    if some is not None:
        takes &= some
    domid = rows.get_column("domid").cast(pl.UInt32).fill_null(0x10000).to_numpy()
    caller = rows.get_column("caller").to_physical().fill_null(len(CALLERS)).to_numpy()
    value = (domid.astype(np.uint64) << np.uint64(8) | caller.astype(np.uint64))[takes]
    if not len(value):
        return set()
    starts = np.concatenate([[True], value[1:] != value[:-1]])
    return {
        (None if int(v) >> 8 == 0x10000 else int(v) >> 8, CALLERS[int(v) & 0xFF])
        for v in np.unique(value[starts])
        if int(v) & 0xFF < len(CALLERS)
    }
