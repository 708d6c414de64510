"""When, in which segment and for which vCPU each record was written: what a pCPU's earlier records say about its later ones.

Records come grouped by pCPU, in file order within each. Everything here is a forward fill: the last TSC, the last
who-is-running change, the last VM exit before a record, carried per pCPU from one batch to the next, so that where a batch
ends never shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from xtrace.ingest.layout import ACTIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("HVM32", "HVM64", "Batch", "Pcpus", "pack")

_CODE: Final = {name: code for code, name in enumerate(ACTIONS)}


def _flags(*names: str) -> NDArray[np.bool_]:
    table = np.zeros(len(ACTIONS), dtype=np.bool_)
    table[[_CODE[name] for name in names]] = True
    return table


#: Records after which another vCPU, or none, runs on the pCPU.
_WHO: Final = _flags("runs", "stops", "switch", "lost", "gap")
#: Records that end what a VM exit says about the next VMMCALL: the guest ran again, or something is missing.
_CHAIN: Final = _flags("exit32", "exit64", "exit_81003", "exit_other", "entry", "runs", "stops", "switch", "lost", "gap")

#: Exit reasons of a hypercall: VMX EXIT_REASON_VMCALL, SVM VMEXIT_VMMCALL.
_VMCALL: Final = 0x12
_VMMCALL: Final = 0x81

HVM32: Final = 1
HVM64: Final = 2


def pack(domid: NDArray[Any], vcpu: NDArray[Any]) -> NDArray[np.uint32]:
    """Pack identities as the run state records do: domain in the high half, vCPU in the low."""
    return cast("NDArray[np.uint32]", (domid << 16) | (vcpu & 0xFFFF))


@dataclass(slots=True)
class Batch:
    """Records of some pCPUs: ``records`` all of them, ``rows`` those with an action, both grouped by pCPU.

    ``pcpus`` (dense numbers) and ``bounds`` give the groups: records ``bounds[i]`` to ``bounds[i + 1]`` are of ``pcpus[i]``.
    """

    words: NDArray[np.uint32]
    pos: NDArray[np.int64]  # word of each record's header
    head: NDArray[np.uint32]
    pcpus: NDArray[np.int64]
    bounds: NDArray[np.int64]
    rows: NDArray[np.int64]  # indices of records
    code: NDArray[np.uint8]  # of each row
    row_bounds: NDArray[np.int64]
    group: NDArray[np.int64]  # of each row
    base: NDArray[np.int64]  # word of each row's first extra word
    extra: NDArray[np.uint32]  # number of extra words of each row

    def word(self, of: NDArray[np.int64], i: int) -> NDArray[np.uint32]:
        """Return extra word ``i`` of the rows ``of``; anything where the record is shorter: ask ``extra``."""
        return self.words[i:].take(self.base if len(of) == len(self.base) else self.base.take(of))


class Pcpus:
    """What is known of each pCPU after its records so far."""

    def __init__(self, count: int) -> None:
        """Know nothing of ``count`` pCPUs."""
        self.tsc = np.zeros(count, dtype=np.uint64)
        self.timed = np.zeros(count, dtype=np.bool_)  # a TSC was seen at all
        self.segment = np.zeros(count, dtype=np.uint32)
        self.who = np.zeros(count, dtype=np.uint32)  # packed
        self.known = np.zeros(count, dtype=np.bool_)
        self.exit = np.zeros((count, 6), dtype=np.uint32)  # code of the last chain record, its word count, four words
        self.before: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self.first_tsc: int | None = None
        self.last_tsc: int | None = None

    def times(self, b: Batch) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.bool_]]:
        """Give each row its TSC, its segment, and whether there was any TSC yet; records without TSC inherit.

        ``before`` is then the TSC before each gap row, in their order (its own if its pCPU had none).
        """
        raw = np.empty((len(b.pos), 2), dtype=np.uint32)
        raw[:, 0] = b.words[1:].take(b.pos)
        raw[:, 1] = b.words[2:].take(b.pos)
        tsc = raw.view(np.uint64)[:, 0]
        timed = b.head.view(np.int32) < 0
        blank = self._inherit(b, tsc, timed) if not timed.all() else None
        filled = np.flatnonzero(b.bounds[1:] > b.bounds[:-1])  # groups that have records
        owner, starts = b.pcpus[filled], b.bounds[:-1][filled]
        steps = self._steps(tsc, starts, owner)

        rows = b.rows
        self._before(b, tsc, blank)
        every = len(rows) == len(tsc)
        out = tsc if every else tsc.take(rows)
        sure = np.ones(len(rows), dtype=np.bool_)
        if blank is not None:
            sure = ~(blank if every else blank.take(rows))
        seg = self.segment[b.pcpus].take(b.group)
        if len(steps):
            seg += (np.searchsorted(steps, rows, "right") - np.searchsorted(steps, b.bounds[b.group])).astype(np.uint32)
            self.segment[b.pcpus] += np.diff(np.searchsorted(steps, b.bounds)).astype(np.uint32)
        if len(filled):
            self._note(b, tsc, timed)
            self.tsc[owner] = tsc[b.bounds[1:][filled] - 1]
        return out, seg, sure

    def _before(self, b: Batch, tsc: NDArray[np.uint64], blank: NDArray[np.bool_] | None) -> None:
        """Note the TSC before each gap."""
        gaps = np.flatnonzero(b.code == _CODE["gap"])
        if not len(gaps) and not len(self.before):
            return
        at, group = b.rows[gaps], b.group[gaps]
        owner = b.pcpus[group]
        carried = np.where(self.timed[owner], self.tsc[owner], tsc[at])
        inside = at > b.bounds[group]
        last = np.maximum(at - 1, 0)
        if blank is not None:
            carried = np.where(inside & blank[last], tsc[at], carried)
            inside &= ~blank[last]
        self.before = np.where(inside, tsc[last], carried)

    def _inherit(self, b: Batch, tsc: NDArray[np.uint64], timed: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Give records without TSC the one before; return which have none before them at all (None: every one has)."""
        at = np.flatnonzero(~timed)
        run = np.append(True, at[1:] != at[:-1] + 1)
        first = at[run]  # of each run of such records
        group = np.searchsorted(b.bounds, first, side="right") - 1
        alone = first == b.bounds[group]  # nothing before it in this batch
        # A run may go on into the next pCPU's records, where it inherits from that pCPU: split it there.
        inside = np.flatnonzero(np.isin(b.bounds[1:-1], at))
        if len(inside):
            starts = np.union1d(first, b.bounds[1:-1][inside])
            run = np.isin(at, starts)
            first = starts
            group = np.searchsorted(b.bounds, first, side="right") - 1
            alone = first == b.bounds[group]
        owner = b.pcpus[group]
        value = np.where(alone, self.tsc[owner], tsc[np.maximum(first - 1, 0)])
        none = alone & ~self.timed[owner]
        which = np.cumsum(run) - 1
        tsc[at] = value.take(which)
        if not none.any():
            return None
        blank = np.zeros(len(tsc), dtype=np.bool_)
        blank[at] = none.take(which)
        return blank

    def _note(self, b: Batch, tsc: NDArray[np.uint64], timed: NDArray[np.bool_]) -> None:
        """Keep the first TSC (the smallest of the pCPUs' first ones) and the highest."""
        fresh = np.flatnonzero(~self.timed[b.pcpus])
        for i in fresh.tolist():
            low, high = int(b.bounds[i]), int(b.bounds[i + 1])
            if low < high and timed[low:high].any():
                value = int(tsc[low + int(timed[low:high].argmax())])
                self.first_tsc = value if self.first_tsc is None else min(value, self.first_tsc)
                self.timed[b.pcpus[i]] = True
        if self.first_tsc is not None:
            self.last_tsc = max(int(tsc.max()), self.last_tsc or 0)

    def _steps(self, tsc: NDArray[np.uint64], starts: NDArray[np.int64], owner: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the TSC of a pCPU is lower than its previous one."""
        back = np.flatnonzero(tsc[1:] < tsc[:-1]) + 1
        carried = starts[self.timed[owner] & (tsc[starts] < self.tsc[owner])]
        return np.union1d(back[np.isin(back, starts, invert=True)], carried) if len(back) else carried

    def identities(self, b: Batch) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Give each row the vCPU (packed) that ran on its pCPU, and whether that is known (``who-is-running`` rows: after them)."""
        owner = b.pcpus.take(b.group)
        changes = _WHO.take(b.code)
        at = np.flatnonzero(changes)
        if not len(at):
            return self.who.take(owner), self.known.take(owner)
        who, known = self._changes(b, at)
        rank = np.zeros(len(changes) + 1, dtype=np.int64)
        np.cumsum(changes, out=rank[1:])
        edges = rank[b.row_bounds]
        index = rank[1:] - 1
        old = index < edges.take(b.group)
        out, sure = who.take(index, mode="clip"), known.take(index, mode="clip")
        if old.any():
            out[old], sure[old] = self.who.take(owner[old]), self.known.take(owner[old])
        filled = np.flatnonzero(edges[1:] > edges[:-1])
        last = edges[1:][filled] - 1
        self.who[b.pcpus[filled]], self.known[b.pcpus[filled]] = who[last], known[last]
        return out, sure

    def _changes(self, b: Batch, at: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        code = b.code[at]
        who = b.word(at, 0)  # run state records: already packed
        known = (code == _CODE["runs"]) & (b.extra[at] >= 1)
        # Up to 3.3 only SWITCH says who runs: words prev dom, prev vcpu, next dom, next vcpu.
        some = np.flatnonzero(code == _CODE["switch"])
        if len(some):
            who[some] = pack(b.word(at[some], 2), b.word(at[some], 3))
            known[some] = b.extra[at[some]] >= 4
        # From 3.4 (5c55dc3c8b) a lost-records entry names the vCPU that is current now: did | vid << 16. Before, anyone may be.
        some = np.flatnonzero(code == _CODE["lost"])
        if len(some):
            word = b.word(at[some], 1)
            who[some] = pack(word & 0xFFFF, word >> 16)
            known[some] = b.extra[at[some]] >= 2
        return who, known

    def exits(
        self, b: Batch, calls: NDArray[np.int64], dom_word: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.uint8]]:
        """Find the VM exit that each VMMCALL row came from.

        Args:
            b: the batch.
            calls: rows that are VMMCALLs (may be none: what the next batch needs is noted all the same).
            dom_word: per call, its era puts ``dom | vcpu << 16`` before every HVM record's own words (3.2 and 3.3).

        Returns:
            Per call the rip of the hypercall instruction, whether it is known, and HVM32, HVM64 or 0 (not proved).
        """
        chain = _CHAIN.take(b.code)
        at = np.flatnonzero(chain)
        table = np.empty((len(at) + len(b.pcpus), 6), dtype=np.uint32)
        table[: len(at), 0] = b.code[at]
        table[: len(at), 1] = b.extra[at]
        for i in range(4):
            table[: len(at), 2 + i] = b.word(at, i)
        table[len(at) :] = self.exit[b.pcpus]
        edges = np.searchsorted(at, b.row_bounds)
        index = np.searchsorted(at, calls) - 1
        group = b.group[calls]
        found = table[np.where(index < edges[group], len(at) + group, index)]
        filled = np.flatnonzero(edges[1:] > edges[:-1])
        self.exit[b.pcpus[filled]] = table[edges[1:][filled] - 1]

        code, extra, w = found[:, 0], found[:, 1], found[:, 2:]
        shift = dom_word.astype(np.int64)
        line = np.arange(len(calls))
        reason, low = w[line, shift], w[line, shift + 1]
        high = np.where(shift == 1, w[:, 3], w[:, 2]).astype(np.uint64)
        # 0x81003 was the 64-bit exit of 3.2.0 and is SVM's 32-bit one from 4.19.0 (320e644616).
        wide = (code == _CODE["exit64"]) | ((code == _CODE["exit_81003"]) & dom_word)
        narrow = (code == _CODE["exit32"]) | ((code == _CODE["exit_81003"]) & ~dom_word)
        known = (wide & (extra >= 3 + shift)) | (narrow & (extra >= 2 + shift))
        known &= (reason == _VMCALL) | (reason == _VMMCALL)
        rip = low | np.where(wide, high << np.uint64(32), np.uint64(0))
        # 3.3.0 writes the 64-bit form for every guest (as 3.1 has one form only), so the form proves the guest's mode only from
        # 3.4.0 on; before, an address that 32 bits cannot hold does.
        mode = np.where(known & ~dom_word, np.where(wide, HVM64, HVM32), 0).astype(np.uint8)
        mode[known & (rip > np.uint64(0xFFFFFFFF))] = HVM64
        return rip, known, mode
