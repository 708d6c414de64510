"""The windows of an xentrace file: an index of where each lies, and a cursor per pCPU that reads them in order.

``xentrace`` copies each pCPU's ring in turn and writes ``0x2001f003, pCPU, byte count`` before every piece
(``RELEASE-4.22.0:tools/xentrace/xentrace.c:write_buffer``, struct cpu_change_record). A first pass reads those headers only and
notes what is damaged or cut; the index it leaves goes to an unnamed temporary file once it outgrows a few megabytes.

Where no header stands at the end of a window (its size is wrong, bytes were lost or came in, the next header is broken), the
next one is searched for byte by byte: a header with a possible pCPU and size whose own end is another header, or the end of
the file (or, if there is none, lies behind it). What lies between the end that the window claims, or that header if it comes
first, and the header found is skipped and counted, never read: nothing there proves where a record begins or whose it is.
Records may be missing then, of one pCPU where its window is cut short, of any where whole windows may be: the next window of
each is marked, so that nothing is stitched across. A file whose header word stands there with its bytes reversed is in the
other byte order throughout.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xtrace.ingest.base import Ledger

__all__ = (
    "AFTER_LOSS", "HEADER_BYTES", "MAGIC", "PCPU_LIMIT", "Cursor", "Order", "Scan", "WindowIndex", "plausible", "read_at",
    "read_words", "scan",
)  # fmt: skip

#: Byte order of a file's words.
Order = Literal["little", "big"]

#: Header word of TRC_TRACE_CPU_CHANGE: event 0x1f003, two extra words, no TSC.
MAGIC: Final = 0x2001F003
HEADER_BYTES: Final = 12

#: Xen's NR_CPUS is at most 16,383 (``RELEASE-4.22.0:xen/arch/Kconfig``), so pCPU numbers are below.
PCPU_LIMIT: Final = 16384

_WINDOW = np.dtype([("offset", "<u8"), ("size", "<u4")])

#: Bit of a window's size in the index (sizes are multiples of 4): records of its pCPU may be missing before it.
AFTER_LOSS: Final = 1

_HEADER: Final[dict[Order, struct.Struct]] = {"little": struct.Struct("<III"), "big": struct.Struct(">III")}
_BLOCK = 1 << 18  # bytes read at once where windows are small
_DENSE = 32  # so many windows in a block make reading it whole worth while
_STEP_MIN, _STEP_MAX = 1 << 12, 1 << 20


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Fill ``into`` from byte ``offset`` of ``fd``; return how many bytes there were."""
    done = 0
    while done < len(into):
        n = os.preadv(fd, [into[done:]], offset + done)
        if n <= 0:
            break
        done += n
    return done


def read_words(fd: int, into: NDArray[np.uint32], offset: int, order: Order) -> int:
    """Fill ``into`` with the words at byte ``offset`` of ``fd``, 0 where there are none; return how many bytes there were."""
    view = memoryview(into).cast("B")  # type: ignore[arg-type]
    got = read_at(fd, view, offset)
    if got < len(view):
        view[got:] = bytes(len(view) - got)
    if order != sys.byteorder:
        into.byteswap(inplace=True)
    return got


def plausible(data: bytes | bytearray | memoryview, at: int = 0, order: Order = "little") -> bool:
    """Say whether the 12 bytes at ``at`` can be a window header."""
    word = int.from_bytes(data[at : at + 4], order)
    pcpu = int.from_bytes(data[at + 4 : at + 8], order)
    size = int.from_bytes(data[at + 8 : at + 12], order)
    return word == MAGIC and pcpu < PCPU_LIMIT and size % 4 == 0


@dataclass(slots=True)
class _Run:
    """A stretch of the index: windows grouped by pCPU, in file order within each."""

    base: int  # first entry's number in the store
    pcpus: NDArray[np.uint32]
    bounds: NDArray[np.int64]  # entry range of pcpus[i]: bounds[i] to bounds[i + 1]


@dataclass(slots=True)
class WindowIndex:
    """All windows of a file.

    ``first`` holds the first few in file order, for a look at the start of the recording.
    """

    count: int = 0
    pcpus: list[int] = field(default_factory=list)  # ascending
    first: list[tuple[int, int]] = field(default_factory=list)  # (payload offset, bytes)
    truncated: int | None = None  # offset of the payload that the end of the file cuts short
    _store: tempfile.SpooledTemporaryFile[bytes] = field(
        default_factory=lambda: tempfile.SpooledTemporaryFile(max_size=1 << 24, prefix="xtrace-")  # noqa: SIM115
    )
    _runs: list[_Run] = field(default_factory=list)
    _entries: int = 0
    _todo: list[NDArray[np.uint64]] = field(default_factory=list)
    _todo_rows: int = 0

    RUN = 1 << 19  # windows sorted at a time
    FIRST = 64

    # By pCPU: it has had a window; records of it may be missing before the next one.
    _seen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(PCPU_LIMIT, dtype=np.bool_))
    _missing: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(PCPU_LIMIT, dtype=np.bool_))

    def lose(self, pcpu: int | None = None) -> None:
        """Note that records of a pCPU (None: of any) may be missing between the windows so far and those to come."""
        if pcpu is None:
            self._missing |= self._seen
        else:
            self._missing[pcpu] = True

    def add(self, rows: NDArray[np.uint64]) -> None:
        """Append windows in file order: rows of (payload offset, bytes, pCPU); empty ones are only counted."""
        self.count += len(rows)
        rows = rows[rows[:, 1] > 0]
        if not len(rows):
            return
        if len(self.first) < self.FIRST:
            self.first += [(int(o), int(s)) for o, s, _ in rows[: self.FIRST - len(self.first)]]
        pcpus = rows[:, 2].astype(np.intp)
        self._seen[pcpus] = True
        hit = np.flatnonzero(self._missing.take(pcpus))
        if len(hit):
            which, at = np.unique(pcpus[hit], return_index=True)
            rows[hit[at], 1] |= np.uint64(AFTER_LOSS)
            self._missing[which] = False
        self._todo.append(rows)
        self._todo_rows += len(rows)
        if self._todo_rows >= self.RUN:
            self._flush()

    def close(self) -> None:
        """End the first pass."""
        self._flush()
        runs = [run.pcpus for run in self._runs]
        self.pcpus = np.unique(np.concatenate(runs)).tolist() if runs else []

    def _flush(self) -> None:
        if not self._todo_rows:
            return
        rows = np.concatenate(self._todo)
        self._todo, self._todo_rows = [], 0
        rows = rows[np.argsort(rows[:, 2], kind="stable")]
        pcpus, starts = np.unique(rows[:, 2], return_index=True)
        out = np.empty(len(rows), dtype=_WINDOW)
        out["offset"], out["size"] = rows[:, 0], rows[:, 1]
        self._store.seek(0, os.SEEK_END)
        self._store.write(out.tobytes())
        self._runs.append(_Run(self._entries, pcpus.astype(np.uint32), np.append(starts, len(rows))))
        self._entries += len(rows)

    def entries(self, pcpu: int, run: int, after: int, most: int) -> tuple[NDArray[np.void], int, int]:
        """Read up to ``most`` windows of ``pcpu`` from entry ``after`` of stretch ``run`` on.

        Returns:
            The windows (fields offset and size, with ``AFTER_LOSS``; none at the end) and the (run, after) to go on with.
        """
        while run < len(self._runs):
            here = self._runs[run]
            i = int(np.searchsorted(here.pcpus, pcpu))
            if i < len(here.pcpus) and here.pcpus[i] == pcpu:
                low, high = int(here.bounds[i]) + after, int(here.bounds[i + 1])
                if low < high:
                    n = min(most, high - low)
                    self._store.seek((here.base + low) * _WINDOW.itemsize)
                    return np.frombuffer(self._store.read(n * _WINDOW.itemsize), dtype=_WINDOW), run, after + n
            run, after = run + 1, 0
        return np.empty(0, dtype=_WINDOW), run, after


class Cursor:
    """Reads one pCPU's windows as a sequence of pieces."""

    __slots__ = (
        "_after", "_i", "_index", "_marks", "_most", "_offsets", "_planned", "_run", "_sizes", "_used", "done", "missing", "pcpu"
    )  # fmt: skip

    def __init__(self, index: WindowIndex, pcpu: int, most: int) -> None:
        """Stand before the first window of ``pcpu``; keep at most ``most`` index entries in memory."""
        self.pcpu, self.done = pcpu, False
        self.missing = False  # records may be missing before the next piece: damage in the last one
        self._index, self._most = index, most
        self._run = self._after = self._i = self._used = self._planned = 0
        self._offsets: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._sizes: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._marks: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._fetch()

    def _fetch(self) -> None:
        rows, self._run, self._after = self._index.entries(self.pcpu, self._run, self._after, self._most)
        self._offsets, sizes = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        self._sizes, self._marks = sizes // 4 * 4, (sizes & AFTER_LOSS) != 0
        self._i = self._used = 0
        self.done = not len(rows)

    def take(self, quota: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Plan the next pieces, about ``quota`` bytes (at least ``4 * MAX_WORDS``, so that a record fits).

        Returns:
            File offset and bytes (a multiple of 4) of each piece, whether it ends with its window, and whether records may
            be missing before it. ``settle`` must follow.
        """
        offsets, sizes = self._offsets[self._i :].copy(), self._sizes[self._i :].copy()
        offsets[0] += self._used
        sizes[0] -= self._used
        total = np.cumsum(sizes)
        n = int(np.searchsorted(total, quota, side="right"))
        ends = np.ones(n, dtype=np.bool_)
        if n < len(sizes) and n == 0:
            sizes[0], n, ends = quota // 4 * 4, 1, np.zeros(1, dtype=np.bool_)
            self._planned = quota // 4 * 4
        marks = self._marks[self._i : self._i + n].copy()
        marks[0] = (marks[0] and not self._used) or self.missing
        self.missing = False
        return offsets[:n], sizes[:n], ends, marks

    def settle(self, pieces: int, *, left: int | None = None) -> None:
        """Move on behind ``pieces`` pieces; ``left`` = the last was part of a window, of which that many bytes were used."""
        if left is not None:
            self._used += left
            return
        self._i += pieces
        self._used = 0
        if self._i >= len(self._offsets):
            self._fetch()

    def skip(self) -> int:
        """Give up the rest of the window of the last piece; return how many bytes of it were never read."""
        rest = int(self._sizes[self._i]) - self._used - self._planned
        self.settle(1)
        return rest


class Scan:
    """The first pass."""

    def __init__(self, fd: int, size: int, ledger: Ledger, order: Order) -> None:
        self.fd, self.size, self.ledger, self.order = fd, size, ledger, order
        self.magic = MAGIC.to_bytes(4, order)
        self.unpack = _HEADER[order].unpack
        self.index = WindowIndex()
        self.buffer = bytearray(_BLOCK)
        self.small = bytearray(HEADER_BYTES)
        self.rows: list[tuple[int, int, int]] = []

    def run(self) -> WindowIndex:
        """Find all windows of the file."""
        self.advance(0)
        self.index.close()
        return self.index

    def advance(self, at: int) -> int:
        """Hand the windows from byte ``at`` on to the index; return where the last one ends."""
        dense = False
        while at < self.size:
            head = self.head(at)
            if head is None:
                at = self.resync(at, at, None)
            elif dense:
                at, dense = self.block(at)
            else:
                at, dense = self.one_by_one(at, head)
        self.flush()
        return at

    def head(self, at: int) -> tuple[int, int] | None:
        """Return pCPU and size of the plausible window header at byte ``at``."""
        if os.preadv(self.fd, [self.small], at) < HEADER_BYTES:
            return None
        word, pcpu, size = self.unpack(self.small)
        return (pcpu, size) if word == MAGIC and pcpu < PCPU_LIMIT and size % 4 == 0 else None

    def one_by_one(self, at: int, head: tuple[int, int]) -> tuple[int, bool]:
        """Hop from header to header while windows are large; return where to go on, and whether they have become small."""
        small = 0
        while small < _DENSE:
            pcpu, size = head
            due = at + HEADER_BYTES + size
            found = None if due >= self.size else self.head(due)
            if due != self.size and found is None:
                return self.resync(at + HEADER_BYTES, due, pcpu), False
            self.rows.append((at + HEADER_BYTES, size, pcpu))
            if found is None:
                return due, False
            small = small + 1 if size < _BLOCK // _DENSE else 0
            at, head = due, found
            if len(self.rows) >= _BLOCK:
                self.flush()
        return at, True

    def flush(self) -> None:
        """Hand the windows found one by one to the index."""
        if self.rows:
            self.index.add(np.array(self.rows, dtype=np.uint64))
            self.rows = []

    def block(self, at: int) -> tuple[int, bool]:
        """Take all windows whose headers lie in the block at ``at``; return as ``one_by_one`` does."""
        self.flush()
        view = memoryview(self.buffer)[: min(_BLOCK, self.size - at)]
        kind = "<u4" if self.order == "little" else ">u4"
        words = np.frombuffer(view[: read_at(self.fd, view, at) // 4 * 4], dtype=kind)
        heads = np.flatnonzero(words[:-2] == MAGIC)
        heads = heads[(words[heads + 1] < PCPU_LIMIT) & (words[heads + 2] % 4 == 0)]
        ends = heads + 3 + words[heads + 2].astype(np.int64) // 4
        if not (ends[:-1] == heads[1:]).all():
            # Payload that looks like a header, or damage: follow the declared sizes one by one.
            chain, due = [], 0
            for i, (head, end) in enumerate(zip(heads.tolist(), ends.tolist(), strict=True)):
                if head == due:
                    chain.append(i)
                    due = end
            heads, ends = heads[chain], ends[chain]
        last = len(heads) - 1
        due = at + int(ends[last]) * 4
        rows = np.empty((len(heads), 3), dtype=np.uint64)
        rows[:, 0] = at + (heads + 3) * 4
        rows[:, 1] = (ends - heads - 3) * 4
        rows[:, 2] = words[heads + 1]
        if self.lands(due):
            self.index.add(rows)
            return due, last >= _DENSE
        # The last window's end is not a header: it is cut, or there is damage.
        self.index.add(rows[:last])
        return self.resync(at + (int(heads[last]) + 3) * 4, due, int(words[heads[last] + 1])), False

    def lands(self, due: int) -> bool:
        """Say whether the file ends at ``due`` or has a plausible window header there."""
        return due == self.size or self.head(due) is not None

    def resync(self, payload: int, due: int, pcpu: int | None) -> int:
        """Handle a window (payload from ``payload`` to ``due``, or none at all) behind which no header stands.

        Returns:
            Where to go on: the next header that leads to another header or out of the file, or the end of the file.
        """
        self.flush()
        found = self.find(payload)
        end = self.size if found is None else found
        note = self.ledger.problem
        if pcpu is not None:
            whole = min(due, end)
            self.index.add(np.array([[payload, (whole - payload) // 4 * 4, pcpu]], dtype=np.uint64))
            self.ledger.skipped_bytes += (whole - payload) % 4
            if due > end or (whole - payload) % 4:
                self.index.lose(pcpu)
            if found is None and due > self.size:
                self.ledger.truncated = True
                self.index.truncated = payload
                note(f"the file ends {due - self.size} bytes before the window of pCPU {pcpu} does", offset=self.size)
                return end
            if due > end:
                note(f"a window header stands {due - end} bytes before the end of the window of pCPU {pcpu}", offset=end)
                return end
        else:
            whole = payload
        gap = end - whole
        self.ledger.skipped_bytes += gap
        self.index.lose()
        tail = bytearray(min(gap, HEADER_BYTES))
        read_at(self.fd, memoryview(tail), whole)
        if found is None and gap < HEADER_BYTES and self.magic.startswith(bytes(tail[:4])):
            self.ledger.truncated = True
            note("the file ends inside a window header", offset=self.size)
        else:
            note(f"no window header where one is due; {gap} bytes skipped", offset=whole)
        return end

    def find(self, start: int) -> int | None:
        """Search from byte ``start`` for a header whose declared end is another header, or the end of the file.

        One whose end lies behind the end of the file is taken only if there is no such header: its window may be cut, but
        three words that a guest chose can also look like that.
        """
        keep = HEADER_BYTES - 1
        cut = None
        at, step = start, _STEP_MIN
        while at < self.size:
            # Widening steps: the next header is usually near, and damage may be everywhere.
            view = memoryview(bytearray(min(step + keep, self.size - at)))
            step = min(step * 4, _STEP_MAX)
            data = bytes(view[: read_at(self.fd, view, at)])
            i = data.find(self.magic)
            while 0 <= i <= len(data) - HEADER_BYTES:
                if plausible(data, i, self.order):
                    due = at + i + HEADER_BYTES + int.from_bytes(data[i + 8 : i + 12], self.order)
                    if due > self.size:
                        cut = at + i if cut is None else cut
                    elif self.lands(due):
                        return at + i
                i = data.find(self.magic, i + 1)
            if len(data) <= keep:
                break
            at += len(data) - keep
        return cut


def scan(fd: int, size: int, ledger: Ledger, order: Order = "little") -> WindowIndex:
    """Find all windows of the file ``fd`` of ``size`` bytes; damage and a cut end go to ``ledger``."""
    return Scan(fd, size, ledger, order).run()
