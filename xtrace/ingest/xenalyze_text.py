"""Reader of ``xenalyze --dump-all`` text (tools/xentrace/xenalyze.c, in Xen's tree from 4.6.0 on).

The tool merges the records of all pCPUs by TSC and prints one line for each, with warnings between them::

       0.000002000 x| d3v1 hypercall  1 (mmu_update) 3 updates (preempted)
       0.000009002 x| d3v1 hypercall 1a (mmuext_op) -2147483644 ops
       0.000005001 x| d3v1  hypercall  1 (mmu_update) 7 updates
    ]  0.000005042 |x d4v0 vmexit exit_reason VMCALL eip ffffffff81234567
       0.000005042 |x d4v0 vmcall  c (memory_op)

A blank, ``]`` or ``!``; time; one column for each pCPU so far, ``x`` the one of this record; the vCPU; the record, a call inside a
multicall one blank further right. What a line proves, and what it does not:

* **Flags.** Every tool from 4.6.0 to 4.22.0 (pv_hypercall_v2_process) prints ``(preempted)`` where bit 31 of mmu_update's count is
  set, and mmuext_op's count as a signed number with the flag in it: a negative one is a continuation. So arg1 has the 32 bits that
  were recorded, and a count without the flag is proved to have none. Recorded arguments are 32 bits long (``cut``).
* **Zero.** An argument that the record lacks is printed as 0 (pv_hypercall_gather_args). Every Xen that writes these records
  records the arguments that are printed (see layouts/xentrace.toml), so a printed 0 is taken for one.
* **Numbers.** The number of the hypercall is printed (hex), the name only up to 37: the number counts. Only its low 20 bits are.
* **Who.** The vCPU is the tool's own attribution by run states. Domain 32768 (nobody known yet) and ``d?v?`` (after a loss, or
  nobody) are null, but for records of 3.2 and 3.3, whose scheduling record the tool does not know and prints as bare words: then it
  is read here.
* **ABI.** An instruction pointer above 32 bits was printed from the 64-bit record, which only 64-bit guests cause: pv64, hvm64. A
  smaller one may come from either record: null. Records of 4.3 and later do not say.
* **rip** of an HVM call is that of the exit before it, if that was for a hypercall and of the same vCPU.
* **Time** is not a TSC: nanoseconds since the first record at an assumed clock, 2.4 GHz unless ``--cpu-hz`` was given, which the
  text does not say. ``tsc`` is the number of ticks since the first record *if it was not given*, to within three ticks; its
  origin is unknown, so it compares with no other recording. Nor does the ``first_tsc`` of a lost_records line, which is a raw
  TSC: it is not used. Order is that of the file. A blank time is 0.
* A record that the tool prints as bare words (a PV record on an HVM vCPU, for one) is decoded from them.

Arguments of other hypercalls, what a call returned and when dropping of lost records began are not in the text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import polars as pl

from xtrace.ingest.base import ReadOptions, Shows
from xtrace.ingest.layout import REGISTERS
from xtrace.ingest.text import Found
from xtrace.ingest.text_ahead import AheadRecording
from xtrace.ingest.xenalyze_lines import REASONS, SHAPE, layout, parse

if TYPE_CHECKING:
    from xtrace.ingest.source import Source

__all__ = ("READER", "XenalyzeReader", "XenalyzeRecording")

# A record's line begins with its prefix, its time (13 columns, more from 1,000 s on; 14 blanks for 0) and the pCPUs up to its own.
_STARTS: Final = r"^[\] !](?: {0,2}[0-9]{1,10}\.[0-9]{9}| {14}) [-|.l 0-9]*x[-|.l 0-9]* d[0-9?]"
_TIME: Final = re.compile(r". *[0-9]+\.[0-9]{9} ")
_AT: Final = 15  # column of the pCPUs below 1,000 s
_POINT: Final = ord(".")
_HVM: Final = [" vmentry", " vmexit ", "(8:1:"]
_HYPERCALL_EXITS: Final = [*(f" exit_reason {name} " for name in REASONS), " 12 ", " 81 "]
_SHORT: Final = r"^(.*? (?:vmentry|vmexit|[0-9a-f]{1,7}\(8:1:[0-9a-f]+\)))(?: |$)"
#: Lines that look like records in the middle, whatever happened to their start.
_LOOKS: Final = r" d(?:[0-9]+v[0-9]+|\?v\?) +(?:hypercall|vmcall|lost_records count|sched_shutdown)\b"
_SNIFF: Final = re.compile(
    rb"(?m)^[\] !](?: {0,2}[0-9]{1,10}\.[0-9]{9}| {14}) [-|.l 0-9]*x[-|.l 0-9]* d(?:[0-9]+v[0-9]+|\?v\?) +[a-z0-9]"
)
_HEAD: Final = re.compile(rb"(?m)^(?:scan_for_new_pcpu: Activating pcpu [0-9]+ at offset|init_pcpus: through first trace write)")
#: So many texts are remembered; the same ones come again and again.
_REMEMBERED: Final = 1 << 16


@cache
def _wanted() -> list[str]:
    """Return what a line must contain to be read."""
    marks = [g["mark"] for g in layout()["generic"]]
    return [" hypercall ", " vmcall ", " vmexit ", " vmentry", " lost_records count", " sched_shutdown", *marks]


class XenalyzeRecording(AheadRecording):
    """One opened dump (``xtrace.ingest.base.Recording``)."""

    format = "xenalyze"
    clock: ClassVar[tuple[str, ...]] = ("pcpu",)

    def __post_init__(self) -> None:
        """Know nothing of any pCPU."""
        super().__post_init__()
        #: The last row of each pCPU that says where the next HVM call came from, and who runs there.
        self._exits = pl.DataFrame(
            schema={"pcpu": pl.UInt32, "eip": pl.UInt64, "mode": pl.String, "domid": pl.UInt16, "vcpu": pl.UInt32}
        )
        self._known = pl.DataFrame(schema=SHAPE)
        self._runs = pl.DataFrame(schema={"pcpu": pl.UInt32, "domid": pl.UInt16, "vcpu": pl.UInt32})

    def prepare(self, lines: pl.DataFrame) -> Found:
        """Read whole lines as far as each says something by itself."""
        text = pl.col("text")
        mask = lines.select(is_record=text.str.contains(_STARTS), wanted=text.str.contains_any(_wanted()))
        is_record, wanted = mask["is_record"], mask["wanted"]
        bad, noise = lines[:0].select("line", "offset", "text"), None
        if not is_record.all():
            strays = lines.filter(~is_record)
            looks = text.str.contains(_LOOKS)
            bad, noise = strays.filter(looks).select("line", "offset", "text"), strays.filter(~looks).select("line", "text")
        rows = _timed(lines.filter(is_record & wanted))
        rows = rows.join(self._parsed(rows["tail"].unique()), on="tail", how="left", maintain_order="left")
        lame = rows.filter(pl.col("action").is_null()) if rows["action"].null_count() else rows[:0]
        if len(lame):
            bad = pl.concat([bad, lame.select("line", "offset", "text")])
            rows = rows.filter(pl.col("action").is_not_null())
        return Found(rows.drop("tail", "text", "size"), bad, records=int(is_record.sum()) - len(lame), noise=noise)

    def read(self, lines: pl.DataFrame) -> Found:
        """Read whole lines: records become rows, warnings of the tool are noise."""
        found = self.prepared(lines)
        rows = self._rip(self._who(found.rows))
        found.rows = rows.filter(pl.col("kind").is_not_null()).drop("action", "eip", "mode", "next_domid", "next_vcpu")
        return found

    def _parsed(self, tails: pl.Series) -> pl.DataFrame:
        """Read texts that were not met yet; return those of ``tails`` and others."""
        known = self._known  # another thread may put a new one there at any time
        fresh = tails.to_frame("tail").join(known, on="tail", how="anti")["tail"]
        if len(fresh):
            if len(known) > _REMEMBERED:
                known, fresh = known[:0], tails
            self._known = known = pl.concat([known, parse(fresh)])
        return known

    def _who(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Attribute rows that the tool did not, by the scheduling record of 3.2 and 3.3; a loss leaves nobody known."""
        changes = pl.col("action").is_in(["switch", "lost"])
        if not len(self._runs) and not (rows["action"] == "switch").any():
            return rows
        who = {"domid": pl.when(pl.col("action") == "switch").then("next_domid"), "vcpu": pl.col("next_vcpu")}
        marks = rows.filter(changes).select("line", "pcpu", **who)
        found, self._runs = _latest(rows, marks, self._runs, ["domid", "vcpu"])
        own = pl.col("domid").is_null()
        return rows.with_columns(
            domid=pl.when(own).then(found["domid"]).otherwise("domid"), vcpu=pl.when(own).then(found["vcpu"]).otherwise("vcpu")
        )

    def _rip(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Give each HVM call the instruction pointer of the exit that it came from."""
        ends = pl.col("action").is_in(["exit", "entry", "lost"])
        if not len(self._exits) and not rows.select(pl.col("action").is_in(["exit", "entry"]).any()).item():
            return rows
        marks = rows.filter(ends).select("line", "pcpu", "eip", "mode", "domid", "vcpu")
        found, self._exits = _latest(rows, marks, self._exits, ["eip", "mode", "domid", "vcpu"])
        same = (rows["kind"] == "vmmcall") & rows["domid"].eq_missing(found["domid"]) & rows["vcpu"].eq_missing(found["vcpu"])
        return rows.with_columns(
            rip=pl.coalesce("rip", pl.when(same).then(found["eip"])),
            caller=pl.coalesce("caller", pl.when(same).then(found["mode"])),
        )


def _timed(rows: pl.DataFrame) -> pl.DataFrame:
    """Split records behind the time: adds ``tsc`` (UInt64) and ``tail``."""
    if not len(rows):
        return rows.with_columns(tsc=pl.lit(None, pl.UInt64), tail="text")
    text = rows["text"]
    first = _TIME.match(text[0])
    at = first.end() if first else _AT
    head = text.str.slice(0, at).to_arrow(compat_level=pl.CompatLevel.oldest()).buffers()[2]
    grid = np.frombuffer(head, dtype=np.uint8)[: len(rows) * at]  # _STARTS: all of it is ASCII, and more is behind it
    time = np.zeros(len(rows), dtype=np.uint64)
    for i in (*range(1, at - 11), *range(at - 10, at - 1)):
        time *= 10
        time += grid[i::at] & 15  # a digit, or a blank (0)
    tail = text.str.slice(at)
    odd = np.flatnonzero(grid[at - 11 :: at] != _POINT)
    if len(odd):  # a blank time, or another number of digits
        part = text.gather(odd).to_frame().with_columns(blank=pl.col("text").str.slice(1, 14) == " " * 14)
        some, width = pl.col("text").str, pl.col("width")
        part = part.with_columns(width=pl.when("blank").then(_AT + 1).otherwise(some.find(r"\.[0-9]{9} ") + 11))
        s = some.slice(1, width - 12).str.strip_chars_start(" ").cast(pl.UInt64, strict=False)
        ns = some.slice(width - 10, 9).cast(pl.UInt64, strict=False)
        part = part.select(tail=some.slice(width), time=(s * 10**9 + ns).fill_null(0))
        time[odd] = part["time"].to_numpy()
        tail = tail.scatter(odd, part["tail"])
    # The first tick whose time is printed so: time = ticks * 1024 / qhz, cut to whole nanoseconds.
    ticks = (time * np.uint64(layout()["clock"]["qhz"]) + np.uint64(1023)) >> np.uint64(10)
    rows = rows.with_columns(tsc=pl.Series(ticks), tail=tail)
    # What differs from line to line and is not needed (cycles, other exits) would make each of them a text of its own.
    hvm = rows["tail"].str.contains_any(_HVM)
    if hvm.any():
        wordy = hvm & ~rows["tail"].str.contains_any(_HYPERCALL_EXITS)
        short = rows.filter(wordy).select("line", short=pl.col("tail").str.extract(_SHORT, 1))
        rows = rows.join(short, on="line", how="left", maintain_order="left")
        rows = rows.with_columns(tail=pl.coalesce("short", "tail")).drop("short")
    return rows


def _latest(rows: pl.DataFrame, marks: pl.DataFrame, held: pl.DataFrame, names: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Find the last mark of its pCPU at or before each row.

    Args:
        rows: ``line`` and ``pcpu``, in order.
        marks: ``line``, ``pcpu`` and ``names``, in order.
        held: the last mark of each pCPU before these rows (``pcpu`` and ``names``).
        names: columns that a mark sets, to null too.

    Returns:
        ``names`` for each row (null where there is no mark), and the marks to hold for the next rows.
    """
    both = pl.concat(
        [
            held.with_columns(line=pl.lit(0, pl.UInt64)).select("line", "pcpu", *names),
            marks.select("line", "pcpu", *names).cast(held.schema),
        ]
    )
    both = both.sort("line", maintain_order=True)
    found = rows.select("line", "pcpu").join_asof(both, on="line", by="pcpu", strategy="backward", check_sortedness=False)
    return found.select(names), both.unique("pcpu", keep="last", maintain_order=True).select("pcpu", *names)


class XenalyzeReader:
    """Reader of ``xenalyze --dump-all`` text (``xtrace.ingest.base.Reader``)."""

    name = "xenalyze"
    title = "xenalyze --dump-all text"
    streams = True
    shows = Shows(
        op="always",
        subop="grant_table_op, vcpu_op and sched_op, Xen 4.3 and later",
        arguments="counts of mmu_update, mmuext_op, multicall, grant_table_op (32 bits), Xen 4.3 and later",
        rip="PV: Xen 3.2 to 4.2; HVM: from the exit before",
        who="as xenalyze attributes it, where scheduling was recorded",
        time="relative, at the clock that xenalyze assumed",
        proved="mmu_update and mmuext_op by the flag in the count; paging_domctl_cont by its number",
        inferred="multicall and grant_table_op by counts that go down",
        unobservable="progress of memory_op, hvm_op, domctl and all others; any continuation before Xen 4.3",
        registers=REGISTERS,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this is: 90 for a record's line, 60 for what the tool says first."""
        if _SNIFF.search(head):
            return 90
        return 60 if _HEAD.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> XenalyzeRecording:
        """Open ``source``; nothing is read before the batches are."""
        return XenalyzeRecording(source, options)


READER: Final = XenalyzeReader()
