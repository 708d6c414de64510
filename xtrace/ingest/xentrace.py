"""The binary that ``xentrace`` writes, from Xen 3.2.0 to 4.22.0: windows of variable-size records, one pCPU each.

The work goes in rounds. Each round reads some more of the pCPUs that are behind, finds their records (``walk``), extracts
those that become events and who they belong to (``records``, ``attribute``), and emits everything up to the time that no
pCPU can fall behind any more. How much a round reads depends on a fixed budget, shared by the pCPUs, and on nothing that a
file claims.

Damage: ``windows`` finds the next true window header wherever one is due and does not stand. Inside a window a record's
place follows from the one before it alone, so behind an impossible header the rest of that window is skipped and counted:
guests choose the words of some records, and whatever looked like a record there might be made of them. Where records may be
missing a ``lost`` event stands without number or count, from the last TSC known of its pCPU to the next, so that nothing is
stitched across; who runs is unknown until a record says so.

Words are little-endian; a file whose window header has its bytes reversed is read as big-endian by the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from xtrace.ingest import gaps
from xtrace.ingest.attribute import Batch, Pcpus
from xtrace.ingest.base import Ledger, Observed, Shows
from xtrace.ingest.layout import BAD, REGISTERS, load
from xtrace.ingest.merge import Merge
from xtrace.ingest.records import Rows, Tally, extract, frame, tally
from xtrace.ingest.source import is_live
from xtrace.ingest.walk import BLOCK, PAD, walk
from xtrace.ingest.windows import HEADER_BYTES, MAGIC, Cursor, Order, WindowIndex, plausible, read_words, scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source

__all__ = ("READER", "XentraceReader", "XentraceRecording")

#: Bytes that a round reads.
CHUNK: Final = 1 << 22

QUOTA_MIN: Final = 1 << 11  # bytes that a pCPU gets even where there are thousands
_HELD: Final = 16  # chunks' worth of events that may wait for a slow pCPU before reading ahead is cut down
_ROW_BYTES: Final = 32  # what an event that waits counts for in the budget
_GAP: Final = 1 << 12  # bytes of other pCPUs' windows that are read over rather than jumped over
LOOK: Final = 1 << 22  # bytes at the start that may be looked at to tell the era

_ORDERS: Final[tuple[Order, ...]] = ("little", "big")


def byte_order(head: bytes) -> tuple[int, Order]:
    """Say how sure the first bytes of a file make it that they are ours, and in which byte order."""
    for order in _ORDERS:
        if len(head) >= HEADER_BYTES and plausible(head, 0, order):
            return 100, order
    for order in _ORDERS:
        magic = MAGIC.to_bytes(4, order)
        at = head.find(magic)
        while 0 <= at <= len(head) - HEADER_BYTES:
            if plausible(head, at, order):
                due = at + HEADER_BYTES + int.from_bytes(head[at + 8 : at + 12], order)
                if due >= len(head) or plausible(head, due, order):
                    return 20, order
            at = head.find(magic, at + 1)
    return 0, "little"


class XentraceReader:
    """Reader of the xentrace binary (``xtrace.ingest.base.Reader``)."""

    name = "xentrace"
    title = "xentrace binary, Xen 3.2 to 4.22"
    streams = True
    shows = Shows(
        op="every call",
        subop="4.3 on: grant_table_op, vcpu_op, sched_op",
        arguments="4.3 on: counts and commands of six hypercalls, 32 bits",
        rip="PV to 4.2; HVM with exit records",
        who="with scheduling records",
        time="TSC",
        proved="4.3 on: bit 31 of an mmu_update or mmuext_op count, hypercall 49",
        inferred="the same call again on the same vCPU, smaller counts",
        unobservable="memory_op's registers, guest memory, results",
        registers=REGISTERS,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this is: 100 for a window header at byte 0, 20 for a damaged head with windows behind it."""
        return byte_order(head)[0]

    def open(self, source: Source, options: ReadOptions) -> XentraceRecording:
        """Open ``source``; nothing is read yet."""
        if is_live(source):
            from xtrace.ingest.xentrace_live import GrowingXentrace

            return GrowingXentrace(source, options)
        return XentraceRecording(source, options)


class XentraceRecording:
    """One opened xentrace binary (``xtrace.ingest.base.Recording``).

    Args:
        source: where the bytes are.
        options: how to read.
        chunk: bytes a round reads; for tests, it never changes a result.
        block: words a block of the walk; for tests.
    """

    format = "xentrace"

    def __init__(self, source: Source, options: ReadOptions, *, chunk: int = CHUNK, block: int = BLOCK) -> None:
        self.ledger = Ledger()
        self.observed = Observed(tsc_khz=None)
        self._source = source  # keeps the file open
        self._fd = source.file.fileno()
        self._size = source.size
        self._options = options
        self._chunk, self._block = max(chunk, 64), block
        self._layout = load()
        self._counts = np.zeros(len(self._layout.codes), dtype=np.int64)
        self._others: dict[int, int] = {}
        self._forms: dict[tuple[int, int], int] = {}  # slot, top four bits of the header -> byte of the first such record
        self._peaks: dict[tuple[int, int], tuple[int, int]] = {}
        self._words = np.zeros(0, dtype=np.uint32)
        self._marks = np.zeros(0, dtype=np.bool_)
        self._index = WindowIndex()
        self._order: Order = "little"
        self._dom_era: tuple[bool | None] | None = None

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in the order (segment, TSC, pCPU, file); damage goes to the ledger."""
        self._index = self._find()
        numbers = np.array(self._index.pcpus, dtype=np.uint32)
        self.observed.pcpus = len(numbers)
        most = min(max((1 << 20) // max(len(numbers), 1), 64), 1 << 14)
        cursors = [Cursor(self._index, int(n), most) for n in numbers]
        self._pcpus = Pcpus(len(cursors))
        ready: list[pl.DataFrame] = []
        held, seq = 0, 0
        for rows in self._rounds(cursors):
            n = len(rows["code"])
            counts = tally(rows)
            out = frame(rows, counts, numbers, seq, self._options.tsc_khz)
            self._count(counts)
            seq, held = seq + n, held + n
            ready.append(out)
            if held >= self._options.batch_rows:
                yield from self._sliced(pl.concat(ready, rechunk=False))
                ready, held = [], 0
        if ready:
            yield from self._sliced(pl.concat(ready, rechunk=False))
        self._finish()

    def _find(self) -> WindowIndex:
        """Find all windows."""
        self._order = byte_order(self._source.head())[1]
        return scan(self._fd, self._size, self.ledger, self._order)

    def _sliced(self, batch: pl.DataFrame) -> Iterator[pl.DataFrame]:
        size = max(self._options.batch_rows, 1)
        return batch.iter_slices(size) if batch.height >= 2 * size else iter((batch,))

    # --- rounds -------------------------------------------------------------------------------------------------

    def _rounds(self, cursors: list[Cursor]) -> Iterator[Rows]:
        """Read in rounds; yield rows in their final order."""
        state, merge = self._pcpus, Merge(len(cursors))
        live = np.array([i for i, c in enumerate(cursors) if not c.done], dtype=np.int64)
        while len(live):
            # Read on where little waits, and where everyone else waits for.
            room = merge.behind[live] * _ROW_BYTES <= self._chunk // (2 * len(live))
            room[np.lexsort((live, state.tsc[live], state.segment[live]))[0]] = True
            wanted = live[room]
            left = max(_HELD * self._chunk - int(merge.behind.sum()) * _ROW_BYTES, 0)
            quota = max(min(self._chunk, left) // len(wanted), min(QUOTA_MIN, self._chunk)) // 4 * 4
            merge.add(self._round([cursors[i] for i in wanted.tolist()], wanted, quota))
            live = np.array([i for i in live.tolist() if not cursors[i].done], dtype=np.int64)
            key = None
            if len(live):
                p = live[np.lexsort((live, state.tsc[live], state.segment[live]))[0]]
                key = (int(state.segment[p]), int(state.tsc[p]), int(p))
            done = merge.ripe(key)
            if done is not None:
                yield done

    def _round(self, cursors: list[Cursor], dense: NDArray[np.int64], quota: int) -> Rows:
        """Read, walk and extract the next pieces of ``cursors``; move them on."""
        plans = [cursor.take(quota) for cursor in cursors]
        pieces = np.array([len(plan[0]) for plan in plans], dtype=np.int64)
        offset, size, final, missing = (np.concatenate(parts) for parts in zip(*plans, strict=True))
        in_file = np.argsort(offset, kind="stable")
        start = np.empty(len(offset), dtype=np.int64)
        start[in_file] = self._read(offset[in_file], size[in_file])
        end = start + size // 4
        pos, counts, stops = walk(self._words, start[in_file], end[in_file], self._marks, self._layout.likely, self._block)
        count, stop = np.empty_like(counts), np.empty_like(stops)
        count[in_file], stop[in_file] = counts, stops
        if len(dense) > 1 and not (in_file[1:] > in_file[:-1]).all():
            first = np.empty_like(count)
            first[in_file] = np.cumsum(counts) - counts
            shift = first - (np.cumsum(count) - count)
            pos = pos.take(np.arange(len(pos)) + np.repeat(shift, count))
        head = self._words.take(pos)
        slot = self._layout.rows.take(head << 4 >> 16)
        slot += head & 0xFFF
        code = self._layout.codes.take(slot)

        broken = np.zeros(len(offset), dtype=np.bool_)
        if (code == BAD).any():
            keep = self._damage(pos, code, count, offset, start, stop, broken)
            pos, head, slot, code = pos[keep], head[keep], slot[keep], code[keep]
        lossy = self._straddles(offset, size, start, end, stop, final, broken) | broken
        self._histogram(slot, head, pos, np.append(0, np.cumsum(count)), offset - start * 4)
        last = np.cumsum(pieces) - 1
        for i, (cursor, n) in enumerate(zip(cursors, pieces.tolist(), strict=True)):
            k = int(last[i])
            if bool(final[k]):
                cursor.settle(n)
            elif broken[k]:
                self.ledger.skipped_bytes += cursor.skip()
            else:
                cursor.settle(n, left=int(stop[k] - start[k]) * 4)
            cursor.missing = bool(lossy[k])
        if lossy.any() or missing.any():
            ended = np.array([cursor.done for cursor in cursors])
            pos, head, code = gaps.insert(pos, head, code, count, start, stop, pieces, missing, lossy, ended)

        bounds = np.append(0, np.cumsum(count))
        chosen = code != 0
        rows = np.flatnonzero(chosen)
        if len(rows) == len(pos):
            at, top = pos, head
        else:
            at, top, code = pos.take(rows), head.take(rows), code.take(rows)
        per_piece = np.diff(np.searchsorted(rows, bounds))
        edges = np.append(0, last + 1)
        batch = Batch(
            words=self._words,
            pos=pos,
            head=head,
            pcpus=dense,
            bounds=bounds[edges],
            rows=rows,
            code=code,
            row_bounds=np.append(0, np.cumsum(per_piece))[edges],
            group=np.repeat(np.repeat(np.arange(len(dense)), pieces), per_piece),
            base=np.where(top.view(np.int32) < 0, at + 3, at + 1),
            extra=(top >> 28 & 7).astype(np.uint8),
        )
        offsets = at * 4 + np.repeat(offset - start * 4, per_piece)
        marked = np.flatnonzero(code == gaps.GAP)
        if len(marked):
            offsets[marked] -= (top[marked] & gaps.BEFORE) * HEADER_BYTES
        events, short = extract(batch, self._pcpus, offsets, self._layout.needs, self._era_has_dom_word)
        for row in short[: Ledger.KEEP].tolist():
            event = int(top[row]) & 0xFFFFFFF
            name = self._layout.names.get(event, "")
            text = f"record {event:#x} ({name}) has only {int(batch.extra[row])} words"
            self.ledger.problem(text, offset=int(offsets[row]))
        self.ledger.problems_dropped += max(len(short) - Ledger.KEEP, 0)
        return events

    def _read(self, offset: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read pieces (ascending in the file) into the buffer; return the word at which each begins there."""
        gap = offset[1:] - offset[:-1] - size[:-1]
        joined = (gap >= 0) & (gap % 4 == 0) & (gap <= np.minimum(3 * size[1:] + 64, _GAP))
        first = np.flatnonzero(np.append(True, ~joined))
        last = np.append(first[1:], len(offset)) - 1
        length = offset[last] + size[last] - offset[first]
        base = np.cumsum(length) - length
        need = int(base[-1] + length[-1]) // 4 + PAD + 1
        if need > len(self._words):
            self._words = np.zeros(need, dtype=np.uint32)
            self._marks = np.zeros(need, dtype=np.bool_)
        for at, begin, n in zip(offset[first].tolist(), (base // 4).tolist(), (length // 4).tolist(), strict=True):
            read_words(self._fd, self._words[begin : begin + n], at, self._order)
        span = np.repeat(np.arange(len(first)), last - first + 1)
        words: NDArray[np.int64] = (base[span] + offset - offset[first][span]) // 4
        return words

    # --- damage -------------------------------------------------------------------------------------------------

    def _damage(
        self,
        pos: NDArray[np.int64],
        code: NDArray[np.uint8],
        count: NDArray[np.int64],
        offset: NDArray[np.int64],
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        broken: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Give up each piece from its first impossible header on; return which records are kept.

        ``count``, ``stop`` and ``broken`` are changed for those pieces.
        """
        bounds = np.append(0, np.cumsum(count))
        bad = np.flatnonzero(code == BAD)
        piece, at = np.unique(np.searchsorted(bounds, bad, side="right") - 1, return_index=True)
        first = bad[at]
        change = np.zeros(len(pos) + 1, dtype=np.int8)
        change[first] += 1
        np.subtract.at(change, bounds[piece + 1], 1)
        stop[piece] = pos[first]
        count[piece] = first - bounds[piece]
        broken[piece] = True
        where = offset[piece] + (stop[piece] - start[piece]) * 4
        for at_byte, word in zip(where[: Ledger.KEEP].tolist(), pos[first].tolist(), strict=False):
            text = f"{int(self._words[word]):#010x} is no record header; the rest of the window is skipped"
            self.ledger.problem(text, offset=at_byte)
        self.ledger.problems_dropped += max(len(piece) - Ledger.KEEP, 0)
        keep: NDArray[np.bool_] = np.cumsum(change[:-1]) == 0
        return keep

    def _straddles(
        self,
        offset: NDArray[np.int64],
        size: NDArray[np.int64],
        start: NDArray[np.int64],
        end: NDArray[np.int64],
        stop: NDArray[np.int64],
        final: NDArray[np.bool_],
        broken: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Note what is left of windows: bytes behind damage, and a last record that would stick out.

        Returns:
            The pieces of the second sort, without one that the end of the file cuts.
        """
        short = stop < end
        out = np.zeros(len(offset), dtype=np.bool_)
        if not short.any():
            return out
        lost = np.flatnonzero(short & (final | broken))
        self.ledger.skipped_bytes += int((end[lost] - stop[lost]).sum()) * 4
        over = lost[~broken[lost]]
        where = offset[over] + (stop[over] - start[over]) * 4
        cut = offset[over] + size[over] + 4 > self._size if self._index.truncated is not None else np.zeros(len(over))
        for at, is_cut in zip(where[: Ledger.KEEP].tolist(), cut.tolist(), strict=False):
            # Where the file ends early, the cut last record belongs to that, and is no damage of its own.
            if not is_cut:
                self.ledger.problem("a record sticks out of its window", offset=at)
        self.ledger.problems_dropped += max(len(over) - Ledger.KEEP, 0)
        out[over] = True
        out[over] &= ~np.asarray(cut, dtype=np.bool_)
        return out

    # --- what was seen ------------------------------------------------------------------------------------------

    def _histogram(
        self,
        slot: NDArray[Any],
        head: NDArray[np.uint32],
        pos: NDArray[np.int64],
        bounds: NDArray[np.int64],
        shift: NDArray[np.int64],
    ) -> None:
        """Count records by event id and form; record ``pos`` of piece i begins at byte ``pos * 4 + shift[i]``."""
        counts = np.bincount(slot, minlength=len(self._counts))
        self._counts += counts
        shared = self._layout.shared
        if self._counts[shared:].any():
            ids, others = np.unique(head[slot >= shared] & 0xFFFFFFF, return_counts=True)
            for event, n in zip(ids.tolist(), others.tolist(), strict=True):
                self._others[event] = self._others.get(event, 0) + n
            self._counts[shared:] = 0
        present = np.flatnonzero(counts[:shared])
        if not len(present):
            return
        first = int((pos[bounds[:-1][bounds[:-1] < bounds[1:]]] * 4 + shift[bounds[:-1] < bounds[1:]]).min())

        def place(rows: NDArray[np.intp]) -> NDArray[np.int64]:
            at: NDArray[np.int64] = pos[rows] * 4 + shift[np.searchsorted(bounds, rows, side="right") - 1]
            return at

        # Records of few ids make up a trace: numbered densely, id and form together fit a small table.
        dense = np.zeros(len(self._counts), dtype=np.intp)
        dense[present] = np.arange(16, 16 * len(present) + 16, 16)
        form = dense.take(slot)
        form += head >> 28
        for value in np.flatnonzero(np.bincount(form)[16:]).tolist():
            key = (int(present[value >> 4]), value & 15)
            if self._forms.get(key, first + 1) > first:
                self._forms[key] = min(int(place(np.flatnonzero(form == value + 16)).min()), self._forms.get(key, 1 << 62))
        for watched, event, word in self._layout.peaks:
            if counts[watched]:
                self._peak(event, word, np.flatnonzero(slot == watched), head, pos, place)

    def _peak(
        self,
        event: int,
        word: int,
        rows: NDArray[np.intp],
        head: NDArray[np.uint32],
        pos: NDArray[np.int64],
        place: Callable[[NDArray[np.intp]], NDArray[np.int64]],
    ) -> None:
        """Keep the largest value that word ``word`` of some records holds."""
        rows = rows[(head[rows] >> np.uint32(28) & np.uint32(7)) > word]
        if not len(rows):
            return
        value = self._words.take(pos[rows] + 1 + (head[rows] >> np.uint32(31)) * 2 + word)
        most = int(value.max())
        old = self._peaks.get((event, word), (-1, 0))
        if most >= old[0]:
            at = int(place(rows[value == most]).min())
            self._peaks[event, word] = (most, min(at, old[1]) if most == old[0] else at)

    def _count(self, counts: Tally) -> None:
        """Add emitted events to the ledger."""
        ledger = self.ledger
        ledger.hypercalls += counts.hypercalls
        ledger.subcalls += counts.subcalls
        ledger.vmmcalls += counts.vmmcalls
        ledger.lost_events += counts.lost_events
        ledger.lost_records += counts.lost_records
        ledger.unattributed += counts.unattributed

    def _finish(self) -> None:
        seen, ledger = self.observed, self.ledger
        known = np.flatnonzero(self._counts)
        ids = dict(zip(self._layout.ids[known].tolist(), self._counts[known].tolist(), strict=True)) | self._others
        seen.event_ids = {event: int(n) for event, n in sorted(ids.items())}
        ids_of = self._layout.ids
        seen.forms = {(int(ids_of[s]), top & 7, top >= 8): at for (s, top), at in sorted(self._forms.items())}
        seen.peaks = dict(sorted(self._peaks.items()))
        if self._index.count:
            seen.event_ids[MAGIC & 0xFFFFFFF] = self._index.count
            head = min((offset for offset, _ in self._index.first), default=HEADER_BYTES) - HEADER_BYTES
            seen.forms = {(MAGIC & 0xFFFFFFF, MAGIC >> 28 & 7, False): head} | seen.forms
        ledger.records = sum(seen.event_ids.values())
        seen.layout = self._layout.era(set(ids)) + (", big-endian" if self._order == "big" else "")
        seen.first_tsc, seen.last_tsc = self._pcpus.first_tsc, self._pcpus.last_tsc
        ledger.problems.sort(key=lambda p: p.offset or 0)

    def _era_has_dom_word(self) -> bool | None:
        """Say whether HVM records carry a dom/vcpu word (3.2, 3.3), from the scheduling ids at the start of the file."""
        if self._dom_era is None:
            ids: set[int] = set()
            budget = LOOK
            for offset, size in self._index.first:
                n = min(size, budget) // 4 * 4
                if not n:
                    break
                budget -= n
                words = np.zeros(n // 4 + PAD + 1, dtype=np.uint32)
                read_words(self._fd, words[: n // 4], offset, self._order)
                marks = np.zeros(len(words), dtype=np.bool_)
                pos, _, _ = walk(words, np.array([0]), np.array([n // 4]), marks, self._layout.likely)
                head = words.take(pos)
                bad = self._layout.codes.take(self._layout.rows.take(head << 4 >> 16) + (head & 0xFFF)) == BAD
                head = head[: int(bad.argmax())] if bad.any() else head
                ids.update(np.unique(head & 0xFFFFFFF).tolist())
            old = bool(ids & self._layout.dom_word)
            new = any(ids & known for known, since, _ in self._layout.evidence if since)
            self._dom_era = (None if old == new else old,)
        return self._dom_era[0]


READER: Final = XentraceReader()
