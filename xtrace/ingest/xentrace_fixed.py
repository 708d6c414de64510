"""The binary that ``xentrace`` writes in Xen 3.0 and 3.1: records of a fixed size, of all pCPUs one after another.

What they show: in 3.1 the hypercalls of HVM guests, with domain and vCPU, number and, by the VM exit before, the address of
the instruction (of 64 bits only where records have 60 bytes); who runs; suspends; how many records were lost (3.0.3 on). No
argument, no result. PV guests' calls, and in 3.0 any call, leave no record at all (``3.1.0-branched:xen/arch/x86`` has no
trace call on that path), so such a trace proves nothing about them. The number is the low 32 bits of rax, as 3.1 itself takes
it (``3.1.0-branched:xen/arch/x86/hvm/hvm.c`` __hvm_do_hypercall: "mask in case compat32 caller"). The caller's mode is not
recorded; only an instruction above 4 GiB proves 64 bits.

The records are rewritten, a block at a time, as the windowed format of 3.2 would hold them (both name domain and vCPU in HVM
records); from there on ``xentrace`` does the work. Damage: ``fixed``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.ingest import gaps
from xtrace.ingest.attribute import Batch
from xtrace.ingest.base import Shows
from xtrace.ingest.fixed import Shape, guess, load, scan
from xtrace.ingest.layout import ACTIONS
from xtrace.ingest.records import Rows, extract
from xtrace.ingest.xentrace import XentraceRecording

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source
    from xtrace.ingest.windows import Cursor, WindowIndex

__all__ = ("READER", "FixedReader", "FixedRecording")

_CODE: Final = {name: code for code, name in enumerate(ACTIONS)}

#: Words of a rewritten record: header, TSC, five words.
_WORDS: Final = 8

#: Header of a rewritten record, without its event id: with TSC and five words.
_HEAD: Final = np.uint32(0xD0000000)

#: Highest domain number (DOMID_FIRST_RESERVED, ``3.1.0-branched:xen/include/public/xen.h``; idle is 0x7fff) and more vCPUs
#: than a domain has (MAX_VIRT_CPUS 32, 64 on ia64).
_DOMID_MAX: Final = 0x7FFF
_VCPU_LIMIT: Final = 64


class FixedReader:
    """Reader of the fixed-size records (``xtrace.ingest.base.Reader``)."""

    name = "xentrace-fixed"
    title = "xentrace binary, Xen 3.0 and 3.1"
    shows = Shows(
        op="3.1: HVM guests' calls",
        rip="with exit records",
        who="domain and vCPU",
        time="TSC",
        inferred="the same call again on the same vCPU",
        unobservable="every call of PV guests, every call in 3.0, registers, memory, results",
        partial="no call of a PV guest is recorded",
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this is: 90 for records from byte 0 on, 40 for a single one, 15 for some behind damage."""
        return guess(head)[0]

    def open(self, source: Source, options: ReadOptions) -> FixedRecording:
        """Open ``source``; nothing is read yet."""
        return FixedRecording(source, options)


class FixedRecording(XentraceRecording):
    """One opened file (``xtrace.ingest.base.Recording``).

    Args:
        source, options, chunk: as in ``XentraceRecording``.
    """

    format = "xentrace-fixed"

    def __init__(self, source: Source, options: ReadOptions, *, chunk: int = 1 << 22) -> None:
        super().__init__(source, options, chunk=chunk)
        self._shape = Shape(False, "little")
        self._table = load()
        self._counts = np.zeros(len(self._table.ids), dtype=np.int64)

    def _find(self) -> WindowIndex:
        self._shape = guess(self._source.head())[1]
        self._order = self._shape.order
        return scan(self._fd, self._size, self._shape, self.ledger)

    def _round(self, cursors: list[Cursor], dense: NDArray[np.int64], quota: int) -> Rows:
        """Read, rewrite and extract the next pieces of ``cursors``; move them on."""
        plans = [cursor.take(quota) for cursor in cursors]
        pieces = np.array([len(plan[0]) for plan in plans], dtype=np.int64)
        offset, size, final, missing = (np.concatenate(parts) for parts in zip(*plans, strict=True))
        stride = self._shape.stride
        count = size // stride
        in_file = np.argsort(offset, kind="stable")
        start = np.empty(len(offset), dtype=np.int64)
        start[in_file] = self._read(offset[in_file], size[in_file])
        last = np.cumsum(pieces) - 1
        for cursor, n, k in zip(cursors, pieces.tolist(), last.tolist(), strict=True):
            cursor.settle(n, left=None if final[k] else int(count[k]) * stride)

        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        where = np.repeat(offset, count) + within * stride
        words, event, code, first_word = self._rewrite(np.repeat(start, count) + within * (stride // 4))
        self._see(event, first_word, where)
        head = words.reshape(-1, _WORDS)[: len(event), 0]
        extra = np.full(len(event), 5, dtype=np.uint32)
        extra[code == _CODE["lost"]] = 1
        pos = np.arange(len(event)) * _WORDS
        first = np.append(0, np.cumsum(count)[:-1]) * _WORDS
        at_record = np.arange(len(event))
        if missing.any():
            nothing = np.zeros(len(count), dtype=np.bool_)
            pos, head, code = gaps.insert(
                pos, head, code, count, first, first, pieces, missing, nothing, np.zeros(len(cursors), dtype=np.bool_)
            )
            at_record = pos // _WORDS
            extra = np.where(code == gaps.GAP, np.uint32(0), extra[at_record])
        rows = np.flatnonzero(code)
        bounds = np.append(0, np.cumsum(count))
        per_piece = np.diff(np.searchsorted(rows, bounds))
        edges = np.append(0, last + 1)
        batch = Batch(
            words=words,
            pos=pos,
            head=head,
            pcpus=dense,
            bounds=bounds[edges],
            rows=rows,
            code=code[rows],
            row_bounds=np.append(0, np.cumsum(per_piece))[edges],
            group=np.repeat(np.repeat(np.arange(len(dense)), pieces), per_piece),
            base=pos[rows] + 3,
            extra=extra[rows],
        )
        return extract(batch, self._pcpus, where[at_record[rows]], self._layout.needs, self._era_has_dom_word)[0]

    def _rewrite(
        self, at: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint8], NDArray[np.uint32]]:
        """Rewrite the records at words ``at`` of the buffer.

        Returns:
            The new words, and each record's event id, action and first data word (its low half).
        """
        wide, low = self._shape.wide, int(self._shape.order == "big")  # which half of 8 bytes is the low one
        raw = self._words
        out = np.zeros(len(at) * _WORDS + _WORDS * 2, dtype=np.uint32)
        new = out.reshape(-1, _WORDS)[: len(at)]
        event = raw.take(at + 3)
        code = self._table.codes.take(self._table.slots(event))
        new[:, 0] = event & np.uint32(0xFFFFFFF) | _HEAD
        new[:, 1], new[:, 2] = raw.take(at + 1 + low), raw.take(at + 2 - low)
        step = 2 if wide else 1
        data = [raw.take(at + (5 + low if wide else 4) + step * i) for i in range(5)]
        high = [raw.take(at + 6 - low + 2 * i) for i in range(5)] if wide else [np.zeros(len(at), dtype=np.uint32)] * 5
        for i in range(5):
            new[:, 3 + i] = data[i]
        turned = data[0] << np.uint32(16) | data[0] >> np.uint32(16)  # dom << 16 | vcpu; in 3.2 dom | vcpu << 16

        some = np.flatnonzero(code == _CODE["vmmcall"])
        if len(some):
            # In 3.0.4 vCPU 17's VMENTRY has this id: its first word is an exit reason.
            dom, vcpu = data[0][some] >> np.uint32(16), data[0][some] & np.uint32(0xFFFF)
            rest = high[0][some] | data[2][some] | data[3][some] | data[4][some] | high[2][some] | high[3][some] | high[4][some]
            other = (dom == 0) | (dom > _DOMID_MAX) | (vcpu >= _VCPU_LIMIT) | (rest != 0)
            code[some[other]] = 0
            new[some, 3] = turned[some]
        some = np.flatnonzero(code == _CODE["exit64"])
        if len(some):
            new[some, 3], new[some, 4] = turned[some], data[2][some]
            new[some, 5], new[some, 6] = data[1][some], high[1][some]
        some = np.flatnonzero(code == _CODE["switch"])
        if len(some):
            # What cannot be a domain and a vCPU makes who runs unknown, like a loss: a switch took place.
            dom, vcpu = data[2][some], data[3][some]
            wrong = (dom > _DOMID_MAX) | (vcpu > 0xFFFF) | (high[2][some] != 0) | (high[3][some] != 0)
            code[some[wrong]] = _CODE["stops"]
        some = np.flatnonzero(code == _CODE["shutdown"])
        if len(some):
            wrong = (data[0][some] > _DOMID_MAX) | (data[1][some] > 0xFFFF) | (high[0][some] | high[1][some] | high[2][some] != 0)
            code[some[wrong]] = 0
        some = np.flatnonzero(code == _CODE["lost"])
        if len(some):
            new[some, 3] = np.where(high[0][some] != 0, np.uint32(0xFFFFFFFF), data[0][some])
        return out, event, code, data[0]

    def _see(self, event: NDArray[np.uint32], first: NDArray[np.uint32], where: NDArray[np.int64]) -> None:
        """Count records by event id; note where each id was first seen and the largest first word of watched ones."""
        slot = self._table.slots(event)
        counts = np.bincount(slot, minlength=len(self._counts))
        lowest = int(where.min())
        for found in np.flatnonzero(counts).tolist():
            old = self._forms.get((found, 0), 1 << 62)
            if lowest < old:
                self._forms[found, 0] = min(int(where[slot == found].min()), old)
        self._counts += counts
        for watched in self._table.peaks:
            rows = np.flatnonzero(event == watched)
            if len(rows):
                value = first[rows]
                most = int(value.max())
                so_far, place = self._peaks.get((watched, 0), (-1, 0))
                if most >= so_far:
                    at = int(where[rows[value == most]].min())
                    self._peaks[watched, 0] = (most, min(at, place) if most == so_far else at)

    def _finish(self) -> None:
        seen, ledger = self.observed, self.ledger
        known = np.flatnonzero(self._counts)
        ids = self._table.ids
        seen.event_ids = {int(ids[slot]): int(self._counts[slot]) for slot in known.tolist()}
        words = 10 if self._shape.wide else 5
        forms: dict[tuple[int, int, bool], int] = {(0, words, True): 0} if len(known) else {}
        for (slot, _), at in sorted(self._forms.items()):
            forms[int(ids[slot]), words, True] = at
        seen.forms = forms
        seen.peaks = dict(sorted(self._peaks.items()))
        ledger.records = sum(seen.event_ids.values())
        big = ", big-endian" if self._shape.order == "big" else ""
        seen.layout = f"3.0-3.1, {self._shape.stride}-byte records{big}"
        seen.first_tsc, seen.last_tsc = self._pcpus.first_tsc, self._pcpus.last_tsc
        what = "hypercalls of PV guests leave no record" if ledger.vmmcalls else "there is no record of a hypercall"
        ledger.problem(f"{what}: xentrace before Xen 3.2 records those of HVM guests, from 3.1 on, and no others", offset=0)
        ledger.problems.sort(key=lambda p: p.offset or 0)

    def _era_has_dom_word(self) -> bool | None:
        return True


READER: Final = FixedReader()
