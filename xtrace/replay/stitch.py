"""Stitching entries into calls, batch by batch, and finding the continuations among them.

Evidence, strongest first (DESIGN §2):

* ``proved``: the record's own content (flag bit, non-zero continuation bits, an index in guest memory, the number 49), or a
  stopped vCPU on the hypercall instruction of a call in progress;
* ``inferred``: arithmetic between two entries of one vCPU (count down by what was done, pointer up by as much), an entry with
  the registers of the stopped vCPU before it, or a stopped vCPU on a hypercall instruction whose call was not seen.

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
from xtrace.replay.links import CODE, DOMCTL, PAGING_DOMCTL_CONT, Pace
from xtrace.replay.reading import MULTICALL
from xtrace.replay.states import nullable
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
_CARRIED: Final = pl.Schema(
    {
        **EVENTS,
        "epoch": pl.UInt32(),
        "call": pl.UInt64(),
        "subs": pl.UInt32(),  # sub-calls that ran on its vCPU since
        "irets": pl.UInt32(),  # irets that its vCPU made since
        "multi": pl.Int8(),
        **_ISSUED,
    }
)


@dataclass(slots=True)
class Stitched:
    """What one batch yields.

    Attributes:
        entries: the batch's hypercall, vmmcall, subcall, sample and return rows (``schema.EVENTS``) with ``call`` (number of
            the logical call, null for what belongs to none), ``reentry`` (the row continues that call), ``by`` (what shows it, or
            that a sub-call or sample is a continuation), ``marked`` (its own content shows a continuation), ``number`` (of the
            sub-operation) and ``total`` (units that it asks for).
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
    _pace: Pace = field(default_factory=Pace)
    _tail: pl.DataFrame = field(default_factory=lambda: empty(_CARRIED))

    def feed(self, events: pl.DataFrame) -> Stitched:
        """Take one batch of events in time order; callers must be filled in where they can be assumed."""
        rows, lost = self._rows(events)
        old, names = len(self._tail), [*EVENTS.names(), "epoch"]
        table = pl.concat([self._tail.select(names), rows]) if old else rows
        kind = table.get_column("kind").to_physical().to_numpy()
        op = table.get_column("op").fill_null(0xFFFFFFFF).to_numpy()
        entry = (kind == CODE["hypercall"]) | (kind == CODE["vmmcall"])
        sub, sample, ret = kind == CODE["subcall"], kind == CODE["sample"], kind == CODE["return"]
        key = links.keys(table)
        marks = links.marks(self.source, table, entry | sub | sample)
        linked, guessed, stood, start, multi, subs, irets = self._links(table, old, key, op, entry, sub, ret, marks)
        call = self._calls(old, entry, linked, start)
        owner, before = links.fill(np.where(entry, np.arange(len(table)), -1), entry | ret, key)
        owner = np.where(ret, before, owner)
        owner = np.where(sub & (op[np.maximum(owner, 0)] != MULTICALL), -1, owner)
        # What was lost, or the time that stepped back, may hide the end of that call.
        segment, epoch = (table.get_column(c).fill_null(0).to_numpy() for c in ("segment", "epoch"))
        o = np.maximum(owner, 0)
        owner = np.where((segment == segment[o]) & (epoch == epoch[o]), owner, -1)
        call = np.where(entry, call, np.where(owner >= 0, call[np.maximum(owner, 0)], -1))
        resumed = _resumed(sub, op, key, multi) & (owner >= 0) & (multi[np.maximum(owner, 0)] == 2)
        proved, inferred = _evidence(table, op, entry, sub, sample, marks, linked, owner, resumed)
        proved[:old] = inferred[:old] = False
        self.proved += int(proved.sum())
        self.inferred += int(inferred.sum())
        self._epoch = lost
        table = table.with_columns(
            nullable("call", call.astype(np.uint64), call >= 0),
            pl.Series("subs", subs.astype(np.uint32)),
            pl.Series("irets", irets.astype(np.uint32)),
            pl.Series("multi", multi),
        )
        # A stopped vCPU may stand in a later call whose entry was not recorded: one of another hypercall shows it.
        o = np.maximum(owner, 0)
        own = (op == op[o]) | ((op == PAGING_DOMCTL_CONT) & (op[o] == DOMCTL))
        begin = np.where(entry, start, np.where(sample & (owner >= 0) & own, start[o], -1))
        hit = np.flatnonzero(proved | inferred)
        evidence = pl.Series("evidence", np.where(proved[hit], "proved", "inferred")).cast(CONTINUATIONS["evidence"])
        by = _by(marks.marked | sample | stood, guessed, proved | inferred)
        continuations = pl.concat(
            [table[hit], self._issued(table, old, begin[hit], marks.marked), evidence.to_frame(), by[hit].to_frame()],
            how="horizontal",
        ).select(CONTINUATIONS.names())
        keep = self._keep(len(table), key, op, entry, sub, ret, marks, links.continuing(self.source, table, entry))
        tail = pl.concat([table[keep], self._issued(table, old, begin[keep], marks.marked)], how="horizontal")
        self._tail = tail.select(_CARRIED.names())
        entries = table[old:].with_columns(
            pl.Series("reentry", (entry & linked)[old:]),
            by[old:],
            pl.Series("marked", marks.marked[old:]),
            nullable("number", marks.number[old:], marks.number[old:] >= 0),
            nullable("total", marks.total[old:], marks.totalled[old:]),
        )
        return Stitched(entries, continuations)

    def _rows(self, events: pl.DataFrame) -> tuple[pl.DataFrame, int]:
        """Return the rows that take part, each with the number of losses before it, and that number at the end."""
        kind = events.get_column("kind").to_physical().to_numpy()
        lost = kind == CODE["lost"]
        if lost.any():
            epoch = (np.cumsum(lost) + self._epoch).astype(np.uint32)
            last = int(epoch[-1])
        else:
            epoch, last = np.full(len(events), self._epoch, np.uint32), self._epoch
        rows = events.with_columns(pl.Series("epoch", epoch))
        takes = np.isin(kind, [CODE[k] for k in _KINDS])
        return (rows if takes.all() else rows.filter(pl.Series(takes))), last

    def _links(
        self, table: pl.DataFrame, old: int, key: npt.NDArray[np.uint32], op: npt.NDArray[np.uint32], entry: Mask,
        sub: Mask, ret: Mask, marks: Marks,
    ) -> tuple[Mask, Mask, Mask, Rows, npt.NDArray[np.int8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # fmt: skip
        """Return which entries continue another, those by sequence or a sample, each chain's first row, and what ran since."""
        n = len(table)
        redirected = entry & (op == PAGING_DOMCTL_CONT)
        some = np.flatnonzero(redirected | (entry & ((marks.kind > 0) | links.continuing(self.source, table, entry))))
        slot = _slot(op)
        before, ranked = links.previous(some, key, slot)
        p = np.maximum(before, 0)
        neighbour = np.full(n, -1, np.intp)
        iret = entry & links.is_iret(op)
        real = np.flatnonzero(entry & ~iret)
        neighbour[real] = links.previous(real, key)[0]
        # Sub-calls and irets of the batches before are in what was carried already.
        new = np.arange(n) >= old
        ran, returned, landed = _counts(sub & new, key), _counts(ret, key), _counts(iret & new, key)
        carried, crossed = np.zeros(n, np.int64), np.zeros(n, np.int64)
        carried[:old] = self._tail.get_column("subs").fill_null(0).to_numpy()
        crossed[:old] = self._tail.get_column("irets").fill_null(0).to_numpy()
        subs = np.where(before >= 0, ran[0][some] - ran[0][p] + carried[p], 0)
        once = landed[0][some] - landed[0][p] + crossed[p] == 1
        segment, epoch = (table.get_column(c).fill_null(0).to_numpy() for c in ("segment", "epoch"))
        open_ = (segment[some] == segment[p]) & (epoch[some] == epoch[p]) & (returned[0][some] == returned[0][p])
        soon = self._landings(table, old, key, entry | ret, iret, segment, epoch)
        rip = table.get_column("rip")
        there, known = rip.fill_null(0).to_numpy(), rip.is_not_null().to_numpy()
        soon = soon[some] & once & ((there[some] == there[p]) | ~known[some] | ~known[p])
        hit, guess = links.link(marks, some, op[some], before, neighbour[some] == before, open_, subs, soon)
        # A stopped vCPU stood on the instruction of that call with these very registers.
        stands = _stood(table, key, op, (entry & ~iret) | ret, entry)[some] & (neighbour[some] == before) & open_ & (before >= 0)
        # Xen alone issues that number, for a domctl that it left; a domctl behind it is a new one.
        stands |= redirected[some] & (neighbour[some] == before) & open_ & (before >= 0)
        hit, guess = (x & ~(redirected[p] & ~redirected[some]) for x in (hit, guess))
        hit, guess = (hit | guess | stands) & (some >= old), guess & ~stands & (some >= old)
        linked, guessed, stood = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        linked[some], guessed[some], stood[some] = hit, guess, stands & (some >= old)
        # 1: re-entered between two entries of the multicall; 2: its last sub-call was preempted and runs again.
        done = (marks.amount[p] - marks.amount[some]).astype(np.int64)
        multi = np.zeros(n, np.int8)
        multi[:old] = self._tail.get_column("multi").to_numpy()
        back = np.where(hit & ~guess & (op[some] == MULTICALL), np.where(subs == done + 1, 2, 1), 0)
        multi[some] = np.where(some >= old, back, multi[some])
        start = np.arange(n)
        if len(ranked):
            at = np.maximum.accumulate(np.where(linked[ranked], 0, np.arange(len(ranked))))
            start[ranked] = ranked[at]
        # What each row has seen run since, for the next batch.
        since = np.where(op == MULTICALL, ran[1][key] - ran[0] + carried, 0)
        return linked, guessed, stood, start, multi, since, landed[1][key] - landed[0] + crossed

    def _landings(
        self, table: pl.DataFrame, old: int, key: npt.NDArray[np.uint32], rows: Mask, iret: Mask,
        segment: npt.NDArray[np.uint32], epoch: npt.NDArray[np.uint32],
    ) -> Mask:  # fmt: skip
        """Say which entries follow an iret of their vCPU as fast as nothing else does in this trace."""
        out = np.zeros(len(table), bool)
        some = np.flatnonzero(rows)
        before, _ = links.previous(some, key)
        p = np.maximum(before, 0)
        pcpu = table.get_column("pcpu").fill_null(0).to_numpy()
        tsc, timed = table.get_column("tsc").fill_null(0).to_numpy(), table.get_column("tsc").is_not_null().to_numpy()
        counts = (before >= 0) & iret[p] & (some >= old) & (pcpu[some] == pcpu[p]) & timed[some] & timed[p]
        counts &= (segment[some] == segment[p]) & (epoch[some] == epoch[p]) & (tsc[some] > tsc[p])
        gap = np.where(counts, tsc[some] - tsc[p], np.uint64(0))
        out[some] = self._pace.within(gap, counts)
        return out

    def _calls(self, old: int, entry: Mask, linked: Mask, start: Rows) -> npt.NDArray[np.int64]:
        """Number the logical calls in time order."""
        new = entry & ~linked
        new[:old] = False
        call = np.where(new, self.calls + np.cumsum(new) - 1, -1).astype(np.int64)
        call[:old] = self._tail.get_column("call").cast(pl.Int64).fill_null(-1).to_numpy()
        self.calls += int(new.sum())
        return np.where(entry, call[start], -1)

    def _issued(self, table: pl.DataFrame, old: int, begin: Rows, marked: Mask) -> pl.DataFrame:
        """Return the call as first made for some rows: their chain's first entry, unless that was a continuation already.

        Args:
            table: the batch behind the carried rows. old: how many of them are carried.
            begin: first row of the chain of each row asked for; −1 is none.
            marked: rows that are continuations by their own content.
        """
        seen = (begin >= 0) & ((begin < old) | ~marked[np.maximum(begin, 0)])
        chosen = nullable("", begin.astype(np.uint32), seen)
        own = table.select(
            pl.col("seq").gather(chosen).alias("issued_seq"),
            *(pl.col(a).gather(chosen).alias(f"issued_{a}") for a in ARGS),
            pl.col("memory").gather(chosen).alias("issued_memory"),
        )
        if not old:
            return own
        # A chain that began in an earlier batch: what was carried says how.
        before = nullable("", np.minimum(begin, old - 1).astype(np.uint32), seen & (begin < old))
        earlier = self._tail.select(pl.col(list(_ISSUED)).gather(before))
        mask = pl.Series(begin < old)
        return pl.select(*(pl.when(mask).then(earlier.get_column(c)).otherwise(own.get_column(c)).alias(c) for c in _ISSUED))

    def _keep(
        self,
        n: int,
        key: npt.NDArray[np.uint32],
        op: npt.NDArray[np.uint32],
        entry: Mask,
        sub: Mask,
        ret: Mask,
        marks: Marks,
        continuing: Mask,
    ) -> Rows:
        """Choose the last rows of every vCPU that a later row may be compared with."""
        keep = np.zeros(n, bool)
        slot = _slot(op)
        real = entry & ~links.is_iret(op)
        # The last is a sample, or stands behind one and hides it.
        for mask in (real, entry | ret, ret, sub, ~(sub | (entry & ~real))):
            rows = np.flatnonzero(mask)
            keep[rows[_last(key[rows])]] = True
        rows = np.flatnonzero(entry & ((marks.kind > 0) | continuing | (op == PAGING_DOMCTL_CONT)))
        keep[rows[_last(key[rows], slot[rows])]] = True
        return np.flatnonzero(keep)


def _by(explicit: Mask, guessed: Mask, any_: Mask) -> pl.Series:
    """Name what shows that rows are continuations; null for the others."""
    word = np.where(explicit, 0, np.where(guessed, 2, 1)).astype(np.uint32)
    return (
        nullable("by", word, any_)
        .cast(pl.String)
        .replace_strict({"0": "explicit", "1": "arithmetic", "2": "sequence"}, default=None)
        .cast(CONTINUATIONS["by"])
        .alias("by")
    )


def _counts(mark: Mask, key: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return how many marked rows each row has before it in its key, itself included, and the sum for each key."""
    n, keys = len(mark), int(key.max(initial=0)) + 1
    if not mark.any():
        return np.zeros(n, np.int64), np.zeros(keys, np.int64)
    order = links.by_group(key)
    count = np.empty(n, np.int64)
    count[order] = np.cumsum(mark[order])
    last = np.zeros(keys, np.int64)
    last[key[order]] = count[order]
    return count, last


def _last(*group: npt.NDArray[np.uint32]) -> Rows:
    """Return the last row of each group."""
    order = links.by_group(*group)
    if not len(order):
        return order
    change = np.zeros(len(order) - 1, bool)
    for g in group:
        change |= g[order[1:]] != g[order[:-1]]
    last: Rows = order[np.append(change, True)]
    return last


def _slot(op: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return where calls that may go on as one another stand together: their number, and a domctl's for what Xen makes of one."""
    return np.where(op == PAGING_DOMCTL_CONT, DOMCTL, np.minimum(op, 64)).astype(np.uint32)


def _stood(table: pl.DataFrame, key: npt.NDArray[np.uint32], op: npt.NDArray[np.uint32], ends: Mask, entry: Mask) -> Mask:
    """Say which entries repeat the registers of a sample on the hypercall instruction; ``ends``: rows after which it is past."""
    sample = (table.get_column("kind") == "sample").to_numpy()
    on = table.get_column("on_insn").fill_null(value=False).to_numpy() & sample
    out = np.zeros(len(table), bool)
    if not on.any():
        return out
    rows = np.flatnonzero(ends | sample)
    before, _ = links.previous(rows, key)
    hit = (before >= 0) & entry[rows] & on[np.maximum(before, 0)] & (op[rows] == op[np.maximum(before, 0)])
    rows, before = rows[hit], before[hit]
    same, told = np.ones(len(rows), bool), np.zeros(len(rows), bool)
    for name in ("segment", "epoch", *ARGS):
        column = table.get_column(name)
        value, known = column.fill_null(0).to_numpy(), column.is_not_null().to_numpy()
        both = known[rows] & known[before]
        same &= ~both | (value[rows] == value[before])
        told |= both & name.startswith("arg")
    out[rows] = same & told
    return out


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
    # A recorder that samples where hypercalls are made, and does not say whether this one stands there (ftrace).
    somewhere = insn.is_null().to_numpy() & table.get_column("rip").is_not_null().to_numpy()
    inferred = (entry & linked) | resumed | (sample & ~off & (on | in_call | somewhere))
    return proved, inferred & ~proved
