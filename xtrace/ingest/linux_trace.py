"""Reader of Linux's tracing text: ftrace, ``trace-cmd report``, ``perf script``.

Two things in it are about hypercalls, in one file or in several: the tracepoints of a PV kernel's multicalls
(`xtrace.ingest.linux_xen_events`) and probes that print the registers of an interrupted frame (`xtrace.ingest.linux_registers`).
Every other event is a record without an event of ours. What the lines prove, and what they do not:

* The guest traces itself: the CPU is its vCPU. Domain and pCPU are not in the file.
* ``caller``: a kernel that has these tracepoints is PV, and its words show which; so it is known from the first line on that shows
  it (above 32 bits: pv64; a pointer below: pv32), null before.
* The tracepoints show the multicalls of the page-table code with all arguments, as issued, once. Hypercalls made otherwise
  (memory_op, grant_table_op, event_channel_op, sched_op …) have no tracepoint, and the guest never sees that a call was preempted:
  a continuation is unobservable there.
* A sample shows it: registers that stand on the hypercall instruction in the middle of a call. ``on_insn`` needs the address
  of that instruction. The text does not contain the probe's filter, so it is null, unless someone put the filter in a comment
  above the samples: ``# filter: ip == 0xffffffff81a39073``.
* Where ``xen_mc_flush`` says more entries than were seen, the rest is lost: nothing is concluded across it.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import polars as pl

from xtrace.ingest.base import Shows
from xtrace.ingest.lines import LineBlock, magnitudes
from xtrace.ingest.linux_lines import EVENT_LINE, RARE_LINE, losses, parse, times
from xtrace.ingest.linux_registers import LOOKS, samples
from xtrace.ingest.linux_xen_events import EVENTS, KINDS, Batches, decode
from xtrace.ingest.text import Found, TextRecording
from xtrace.schema import ARGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source

__all__ = ("READER", "LinuxTraceReader", "LinuxTraceRecording", "Split", "split_lines")

_MAYBE: Final = rf"(?:{'|'.join(EVENTS)}): | [re]?ip="
_XEN: Final = rf"\b(?:{'|'.join(EVENTS)}): "
_FILTER: Final = r"^#.*\bfilter: *ip *== *(0x[0-9a-fA-F]{1,16})\s*$"
#: Bytes read at once: what a block costs beside its lines weighs less in large ones.
_BLOCK: Final = 1 << 24
_TEXT: Final = ("line", "offset", "text")

_SNIFF_XEN: Final = re.compile(rb"(?m)^[^#\n].*[ :]xen_(?:mc|mmu|cpu)_[a-z0-9_]+: ")
_SNIFF_FRAME: Final = re.compile(rb"(?m)^[^#\n].*: .*\b[re]?ip=0x[0-9a-f]+ .*\b[re]?ax=0x[0-9a-f]+")
_SNIFF_HEADER: Final = re.compile(rb"\A(?:#? *\n)?(?:# tracer: |cpus=[0-9]+\n|version = [0-9]+\ncpus=)")
_SNIFF_EVENT: Final = re.compile(
    rb"(?m)^ *\S.*[- ][0-9]+ +(?:\(.{7,10}\) +)?\[[0-9]{3,4}\] +(?:[a-zA-Z.0-9]{4,7} +)?"
    rb"[0-9]+\.[0-9]{6,9}: +(?:[a-z0-9_-]+:)?[a-z0-9_]+: "
)


@cache
def layout() -> dict[str, Any]:
    """Return layouts/linux.toml."""
    return tomllib.loads((Path(__file__).parent / "layouts" / "linux.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Split:
    """Lines of one block, each by itself.

    Attributes:
        event: Boolean[n], which lines are event lines of the usual forms.
        rest: the other lines. rare: those of them that are events.
        queued: what tells of multicalls (`decode`). taken: samples. wrong: lines that look like either and cannot be understood.
    """

    event: pl.Series
    rest: pl.DataFrame
    rare: pl.DataFrame
    queued: pl.DataFrame
    taken: pl.DataFrame
    wrong: pl.DataFrame


def split_lines(lines: pl.DataFrame) -> Split:
    """Split ``text`` (with ``line`` and ``offset``) into what it says."""
    event = lines["text"].str.contains(EVENT_LINE)
    rest = lines.filter(~event).select(_TEXT)
    some = lines.filter(pl.col("text").str.contains(_MAYBE)).select(_TEXT)
    parsed = parse(some.filter(~some["text"].str.starts_with("#")))
    named = parsed["event"].is_in(EVENTS).fill_null(value=False)
    framed = ~named & parsed["fields"].str.contains(LOOKS).fill_null(value=False)
    queued = decode(times(parsed.filter(named)))
    taken = samples(times(parsed.filter(framed)), tuple(layout()["samples"]["pv_functions"]))
    # What only looks like one of ours, and cannot be split.
    broken = pl.col("text").str.contains(_XEN) | pl.col("text").str.contains(LOOKS)
    lone = parsed.filter(parsed["event"].is_null()).filter(broken)
    unread = queued.clear() if not queued["kind"].null_count() else queued.filter(pl.col("kind").is_null())
    wrong = pl.concat(part.select(_TEXT) for part in (lone, unread, taken.filter(~pl.col("good"))))
    queued = queued.drop("event", "fields", "head", "text")
    queued = queued if not len(unread) else queued.filter(pl.col("kind").is_not_null())
    return Split(event, rest, rest.filter(rest["text"].str.contains(RARE_LINE)), queued, taken.filter("good"), wrong)


@dataclass
class LinuxTraceRecording(TextRecording):
    """An opened trace; see ``xtrace.ingest.base.Recording``."""

    format: ClassVar[str] = "linux-trace"
    clock: ClassVar[tuple[str, ...]] = ("vcpu",)

    def __post_init__(self) -> None:
        """Start with empty queues and nothing known."""
        super().__post_init__()
        self._batches = Batches({int(op): (wide, narrow) for op, (wide, narrow) in layout()["lists"].items()})
        self._insn: int | None = None
        self._caller: str | None = None
        self._since = 0  # the line that showed it, if that was in the latest block
        self._split: Split | None = None

    def blocks(self) -> Iterator[LineBlock]:
        """Yield blocks of lines; the next ones are split into fields meanwhile."""
        size = min(_BLOCK, max(64, self.options.batch_rows * 128))
        for block, split in self.blocks_split(size, split_lines):
            self._split = split
            yield block

    def read(self, lines: pl.DataFrame) -> Found:
        """Read whole lines."""
        split, self._split = self._split or split_lines(lines), None
        queued, taken = split.queued, self._on_insn(split.taken, split.rest)
        lost = losses(split.rest)
        rows = self._issued(queued, taken, lost)
        # Every event line is a record, whatever the event, and so is the tracer's word of losses.
        understood, number = split.event.to_numpy(writable=True), lines["line"].to_numpy()
        for part in (split.rare, queued, taken, lost):
            understood[np.searchsorted(number, part["line"].to_numpy())] = True
        wrong = np.searchsorted(number, split.wrong["line"].to_numpy())
        understood[wrong] = False
        records, noise = int(np.count_nonzero(understood)), None
        if len(self.ledger.unparsed) < self.ledger.SHOWN:
            understood[wrong] = True
            other = lines[np.flatnonzero(~understood)]
            noise = other.filter(~other["text"].str.contains("^#|^CPU:|^cpus=[0-9]+$"))
        return Found(rows, split.wrong, records, noise)

    def finish(self) -> pl.DataFrame | None:
        """Say what was issued before entries were traced."""
        if self._batches.unnamed:
            text = f"{self._batches.unnamed:,} hypercalls were issued whose number is not recorded (no xen_mc_entry before them)"
            line, offset = self._batches.unnamed_at
            self.ledger.problem(text, line=line, offset=offset)
        return None

    def _issued(self, queued: pl.DataFrame, taken: pl.DataFrame, lost: pl.DataFrame) -> pl.DataFrame:
        """Put flushes, samples and losses together in order of the file."""
        self._learn(queued, taken)
        gaps = lost.filter(pl.col("vcpu").is_not_null()).select(
            "line", "offset", "vcpu", kind=pl.lit(KINDS["lost"], pl.UInt8), key=pl.col("vcpu").cast(pl.UInt64)
        )
        key = pl.coalesce(pl.col("vcpu").cast(pl.UInt64), pl.col("thread") + (1 << 32), pl.lit((1 << 64) - 1, pl.UInt64))
        narrow = (pl.col("line") >= self._since) & pl.lit(self._caller == "pv32")
        rows = pl.concat([queued.with_columns(key=key, narrow=narrow).drop("thread"), gaps], how="diagonal")
        issued = self._cut_to_size(self._called(self._batches.feed(rows.sort("line", maintain_order=True))))
        stopped = taken.with_columns(at="line", kind=pl.lit("sample"), sub=pl.lit(0, pl.UInt8))
        gone = lost.with_columns(at="line", kind=pl.lit("lost"), sub=pl.lit(0, pl.UInt8))
        names = ("line", "offset", "at", "sub", "kind", "vcpu", "tsc", "time_ns", "caller", "op", *ARGS, "rip", "on_insn", "result")
        out = pl.concat([issued, self._called(stopped), gone], how="diagonal").sort("at", "sub", "line", maintain_order=True)
        return out.select(pl.col(n) if n in out.columns else pl.lit(None).alias(n) for n in names).drop("at", "sub")

    def _learn(self, queued: pl.DataFrame, taken: pl.DataFrame) -> None:
        """Note the first line that shows which kernel this is."""
        self._since = 0
        if self._caller is None:
            proofs = pl.concat([queued.select("line", "caller"), taken.select("line", "caller")]).drop_nulls().sort("line")
            self._caller, self._since = (proofs["caller"][0], int(proofs["line"][0])) if len(proofs) else (None, 0)

    def _called(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Say who called, where it is known by then; all rows are of one kernel."""
        own = pl.col("caller") if "caller" in rows.columns else pl.lit(None, pl.String)
        known = pl.when(pl.col("at") >= self._since).then(pl.lit(self._caller, pl.String))
        return rows.with_columns(caller=pl.when(pl.col("kind") != "lost").then(pl.coalesce(own, known)))

    def _cut_to_size(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Leave out the arguments that an entry does not have."""
        table = layout()["nargs"]
        size = {int(op): (wide, narrow) for op, (wide, narrow) in table.items()}
        wide, narrow = (
            pl.col("op").replace_strict({o: s[i] for o, s in size.items()}, default=None, return_dtype=pl.UInt8) for i in (0, 1)
        )
        many = pl.coalesce("nargs", pl.when(pl.col("caller") == "pv32").then(narrow).otherwise(wide))
        # Of a hypercall that is not in the table, zeros at the end say nothing.
        tail = [pl.all_horizontal(pl.col(a) == 0 for a in ARGS[i:]) for i in range(len(ARGS))]
        multi = (pl.col("op") == 13) & pl.col("arg0").is_null()
        return rows.with_columns(
            pl.when(multi | (many > i) | (many.is_null() & ~tail[i])).then(a).alias(a) for i, a in enumerate(ARGS)
        )

    def _on_insn(self, taken: pl.DataFrame, lines: pl.DataFrame) -> pl.DataFrame:
        """Compare rip with the address of the last filter comment before the line."""
        said = (
            lines.filter(pl.col("text").str.starts_with("#"))
            .select("line", insn=magnitudes(pl.col("text").str.extract(_FILTER, 1)))
            .drop_nulls("insn")
        )
        insns = pl.Series([self._insn, *said["insn"]], dtype=pl.UInt64)
        self._insn = insns[-1]
        at = np.searchsorted(said["line"].to_numpy(), taken["line"].to_numpy())
        return taken.with_columns(on_insn=pl.col("rip") == insns.gather(at))


class LinuxTraceReader:
    """Linux tracing text; see ``xtrace.ingest.base.Reader``."""

    name = "linux-trace"
    title = "Linux tracing text (ftrace, trace-cmd report, perf script)"
    shows = Shows(
        op="multicalls of a PV kernel (xen: tracepoints); hypercalls that a probe's sample stopped in",
        subop="where it is an argument",
        arguments="all of a multicall's entries as queued; all registers of a sample",
        rip="of samples",
        who="vCPU; not the domain",
        time="TSC (trace_clock x86-tsc) or seconds",
        proved="by registers of a sample that show it themselves, or that stand on the instruction of a call in progress",
        inferred="by a sample where the hypercall instruction's address is not known",
        unobservable="a preempted call in the tracepoints alone; hypercalls that are not multicalls",
        partial="only multicalls, and calls that a sample stopped in, are recorded",
        registers={"*": (0, 1, 2, 3, 4, 5)},
        samples=True,
    )
    streams = True

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 90 for an event of ours, 60 for a tracer's header, 40 for any event."""
        if _SNIFF_XEN.search(head) or _SNIFF_FRAME.search(head):
            return 90
        if _SNIFF_HEADER.search(head):
            return 60
        return 40 if _SNIFF_EVENT.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> LinuxTraceRecording:
        """Open ``source``; nothing is read before the batches are."""
        return LinuxTraceRecording(source, options)


READER: Final = LinuxTraceReader()
