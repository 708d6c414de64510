"""Reader of what a console holds: a serial log, ``xl dmesg``, Linux's dmesg or journal, a mail that quotes them.

Three subjects, a file each: `console_registers` (register dumps of guest vCPUs: samples), `console_progress` (memory_ops
that ended early), `console_multicall` (Linux's failed multicalls). Everything else is noise, however much it is.

* Time: see `console_text.stamps`. Lines without a stamp have no time; order is that of the file.
* A banner (``Xen version 4.17.7 …``, ``Linux version …``) is a boot: a new segment, and nothing belongs together across it.
* Release: ``Xen version X.Y.Z (`` or the heading of a dump (``----[ Xen-X.Y.Z  x86_64``), and only when the number is whole: of
  ``4.13.4-9.24.1``, ``4.18-unstable`` or ``4.8.5-16.fc25`` the code is not that of a release tag. Several boots of different
  releases leave it open.
* TSC frequency: ``Detected 2596.122 MHz processor``.

A console shows what someone printed. A vCPU that is in no dump may stand anywhere, and a domain without a line may make any
call: nothing here shows that something is absent.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import polars as pl

from xtrace.ingest import console_multicall, console_progress, console_registers
from xtrace.ingest.base import ReadOptions, Shows
from xtrace.ingest.console_registers import Dumps
from xtrace.ingest.console_text import Part, View, WindowedRecording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.ingest.source import Source

__all__ = ("READER",)

_BANNERS: Final = ("Xen version ", "Linux version ")
_HEADING: Final = "----[ Xen-"
_MHZ: Final = " MHz processor"
#: print_xen_info, and the banner of console_init_preirq (RELEASE-4.17.0:xen/drivers/char/console.c); "Xen version 4.17.7 (".
_RELEASE: Final = r"(?:Xen version |----\[ Xen-)([0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}) [( ]"
_ANY_RELEASE: Final = r"(?:Xen version |----\[ Xen-)([0-9]\S*)"
_DETECTED: Final = r"Detected ([0-9]{1,6})\.([0-9]{3}) MHz processor"
_CUT: Final = (
    r"CONTEXT: |[RE]IP: +[0-9a-f]{4}:\[<|\b[re](?:[abcd]x|[sd]i|[sb]p): +[0-9a-f]|\br[0-9]{1,2}: +[0-9a-f]"
    r"|Could not allocate order=|multicall\(s\) failed|\bcall +[0-9/]+: op="
)
_SNIFF_RECORD: Final = re.compile(
    rb"FLAGS: +[0-9a-f]{8,16} [^\n]*CONTEXT: (?:pv guest|hvm guest|hypervisor|guest|hvm)"
    rb"|Could not allocate order=(?:3D)?[0-9]+ extent: id="
    rb"|[0-9] multicall\(s\) failed: cpu [0-9]"
)
_SNIFF_CONSOLE: Final = re.compile(rb"(?m)^[^\n]{0,80}\(XEN\) ")


class _Console(WindowedRecording):
    """An opened console log; see `Recording`."""

    format: ClassVar[str] = "console"
    literals: ClassVar[tuple[str, ...]] = (
        *console_registers.LITERALS,
        *console_progress.LITERALS,
        *console_multicall.LITERALS,
        *_BANNERS,
        _HEADING,
        _MHZ,
    )
    cut_pattern: ClassVar[str] = _CUT

    def __post_init__(self) -> None:
        """Start before the first boot."""
        super().__post_init__()
        self._dumps = Dumps()
        self._boots = 0
        self._releases: dict[str, None] = {}
        self._second = (0, 0)  # line and offset of where a second release is named
        self._khz: int | None = None

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``; what was observed is complete afterwards."""
        yield from super().batches()
        seen = self.observed
        if len(self._releases) == 1:
            (only,) = self._releases
            seen.release = only if re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", only) else None
        elif self._releases:
            text = f"several releases of Xen wrote it ({', '.join(list(self._releases)[:4])}); the second begins here"
            self.ledger.problem(text, offset=self._second[1], line=self._second[0])
        seen.tsc_khz = self._khz
        seen.domains.update(self._dumps.told())
        for line, offset, text in self._dumps.notes():
            self.ledger.problem(text, offset=offset, line=line)

    def decide(self, view: View) -> Part:
        """Read the lines of a view that are due."""
        boots = np.union1d(view.having(_BANNERS[0]), view.having(_BANNERS[1]))
        self._heard(view)
        parts = [
            self._dumps.read(view, boots),
            console_progress.read(view, boots),
            console_multicall.read(view, boots),
        ]
        rows = pl.concat([p.rows for p in parts], how="diagonal_relaxed")
        due = boots[view.due(boots)]
        if len(rows):
            rows = rows.sort("place", maintain_order=True)
            count = np.searchsorted(view.lines["line"].gather(due).to_numpy(), rows["place"].to_numpy())
            rows = rows.with_columns(boot=pl.Series(count + self._boots, dtype=pl.UInt32))
        self._boots += len(due)
        return Part(rows, sum(p.records for p in parts), pl.concat([p.bad for p in parts]).sort("line"))

    def _heard(self, view: View) -> None:
        """Note what lines say of the host."""
        rows = np.union1d(view.having(_BANNERS[0]), view.having(_HEADING))
        named = pl.coalesce(pl.col("text").str.extract(_RELEASE, 1), pl.col("text").str.extract(_ANY_RELEASE, 1))
        said = view.places(rows[view.due(rows)]).with_columns(name=named).drop_nulls("name").unique("name", maintain_order=True)
        for line, offset, name in said.select("line", "offset", "name").head(8).iter_rows():
            if name not in self._releases and len(self._releases) < 8:
                self._second = (line, offset) if len(self._releases) == 1 else self._second
                self._releases[name] = None
        rows = view.having(_MHZ)
        rows = rows[view.due(rows)]
        if self._khz is None and len(rows):
            found = view.lines["text"].gather(rows).str.extract_groups(_DETECTED).struct.unnest().drop_nulls()
            for whole, part in found.head(1).iter_rows():
                self._khz = int(whole) * 1000 + int(part) or None

    def _assemble(self, rows: pl.DataFrame) -> pl.DataFrame:
        out = super()._assemble(rows)
        return out.with_columns(segment=out["segment"] + rows["boot"]) if "boot" in rows.columns else out

    def _tally(self, rows: pl.DataFrame) -> None:
        super()._tally(rows)
        # A vCPU that stands somewhere else is no hypercall seen.
        self.ledger.samples -= rows.select(((pl.col("kind") == "sample") & (pl.col("on_insn") == False)).sum()).item()  # noqa: E712


class _Reader:
    """Console logs; see `Reader`."""

    name = "console"
    title = "Xen or Linux console log (register dumps, memory_op progress, failed multicalls)"
    streams = True
    shows = Shows(
        op="of stopped vCPUs, memory_op, multicall entries",
        subop="of stopped vCPUs",
        arguments="of stopped vCPUs; failed multicall entries",
        rip="of stopped vCPUs",
        who="mostly",
        time="if the console stamps its lines",
        memory="nr_extents of a memory_op that failed",
        result="of the calls that failed",
        proved="64-bit PV: rcx is rip + 2, and progress in the registers",
        inferred="rip where a hypercall page has the instruction",
        unobservable="calls that printed nothing; HVM vCPUs outside a hypercall page",
        partial="only the calls of stopped vCPUs, and those that printed something, are recorded",
        registers={"*": (0, 1, 2, 3, 4, 5)},
        samples=True,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 90 for a record, 50 for any line of Xen's console."""
        if _SNIFF_RECORD.search(head):
            return 90
        return 50 if _SNIFF_CONSOLE.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Console:
        """Open ``source``; nothing is read before the batches are."""
        return _Console(source, options)


READER: Final = _Reader()
