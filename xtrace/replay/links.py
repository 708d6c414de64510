"""Which entry continues which: the vectorised comparisons under ``stitch``.

All arrays have one value for each row of a batch, in time order; row numbers are positions in it, −1 is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.reading import MULTICALL, inner_states
from xtrace.replay.states import States
from xtrace.schema import ARGS, KINDS

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.intp]
    Mask = npt.NDArray[np.bool_]

__all__ = (
    "CODE",
    "DOMCTL",
    "PAGING_DOMCTL_CONT",
    "Marks",
    "Pace",
    "by_group",
    "continuing",
    "fill",
    "keys",
    "link",
    "marks",
    "previous",
)

#: Kind name -> code, as in the events table.
CODE: Final = {name: i for i, name in enumerate(KINDS)}

#: __HYPERVISOR_paging_domctl_cont (arch_1): domctl's redirect, issued by Xen alone (4.3.4, 4.4.2, 4.5 and later).
PAGING_DOMCTL_CONT: Final = 49

#: __HYPERVISOR_domctl, which may go on as that.
DOMCTL: Final = 36

#: __HYPERVISOR_iret ends an upcall on 64-bit PV and may fall between a preemption and its re-entry.
_IRET: Final = 23

#: A count from which on the next smaller one of a neighbour is taken for what is left of it.
_LARGE: Final = np.uint64(64)

#: An upcall's iret lands on the rewound hypercall instruction, so that the next record follows at once. How fast that can
#: be is the least that this trace shows of any record behind an iret, once so many were seen; in the recordings of seven
#: releases and two guests (benchmarks/stitching.py) within four times that nothing else was found but re-entries.
_LANDINGS: Final = 16
_LANDING: Final = np.uint64(4)

_RELATIVE: Final = 1
_FLAGGED: Final = 2
_ABSOLUTE: Final = 3
_CLASS: Final = {
    "advanced": _RELATIVE,
    "count_flag": _FLAGGED,
    "shifted_index": _ABSOLUTE,
    "masked_offset": _ABSOLUTE,
    "guest_structure": _ABSOLUTE,
}


@dataclass(slots=True)
class Marks:
    """What the registers and memory of each row say by themselves, at the source release."""

    marked: Mask  # a continuation by its own content
    kind: npt.NDArray[np.int8]  # 0 not decoded, else relative, flagged or absolute progress
    number: npt.NDArray[np.int64]  # sub-operation
    amount: npt.NDArray[np.uint64]  # units left (relative, flagged) or done (absolute)
    known: Mask  # amount is known
    pointer: npt.NDArray[np.uint64]
    pointed: Mask  # pointer is known
    size: npt.NDArray[np.uint64]  # what the pointer moves by for each unit; 0: it does not move
    stride: npt.NDArray[np.uint64]
    total: npt.NDArray[np.uint64]  # units of the whole call; 0 where not known
    totalled: Mask


def keys(table: pl.DataFrame) -> npt.NDArray[np.uint32]:
    """Number the vCPUs of a batch; rows whose vCPU is unknown are numbered by pCPU."""
    who = pl.when(pl.col("domid").is_not_null() & pl.col("vcpu").is_not_null()).then(
        pl.col("domid").cast(pl.UInt64) * (1 << 32) + pl.col("vcpu").cast(pl.UInt64)
    )
    wide = table.select(who.otherwise(pl.col("pcpu").fill_null(0).cast(pl.UInt64) + (1 << 62)))
    return numbered(wide.to_series().to_numpy())


def numbered(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Number the distinct values of a column that has long runs: their starts are sorted, not the rows."""
    if not len(value):
        return np.zeros(0, np.uint32)
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    _, ids = np.unique(value[starts], return_inverse=True)
    return np.repeat(ids.astype(np.uint32), np.diff(np.append(starts, len(value))))


def by_group(*columns: npt.NDArray[np.unsignedinteger]) -> Rows:
    """Return the rows ordered by group, rows of one group in time order (a stable sort on small integers)."""
    combined = np.zeros(len(columns[0]), np.uint64)
    if all(not c.any() for c in columns):
        return np.arange(len(combined))
    for c in columns:
        combined = combined * np.uint64(int(c.max(initial=0)) + 1) + c.astype(np.uint64)
    top = int(combined.max(initial=0))
    # NumPy sorts 16-bit integers in linear time.
    return np.argsort(combined.astype(np.uint16 if top < 1 << 16 else np.uint64), kind="stable")


def previous(rows: Rows, *group: npt.NDArray[np.unsignedinteger]) -> tuple[Rows, Rows]:
    """Return, for ``rows`` (ascending), the row before each in its group, and ``rows`` ordered by group."""
    order = by_group(*(g[rows] for g in group))
    ranked = rows[order]
    same = np.ones(max(len(ranked) - 1, 0), bool)
    for g in group:
        same &= g[ranked[1:]] == g[ranked[:-1]]
    before = np.full(len(rows), -1, np.intp)
    before[order[1:]] = np.where(same, ranked[:-1], -1)
    return before, ranked


def fill(values: npt.NDArray[np.intp], new: Mask, key: npt.NDArray[np.uint32]) -> tuple[Rows, Rows]:
    """Carry ``values`` forward from the rows where ``new`` is set, within each key.

    Returns:
        the value in force at each row (its own where it is new), and the one in force just before it; −1 is none.
    """
    order = by_group(key)
    k, v, mark = key[order], values[order], new[order]
    at = np.where(mark, np.arange(len(order)), -1)
    first = np.concatenate([[True], k[1:] != k[:-1]]) if len(k) else np.zeros(0, bool)
    floor = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0)) if len(k) else at
    last = np.maximum.accumulate(at) if len(k) else at
    inside = last >= floor
    now = np.where(inside, v[np.maximum(last, 0)], -1)
    just = np.concatenate([[-1], now[:-1]]) if len(now) else now
    just = np.where(first, -1, just)
    out, before = np.empty(len(order), np.intp), np.empty(len(order), np.intp)
    out[order], before[order] = now, just
    return out, before


def marks(source: str, table: pl.DataFrame, wanted: Mask) -> Marks:
    """Read the rows ``wanted`` as ``source`` does."""
    n = len(table)
    out = Marks(
        np.zeros(n, bool), np.zeros(n, np.int8), np.full(n, -1, np.int64), np.zeros(n, np.uint64), np.zeros(n, bool),
        np.zeros(n, np.uint64), np.zeros(n, bool), np.zeros(n, np.uint64), np.ones(n, np.uint64), np.zeros(n, np.uint64),
        np.zeros(n, bool),
    )  # fmt: skip
    op = table.get_column("op").fill_null(0xFFFFFFFF).to_numpy()
    out.marked[wanted & (op == PAGING_DOMCTL_CONT)] = True
    recorded = table.select(
        pl.any_horizontal(pl.col("^arg[0-5]$").is_not_null()) & pl.col("caller").is_not_null()
    ).to_series().to_numpy()  # fmt: skip
    use = np.flatnonzero(wanted & recorded & np.isin(op, np.fromiter(facts.files(), np.uint32)))
    if not len(use):
        return out
    caller, narrow = table.get_column("caller"), table.select(*ARGS, "cut", "memory")
    group = (op[use].astype(np.uint32) << np.uint32(4)) | caller.to_physical().to_numpy()[use].astype(np.uint32)
    for value in np.unique(group):
        rows = use[group == value]
        _mark(out, Hypervisor(source, str(caller[int(rows[0])])), int(value >> 4), rows, narrow[rows])
    return out


def _mark(out: Marks, xen: Hypervisor, number: int, rows: Rows, part: pl.DataFrame) -> None:
    states = States.from_frame(part)
    read = xen.decode(number, states)
    out.marked[rows] |= read.marked  # a number that only Xen issues is marked already
    out.number[rows] = read.number
    out.total[rows], out.totalled[rows] = read.total.value, read.total.known
    for k, b in enumerate(read.behaviours):
        hit = read.which == k
        at = rows[hit]
        kind = _CLASS.get(b.codec, 0)
        absolute = b.keeps_index
        if kind == 0 or (kind == _ABSOLUTE and not absolute):
            continue
        out.kind[at] = kind
        amount = read.index if absolute else read.remaining
        out.amount[at], out.known[at] = amount.value[hit], amount.known[hit]
        out.stride[at] = b.stride
        if kind == _RELATIVE:  # of a first entry; of a re-entry it is less, which the largest of all makes good
            out.total[at], out.totalled[at] = amount.value[hit], amount.known[hit]
        pointer = b.params.get("pointer", 1 if absolute else None)
        if pointer is not None:
            column = states.at(f"arg{pointer}")
            out.pointer[at], out.pointed[at] = column.value[hit], column.known[hit]
            out.size[at] = 0 if absolute else b.params["size"]
    if number == MULTICALL:
        for op, inner, inside, begun in inner_states(states):
            deeper = Hypervisor(xen.release, xen.caller).decode(op, inside)
            out.marked[rows[inner[begun | (deeper.marked & (deeper.status == hv.MODELLED))]]] = True


def link(
    m: Marks,
    rows: Rows,
    op: npt.NDArray[np.uint32],
    before: Rows,
    adjacent: Mask,
    open_: Mask,
    subs: npt.NDArray[np.int64],
    landed: Mask,
) -> tuple[Mask, Mask]:
    """Say which entries continue the previous entry of the same hypercall on their vCPU, by arithmetic and by sequence.

    Args:
        m: what all rows of the batch say by themselves.
        rows: the entries to look at.
        op: their hypercall numbers.
        before: the previous entry of the same hypercall on the same vCPU of each; −1 is none.
        adjacent: no other hypercall but iret lies between.
        open_: nothing lies between that ends a call (a return, records lost, a TSC that stepped back).
        subs: sub-calls recorded in between.
        landed: an upcall that came in between ended right at this entry (`landings`).
    """
    p = np.maximum(before, 0)
    kind, amount, earlier = m.kind[rows], m.amount[rows], m.amount[p]
    marked, size = m.marked[rows], m.size[rows]
    ok = (before >= 0) & open_ & (kind == m.kind[p]) & (m.number[rows] == m.number[p])
    both = m.known[rows] & m.known[p]
    pointed = m.pointed[rows] & m.pointed[p]
    moved = m.pointer[rows] - m.pointer[p]
    down, level = both & (amount < earlier), both & (amount == earlier)
    flagged = ok & (kind == _FLAGGED) & marked & (down | level)
    absolute = ok & (kind == _ABSOLUTE) & marked & both & (amount >= earlier) & (~pointed | (moved == 0))
    done = np.where(both, earlier - amount, np.uint64(0))
    fits = ~pointed | (moved == done * size)
    relative = ok & (kind == _RELATIVE)
    # Two calls of one after the other, the second smaller, look like a re-entry where no pointer was recorded. Small calls
    # are hardly ever preempted: of 500 true re-entries in the recordings one came from a call of fewer than 64 items.
    told = pointed | (adjacent & (earlier >= _LARGE))
    counted = relative & down & (done % m.stride[rows] == 0) & fits & told
    # set_trap_table has no count: the pointer alone moves, by at most the 256 entries of a table.
    steps = np.where(size > 0, moved // np.maximum(size, np.uint64(1)), np.uint64(0))
    bare = relative & ~m.known[rows] & pointed & adjacent & (steps > 0) & (steps <= 256) & (moved == steps * size)
    # A multicall: what went away must be what was seen to run, the last of it perhaps preempted itself.
    ran = subs.astype(np.uint64)
    multi = relative & (op == MULTICALL)
    between = down & (ran == done)
    # One left after all but one were done is what a finished multicall followed by one of a single entry looks like too.
    inside = (down | level) & (ran == done + np.uint64(1)) & (amount > 1)
    unseen = down & pointed & (ran == 0)
    counted = np.where(multi, relative & fits & (between | inside | unseen), counted)
    counted &= amount > 0  # Xen never leaves a call with nothing left to do
    out: Mask = flagged | absolute | counted | (bare & ~multi)
    # Where the two entries say nothing about each other, or the same: a call that was preempted before its first unit.
    same = (~both | level) & fits & ~marked & (kind != _FLAGGED) & (kind == m.kind[p]) & (m.number[rows] == m.number[p])
    return out, landed & ~out & (before >= 0) & open_ & (same | (relative & down & (done % m.stride[rows] == 0) & fits & ~multi))


@dataclass(slots=True)
class Pace:
    """How fast a record can follow an iret in this trace, so far."""

    least: int = (1 << 64) - 1
    seen: int = 0

    def within(self, gap: npt.NDArray[np.uint64], counts: Mask) -> Mask:
        """Say which gaps are short. Depends on what came before in time only, so that batches do not matter.

        Args:
            gap: TSC ticks since the record before.
            counts: rows that stand behind an iret of the same vCPU and pCPU.
        """
        n = np.cumsum(counts) + self.seen
        some = np.where(counts, gap, np.uint64((1 << 64) - 1))
        least = np.minimum(np.minimum.accumulate(some), np.uint64(self.least)) if len(gap) else some
        out: Mask = counts & (n >= _LANDINGS) & (gap // _LANDING <= least)
        if len(gap):
            self.least, self.seen = int(least[-1]), int(n[-1])
        return out


def continuing(source: str, table: pl.DataFrame, entry: Mask) -> Mask:
    """Say which entries are of hypercalls that may leave a continuation at ``source``; unknown callers' are not."""
    out = np.zeros(len(table), bool)
    op, caller = table.get_column("op"), table.get_column("caller")
    use = np.flatnonzero(entry & op.is_not_null().to_numpy() & caller.is_not_null().to_numpy())
    if not len(use):
        return out
    group = (op.fill_null(0).to_numpy()[use].astype(np.uint64) << np.uint64(4)) | caller.to_physical().fill_null(0).to_numpy()[
        use
    ].astype(np.uint64)
    for value in np.unique(group):
        rows = use[group == value]
        out[rows] = _may_continue(source, str(caller[int(rows[0])]), int(value >> np.uint64(4)))
    return out


def _may_continue(source: str, caller: str, number: int) -> bool:
    if number not in facts.files() or number == PAGING_DOMCTL_CONT:
        return False
    known = facts.lookup(source, caller, number)
    return known.status == "modelled" and any(b.codec != "none" and not b.never_left for b in known.by_number.values())


def is_iret(op: npt.NDArray[np.uint32]) -> Mask:
    """Return the rows that are iret hypercalls."""
    out: Mask = op == _IRET
    return out
