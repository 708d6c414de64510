"""What one release makes of every recorded call, and the first record that the model cannot explain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.reading import operations
from xtrace.replay.states import States, nullable

if TYPE_CHECKING:
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
        unknown: entries of hypercalls without facts. counts: entries by status.
    """

    release: str
    divergence: Divergence | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, stitched: Stitched) -> pl.DataFrame:
        """Return rows of ``ACCOUNT`` for one batch."""
        rows = stitched.entries.filter(pl.col("kind") != "return").with_row_index("_row")
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
        name = facts.hypercall_names().get(op, str(op))
        # A call of something that the release does not have is explained: it fails. A continuation of it, or one that
        # succeeded, is not.
        bad = (
            np.isin(read.status, (hv.ABSENT, hv.UNMATCHED))
            & part.select(pl.col("continuation").is_not_null() | (pl.col("returned") >= 0).fill_null(False)).to_series().to_numpy()
        )
        if read.hypercall.status == "absent":
            self._note(part, bad, f"{name} is called", f"{name} is not in the {xen.caller} hypercall table of {self.release}")
        else:
            numbers = read.number[bad]
            self._note(part, bad, f"{name} with sub-operation {numbers[0] if len(numbers) else '?'}",
                       f"{self.release} has no such sub-operation for {xen.caller}")  # fmt: skip
        back = read.progress.known & read.total.known & (read.progress.value > read.total.value)
        self._note(part, back, f"{name} with progress beyond its total", "progress between 0 and the total")
        # What Xen left must be what the model leaves for the same call and the same progress.
        begun = issued.args[0].known | issued.args[1].known
        rows = np.flatnonzero(begun & (read.status == hv.MODELLED) & read.progress.known & (read.special < 0))
        if not len(rows):
            return
        left = xen.preempt(op, issued.take(rows), read.progress.value[rows])
        seen = states.take(rows)
        wrong = np.zeros(len(part), bool)
        detail: dict[int, str] = {}
        for k in range(6):
            a, b = left.args[k], seen.args[k]
            differ = a.known & b.known & (a.value != b.value)
            for i in np.flatnonzero(differ)[:1]:
                detail.setdefault(int(rows[i]), f"arg{k} = {int(a.value[i]):#x}, not {int(b.value[i]):#x}")
            wrong[rows[differ]] = True
        for i in np.flatnonzero(wrong)[:1]:
            self._note(part, wrong, f"a continuation of {name}", detail.get(int(i), "other registers"))

    def _note(self, part: pl.DataFrame, rows: np.ndarray[tuple[int], np.dtype[np.bool_]], what: str, expected: str) -> None:
        if not rows.any():
            return
        row = part.row(int(np.flatnonzero(rows)[0]), named=True)
        if self.divergence is None or row["seq"] < self.divergence.seq:
            self.divergence = Divergence(row["seq"], row["offset"], row["line"], what, expected)
