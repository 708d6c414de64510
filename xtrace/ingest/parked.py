"""Reader of register samples that a Linux guest's ftrace took in its event upcall (a kprobe printing the frame).

The probe stands on ``__xen_pv_evtchn_do_upcall`` and prints the interrupted frame (samples/dom0-4.17.7)::

    hcload-138 [001] d.h. 78514840775: up: (__xen_pv_evtchn_do_upcall+0x0/0x30) ip=0xffffffff81a39073 ax=0xc di=0xda86 …

Any event line with the fields ``ip ax di si dx r10 r8 r9`` is a sample; other lines of the same trace are noise. What
a line proves, and what it does not:

* The bracket is the CPU as the guest numbers it: its vCPU. The pCPU and the domain are not in the file: null.
* ``r8`` to ``r10`` mean a 64-bit frame and the probed function's name says PV, so the caller is pv64; with another
  function it is null.
* An integer stamp is the TSC (``trace_clock=x86-tsc``; every other clock but ``counter`` prints seconds). Stamps below
  10**8 are no TSC of a booted machine (``counter`` counts from 0) and are left out. Seconds become time_ns.
* ``on_insn`` needs the address of the hypercall instruction. ftrace's output does not contain the probe's filter, so it
  is null, unless someone put the filter in a comment above the samples: ``# filter: ip == 0xffffffff81a39073``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.base import Ledger, Observed, ReadOptions
from xtrace.ingest.clock import Clock, nanoseconds
from xtrace.ingest.lines import LineBlock, block_bytes, line_blocks, magnitudes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.ingest.source import Source

__all__ = ("READER",)

_N: Final = r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})"
#: Field of the probe -> column. The rest of the frame (sp, flags) has no place in an event.
_FIELDS: Final = {
    "ip": "rip",
    "ax": "op",
    "di": "arg0",
    "si": "arg1",
    "dx": "arg2",
    "r10": "arg3",
    "r8": "arg4",
    "r9": "arg5",
}
_LOOKS: Final = r" ip=\S* .*?\bax="
# TASK-PID [CPU] flags STAMP: event: (function+…) fields; the task's name may hold anything.
_LINE: Final = r"^.*\[([0-9]{1,5})\] (?:\S+ +)?([0-9]{1,20})(?:\.([0-9]{1,9}))?: ([^\s:]+): (?:\((\S+?)(?:\+\S*)?\) )?(.*)$"
_LOST: Final = r"^CPU:([0-9]{1,5}) \[LOST ([0-9]{1,18}) EVENTS\]"
_WRITTEN: Final = r"^# entries-in-buffer/entries-written: ([0-9]{1,18})/([0-9]{1,18}) "
_FILTER: Final = r"^#.*\bfilter: *ip *== *(0x[0-9a-fA-F]{1,16})\s*$"
_PV: Final = ("__xen_pv_evtchn_do_upcall", "xen_pv_evtchn_do_upcall")
_LEAST_TSC: Final = 10**8
_SNIFF: Final = re.compile(rb"(?m)^.*\[[0-9]+\] .*: \S+: .*\bip=0x[0-9a-f]+ ax=0x[0-9a-f]+ di=")


class _Parked:
    """An opened trace; see `Recording`."""

    format = "ftrace-parked"

    def __init__(self, source: Source, options: ReadOptions) -> None:
        self._source = source
        self._options = options
        self.ledger = Ledger()
        self.observed = Observed(layout="ftrace-kprobe")
        self._seq = 0
        self._clock = Clock()
        self._insn: int | None = None

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in the order of the file, which ftrace merges by time."""
        for block in line_blocks(self._source.file, block_bytes(self._options)):
            frame = self._events(block)
            if len(frame):
                yield from frame.iter_slices(self._options.batch_rows)
        if self._source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self._source.damage, offset=self._source.size)

    def _events(self, block: LineBlock) -> pl.DataFrame:
        ledger = self.ledger
        notes = [(line, at, f"a line of {size} bytes is no record and was skipped") for at, line, size in block.long]
        more = 0
        ledger.skipped_lines += len(block.long)
        ledger.skipped_bytes += sum(size for _, _, size in block.long)
        frame = pl.DataFrame({"text": block.text, "line": block.line, "offset": block.offset, "size": block.size})
        samples = frame.filter(pl.col("text").str.contains(_LOOKS) & ~pl.col("text").str.starts_with("#"))
        if block.cut and len(samples) and samples["line"][-1] == block.line[-1]:
            # The last word may have lost digits; a line that is whole without it has lost nothing that is used.
            last = pl.col("line") == block.line[-1]
            samples = samples.with_columns(text=pl.when(last).then(pl.col("text").str.replace(r"\S*$", "")).otherwise("text"))
        good, bad = self._samples(samples)
        lost = self._lost(frame)
        ledger.noise_lines += len(frame) - len(samples) - len(lost)
        if len(bad):
            cut = block.cut and int(bad["line"][-1]) == int(block.line[-1])
            if cut:
                ledger.truncated = True
                ledger.skipped_bytes += int(block.size[-1])
                text = "the last line is cut off (no newline) and was not used"
                notes.append((int(bad["line"][-1]), int(bad["offset"][-1]), text))
                bad = bad[:-1]
            ledger.skipped_lines += len(bad)
            first = bad.head(Ledger.KEEP)
            notes.extend((line, offset, "sample not understood") for line, offset in first.iter_rows())
            more = len(bad) - len(first)
        for line, offset, text in sorted(notes):
            ledger.problem(text, offset=offset, line=line)
        ledger.problems_dropped += more
        return self._assemble(self._on_insn(frame, good), lost)

    def _samples(self, lines: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Read sample lines; return the events' columns, and the lines that lack a field or hold no number."""
        out = lines.with_columns(groups=pl.col("text").str.extract_groups(_LINE)).unnest("groups")
        fields = pl.concat_str(pl.lit(" "), pl.col("6"), pl.lit(" "))
        out = out.with_columns(
            magnitudes(fields.str.extract(rf" {name}={_N}[ \r]", 1)).alias(column) for name, column in _FIELDS.items()
        ).with_columns(
            vcpu=pl.col("1").cast(pl.UInt32, strict=False),
            stamp=pl.col("2").cast(pl.UInt64, strict=False),
            part=pl.col("3").str.pad_end(9, "0").cast(pl.Int64, strict=False),
        )
        whole = pl.all_horizontal(*(pl.col(c).is_not_null() for c in (*_FIELDS.values(), "vcpu", "stamp")))
        whole = (whole & (pl.col("op") <= 0xFFFFFFFF)).fill_null(value=False)
        seconds = pl.col("part").is_not_null()
        good = out.filter(whole).select(
            "line", "offset", "vcpu", *_FIELDS.values(),
            tsc=pl.when(~seconds & (pl.col("stamp") >= _LEAST_TSC)).then("stamp"),
            time_ns=pl.when(seconds & (pl.col("stamp") < 9 * 10**9))
            .then(pl.col("stamp").cast(pl.Int64, strict=False) * 10**9 + pl.col("part")),
            caller=pl.when(pl.col("5").is_in(_PV)).then(pl.lit("pv64")).cast(schema.EVENTS["caller"]),
            kind=pl.lit("sample", schema.EVENTS["kind"]),
            result=pl.lit(None, pl.Int64),
        )  # fmt: skip
        return good, out.filter(~whole).select("line", "offset")

    def _lost(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Read what ftrace dropped: ``CPU:1 [LOST 12 EVENTS]``, and fewer entries in the buffer than written."""
        gone = (
            frame.select("line", "offset", groups=pl.col("text").str.extract_groups(_LOST))
            .unnest("groups")
            .drop_nulls("1")
            .select("line", "offset", vcpu=pl.col("1").cast(pl.UInt32), result=pl.col("2").cast(pl.Int64))
        )
        over = (
            frame.select("line", "offset", groups=pl.col("text").str.extract_groups(_WRITTEN))
            .unnest("groups")
            .drop_nulls("1")
            .select(
                "line",
                "offset",
                vcpu=pl.lit(None, pl.UInt32),
                result=pl.col("2").cast(pl.Int64) - pl.col("1").cast(pl.Int64),
            )
            .filter(pl.col("result") > 0)
        )
        lost = pl.concat([gone, over])
        self.ledger.lost_events += len(lost)
        self.ledger.lost_records += int(lost["result"].cast(pl.Int128).sum())
        return lost.with_columns(kind=pl.lit("lost", schema.EVENTS["kind"]))

    def _on_insn(self, frame: pl.DataFrame, good: pl.DataFrame) -> pl.DataFrame:
        """Compare rip with the address of the last filter comment before the line."""
        said = (
            frame.filter(pl.col("text").str.starts_with("#"))
            .select("line", insn=magnitudes(pl.col("text").str.extract(_FILTER, 1)))
            .drop_nulls("insn")
        )
        insns = pl.Series([self._insn, *said["insn"]], dtype=pl.UInt64)
        self._insn = insns[-1]
        at = np.searchsorted(said["line"].to_numpy(), good["line"].to_numpy())
        return good.with_columns(on_insn=pl.col("rip") == insns.gather(at))

    def _assemble(self, good: pl.DataFrame, lost: pl.DataFrame) -> pl.DataFrame:
        rows = pl.concat([good, lost], how="diagonal").sort("line")
        n = len(rows)
        group = rows["vcpu"].cast(pl.UInt64).fill_null(1 << 32)
        tsc, segment = self._clock.advance(group, rows["tsc"])
        rows = rows.with_columns(tsc=tsc, segment=segment, seq=np.arange(self._seq, self._seq + n, dtype=np.uint64))
        khz = np.full(n, self._options.tsc_khz or 0, dtype=np.uint64)
        times = nanoseconds(tsc.fill_null(0).to_numpy(), khz, tsc.is_not_null().to_numpy())
        rows = rows.with_columns(time_ns=pl.coalesce("time_ns", times), cut=pl.lit(0, pl.UInt8))
        self._seq += n
        self.ledger.records += n
        self.ledger.samples += len(good)
        known = tsc.drop_nulls()
        if len(known):
            self.observed.first_tsc = known[0] if self.observed.first_tsc is None else self.observed.first_tsc
            self.observed.last_tsc = known[-1]
        return rows.select(
            (pl.col(name) if name in rows.columns else pl.lit(None)).cast(dtype).alias(name)
            for name, dtype in schema.EVENTS.items()
        )


class _Reader:
    """Register samples in ftrace text; see `Reader`."""

    name = "ftrace-parked"
    title = "Linux ftrace text with the registers of interrupted frames (kprobe)"

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 90 for a sample line, 60 for ftrace's own header (samples may come later)."""
        if _SNIFF.search(head):
            return 90
        return 60 if head.startswith(b"# tracer:") else 0

    def open(self, source: Source, options: ReadOptions) -> _Parked:
        """Open ``source``; nothing is read before the batches are."""
        return _Parked(source, options)


READER: Final = _Reader()
