r"""Reader of ``xenctx`` and ``xenctx -a``: the registers of a paused domain's vCPUs, each one sample.

xenctx pauses the domain, so its vCPUs are stopped. Formats (tools/xentrace/xenctx.c: 3.0.2-branched, 3.3.0-branched,
RELEASE-4.2.0 and RELEASE-4.17.0 compared)::

    vcpu0:                                             only with -C (--all-vcpus), since 4.2
    rip: ffffffff8220128c xen_hypercall_grant_table_op+0xc     32-bit: cs:eip: 0061:c01013a7
    flags: 00001282 i s nz
    rax: 0000000000000014   rcx: ffffffff8220128c   rdx: 0000000000000001
    ...
    Code (instr addr ffffffff8220128c)                 Code: before 4.2
    cc cc … 51 41 53 48 c7 c0 14 00 00 00 0f 05 <41> 5b 59 c3 …

* The bytes at the instruction pointer (in ``<>``) say exactly whether it is a hypercall instruction: see `registers`. On a
  64-bit PV ``syscall`` that was not made yet (rcx is not rip + 2) nothing is in flight, so ``on_insn`` is false there too.
* Caller: a 64-bit layout with cs 0xe033 is pv64, with a ring 0 cs hvm64 (xenctx uses it while EFER.LMA is set); a 32-bit
  one with a ring 1 cs is pv32, with a ring 0 cs hvm32. A vCPU in user mode could be either and is not used.
* The domain is named on the command line, not in the output: null. Without ``vcpuN:`` so is the vCPU. There is no time, no
  pCPU, no release; the call's memory is not shown (``Stack:`` is the guest's stack).
* Arm output begins with ``PC:`` and is not read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import polars as pl

from xtrace.ingest.base import ReadOptions, Shows
from xtrace.ingest.console_text import NOTHING, Part, View, WindowedRecording, joined
from xtrace.ingest.registers import REGISTERS, judge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.ingest.source import Source

__all__ = ("READER",)

#: The line a vCPU begins with.
_ANCHOR: Final = "ip: "
_START: Final = r"^[> \t]*(?:rip: ([0-9a-f]{8,16})|(?:cs:eip: ([0-9a-f]{4}):|eip: )([0-9a-f]{8}))(?:\s|$)"
_FLAGS: Final = r"\bflags: ([0-9a-f]{8})\b"
_VCPU: Final = r"(?s)^(?:.*\n)?[> \t]*vcpu([0-9]{1,5}):\s*$"
_CODE: Final = r"Code(?: \(instr addr [0-9a-f]+\)|:)\s[0-9a-f\s>]*?<([0-9a-f]{2})>((?:[\s>]+[0-9a-f]{2}\b){0,4})"
#: First word of each line about registers.
_LINES: Final = (
    r"(?m)^[> \t]*(?:rip|cs:eip|eip|flags|rsp|ss:esp|esp|[re]ax|rbx|rbp|r10|r13|esi|cs|ds|fs|gs|[cd]r[0-9]):? "
    r"|^[> \t]*Code\b|<[0-9a-f]{2}>"
)
_WINDOW: Final = 40
_CHARACTERS: Final = 3000
_HEADING: Final = 3
_CUT: Final = r"^[> \t]*(?:(?:cs:)?[re]ip: |[ re](?:[abcd]x|[sd]i|bp|[1-9]?[0-9]): [0-9a-f])"
_SNIFF: Final = re.compile(rb"(?m)^[> \t]*(?:rip: [0-9a-f]{8,16}|cs:eip: [0-9a-f]{4}:[0-9a-f]{8})[^\n]*\n[> \t]*flags: [0-9a-f]{8}")


def _register(name: str) -> str:
    """Return the pattern of one register; its order changed over the releases, so each is looked for by itself."""
    return rf"(?:^|[\s>]){name}:[\s>]+([0-9a-f]{{4,16}})\b"


class _Xenctx(WindowedRecording):
    """An opened output; see `Recording`."""

    format: ClassVar[str] = "xenctx"
    literals: ClassVar[tuple[str, ...]] = (_ANCHOR,)
    cut_pattern: ClassVar[str] = _CUT

    def __post_init__(self) -> None:
        """Start with no vCPU seen."""
        super().__post_init__()
        self._seen = self._silent = self._unknown = 0
        self._first: dict[str, tuple[int, int]] = {}

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``."""
        yield from super().batches()
        if self._silent:
            line, offset = self._first["silent"]
            text = f"{self._silent:,} of {self._seen:,} vCPUs do not show whether they stand on a hypercall (first here)"
            self.ledger.problem(text, offset=offset, line=line)
        if self._unknown:
            line, offset = self._first["unknown"]
            text = f"{self._unknown:,} of {self._seen:,} vCPUs do not show the guest's ABI and were not used (first here)"
            self.ledger.problem(text, offset=offset, line=line)

    def decide(self, view: View) -> Part:
        """Read the vCPUs that are due."""
        begins = view.text.str.contains(_START).to_numpy()
        anchors = view.hits[begins]
        at = anchors[view.due(anchors)]
        if not len(at):
            return Part(NOTHING, 0, NOTHING)
        order = np.searchsorted(anchors, at)
        after = np.append(anchors, len(view.lines))[order + 1]
        before = np.where(order > 0, anchors[order - 1] + 1, 0)
        body = joined(view.lines, at, np.minimum(at + _WINDOW, after), _CHARACTERS)
        head = joined(view.lines, np.maximum(at - _HEADING, before), at)
        dumps = self._registers(view.places(at).with_columns(body=body, head=head))
        whole = pl.all_horizontal(pl.col(r).is_not_null() for r in ("rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "cs"))
        whole &= (pl.col("width") == 32) | pl.all_horizontal(pl.col(r).is_not_null() for r in ("r8", "r9", "r10", "r11", "flags"))
        good, bad = judge(dumps.filter(whole)), dumps.filter(~whole)
        told = good.filter(pl.col("caller").is_not_null())
        off = pl.col("on_insn") == False  # noqa: E712 (a column)
        self._seen += len(good)
        self._unknown += self._note("unknown", good.filter(pl.col("caller").is_null()))
        self._silent += self._note("silent", told.filter(off & pl.col("code").is_null() & (pl.col("caller") != "pv64")))
        rows = told.select(
            "line", "offset", "caller", "op", "^arg[0-5]$", "rip", "on_insn", place="line", kind=pl.lit("sample"),
            vcpu=pl.col("head").str.extract(_VCPU, 1).cast(pl.UInt32, strict=False),
        )  # fmt: skip
        lines = int(good.select(pl.col("body").str.count_matches(_LINES).sum() + (pl.col("head").str.contains(_VCPU)).sum()).item())
        return Part(rows, lines, bad.select("line", "offset", "text"))

    def _note(self, what: str, rows: pl.DataFrame) -> int:
        """Keep the place of the first row; return how many there are."""
        if len(rows) and what not in self._first:
            self._first[what] = (int(rows["line"][0]), int(rows["offset"][0]))
        return len(rows)

    def _registers(self, dumps: pl.DataFrame) -> pl.DataFrame:
        """Add the registers of each vCPU, null where a line of it is missing."""
        start = pl.col("text").str.extract_groups(_START)
        out = dumps.with_columns(
            w=start.struct.field("1"), cs0=start.struct.field("2"), n=start.struct.field("3"), body=pl.lit("\n") + pl.col("body")
        ).with_columns(width=pl.when(pl.col("w").is_not_null()).then(64).otherwise(32))
        wide, body = pl.col("width") == 64, pl.col("body")
        text: dict[str, pl.Expr] = {"rip": pl.coalesce("w", "n")}
        for name in REGISTERS[1:]:
            if name in ("r8", "r9", "r10", "r11"):
                text[name] = pl.when(wide).then(body).str.extract(_register(name), 1)
            else:
                text[name] = body.str.extract(_register("[re]" + name[1:]), 1)
        text["cs"] = pl.coalesce("cs0", body.str.extract(_register("cs"), 1))
        text["flags"] = body.str.extract(_FLAGS, 1)
        code = body.str.extract_groups(_CODE)
        shown = pl.concat_str(code.struct.field("1"), code.struct.field("2")).str.replace_all(r"[\s>]", "")
        return out.with_columns(
            **{name: t.str.to_integer(base=16, dtype=pl.UInt64, strict=False) for name, t in text.items()},
            code=shown,
            kind=pl.lit(None, pl.String),
            high=pl.lit(value=False),
            low=pl.lit(value=False),
        )

    def _tally(self, rows: pl.DataFrame) -> None:
        super()._tally(rows)
        # A vCPU that stands somewhere else is no hypercall seen.
        self.ledger.samples -= rows.select(((pl.col("kind") == "sample") & (pl.col("on_insn") == False)).sum()).item()  # noqa: E712


class _Reader:
    """Output of xenctx; see `Reader`."""

    name = "xenctx"
    title = "xenctx (registers of a paused domain's vCPUs)"
    streams = True
    shows = Shows(
        op="of stopped vCPUs",
        subop="of stopped vCPUs",
        arguments="of stopped vCPUs",
        rip="with the bytes there",
        who="vCPU with -C; never the domain",
        proved="on a hypercall instruction, and progress in the registers",
        inferred="on a hypercall instruction",
        unobservable="time; guest memory; calls that are not in flight",
        partial="only the calls that the vCPUs are in are recorded",
        registers={"*": (0, 1, 2, 3, 4, 5)},
        samples=True,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 90 for the first two lines of a vCPU."""
        return 90 if _SNIFF.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Xenctx:
        """Open ``source``; nothing is read before the batches are."""
        return _Xenctx(source, options)


READER: Final = _Reader()
