"""Reader of ``xentrace_format`` text, written with the ``formats`` file of any release from 3.0.0 to 4.18.

One line for each record, window after window (tools/xentrace/xentrace_format, gone with 4.19: 2a40b106e9)::

    CPU0  1000004800 (+    2400)  hypercall  [ rip = 0xffffffff8100102a, eax = 0x00000001 ]
    CPU0  1000014400 (+    2400)    hypercall  [ op = 0x00400001 ]
    CPU1  0 (+       0)  VMMCALL     [ func = 0x0000000c ]

Lines are turned back into the records that they were printed from, and those are merged, timed and attributed as the
binary reader does it (``xtrace.ingest.attribute``). What a line proves, and what it does not:

* **Arguments are not printed**, of no hypercall, whatever the record held: no continuation can be proved by this text, but
  one by its number (paging_domctl_cont). Only where a script met a record that its formats file did not know does it print
  the words (``unknown (0x…20100d)  [ … ]``), up to 5 or 7 of them and zeros behind; then they are used.
* A sub-call's line (4.3 to 4.18) shows the number with the record's argument bits in it; the low 20 bits are the number.
* The 64-bit line of 3.3 and 3.4 prints word 1 as rip and word 2, rip's upper half, as eax: rip is put together again, the
  **number is not in the text**. It is taken from rip only if that stands in a hypercall page (page + 32 * number + 10), and a
  page is taken for one only if at least three different stubs of it were used and no other place in it: one call site in 32
  looks like a stub (recordings have some). For other callers the number is null. Such a line shows itself by an upper half of 0
  and an eax that no hypercall has; with both 0 (a guest below 4 GiB) it could be of either form, and is treated so too.
* VMEXIT's rIP of 3.3 and 3.4 is the low half of a 64-bit one: null. VMMCALL's identity word is ``dom << 16 | vcpu`` in 3.1 and
  the other way round in 3.2 and 3.3: it is used where the text shows which it is (``cpu_change`` lines, exits that name rIP
  first).
* Lost records show their count, not the vCPU that runs next: unknown until the next scheduling line.
* A TSC of 0 is a record without one, which inherits. With ``-c`` the script prints whole seconds instead: then no time is
  used and pCPUs cannot be merged; the ledger says so.
* 3.0 has no hypercall lines, nor has 3.1 for PV; 3.2's are ``unknown`` ones.
"""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.attribute import Batch, Pcpus
from xtrace.ingest.base import Ledger, Observed, Shows
from xtrace.ingest.layout import ACTIONS, load
from xtrace.ingest.lines import split
from xtrace.ingest.merge import Merge
from xtrace.ingest.records import Rows, Tally, extract, frame, tally
from xtrace.ingest.text_runs import RunCursor, scan_runs
from xtrace.ingest.windows import read_at
from xtrace.ingest.xentrace_format_lines import STRIDE, Lines, Words, hypercall_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source

__all__ = ("READER", "XentraceFormatReader", "XentraceFormatRecording")

#: Bytes that a round reads.
CHUNK: Final = 1 << 22

_HELD: Final = 16  # chunks' worth of events that may wait for a slow pCPU before reading ahead is cut down
_ROW_BYTES: Final = 64  # what an event that waits counts for in the budget
_AHEAD: Final = 3  # rounds that are read in the background
_PAD: Final = 16  # bytes before the first line, so that so many can be taken before any place in it
_NEWLINE: Final = ord("\n")
_GAP: Final = 1 << 14  # bytes of other pCPUs' lines that are read over rather than jumped over
_VMMCALL: Final = ACTIONS.index("vmmcall")
_NARROW: Final = (1 << 32) - 1
_SNIFF: Final = re.compile(rb"(?m)^CPU[0-9]{1,5}(?:  [0-9]+ \(\+ *-?[0-9]+\)  \S|\t[0-9]+\t\t\S| {6}[0-9]+\s+VM)")
_STAMP: Final = re.compile(rb"(?m)^CPU[0-9]{1,5}  ([0-9]+) \(\+ *([0-9]+)\)")


class XentraceFormatRecording:
    """One opened text (``xtrace.ingest.base.Recording``).

    Args:
        source: where the bytes are.
        options: how to read.
        chunk: bytes a round reads; for tests, it never changes a result.
    """

    format = "xentrace-format"

    def __init__(self, source: Source, options: ReadOptions, *, chunk: int = CHUNK) -> None:
        self.ledger = Ledger()
        self.observed = Observed(layout=self.format)
        self._source, self._options, self._chunk = source, options, max(chunk, 64)
        self._needs = load().needs

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in the order (segment, TSC, pCPU, file); damage goes to the ledger."""
        source, ledger, seen = self._source, self.ledger, self.observed
        seconds = _in_seconds(source.head())
        if seconds:
            ledger.problem("times are whole seconds (written with -c): not used, and pCPUs cannot be merged")
        runs = scan_runs(source.file, ledger, block=self._chunk)
        ledger.lines = runs.lines
        packing = "low" if runs.windows else "high" if runs.old_exits else None
        self._lines = Lines(packing=packing, timed=not seconds, pages=hypercall_pages(runs.sites))
        numbers = np.array(runs.pcpus, dtype=np.uint32)
        self._pcpus = Pcpus(len(numbers))
        self._seen: set[int] = set()
        most = min(max((1 << 20) // max(len(numbers), 1), 64), 1 << 14)
        cursors = [RunCursor(runs, int(n), most) for n in numbers]
        ready: list[pl.DataFrame] = []
        held, seq, size = 0, 0, max(self._options.batch_rows, 1)
        with ThreadPoolExecutor(2, "xtrace-text") as pool:
            for rows in self._rounds(cursors, pool):
                n = len(rows["code"])
                counts = tally(rows)
                ready.append(_completed(frame(rows, counts, numbers, seq, self._options.tsc_khz), rows))
                self._count(counts)
                seq, held = seq + n, held + n
                if held >= size:
                    yield from pl.concat(ready, rechunk=False).iter_slices(size)
                    ready, held = [], 0
        if ready:
            yield from pl.concat(ready, rechunk=False).iter_slices(size)
        seen.pcpus = len(self._seen)
        seen.first_tsc, seen.last_tsc = self._pcpus.first_tsc, self._pcpus.last_tsc
        if source.damage:
            ledger.truncated = True
            ledger.problem(source.damage, offset=source.size)
        ledger.problems.sort(key=lambda p: p.line or 0)
        ledger.unparsed.sort()

    def _count(self, counts: Tally) -> None:
        """Add emitted events to the ledger."""
        ledger = self.ledger
        for name in ("hypercalls", "subcalls", "vmmcalls", "lost_events", "lost_records", "unattributed"):
            setattr(ledger, name, getattr(ledger, name) + getattr(counts, name))

    def _rounds(self, cursors: list[RunCursor], pool: Executor) -> Iterator[Rows]:
        """Read in rounds, two of them ahead in the background; yield rows in their final order."""
        state, merge = self._pcpus, Merge(len(cursors))
        waiting: deque[tuple[NDArray[np.int64], Future[tuple[pl.DataFrame, Words]]]] = deque()
        under_way = np.zeros(len(cursors), dtype=np.int64)  # rounds of each pCPU that are read and not merged yet
        try:
            while True:
                while len(waiting) < _AHEAD and len(wanted := self._wanted(cursors, merge)):
                    under_way[wanted] += 1
                    waiting.append((wanted, self._begin([cursors[i] for i in wanted.tolist()], merge, pool)))
                if not waiting:
                    return
                wanted, found = waiting.popleft()
                merge.add(self._round(wanted, *found.result()))
                under_way[wanted] -= 1
                live = np.array([i for i, c in enumerate(cursors) if under_way[i] or not c.done], dtype=np.int64)
                key = None
                if len(live):
                    p = live[np.lexsort((live, state.tsc[live], state.segment[live]))[0]]
                    key = (int(state.segment[p]), int(state.tsc[p]), int(p))
                done = merge.ripe(key)
                if done is not None:
                    yield done
        finally:
            for _, found in waiting:
                found.cancel()

    def _wanted(self, cursors: list[RunCursor], merge: Merge) -> NDArray[np.int64]:
        """Choose the pCPUs to read on: where little waits, and where everyone else waits for."""
        state = self._pcpus
        live = np.array([i for i, c in enumerate(cursors) if not c.done], dtype=np.int64)
        if not len(live):
            return live
        room = merge.behind[live] * _ROW_BYTES <= self._chunk // (2 * len(live))
        room[np.lexsort((live, state.tsc[live], state.segment[live]))[0]] = True
        return live[room]

    def _begin(self, cursors: list[RunCursor], merge: Merge, pool: Executor) -> Future[tuple[pl.DataFrame, Words]]:
        """Take the next runs of ``cursors``, and have them read in the background."""
        left = max(_HELD * self._chunk - int(merge.behind.sum()) * _ROW_BYTES, 0)
        plans = [cursor.take(min(self._chunk, left) // len(cursors)) for cursor in cursors]
        owner = np.repeat(np.arange(len(cursors)), [len(plan) for plan in plans])
        return pool.submit(self._read, np.concatenate(plans), owner)

    def _read(self, runs: NDArray[np.void], owner: NDArray[np.int64]) -> tuple[pl.DataFrame, Words]:
        """Read runs as far as each line says something by itself; return their lines, by owner, and what they say."""
        in_file = np.argsort(runs["offset"], kind="stable")
        lines, data = self._text(runs[in_file], owner[in_file])
        if len(owner) and owner[-1] != owner[0]:
            lines = lines.sort("owner", maintain_order=True)
        return lines, self._lines.read(lines["text"], data, lines["start"].to_numpy())

    def _round(self, dense: NDArray[np.int64], lines: pl.DataFrame, found: Words) -> Rows:
        """Extract the events of lines, which are grouped by pCPU."""
        grid, code, opless = found.grid, found.code, found.opless
        self._account(lines, found.record)
        if not found.record.all():
            lines = lines.filter(pl.Series(found.record))
            kept = np.flatnonzero(found.record)
            grid, code, opless = grid.take(np.append(kept, len(found.record)), axis=0), code.take(kept), opless.take(kept)
        group = lines["owner"].to_numpy()
        self._seen.update(dense[np.unique(group)].tolist())
        n = len(code)
        rows = np.flatnonzero(code)
        head = np.ascontiguousarray(grid[:n, 0])
        bounds = np.searchsorted(group, np.arange(len(dense) + 1))
        batch = Batch(
            words=grid.reshape(-1),
            pos=np.arange(n) * STRIDE,
            head=head,
            pcpus=dense,
            bounds=bounds,
            rows=rows,
            code=code.take(rows),
            row_bounds=np.searchsorted(rows, bounds),
            group=group.take(rows),
            base=rows * STRIDE + 3,
            extra=(head.take(rows) >> 28 & 7).astype(np.uint8),
        )
        events, _ = extract(batch, self._pcpus, rows, self._needs, lambda: True)
        at = events["offset"]
        events["line"] = lines["line"].to_numpy()[at]
        events["opless"] = opless.take(at)
        self.ledger.nameless += int(events["opless"].sum())
        events["offset"] = lines["offset"].to_numpy()[at].astype(np.int64)
        return events

    def _text(self, runs: NDArray[np.void], owner: NDArray[np.int64]) -> tuple[pl.DataFrame, NDArray[np.uint8]]:
        """Read runs (ascending in the file); return their lines, and the bytes that hold them.

        Lines are ``text``, ``line``, ``offset``, ``owner``, and ``start``, where each begins in those bytes.
        """
        offset, size = runs["offset"].astype(np.int64), runs["size"].astype(np.int64)
        joined = offset[1:] - offset[:-1] - size[:-1] <= np.minimum(_GAP, 2 * size[1:] + 256)
        first = np.flatnonzero(np.append(True, ~joined))
        last = np.append(first[1:], len(offset)) - 1
        length = offset[last] + size[last] - offset[first]
        base = np.cumsum(length) - length
        padded = np.zeros(_PAD + int(length.sum()), dtype=np.uint8)
        data = padded[_PAD:]
        view = memoryview(data)  # type: ignore[arg-type]
        for at, begin, n in zip(offset[first].tolist(), base.tolist(), length.tolist(), strict=True):
            read_at(self._source.file.fileno(), view[begin : begin + n], at)  # what is missing in a file that shrank stays 0
        data[-1] = _NEWLINE
        text, starts = split(data.tobytes())
        # Lines are in the order of the file: stretches, and runs with what is read over between them, follow each other.
        shift = _spread(offset[first] - base, np.searchsorted(starts, base), len(starts))
        place = starts + shift
        begin_line = np.searchsorted(place, offset)
        piece = _spread(np.arange(len(offset)), begin_line, len(starts))
        number = np.arange(len(starts)) + _spread(runs["line"] - begin_line, begin_line, len(starts))
        lines = pl.DataFrame(
            {
                "text": text,
                "line": number.astype(np.uint64),
                "offset": place.astype(np.uint64),
                "owner": owner[piece],
                "start": starts + _PAD,
            }
        )
        inside = place < _spread(offset + size, begin_line, len(starts))
        return (lines if inside.all() else lines.filter(pl.Series(inside))), padded

    def _account(self, lines: pl.DataFrame, good: NDArray[np.bool_]) -> None:
        """Count lines that are no records, and show the first few."""
        ledger = self.ledger
        ledger.records += int(good.sum())
        if good.all():
            return
        rest = lines.filter(pl.Series(~good)).sort("line")
        begun = rest["text"].str.contains(r"^CPU[0-9]{1,5}[ \t]")
        bad, noise = rest.filter(begun), rest.filter(~begun)
        ledger.skipped_lines += len(bad)
        ledger.noise_lines += len(noise)
        for line, at, text in bad.head(ledger.KEEP).select("line", "offset", "text").iter_rows():
            ledger.problem(f"not understood: {_shown(text)}", offset=at, line=line)
        ledger.problems_dropped += max(len(bad) - ledger.KEEP, 0)
        room = ledger.SHOWN - len(ledger.unparsed)
        some = noise.filter(pl.col("text").str.contains(r"\S")).head(max(room, 0))
        ledger.unparsed += [(line, _shown(text)) for line, text in some.select("line", "text").iter_rows()]


def _spread(values: NDArray[np.int64], begin: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Give each of n rows the value of the last part that begins at or before it; the first begins at 0."""
    return np.repeat(values, np.diff(np.append(begin, n)))


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:59] + "…"


def _completed(events: pl.DataFrame, rows: Rows) -> pl.DataFrame:
    """Add line numbers, and take away what the text did not say."""
    events = events.with_columns(line=pl.Series(rows["line"]).cast(pl.UInt64))
    if rows["opless"].any():
        events = events.with_columns(op=pl.when(~pl.Series(rows["opless"])).then("op"))
    if (rows["code"] == _VMMCALL).any():
        # The 64-bit exit of 3.4 prints the lower half of rip only.
        half = (pl.col("kind") == "vmmcall") & (pl.col("caller") == "hvm64") & (pl.col("rip") <= _NARROW)
        events = events.with_columns(rip=pl.when(~half.fill_null(value=False)).then("rip"))
    return events.match_to_schema(schema.EVENTS)


def _in_seconds(head: bytes) -> bool:
    """Say whether times are whole seconds (``-c``): then a step, which stays in ticks, can be larger than the time."""
    return any(0 < int(time) < int(step) for time, step in _STAMP.findall(head[: head.rfind(b"\n") + 1]) if len(step) < 20)


class XentraceFormatReader:
    """Reader of ``xentrace_format`` text (``xtrace.ingest.base.Reader``)."""

    name = "xentrace-format"
    title = "xentrace_format text, formats files of Xen 3.0 to 4.18"
    streams = False
    shows = Shows(
        op="Xen 3.2 and later; in 64-bit lines of 3.3 and 3.4 only for users of the hypercall page",
        arguments="",
        rip="PV: Xen 3.2 to 4.2; HVM: from the exit before",
        who="by scheduling lines",
        time="TSC, unless -c was used",
        proved="paging_domctl_cont by its number",
        inferred="multicalls by the sub-calls that follow",
        unobservable="every argument, and so the progress of every other hypercall",
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this is: 90 for a record's line."""
        return 90 if _SNIFF.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> XentraceFormatRecording:
        """Open ``source``; nothing is read yet."""
        return XentraceFormatRecording(source, options)


READER: Final = XentraceFormatReader()
