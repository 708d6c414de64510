"""An xentrace binary that still grows: its windows are read as they come, and events told as soon as their order is certain.

``xentrace`` goes over the pCPUs in ascending order again and again, and writes one window for each that has recorded
something since (tools/xentrace/xentrace.c: monitor_tbufs, write_buffer, the same at 3.2.0-rc6, 3.3.0, 4.0.0, 4.17.0 and 4.22.0;
by default ten times a second). So a window whose pCPU is not above that of the window before it begins a new round, and
once a round is complete, whatever a pCPU still has to say was recorded after the round before it had been written: events up
to the latest time of that one are told. A pCPU without a window in a round had nothing to say, and is not waited for.

What this takes for granted are TSCs that agree between pCPUs to within a round. Where they do not, and where nothing has
come for a while or too many events wait (then all are told), an event may come that belongs before one already told. It is
told late, and so is whatever else shows only later (damage, records of Xen 3.2 and 3.3 that look like those of 3.4):
``provisional`` then says that what was given differs from what a reading of the whole gives. Otherwise it is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.ingest.attribute import Pcpus
from xtrace.ingest.merge import Merge
from xtrace.ingest.records import frame, tally
from xtrace.ingest.windows import AFTER_LOSS, HEADER_BYTES, PCPU_LIMIT, Cursor, Scan, WindowIndex
from xtrace.ingest.xentrace import CHUNK, LOOK, QUOTA_MIN, XentraceRecording, byte_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from numpy.typing import NDArray

    from xtrace.ingest.base import Ledger, ReadOptions
    from xtrace.ingest.records import Rows
    from xtrace.ingest.source import Source
    from xtrace.ingest.windows import Order

__all__ = ("GrowingXentrace",)

#: Seconds without growth after which all that has come is told: twenty rounds of ``xentrace``.
PATIENCE: Final = 2.0
#: Bytes whose windows are looked for at once.
_STEP: Final = 1 << 24
#: So many events may wait.
_MOST: Final = 1 << 20
#: Behind damage, so many bytes are searched again for a header whose window was not complete.
_AGAIN: Final = 1 << 23
_LAST: Final = (1 << 16) - 1


@dataclass(slots=True)
class _Arrived(WindowIndex):
    """Windows that came and were not read yet."""

    def _flush(self) -> None:
        """Keep them all: they are taken soon."""

    def taken(self) -> NDArray[np.int64]:
        """Return, in file order, the windows since the last call: payload offset, bytes (and `AFTER_LOSS`), pCPU."""
        rows = np.concatenate([np.zeros((0, 3), dtype=np.uint64), *self._todo]).astype(np.int64)
        self._todo, self._todo_rows = [], 0
        return rows

    @property
    def known(self) -> NDArray[np.int64]:
        """The pCPUs that had a window, ascending."""
        return np.flatnonzero(self._seen)


class _Complete(Scan):
    """Finds complete windows; where one is not, it waits there."""

    def __init__(self, fd: int, ledger: Ledger, order: Order) -> None:
        super().__init__(fd, 0, ledger, order)
        self.index: _Arrived = _Arrived()
        self.at = 0
        self.damaged = False
        self._final = False
        self._waits: int | None = None
        self._searched = 0

    def more(self, size: int, *, final: bool = False) -> NDArray[np.int64]:
        """Return the windows that are complete with ``size`` bytes of the file; ``final``: there will not be more of it."""
        self.size, self._final, self._waits = size, final, None
        at = self.advance(self.at)
        self.at = at if self._waits is None else self._waits
        return self.index.taken()

    def head(self, at: int) -> tuple[int, int] | None:
        return super().head(at) if at + HEADER_BYTES <= self.size else None

    def resync(self, payload: int, due: int, pcpu: int | None) -> int:
        if self._final:
            return super().resync(payload, due, pcpu)
        self.flush()
        if due + HEADER_BYTES <= self.size:
            found = self.find(max(payload, self._searched))
            head = None if found is None else self.head(found)
            if found is not None and head is not None and found + HEADER_BYTES + head[1] <= self.size:
                self.damaged, self._searched = True, 0
                return super().resync(payload, due, pcpu)
            self._searched = max(payload, self.size - _AGAIN)
        self._waits = payload if pcpu is None else payload - HEADER_BYTES
        return self.size


class _Reading(Cursor):
    """Reads the windows of one pCPU that came."""

    __slots__ = ()

    def __init__(self, pcpu: int) -> None:
        super().__init__(WindowIndex(), pcpu, 1)

    def feed(self, windows: NDArray[np.int64]) -> None:
        """Take windows as ``_Arrived.taken`` gives them; all before them were read."""
        self._offsets, self._marks = windows[:, 0], (windows[:, 1] & AFTER_LOSS) != 0
        self._sizes = windows[:, 1] // 4 * 4
        self._i = self._used = 0
        self.done = not len(windows)

    def _fetch(self) -> None:
        self.feed(np.zeros((0, 3), dtype=np.int64))


class GrowingXentrace(XentraceRecording):
    """One xentrace binary that still grows (``xtrace.ingest.base.Recording``).

    Args:
        source: where the bytes are.
        options: how to read.
        chunk, step: bytes that are read, and looked for windows, at once; for tests.
    """

    def __init__(self, source: Source, options: ReadOptions, *, chunk: int = CHUNK, step: int = _STEP) -> None:
        super().__init__(source, options, chunk=chunk)
        self._step = max(step, HEADER_BYTES)
        #: What was given differs from what a reading of the whole gives.
        self.provisional = False
        self._readings: dict[int, _Reading] = {}
        self._merge = Merge(PCPU_LIMIT)
        self._pcpus = Pcpus(PCPU_LIMIT)
        self._told = (0, 0, 0)  # segment, TSC, pCPU of the last event given
        self._last = -1  # pCPU of the last window
        # By segment, the latest time: now, when this round began, when the one before it began.
        self._latest: dict[int, int] = {}
        self._begun: dict[int, int] = {}
        self._floor: dict[int, int] = {}
        self._eras: set[bool | None] = set()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` as they become certain, else in the order (segment, TSC, pCPU, file)."""
        source, numbers, seq = self._source, np.arange(PCPU_LIMIT, dtype=np.uint32), 0
        self._order = byte_order(source.head())[1]
        for rows in self._released():
            counts = tally(rows)
            yield from self._sliced(frame(rows, counts, numbers, seq, self._options.tsc_khz))
            self._count(counts)
            seq += len(rows["code"])
        if self._eras - {super()._era_has_dom_word()}:
            self.provisional = True
        self.observed.pcpus = len(self._index.known) if isinstance(self._index, _Arrived) else 0
        if source.damage:
            self.ledger.truncated = True
            self.ledger.problem(source.damage, offset=source.size)
        self._finish()

    def _released(self) -> Iterator[Rows]:
        """Yield rows in the order in which they are told."""
        source, scan, step = self._source, _Complete(self._fd, self.ledger, self._order), self._step
        self._index = scan.index
        size = 0
        while True:
            more = source.wait(size, PATIENCE)
            if more:
                size = min(source.size, max(scan.at, size) + step)
                self._take(scan.more(size))
                ripe = self._certain()
            elif more is None:
                ripe = self._merge.ripe(None)
            else:
                self._size = source.size
                self._take(scan.more(self._size, final=True))
                ripe = self._merge.ripe(None)
            if ripe is not None:
                self._told = (int(ripe["segment"][-1]), int(ripe["tsc"][-1]), int(ripe["pcpu"][-1]))
                yield ripe
            if more is False:
                self.provisional |= scan.damaged
                return

    def _take(self, windows: NDArray[np.int64]) -> None:
        """Read windows, and note where rounds begin: those before the last two do not matter any more."""
        if not len(windows):
            return
        pcpu = windows[:, 2]
        turns = np.flatnonzero(pcpu <= np.append(self._last, pcpu[:-1]))[-2:].tolist()
        self._last = int(pcpu[-1])
        for low, high in zip([0, *turns], [*turns, len(windows)], strict=True):
            if low in turns:
                self._floor, self._begun = self._begun, dict(self._latest)
            self._consume(windows[low:high])

    def _consume(self, windows: NDArray[np.int64]) -> None:
        """Read windows through."""
        windows = windows[np.argsort(windows[:, 2], kind="stable")]
        pcpus, starts = np.unique(windows[:, 2], return_index=True)
        for pcpu, some in zip(pcpus.tolist(), np.split(windows, starts[1:]), strict=False):
            self._readings.setdefault(pcpu, _Reading(pcpu)).feed(some)
        wanted = pcpus
        while len(wanted):
            cursors = [self._readings[p] for p in wanted.tolist()]
            quota = max(self._chunk // len(wanted), min(QUOTA_MIN, self._chunk)) // 4 * 4
            rows = self._round(list(cursors), wanted, quota)
            if any(cursor.missing for cursor in cursors) or self._is_late(rows):
                self.provisional = True
            self._merge.add(rows)
            wanted = wanted[[not cursor.done for cursor in cursors]]
        state = self._pcpus
        for segment, tsc in zip(state.segment[pcpus].tolist(), state.tsc[pcpus].tolist(), strict=True):
            self._latest[segment] = max(tsc, self._latest.get(segment, 0))

    def _is_late(self, rows: Rows) -> bool:
        """Say whether any of these rows should have been told before the last one that was."""
        segment, tsc, pcpu = self._told
        late = rows["tsc"] < tsc
        late |= (rows["tsc"] == tsc) & (rows["pcpu"] < pcpu)
        late &= rows["segment"] == segment
        return bool((late | (rows["segment"] < segment)).any())

    def _certain(self) -> Rows | None:
        """Return the rows before which nothing can come any more."""
        if self._merge.behind.sum() > _MOST:
            return self._merge.ripe(None)
        # A pCPU whose TSC stepped back waits for the others to do so, as it does where a whole file is read.
        segment = int(self._pcpus.segment[list(self._readings)].min()) if self._readings else 0
        floor = self._floor.get(segment, 0)
        return self._merge.ripe((segment, floor - 1, _LAST)) if floor else None

    def _era_has_dom_word(self) -> bool | None:
        first = self._index.first
        if len(first) < self._index.FIRST and sum(size for _, size in first) < LOOK:
            self._dom_era = None  # more will tell
        value = super()._era_has_dom_word()
        self._eras.add(value)
        return value
