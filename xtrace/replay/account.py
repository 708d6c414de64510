"""What one release makes of every recorded call, and the first record that the model cannot explain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.reading import operations
from xtrace.replay.states import States, nullable
from xtrace.replay.unexplained import unexplained

if TYPE_CHECKING:
    from xtrace.replay import hypervisor as hv
    from xtrace.replay.stitch import Stitched

__all__ = ("ACCOUNT", "Account", "Divergence")

#: One row per recorded entry, sub-call or sample.
ACCOUNT: Final = pl.Schema(
    {
        "seq": pl.UInt64(),
        "offset": pl.UInt64(),
        "line": pl.UInt64(),
        "tsc": pl.UInt64(),
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "caller": pl.String(),
        "kind": pl.String(),
        "op": pl.UInt32(),
        "hypercall": pl.String(),
        "subop": pl.String(),
        "progress": pl.UInt64(),
        "remaining": pl.UInt64(),
        "total": pl.UInt64(),
        "unit": pl.String(),
        "status": pl.String(),  # modelled, never (continues), unknown (no facts), absent, unmatched, unrecorded (arguments)
        "continuation": pl.String(),  # proved, inferred or null
        "call": pl.UInt64(),
    }
)

_STATUS: Final = ("modelled", "never", "unknown", "absent", "unmatched", "unrecorded")


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first record that the model cannot explain, and what it expected instead."""

    seq: int
    offset: int | None
    line: int | None
    what: str
    expected: str


@dataclass(slots=True)
class Account:
    """Reads stitched batches as ``release`` does.

    Attributes:
        divergence: the first record that no behaviour of the release explains.
        counts: entries by status.
        nameless: entries left out since their hypercall's number is not recorded.
        elsewhere: register samples left out since the vCPU is known to stand on no hypercall instruction.
    """

    release: str
    divergence: Divergence | None = None
    counts: dict[str, int] = field(default_factory=dict)
    nameless: int = 0
    elsewhere: int = 0

    def take(self, stitched: Stitched) -> pl.DataFrame:
        """Return rows of ``ACCOUNT`` for one batch."""
        # The registers of a vCPU that stands elsewhere are no call.
        elsewhere = (pl.col("kind") == "sample") & ~pl.col("on_insn").fill_null(value=True)
        self.elsewhere += int(stitched.entries.select(elsewhere.sum()).item())
        rows = stitched.entries.filter((pl.col("kind") != "return") & ~elsewhere).with_row_index("_row")
        self.nameless += rows.get_column("op").null_count()
        evidence = stitched.continuations.select("seq", pl.col("evidence").cast(pl.String).alias("continuation"))
        issued = stitched.continuations.select("seq", "^issued_.*$")
        returned = (
            stitched.entries.filter(pl.col("kind") == "return")
            .select("call", pl.col("result").alias("returned"))
            .drop_nulls()
            .unique("call", keep="last")
        )
        rows = rows.join(returned, on="call", how="left", maintain_order="left").join(
            evidence, on="seq", how="left", maintain_order="left"
        )
        parts = []
        for (op, caller), part in rows.group_by("op", "caller", maintain_order=True):
            if op is not None:
                parts.append(self._part(part.join(issued, on="seq", how="left", maintain_order="left"),
                                        int(str(op)), str(caller)))  # fmt: skip
        if not parts:
            return pl.DataFrame(schema=ACCOUNT)
        out = pl.concat(parts).sort("_row")
        for name, n in out.group_by("status").len().iter_rows():
            self.counts[name] = self.counts.get(name, 0) + n
        return out.select(ACCOUNT.names()).cast(ACCOUNT)

    def _part(self, part: pl.DataFrame, op: int, caller: str) -> pl.DataFrame:
        xen = Hypervisor(self.release, caller)
        states = States.from_frame(part)
        issued = States.from_frame(part, prefix="issued_")
        read = xen.decode(op, states, issued)
        which = np.where(read.which >= 0, read.which, len(read.behaviours))
        units = pl.Series([*(b.unit for b in read.behaviours), None], dtype=pl.String).gather(which)
        frame = part.select("_row", "seq", "offset", "line", "tsc", "domid", "vcpu", pl.col("caller").cast(pl.String),
                            pl.col("kind").cast(pl.String), "op", "call", "continuation").with_columns(
            pl.lit(read.hypercall.name).alias("hypercall"),
            operations(read).alias("subop"),
            *(
                nullable(n, c.value, c.known)
                for n, c in (("progress", read.progress), ("remaining", read.remaining), ("total", read.total))
            ),
            units.alias("unit"),
            pl.Series(_STATUS).gather(read.status).alias("status"),
        )  # fmt: skip
        self._look(part, op, xen, read, states, issued)
        return frame

    def _look(self, part: pl.DataFrame, op: int, xen: Hypervisor, read: hv.Decoded, states: States, issued: States) -> None:
        """Keep the earliest row that cannot be explained."""
        shown = (
            part.select(pl.col("continuation").is_not_null() | (pl.col("returned") >= 0).fill_null(False)).to_series().to_numpy()
        )
        for reason in unexplained(xen, op, read, states, issued, shown):
            self._note(part, reason.rows, reason.what, reason.expected)

    def _note(self, part: pl.DataFrame, rows: np.ndarray[tuple[int], np.dtype[np.bool_]], what: str, expected: str) -> None:
        if not rows.any():
            return
        row = part.row(int(np.flatnonzero(rows)[0]), named=True)
        if self.divergence is None or row["seq"] < self.divergence.seq:
            self.divergence = Divergence(row["seq"], row["offset"], row["line"], what, expected)
