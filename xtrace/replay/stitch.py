"""Stitching entries into calls, batch by batch, and finding the continuations among them.

Evidence, strongest first (DESIGN §2):

* ``proved``: the record's own content (flag bit, non-zero continuation bits, an index in guest memory, the number 49), or a
  stopped vCPU on the hypercall instruction of a call in progress;
* ``inferred``: arithmetic between two entries of one vCPU (count down by what was done, pointer up by as much), or a stopped
  vCPU on a hypercall instruction whose call was not seen.

Nothing is concluded from the same hypercall being made twice: with a hypercall page every call of one number has one
instruction pointer. Entries are compared per (domid, vcpu) in time order; where the trace does not say who runs, per
pCPU. Nothing is stitched across a TSC that steps back, nor across lost records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.replay import links
from xtrace.replay.links import CODE
from xtrace.replay.reading import MULTICALL
from xtrace.schema import ARGS, CONTINUATIONS, EVENTS, MEMORY, empty

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.replay.links import Marks, Mask, Rows

__all__ = ("Stitched", "Stitcher")

#: Rows that take part in stitching.
_KINDS: Final = ("hypercall", "vmmcall", "subcall", "sample", "return")

_ISSUED: Final = {
    "issued_seq": pl.UInt64(),
    **{f"issued_{a}": pl.UInt64() for a in ARGS},
    "issued_memory": MEMORY,
}

#: What is carried from one batch to the next: the last rows of every vCPU that a later one may continue.
_CARRIED: Final = pl.Schema({**EVENTS, "epoch": pl.UInt32(), "call": pl.UInt64(), "subs": pl.UInt32(), **_ISSUED})


@dataclass(slots=True)
class Stitched:
    """What one batch yields.

    Attributes:
        entries: the batch's hypercall, vmmcall, subcall, sample and return rows (``schema.EVENTS``) with ``call`` (number of
            the logical call, null for what belongs to none), ``reentry`` (the row continues that call), ``marked`` (its own
            content shows a continuation), ``number`` (of the sub-operation) and ``total`` (units that it asks for).
        continuations: rows of ``schema.CONTINUATIONS``.
    """

    entries: pl.DataFrame
    continuations: pl.DataFrame


@dataclass(slots=True)
class Stitcher:
    """Stitches a stream of events.

    Args:
        source: release that decides which bits show a continuation.

    Attributes:
        calls: logical calls so far. proved, inferred: continuations so far.
    """

    source: str
    calls: int = 0
    proved: int = 0
    inferred: int = 0
    _epoch: int = 0
    _tail: pl.DataFrame = field(default_factory=lambda: empty(_CARRIED))

    def feed(self, events: pl.DataFrame) -> Stitched:
        """Take one batch of events in time order; callers must be filled in where they can be assumed."""
        lost = (events.get_column("kind") == "lost").cum_sum().cast(pl.UInt32) + self._epoch
        self._epoch = int(lost[-1]) if len(lost) else self._epoch
        rows = events.with_columns(lost.alias("epoch")).filter(pl.col("kind").is_in(_KINDS))
        old, names = len(self._tail), [*EVENTS.names(), "epoch"]
        table = pl.concat([self._tail.select(names), rows.select(names)]) if old else rows.select(names)
        kind = table.get_column("kind").to_physical().to_numpy()
        op = table.get_column("op").fill_null(0xFFFFFFFF).to_numpy()
        entry = (kind == CODE["hypercall"]) | (kind == CODE["vmmcall"])
        sub, sample = kind == CODE["subcall"], kind == CODE["sample"]
        key = links.keys(table)
        marks = links.marks(self.source, table, entry | sub | sample)
        linked, start, multi, subs = self._links(table, old, key, op, entry, sub, kind == CODE["return"], marks)
        call = self._calls(old, entry, linked, start)
        value = np.where(entry, np.arange(len(table)), -1)
        owner, before = links.fill(value, entry | (kind == CODE["return"]), key)
        owner = np.where(kind == CODE["return"], before, owner)
        owner = np.where(sub & (op[np.maximum(owner, 0)] != MULTICALL), -1, owner)
        call = np.where(entry, call, np.where(owner >= 0, call[np.maximum(owner, 0)], -1))
        proved, inferred = _evidence(table, op, entry, sub, sample, marks, linked, owner, _resumed(sub, op, key, multi))
        proved[:old] = inferred[:old] = False
        self.proved += int(proved.sum())
        self.inferred += int(inferred.sum())
        begin = np.where(entry, start, np.where(sample & (owner >= 0), start[np.maximum(owner, 0)], -1))
        table = pl.concat([table, self._issued(table, old, begin, marks.marked)], how="horizontal").with_columns(
            pl.when(pl.Series(call >= 0)).then(pl.Series(np.maximum(call, 0).astype(np.uint64))).alias("call"),
            pl.Series("reentry", entry & linked),
            pl.Series("marked", marks.marked),
            pl.when(pl.Series(marks.number >= 0)).then(pl.Series(marks.number)).alias("number"),
            pl.when(pl.Series(marks.totalled)).then(pl.Series(marks.total)).alias("total"),
            pl.Series("subs", subs.astype(np.uint32)),
        )
        evidence = pl.Series("evidence", np.where(proved, "proved", "inferred")).cast(CONTINUATIONS["evidence"])
        continuations = table.with_columns(evidence).filter(pl.Series(proved | inferred)).select(CONTINUATIONS.names())
        self._keep(table, key, op, entry, sub, kind, marks)
        return Stitched(table[old:], continuations)

    def _links(
        self, table: pl.DataFrame, old: int, key: npt.NDArray[np.uint32], op: npt.NDArray[np.uint32], entry: Mask,
        sub: Mask, ret: Mask, marks: Marks,
    ) -> tuple[Mask, Rows, npt.NDArray[np.int8], npt.NDArray[np.int64]]:  # fmt: skip
        """Return which entries continue another, the first row of each chain, and what multicalls ran."""
        n = len(table)
        some = np.flatnonzero(entry & (marks.kind > 0))
        slot = np.minimum(op, 64).astype(np.uint32)
        before_some, ranked = links.previous(some, key, slot)
        before = np.full(n, -1, np.intp)
        before[some] = before_some
        p = np.maximum(before, 0)
        real = np.flatnonzero(entry & ~links.is_iret(op))
        neighbour = np.full(n, -1, np.intp)
        neighbour[real] = links.previous(real, key)[0]
        order = links.by_group(key)
        count = np.empty((2, n), np.int64)
        count[0, order], count[1, order] = np.cumsum(sub[order]), np.cumsum(ret[order])
        carried = np.zeros(n, np.int64)
        carried[:old] = self._tail.get_column("subs").fill_null(0).to_numpy()
        subs = np.where(before >= 0, count[0] - count[0][p] + carried[p], 0)
        segment, epoch = (table.get_column(c).fill_null(0).to_numpy() for c in ("segment", "epoch"))
        open_ = (segment == segment[p]) & (epoch == epoch[p]) & (count[1] == count[1][p])
        linked = links.link(marks, op, before, neighbour == before, open_, subs)
        linked[:old] = False
        # 1: re-entered between two entries of the multicall; 2: its last sub-call was preempted and runs again.
        done = np.where(linked, marks.amount[p] - marks.amount, 0).astype(np.int64)
        multi = np.where(linked & (op == MULTICALL), np.where(subs == done + 1, 2, 1), 0).astype(np.int8)
        start = np.arange(n)
        if len(ranked):
            at = np.maximum.accumulate(np.where(linked[ranked], 0, np.arange(len(ranked))))
            start[ranked] = ranked[at]
        # What each multicall row has seen run since, for the next batch.
        last = np.full(int(key.max(initial=0)) + 1, 0, np.int64)
        last[key[order]] = count[0][order]
        return linked, start, multi, np.where(op == MULTICALL, last[key] - count[0] + carried, 0)

    def _calls(self, old: int, entry: Mask, linked: Mask, start: Rows) -> npt.NDArray[np.int64]:
        """Number the logical calls in time order."""
        new = entry & ~linked
        new[:old] = False
        call = np.where(new, self.calls + np.cumsum(new) - 1, -1).astype(np.int64)
        call[:old] = self._tail.get_column("call").cast(pl.Int64).fill_null(-1).to_numpy()
        self.calls += int(new.sum())
        return np.where(entry, call[start], -1)

    def _issued(self, table: pl.DataFrame, old: int, begin: Rows, marked: Mask) -> pl.DataFrame:
        """Return the call as first made for each row: its chain's first entry, unless that was a continuation already."""
        own = table.select(
            pl.col("seq").alias("issued_seq"),
            *(pl.col(a).alias(f"issued_{a}") for a in ARGS),
            pl.col("memory").alias("issued_memory"),
        )
        if old:
            own = pl.concat([self._tail.select(list(_ISSUED)), own[old:]])
        seen = (begin >= 0) & ((begin < old) | ~marked[np.maximum(begin, 0)])
        index = pl.Series(np.where(seen, begin, -1))
        return _gather(own, index)

    def _keep(
        self, table: pl.DataFrame, key: npt.NDArray[np.uint32], op: npt.NDArray[np.uint32], entry: Mask, sub: Mask,
        kind: npt.NDArray[np.uint8], marks: Marks,
    ) -> None:  # fmt: skip
        """Remember the last rows of every vCPU that a later row may be compared with."""
        keep = np.zeros(len(table), bool)
        slot = np.minimum(op, 64).astype(np.uint32)
        for rows in (
            np.flatnonzero(entry & ~links.is_iret(op)),
            np.flatnonzero(entry | (kind == CODE["return"])),
            np.flatnonzero(sub),
        ):
            keep[rows[_last(key[rows])]] = True
        rows = np.flatnonzero(entry & (marks.kind > 0))
        keep[rows[_last(key[rows], slot[rows])]] = True
        self._tail = table.filter(pl.Series(keep)).select(_CARRIED.names())


def _gather(frame: pl.DataFrame, index: pl.Series) -> pl.DataFrame:
    """Take rows by number; −1 gives a row of nulls."""
    chosen = index.set(index < 0, None).cast(pl.UInt32)
    return frame.select(pl.all().gather(pl.lit(chosen)))


def _last(*group: npt.NDArray[np.uint32]) -> Rows:
    """Return the last row of each group."""
    order = links.by_group(*group)
    if not len(order):
        return order
    change = np.zeros(len(order) - 1, bool)
    for g in group:
        change |= g[order[1:]] != g[order[:-1]]
    return order[np.append(change, True)]


def _resumed(sub: Mask, op: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32], multi: npt.NDArray[np.int8]) -> Mask:
    """Return the sub-calls that run again: the first one after a multicall came back for it."""
    back = multi == 2
    rows = np.flatnonzero(sub | (multi > 0))
    before, _ = links.previous(rows, key)
    out = np.zeros(len(sub), bool)
    first = (before >= 0) & sub[rows] & back[np.maximum(before, 0)]
    out[rows[first]] = True
    # Its record repeats the one that was preempted: the same hypercall number.
    subs = np.flatnonzero(sub)
    earlier, _ = links.previous(subs, key)
    same = (earlier >= 0) & (op[subs] == op[np.maximum(earlier, 0)])
    repeated = np.zeros(len(sub), bool)
    repeated[subs[same]] = True
    return out & repeated


def _evidence(
    table: pl.DataFrame, op: npt.NDArray[np.uint32], entry: Mask, sub: Mask, sample: Mask, marks: Marks, linked: Mask,
    owner: Rows, resumed: Mask,
) -> tuple[Mask, Mask]:  # fmt: skip
    """Say which rows are continuations, by their own content or by the sequence."""
    insn = table.get_column("on_insn")
    off = (insn == False).fill_null(False).to_numpy()  # noqa: E712 (a column)
    on = insn.fill_null(False).to_numpy()
    in_call = sample & (owner >= 0) & (op == op[np.maximum(owner, 0)])
    proved = (entry | sub) & marks.marked
    proved |= sample & ~off & (marks.marked | (on & in_call))
    inferred = (entry & linked) | resumed | (sample & ~off & (on | in_call))
    return proved, inferred & ~proved
