"""The container of Xen 3.0 and 3.1: records of a fixed size, which pCPU each is of, and where damage is.

A record is ``u32 cpu`` and a raw ``struct t_rec`` (``layouts/xentrace_fixed.toml``): 36 or 60 bytes, in the byte order of
the host, without a file header. So nothing but the period says where a record begins: a record is one whose cpu and event
are possible *and* that is followed by another, or by the end of the file.

Where the period breaks, the next record is searched for, in step first and then byte by byte: four in a row that are possible
and whose time does not step back on a pCPU. Bytes that were lost or came in may have been inside the last record that seems
whole before the break, behind its event, or inside the first one behind it, before its event, so these two are skipped along
with what lies between. Skipped bytes are counted, and all pCPUs may miss records there.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xtrace.ingest.layout import ACTIONS
from xtrace.ingest.windows import WindowIndex, read_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xtrace.ingest.base import Ledger
    from xtrace.ingest.windows import Order

__all__ = ("CPU_LIMIT", "Shape", "Table", "guess", "load", "scan")

#: pCPU numbers are below: NR_CPUS is 32 unless built with max_phys_cpus (``3.1.0-branched:xen/include/asm-x86/config.h``),
#: and the APICs of the time number 255 at most.
CPU_LIMIT: Final = 256

#: So many records in a row, time ascending, prove that one begins here.
_CHAIN: Final = 4

_PAGE: Final = 1 << 12  # ids in a row of the table
_BLOCK: Final = 1 << 21  # bytes scanned at once
_STEP_MIN: Final = 1 << 12
_SURE: Final = 16  # records at the start of a file that must fit


@dataclass(frozen=True, slots=True)
class Shape:
    """How the records of one file lie."""

    wide: bool  # data words of 8 bytes
    order: Order

    @property
    def stride(self) -> int:
        """Return the bytes of a record."""
        return 60 if self.wide else 36

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Return a record as NumPy sees it: cpu, tsc, event, (padding,) d."""
        sign = "<" if self.order == "little" else ">"
        pad = [("pad", f"{sign}u4")] if self.wide else []
        data = ("d", f"{sign}u{8 if self.wide else 4}", (5,))
        return np.dtype([("cpu", f"{sign}u4"), ("tsc", f"{sign}u8"), ("event", f"{sign}u4"), *pad, data])


#: In the order in which they are tried.
_ORDERS: Final[tuple[Order, ...]] = ("little", "big")
_SHAPES: Final = tuple(Shape(wide, order) for order in _ORDERS for wide in (True, False))


@dataclass(frozen=True, slots=True)
class Table:
    """Event ids. An id's slot is ``rows[id >> 12] + (id & 0xfff)``; the last row holds the ids that nobody writes."""

    rows: NDArray[np.int64]  # by class and subclass, up to the highest known
    codes: NDArray[np.uint8]  # by slot: index into ACTIONS
    possible: NDArray[np.bool_]  # by slot
    ids: NDArray[np.uint32]  # by slot
    peaks: tuple[int, ...]  # event ids whose largest first data word is kept

    def slots(self, events: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the slot of each event id; whatever it is."""
        slots: NDArray[np.int64] = self.rows.take(events >> 12, mode="clip")
        slots += events & np.uint32(_PAGE - 1)
        return slots


@cache
def load() -> Table:
    """Load ``layouts/xentrace_fixed.toml`` (once)."""
    with (Path(__file__).parent / "layouts" / "xentrace_fixed.toml").open("rb") as file:
        data: dict[str, Any] = tomllib.load(file)
    pairs = sorted({span["first"] >> 12 for span in data["possible"]})
    none = len(pairs) * _PAGE
    rows = np.full(pairs[-1] + 2, none, dtype=np.int64)  # clip ends in the row of nobody
    possible = np.zeros(none + _PAGE, dtype=np.bool_)
    codes = np.zeros(none + _PAGE, dtype=np.uint8)
    ids = np.zeros(none + _PAGE, dtype=np.uint32)
    for i, pair in enumerate(pairs):
        rows[pair] = i * _PAGE
        ids[i * _PAGE : (i + 1) * _PAGE] = (pair << 12) + np.arange(_PAGE)
    for span in data["possible"]:
        first = int(rows[span["first"] >> 12]) + (span["first"] & (_PAGE - 1))
        possible[first : first + span["last"] - span["first"] + 1] = True
    for record in data["record"]:
        for event in record["ids"]:
            codes[rows[event >> 12] + (event & (_PAGE - 1))] = ACTIONS.index(record["action"])
    return Table(rows, codes, possible, ids, tuple(p["id"] for p in data["peak"]))


def _possible(cpu: NDArray[Any], event: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which records can be some."""
    table = load()
    out: NDArray[np.bool_] = table.possible.take(table.slots(event.astype(np.uint32)))
    out &= cpu < CPU_LIMIT
    return out


def _ascending(records: NDArray[np.void]) -> bool:
    """Say whether time steps back on no pCPU."""
    last: dict[int, int] = {}
    for cpu, tsc in zip(records["cpu"].tolist(), records["tsc"].tolist(), strict=True):
        if tsc < last.get(cpu, 0):
            return False
        last[cpu] = tsc
    return True


def guess(head: bytes) -> tuple[int, Shape]:
    """Say how sure the first bytes of a file make it that they are such records, and of which shape.

    90: two or more records from byte 0 on, as far as 16 of them, whose time steps back on no pCPU. 40: a single one and no
    more. 15: four in a row further on.
    """
    for shape in _SHAPES:
        n = min(len(head) // shape.stride, _SURE)
        if n >= 2:
            records = np.frombuffer(head, dtype=shape.dtype, count=n)
            if _possible(records["cpu"], records["event"]).all() and _ascending(records):
                return 90, shape
    for shape in _SHAPES:
        if len(head) == shape.stride and _possible(*(np.frombuffer(head, shape.dtype)[name] for name in ("cpu", "event"))).all():
            return 40, shape
    found = [(next(_chains(head, shape), None), shape) for shape in _SHAPES]
    at, shape = min(((len(head) if at is None else at, shape) for at, shape in found), key=lambda pair: pair[0])
    return (15 if at < len(head) else 0), shape


def _chains(data: bytes, shape: Shape) -> Iterator[int]:
    """Yield the bytes at which four records in a row begin."""
    stride = shape.stride
    span = len(data) - _CHAIN * stride + 1
    if span <= 0:
        return
    kind = "<u4" if shape.order == "little" else ">u4"
    can = np.zeros(len(data), dtype=np.bool_)
    for phase in range(4):
        words = np.frombuffer(data, dtype=kind, offset=phase, count=(len(data) - phase) // 4)
        can[phase : phase + (len(words) - 3) * 4 : 4] = _possible(words[:-3], words[3:])
    run = can[:span].copy()
    for i in range(1, _CHAIN):
        run &= can[i * stride : i * stride + span]
    for at in np.flatnonzero(run).tolist():
        if _ascending(np.frombuffer(data, dtype=shape.dtype, offset=at, count=_CHAIN)):
            yield at


class _Scan:
    """The first pass."""

    def __init__(self, fd: int, size: int, shape: Shape, ledger: Ledger) -> None:
        self.fd, self.size, self.shape, self.ledger = fd, size, shape, ledger
        self.index = WindowIndex()
        self.buffer = bytearray(_BLOCK // shape.stride * shape.stride)
        self.step = len(self.buffer)
        self.held: tuple[int, int] | None = None  # the last record (byte, cpu), not taken yet: what follows may disprove it

    def run(self) -> WindowIndex:
        at, stride = 0, self.shape.stride
        while self.size - at >= stride:
            view = memoryview(self.buffer)[: min(self.step, (self.size - at) // stride * stride)]
            got = read_at(self.fd, view, at) // stride
            if not got:
                break  # the file shrank meanwhile
            records = np.frombuffer(view, dtype=self.shape.dtype, count=got)
            good = _possible(records["cpu"], records["event"])
            n = got if good.all() else int(good.argmin())
            self.take(at, records["cpu"][:n])
            at += n * stride
            self.step = min(self.step * 4, len(self.buffer))
            if n < got:
                at = self.resync(at)
                self.step = min(stride << 6, len(self.buffer))  # damage may be everywhere
        if self.held is not None:
            self.add([self.held[0]], [self.held[1]], [1])
        if at < self.size:
            self.ledger.truncated = True
            self.ledger.skipped_bytes += self.size - at
            self.ledger.problem(f"the file ends {stride - (self.size - at)} bytes before a record does", offset=at)
        self.index.close()
        return self.index

    def take(self, at: int, cpus: NDArray[Any]) -> None:
        """Note runs of records of one pCPU; the last record is held back."""
        if not len(cpus):
            return
        stride = self.shape.stride
        first = at
        cpus = cpus.astype(np.int64)
        if self.held is not None:
            first, cpus = self.held[0], np.append(self.held[1], cpus)
        self.held = (first + (len(cpus) - 1) * stride, int(cpus[-1]))
        cpus = cpus[:-1]
        if len(cpus):
            begin = np.flatnonzero(np.append(True, cpus[1:] != cpus[:-1]))
            self.add(first + begin * stride, cpus[begin], np.diff(np.append(begin, len(cpus))))

    def add(self, at: Any, cpus: Any, counts: Any) -> None:
        # A window's size fits 32 bits: a run is never longer than the buffer and one record.
        rows = np.stack([np.asarray(at), np.asarray(counts) * self.shape.stride, np.asarray(cpus)], axis=1)
        self.index.add(rows.astype(np.uint64))

    def resync(self, at: int) -> int:
        """Find the next record behind the one at ``at``, which is none; return where it begins, or the end of the file."""
        start = at if self.held is None else self.held[0]
        self.held = None
        found = self.find(at, start)
        end = self.size if found is None else found + self.shape.stride
        self.ledger.skipped_bytes += end - start
        self.ledger.problem(f"no record where one is due; {end - start} bytes skipped", offset=start)
        self.index.lose()
        return end

    def find(self, broken: int, start: int) -> int | None:
        """Search for four records in a row: in step with the record ``broken`` that is none, or anywhere behind byte ``start``.

        ``start`` is the record before: where bytes were lost from inside it the next one begins before ``broken``. Fewer than
        four do in step at the end of the file.
        """
        stride = self.shape.stride
        keep = _CHAIN * stride - 1
        fits = self.fits(broken + stride)
        if fits == _CHAIN:
            return broken + stride
        at, size = start + 1, _STEP_MIN
        while at < self.size:
            view = memoryview(bytearray(min(size + keep, self.size - at)))
            size = min(size * 4, _BLOCK)
            data = bytes(view[: read_at(self.fd, view, at)])
            i = next(_chains(data, self.shape), None)
            if i is not None:
                return at + i
            if len(data) <= keep:
                break
            at += len(data) - keep
        return broken + stride if fits else None

    def fits(self, at: int) -> int:
        """Return how many records stand at byte ``at``, four or as many as the file ends with; 0 if one of these is none."""
        data = os.pread(self.fd, _CHAIN * self.shape.stride, at)
        records = np.frombuffer(data, dtype=self.shape.dtype, count=len(data) // self.shape.stride)
        fit = bool(_possible(records["cpu"], records["event"]).all()) and _ascending(records)
        return len(records) if fit else 0


def scan(fd: int, size: int, shape: Shape, ledger: Ledger) -> WindowIndex:
    """Find all records of the file ``fd`` of ``size`` bytes, as runs of one pCPU; damage goes to ``ledger``."""
    return _Scan(fd, size, shape, ledger).run()
