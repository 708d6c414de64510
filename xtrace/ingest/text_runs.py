"""Where the lines of each pCPU stand in ``xentrace_format`` text: the first pass of its reader.

The text goes window after window, as the binary does, so records of different pCPUs are out of order by a window or more.
Reading them merged takes an index: runs of lines of one pCPU, cut at a few kilobytes. It goes to an unnamed temporary file
once it is large.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from xtrace.ingest.lines import raw_blocks
from xtrace.ingest.windows import PCPU_LIMIT

if TYPE_CHECKING:
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from xtrace.ingest.base import Ledger

__all__ = ("RunCursor", "Runs", "scan_runs")

#: A longer line is no record.
LINE_MOST: Final = 1 << 12
#: Lines of a run begin within so many bytes of its start.
_RUN: Final = 1 << 13

_BLOCK: Final = 1 << 22
_PAD: Final = bytes(16)
_TAB, _ZERO, _BLANK, _NEWLINE = b"\t"[0], b"0"[0], b" "[0], b"\n"[0]
_CPU: Final = int.from_bytes(b"CPU", "little")
_CPU_CHANGE: Final = b"cpu_change "
_CALL: Final = re.compile(rb"hypercall  \[ (op|eip|rip) = ")
_HALF: Final = b"hypercall  [ rip = 0x00000000"
_SITE: Final = re.compile(rb"hypercall  \[ rip = 0x00000000([0-9a-f]{8}), eax = 0x([0-9a-f]{8}) \]")
_SITES_MOST: Final = 1 << 16
_OLD_EXIT: Final = re.compile(rb"rIP  = 0x[0-9a-f]+, exitcode = ")
#: A line that the shipped scripts could have begun.
RECORD: Final = re.compile(rb"CPU[0-9]+[ \t]")


_ROW: Final = np.dtype([("offset", "<i8"), ("line", "<i8"), ("size", "<i4"), ("pcpu", "<i4")])
#: Runs sorted at a time.
_STRETCH: Final = 1 << 17


@dataclass(slots=True)
class Runs:
    """All lines of a text, by pCPU.

    Attributes:
        pcpus: the pCPUs, ascending.
        lines: how many lines there are.
        windows: the text has ``cpu_change`` lines (Xen 3.2 and later).
        old_exits: an exit names rIP first, as only 3.1 does.
    """

    pcpus: list[int] = field(default_factory=list)
    lines: int = 0
    windows: bool = False
    old_exits: bool = False
    #: Halves of rip of the 64-bit hypercall lines of 3.3 and 3.4 (upper, lower); None: more than a trace can have.
    sites: set[tuple[int, int]] | None = field(default_factory=set)
    _store: tempfile.SpooledTemporaryFile[bytes] = field(
        default_factory=lambda: tempfile.SpooledTemporaryFile(max_size=1 << 23, prefix="xtrace-")  # noqa: SIM115
    )
    #: Stretches of the store, each grouped by pCPU: its first row, the pCPUs, and where each one's rows begin.
    _stretches: list[tuple[int, NDArray[np.int32], NDArray[np.int64]]] = field(default_factory=list)
    _rows: int = 0
    _todo: list[NDArray[np.void]] = field(default_factory=list)
    _held: int = 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Append runs (``offset`` of the first line, its number ``line``, ``size`` with newlines, ``pcpu``) in file order."""
        self._todo.append(rows)
        self._held += len(rows)
        if self._held >= _STRETCH:
            self._flush()

    def close(self) -> None:
        """End the first pass."""
        self._flush()
        self.pcpus = sorted({int(p) for _, pcpus, _ in self._stretches for p in pcpus})

    def _flush(self) -> None:
        if not self._held:
            return
        rows = np.concatenate(self._todo)
        self._todo, self._held = [], 0
        rows = rows[np.argsort(rows["pcpu"], kind="stable")]
        pcpus, starts = np.unique(rows["pcpu"], return_index=True)
        self._store.seek(0, os.SEEK_END)
        self._store.write(rows.tobytes())
        self._stretches.append((self._rows, pcpus, np.append(starts, len(rows))))
        self._rows += len(rows)

    def entries(self, pcpu: int, stretch: int, after: int, most: int) -> tuple[NDArray[np.void], int, int]:
        """Read up to ``most`` runs of ``pcpu`` from row ``after`` of a stretch on; none: that was all.

        Returns:
            The runs, and the (stretch, after) to go on with.
        """
        while stretch < len(self._stretches):
            base, pcpus, bounds = self._stretches[stretch]
            i = int(np.searchsorted(pcpus, pcpu))
            if i < len(pcpus) and pcpus[i] == pcpu and bounds[i] + after < bounds[i + 1]:
                n = min(most, int(bounds[i + 1] - bounds[i]) - after)
                self._store.seek((base + int(bounds[i]) + after) * _ROW.itemsize)
                return np.frombuffer(self._store.read(n * _ROW.itemsize), dtype=_ROW), stretch, after + n
            stretch, after = stretch + 1, 0
        return np.zeros(0, dtype=_ROW), stretch, after


class RunCursor:
    """Reads one pCPU's runs in order."""

    __slots__ = ("_at", "_most", "_rows", "_runs", "_total", "done", "pcpu")

    def __init__(self, runs: Runs, pcpu: int, most: int) -> None:
        """Stand before the first run of ``pcpu``; keep at most ``most`` in memory."""
        self.pcpu, self._runs, self._most = pcpu, runs, most
        self._at = (0, 0)
        self._fetch()

    def _fetch(self) -> None:
        self._rows, *at = self._runs.entries(self.pcpu, *self._at, self._most)
        self._at = (at[0], at[1])
        self._total = np.cumsum(self._rows["size"])
        self.done = not len(self._rows)

    def take(self, quota: int) -> NDArray[np.void]:
        """Return the next runs, of about ``quota`` bytes, at least one."""
        n = max(int(np.searchsorted(self._total, quota, side="right")), 1)
        rows, self._rows = self._rows[:n], self._rows[n:]
        self._total = self._total[n:] - self._total[n - 1]
        if not len(self._rows):
            self._fetch()
        return rows


def _pcpus(raw: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Find the lines of a block: where each ends, its pCPU, and whether it begins as a record does."""
    data = np.frombuffer(raw + _PAD, dtype=np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    starts = np.empty_like(ends)
    starts[:1], starts[1:] = 0, ends[:-1] + 1
    # Four bytes at once, wherever they begin: CPU and the first digit.
    first = np.ndarray(len(data) - 3, "<u4", data, strides=(1,))[starts]
    ok = first & np.uint32(0xFFFFFF) == _CPU
    number = (first >> np.uint32(24)).astype(np.int64) - _ZERO
    ok &= (number >= 0) & (number <= 9)
    open_ = ok.copy()  # the number may go on
    for k in range(4, 9):
        byte = data.take(starts + k)
        ends_here = (byte == _BLANK) | (byte == _TAB)
        more = open_ & ~ends_here
        if not more.any():
            break
        digit = (byte - _ZERO <= 9) & (k < 8)
        ok &= ~more | digit
        open_ = more & digit
        number = np.where(open_, number * 10 + (byte - _ZERO), number)
    ok &= number < PCPU_LIMIT
    return ends, number, ok


def scan_runs(file: IO[bytes], ledger: Ledger, *, block: int = _BLOCK) -> Runs:
    """Read ``file`` once; long lines and a last line that is cut off go to ``ledger``.

    Lines that do not begin as records do are counted to the run that they stand in.
    """
    runs = Runs()
    pcpu = 0
    with ThreadPoolExecutor(2, "xtrace-runs") as pool:
        waiting: deque[  # block, what was found in it
            tuple[
                tuple[bytes, int, int, list[tuple[int, int, int]], bool],
                Future[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]],
            ]
        ] = deque()
        blocks = raw_blocks(file, block)
        while True:
            while len(waiting) < 3 and (item := next(blocks, None)) is not None:
                waiting.append((item, pool.submit(_pcpus, item[0])))
            if not waiting:
                break
            (raw, base, number, long, cut), found = waiting.popleft()
            ends, cpu, ok = found.result()
            runs.windows = runs.windows or _CPU_CHANGE in raw
            if not runs.windows and not runs.old_exits:
                runs.old_exits = b"exitcode" in raw and _OLD_EXIT.search(raw) is not None
            # No recording has both lines of 4.3 and later and older ones.
            call = _CALL.search(raw)
            if runs.sites is not None and call and call[1] != b"op" and _HALF in raw:
                runs.sites.update((int(eax, 16), int(rip, 16)) for rip, eax in set(_SITE.findall(raw)))
                runs.sites = runs.sites if len(runs.sites) <= _SITES_MOST else None
            if cut:
                _cut(raw, base, number, ledger)
            pcpu = _add(runs, ledger, (base, number), ends, cpu, ok, pcpu, skip_last=cut)
            runs.lines += len(ends) + len(long)
            _long(ledger, long)
    runs.close()
    return runs


def _add(
    runs: Runs,
    ledger: Ledger,
    place: tuple[int, int],
    ends: NDArray[np.int64],
    cpu: NDArray[np.int64],
    ok: NDArray[np.bool_],
    pcpu: int,
    *,
    skip_last: bool,
) -> int:
    """Add the runs of one block; return the pCPU of its last line."""
    base, number = place
    n = len(ends)
    if not n:
        return pcpu
    starts = np.append(0, ends[:-1] + 1)
    owner = cpu
    if not ok.all():
        at = np.maximum.accumulate(np.where(ok, np.arange(n), -1))
        owner = np.where(at >= 0, cpu[np.maximum(at, 0)], pcpu)
    keep = ends - starts <= LINE_MOST
    if skip_last:
        keep[-1] = False
    wide = np.flatnonzero(~keep)
    wide = wide[:-1] if skip_last else wide
    _long(ledger, [(base + int(starts[i]), number + int(i), int(ends[i] - starts[i])) for i in wide.tolist()])
    change = np.empty(n, dtype=np.bool_)
    change[0] = True
    np.not_equal(owner[1:], owner[:-1], out=change[1:])
    grid = starts // _RUN  # a run begins anew in every so many bytes
    change[1:] |= grid[1:] != grid[:-1]
    if not keep.all():
        change[1:] |= keep[1:] != keep[:-1]
    first = np.flatnonzero(change)
    last = np.append(first[1:], n) - 1
    good = keep[first]
    first, last = first[good], last[good]
    rows = np.empty(len(first), dtype=_ROW)
    rows["offset"], rows["line"] = base + starts[first], number + first
    rows["size"], rows["pcpu"] = ends[last] + 1 - starts[first], owner[first]
    runs.add(rows)
    return int(owner[-1])


def _long(ledger: Ledger, long: list[tuple[int, int, int]]) -> None:
    for at, line, size in long:
        ledger.skipped_lines += 1
        ledger.skipped_bytes += size
        ledger.problem(f"a line of {size} bytes is no record and was skipped", offset=at, line=line)


def _cut(raw: bytes, base: int, number: int, ledger: Ledger) -> None:
    """Account for a last line without a newline: a record that is cut, or noise."""
    start = raw.rfind(b"\n", 0, -1) + 1
    if RECORD.match(raw, start):
        ledger.truncated = True
        ledger.skipped_bytes += len(raw) - 1 - start
        text = "the last line is cut off (no newline) and was not used"
        ledger.problem(text, offset=base + start, line=number + raw.count(b"\n", 0, start))
    else:
        ledger.noise_lines += 1
