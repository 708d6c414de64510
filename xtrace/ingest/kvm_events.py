"""Reader of hypercalls that guests of KVM made to an emulated Xen: QEMU's and KVM's own trace events.

``-accel kvm,xen-version=…`` makes QEMU answer Xen hypercalls; KVM answers a few itself (event channel send, timers)::

    kvm_xen_hypercall xen_hypercall: cpu 0 cpl 0 input 12 a0 0x7 a1 0xffffffff82003d40 a2 0x0 ret 0x0
    4711@1690000000.123456:kvm_xen_hypercall xen_hypercall: cpu 0 …            log backend with timestamps, until 2025
    2025-11-05T10:00:00.123456Z kvm_xen_hypercall xen_hypercall: cpu 0 …       log backend with timestamps, since
    kvm_xen_hypercall 12.345 pid=4711 cpu=0x0 cpl=0x0 input=0xc a0=0x7 …       simple backend (scripts/simpletrace.py)
    CPU 0/KVM-4713 [005] d.... 1234.567890: kvm_xen_hypercall: cpl 0 nr 0xc a0 0x7 a1 0x… a2 0x0 a3 0x0 a4 0x0 a5 0

Sources: QEMU target/i386/kvm/trace-events and xen-emu.c kvm_xen_handle_exit (8.0 on), scripts/tracetool/backend/log.py, util/log.c
qemu_log; Linux arch/x86/kvm/trace.h (5.12 on; ``cpl`` since c3f3719952b9, 6.2) and xen.c kvm_xen_hypercall.

* No Xen is there and nothing preempts a hypercall: there are no continuations to be seen, only which calls a guest makes. It is
  an HVM guest; a value above 32 bits proves a 64-bit caller (KVM cuts a 32-bit caller's registers), else it is null.
* QEMU prints a call when it is done, with its result: the call and its return are one line. Its arguments are the first three.
* KVM's tracepoint is at the entry. It prints six arguments, of which a4 and a5 are left null: until commit 2b72f1674e42 (2026) the
  kernel stored a5 in a4's place and left a5 unset, and a line does not say which kernel printed it.
* KVM's line has the host's CPU in brackets; the vCPU is in the name that QEMU gives its threads ("CPU 0/KVM"), where the task has
  one. Where threads of several machines have one such name, only the first one's calls get the number.
* The simple backend prints the time since the record before, of whatever event: no time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import polars as pl

from xtrace.ingest.base import Shows
from xtrace.ingest.lines import LineBlock, block_bytes, magnitudes
from xtrace.ingest.linux_lines import EVENT_LINE, losses, parse, times
from xtrace.ingest.source import is_live
from xtrace.ingest.text import Found, TextRecording
from xtrace.schema import ARGS, EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source

__all__ = ("READER", "KvmEventsReader", "KvmEventsRecording")

_X: Final = r"(0x[0-9a-f]{1,16})"
_ANY: Final = "xen_hypercall"
_LOG_BEGINS: Final = "xen_hypercall: cpu "
_LOG: Final = rf"xen_hypercall: cpu ([0-9]{{1,5}}) cpl [0-9]+ input ([0-9]{{1,20}}) a0 {_X} a1 {_X} a2 {_X} ret {_X}\s*$"
_SIMPLE: Final = (
    r"^kvm_xen_hypercall -?[0-9]+\.[0-9]{3} pid=[0-9]+ "
    rf"cpu=(0x[0-9a-f]{{1,5}}) cpl=0x[0-9a-f]+ input={_X} a0={_X} a1={_X} a2={_X} ret={_X}\s*$"
)
_QEMU: Final = ("vcpu", "op", "arg0", "arg1", "arg2", "ret")
_STAMP: Final = r"(?:^|\s)[0-9]+@([0-9]{1,10})\.([0-9]{6}):kvm_xen_hypercall "
# What is before the first name on a line: anchored at both ends of a short text, a pattern costs a fraction.
_NAME: Final = "kvm_xen_hypercall "
_STAMP_HEAD: Final = r"^[0-9]+@([0-9]{1,10})\.([0-9]{6}):$"
_ISO_HEAD: Final = r"^([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?)Z $"
_QEMU_LINE: Final = r"^(?:[0-9]+@[0-9]+\.[0-9]{6}:|[0-9-]{10}T[0-9:.]{8,18}Z )?[a-z][a-z0-9]*_\w+ "
_LOOKS: Final = r"xen_hypercall:? +(?:cp[ul]|nr|-?[0-9.]+ pid=)"
# (?:0x)?[0-9a-f]{1,16}, written so that each character says what may follow: such a pattern is matched in one pass.
_A5: Final = "(?:0(?:x[0-9a-f]{1,16}|[0-9a-f]{0,15})|[1-9a-f][0-9a-f]{0,15})"
_KVM: Final = rf"^(?:cpl [0-9]+ )?nr {_X} a0 {_X} a1 {_X} a2 {_X} a3 {_X} a4 0x[0-9a-f]{{1,16}} a5 {_A5}\s*$"
_TASK: Final = r"^\s*CPU ([0-9]{1,5})/KVM[- ] *([0-9]{1,10})(?:/[0-9]+)? "
#: More threads than this are not told apart.
_THREADS: Final = 1 << 16
_TEXT: Final = ("line", "offset", "text")
_SNIFF: Final = re.compile(
    rb"(?m)xen_hypercall: cpu [0-9]+ cpl [0-9]+ input |kvm_xen_hypercall: +(?:cpl [0-9]+ )?nr 0x[0-9a-f]+ a0 0x"
    rb"|^kvm_xen_hypercall -?[0-9]+\.[0-9]{3} pid="
)


@dataclass
class KvmEventsRecording(TextRecording):
    """An opened log; see ``xtrace.ingest.base.Recording``."""

    format: ClassVar[str] = "kvm-xen"

    def __post_init__(self) -> None:
        """Start with no thread seen."""
        super().__post_init__()
        self._threads: dict[int, int] = {}  # vCPU -> the first thread of that name

        self._split: Split | None = None

    def blocks(self) -> Iterator[LineBlock]:
        """Yield blocks of lines, large ones: what a block costs beside its lines weighs less."""
        size = block_bytes(self.options)
        for block, split in self.blocks_split(size if size < 1 << 22 or is_live(self.source) else 4 * size, split_lines):
            self._split = split
            yield block

    def read(self, lines: pl.DataFrame) -> Found:
        """Read whole lines."""
        split, self._split = self._split or split_lines(lines), None
        rows = pl.concat([split.called, self._vcpus(split.kernel), split.lost], how="diagonal")
        rows = rows.sort(pl.col("line") * 2 + pl.col("order"), maintain_order=True)
        noise = None
        if len(self.ledger.unparsed) < self.ledger.SHOWN:
            other = ~split.understood
            other[np.searchsorted(lines["line"].to_numpy(), split.bad["line"].to_numpy())] = False
            noise = lines[np.flatnonzero(other)]
        return Found(rows.drop("order"), split.bad, int(np.count_nonzero(split.understood)), noise)

    def _vcpus(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Take the vCPU from the task's name, unless another thread had that name before."""
        firsts = rows.drop_nulls(["vcpu", "_tid"]).unique("vcpu", keep="first", maintain_order=True)
        for vcpu, tid in firsts.select("vcpu", "_tid").iter_rows():
            if len(self._threads) < _THREADS:
                self._threads.setdefault(vcpu, tid)
        owner = pl.col("vcpu").replace_strict(self._threads, default=None, return_dtype=pl.UInt64)
        return rows.with_columns(vcpu=pl.when(owner == pl.col("_tid")).then("vcpu")).drop("_tid")


@dataclass(frozen=True, slots=True)
class Split:
    """Lines of one block, each by itself.

    Attributes:
        called: QEMU's calls and their ends, ``order`` 0 and 1. kernel: KVM's calls, with ``_tid``, the thread. lost: what
            the tracer dropped.
        understood: Boolean[n], which lines are records. bad: lines that look like a call and cannot be understood.
    """

    called: pl.DataFrame
    kernel: pl.DataFrame
    lost: pl.DataFrame
    understood: NDArray[np.bool_]
    bad: pl.DataFrame


def split_lines(lines: pl.DataFrame) -> Split:
    """Split ``text`` (with ``line`` and ``offset``) into what it says."""
    called, left = _qemu(lines.filter(pl.col("text").str.contains(_ANY, literal=True)).select(_TEXT))
    kernel, bad = _kernel(left)
    lost = losses(lines).with_columns(kind=_kind("lost"), order=pl.lit(0, pl.Int32))
    # Every event line is a record, whatever the event.
    understood, number = lines["text"].str.contains(EVENT_LINE).to_numpy(writable=True), lines["line"].to_numpy()
    for part in (called, kernel, lost):
        understood[np.searchsorted(number, part["line"].to_numpy())] = True
    rest = np.flatnonzero(~understood)
    understood[rest] = lines["text"].gather(rest).str.contains(_QEMU_LINE).to_numpy()
    understood[np.searchsorted(number, bad["line"].to_numpy())] = False
    return Split(called, kernel, lost, understood, bad)


def _kind(name: str) -> pl.Expr:
    return pl.lit(name).cast(EVENTS["kind"])


def _qemu(some: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read QEMU's lines, two rows each; return the other lines as well."""
    parts, left = [], some
    text = pl.col("text")
    # Most begin at the first of these words; from there the pattern is matched in one pass.
    begun = text.str.slice(text.str.find(_LOG_BEGINS, literal=True))
    for where, pattern in ((begun, f"^{_LOG}"), (text, _LOG), (text, _SIMPLE)):
        groups = left.select(where.str.extract_groups(pattern)).to_series()
        out = left.with_columns(groups.struct.rename_fields(_QEMU).struct.unnest().get_columns())
        hit = out["vcpu"].is_not_null()
        parts.append(out.filter(hit))
        left = left.filter(~hit)
    out = pl.concat(parts).with_columns(magnitudes(pl.col(n)) for n in _QEMU)
    whole = (out["op"] < 1 << 32).fill_null(value=False)
    left = pl.concat([left, out.filter(~whole).select(_TEXT)])
    good = _wall(out.filter(whole)).with_columns(
        pl.col("op").cast(pl.UInt32),
        pl.col("vcpu").cast(pl.UInt32),
        caller=_caller(ARGS[:3]),
        kind=_kind("vmmcall"),
        order=pl.lit(0, pl.Int32),
    )
    ends = good.select(
        "line", "offset", "vcpu", "op", "time_ns", "caller",
        kind=_kind("return"), result=pl.col("ret").reinterpret(signed=True), order=pl.lit(1, pl.Int32),
    )  # fmt: skip
    return pl.concat([good.drop("text", "ret"), ends], how="diagonal"), left


def _kernel(some: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read KVM's lines; return their rows, and the lines that look like a call and cannot be understood."""
    names = ["op", *ARGS[:4]]
    out = (
        times(parse(some))
        .with_columns(pl.col("fields").str.extract_groups(_KVM).struct.rename_fields(names).struct.unnest())
        .with_columns(magnitudes(pl.col(n)) for n in names)
    )
    whole = ((out["event"] == "kvm_xen_hypercall") & (out["op"] < 1 << 32)).fill_null(value=False)
    left = out.filter(~whole).select(_TEXT)
    task = pl.col("head").str.extract_groups(_TASK)
    good = out.filter(whole).with_columns(
        pl.col("op").cast(pl.UInt32),
        pcpu=pl.col("vcpu"),
        vcpu=task.struct[0].cast(pl.UInt32),
        _tid=task.struct[1].cast(pl.UInt64, strict=False),
        caller=_caller(ARGS[:4]),
        kind=_kind("vmmcall"),
        order=pl.lit(0, pl.Int32),
    )
    keep = ("line", "offset", "order", "kind", "pcpu", "vcpu", "tsc", "time_ns", "caller", "_tid", *names)
    return good.select(keep), left.filter(pl.col("text").str.contains(_LOOKS))


def _wall(rows: pl.DataFrame) -> pl.DataFrame:
    """Read the wall clock before QEMU's lines into ``time_ns``."""
    # Where characters are wider than bytes this is not the head, and matches nothing.
    head = rows.select(pl.col("text").str.head(pl.col("text").str.find(_NAME, literal=True))).to_series()
    time = _micros(head.str.extract_groups(_STAMP_HEAD))
    left = time.is_null() & rows["text"].str.contains("@", literal=True)
    if left.any():
        time = time.scatter(left.arg_true(), _micros(rows["text"].filter(left).str.extract_groups(_STAMP)))
    if time.null_count():
        iso = head.str.extract(_ISO_HEAD).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="ns", strict=False)
        time = time.zip_with(time.is_not_null(), iso.dt.epoch("ns"))
    return rows.with_columns(time.alias("time_ns"))


def _micros(groups: pl.Series) -> pl.Series:
    """Return seconds and microseconds in ns."""
    seconds, micros = (groups.struct.field(name).cast(pl.Int64, strict=False) for name in ("1", "2"))
    return seconds * 10**9 + micros * 1000


def _caller(arguments: tuple[str, ...]) -> pl.Expr:
    return pl.when(pl.any_horizontal(pl.col(a) >= 1 << 32 for a in arguments)).then(pl.lit("hvm64").cast(EVENTS["caller"]))


class KvmEventsReader:
    """Xen hypercalls of KVM guests; see ``xtrace.ingest.base.Reader``."""

    name = "kvm-xen"
    title = "QEMU's and KVM's trace events of an emulated Xen (kvm_xen_hypercall)"
    shows = Shows(
        op="every hypercall that the tracing side handles (KVM handles a few before QEMU)",
        subop="where it is an argument",
        arguments="the first three (QEMU) or four (KVM)",
        who="vCPU (QEMU; KVM where QEMU names its threads); not the guest",
        time="wall clock (QEMU with timestamps), seconds or TSC (KVM)",
        result="of QEMU's",
        unobservable="continuations: KVM and QEMU never preempt a hypercall",
    )
    streams = True

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 90 for a line of ours."""
        return 90 if _SNIFF.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> KvmEventsRecording:
        """Open ``source``; nothing is read before the batches are."""
        return KvmEventsRecording(source, options)


READER: Final = KvmEventsReader()
