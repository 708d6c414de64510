r"""Register dumps on Xen's console: each guest vCPU's registers are one sample.

Printed by the debug keys ``d`` (every pCPU; of one that is in Xen first the host's registers, then the guest's) and ``0``
(every vCPU of dom0), by ``domain_crash``, and before a panic (``_show_registers``, xen/arch/x86/x86_64/traps.c, since 4.19
xen/arch/x86/traps.c; ``show_registers`` in x86_32/ up to 4.2)::

    (XEN) *** Dumping CPU6 guest state (d0v7): ***
    (XEN) ----[ Xen-4.18-unstable  x86_64  debug=y  Tainted:  M     ]----
    (XEN) CPU:    6
    (XEN) RIP:    e033:[<ffffffff81e1546a>]
    (XEN) RFLAGS: 0000000000000286   EM: 0   CONTEXT: pv guest (d0v7)
    (XEN) rax: 0000000000000023   rbx: 0000000000000005   rcx: ffffffff81e1546a

What differs over the releases, compared in every release tag of 3.0 to 4.22: ``CONTEXT:`` says ``guest`` and ``hvm`` up to 3.0,
``pv guest`` and ``hvm guest`` since, ``(d0v7)`` behind it since 4.5; the heading says ``(d0:v7)`` up to 4.4 and no vCPU up to
4.0; a 32-bit Xen (up to 4.2) prints EIP, eax, ebx, ecx, edx in a line of four. The order of the registers never changed.

* ``CONTEXT: hypervisor`` is a frame of Xen itself, and left out.
* pCPU: the ``CPU:`` line before the dump (key ``0`` prints none for a vCPU that does not run).
* What a dump says of the hypercall instruction: see `registers`. The console shows no bytes of guest code in any release
  ("Xen code around" is of Xen), so an HVM or 32-bit PV vCPU is never more than "may stand there".
* ia64 and Arm dumps have no ``CONTEXT:`` and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.ingest.base import Domain
from xtrace.ingest.console_text import BEHIND, NOTHING, Part, View, joined, stamps
from xtrace.ingest.registers import REGISTERS, judge

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("LITERALS", "Dumps")

#: In the line that every dump has, and few other lines.
LITERALS: Final = ("CONTEXT: ",)

#: Lines below that hold the registers (folded ones are two), and how many characters of them are looked at.
_WINDOW: Final = 24
_CHARACTERS: Final = 2000
#: Lines above that may hold RIP: and CPU:, with an answer in between.
_NEAR: Final = 7

_CONTEXT: Final = (
    r"FLAGS:\s+([0-9a-f]{8,16})\s[\s\S]*?CONTEXT:\s+(hypervisor|pv\s+guest|hvm\s+guest|guest|hvm)\b"
    r"(?:\s+\(d([0-9]{1,5})v([0-9]{1,5})\))?"
)
_POINTER: Final = r"[RE]IP:\s+([0-9a-f]{4}):\[<([0-9a-f]{8,16})>\]"
_LOGICAL: Final = r"CPU:\s+([0-9]{1,6})\b"
#: Headings that name the vCPU (domain, vCPU); of several, the last above the dump.
_HEADINGS: Final = (
    r"(?s)^.*Dumping CPU[0-9]{1,5} guest state \(d([0-9]{1,5}):?v([0-9]{1,5})\):",
    r"(?s)^.*Dumping Dom([0-9]{1,5}) vcpu#([0-9]{1,5}) state:",
    r"(?s)^.*Domain ([0-9]{1,5}) \(vcpu#([0-9]{1,5})\) crashed on cpu#[0-9]{1,5}:",
)
_WIDE: Final = REGISTERS[1:]
_NARROW: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
#: Registers that tell the width of an HVM vCPU.
_EXTRAS: Final = ("rsp", "cr0", "cr4", "fsb", "gsb", "gss")
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_FOUR_GIB: Final = 1 << 32
#: Words in lines of a dump that need not be there; lines that must: pointer, context, and four (of 32 bits: two) of registers.
_OTHERS: Final = ("r12:", "r15:", "cr3:", "fsb:", "ds:")
_HEADS: Final = ("*** Dumping ", "crashed on cpu#", "----[ Xen-", "CPU:")


@dataclass(slots=True)
class Dumps:
    """Reads register dumps and counts them.

    Attributes:
        seen: dumps of guest vCPUs. unknown: those whose caller stays unknown; they give no event. silent: those that do
            not say whether they stand on a hypercall instruction. first: place (line, offset) of the first of either.
        domains: what they prove of a domain's caller; None where two dumps differ.
    """

    seen: int = 0
    unknown: int = 0
    silent: int = 0
    first: dict[str, tuple[int, int]] = field(default_factory=dict)
    domains: dict[int, str | None] = field(default_factory=dict)

    def read(self, view: View, stops: NDArray[np.intp]) -> Part:
        """Read the dumps whose ``CONTEXT:`` line is due; ``stops`` are rows that no dump crosses (a boot)."""
        anchors = view.having(LITERALS[0])
        at = anchors[view.due(anchors)]
        if not len(at):
            return Part(NOTHING, 0, NOTHING)
        walls = np.union1d(anchors, stops)
        before = np.searchsorted(walls, at)
        floor = np.where(before > 0, walls[before - 1] + 1, 0)
        after = np.append(walls, len(view.lines))[np.searchsorted(walls, at, side="right")]
        texts = view.places(at).with_columns(
            head=joined(view.lines, np.maximum(at - _NEAR, floor), at + 1),
            tail=joined(view.lines, at + 1, np.minimum(at + 1 + _WINDOW, after), _CHARACTERS),
            row=at,
            floor=np.maximum(at - BEHIND, floor),
        )
        # Of a folded line the end of the context stands below.
        context = pl.concat_str("head", pl.lit("\n"), pl.col("tail").str.slice(0, 80)).str.extract_groups(_CONTEXT)
        texts = texts.with_columns(context.struct.rename_fields(["f", "c", "d", "v"]).alias("m")).unnest("m")
        hvm = pl.col("c").str.starts_with("hvm")
        guest = texts.filter(pl.col("c") != "hypervisor").with_columns(
            kind=pl.when(hvm).then(pl.lit("hvm")).otherwise(pl.lit("pv"))
        )
        if not len(guest):
            return Part(NOTHING, 0, NOTHING)
        dumps = _registers(_headed(view, guest))
        whole = pl.all_horizontal(pl.col(r).is_not_null() for r in ("rip", "cs", "flags", *_NARROW))
        whole &= (pl.col("width") == 32) | pl.all_horizontal(pl.col(r).is_not_null() for r in ("r8", "r9", "r10", "r11"))
        good, bad = judge(dumps.filter(whole)), dumps.filter(~whole)
        told = good.filter(pl.col("caller").is_not_null())
        self.seen += len(good)
        self.unknown += self._first("unknown", good.filter(pl.col("caller").is_null()))
        off = (pl.col("caller") != "pv64") & (pl.col("on_insn") == False)  # noqa: E712 (a column)
        self.silent += self._first("silent", told.filter(off))
        self._tell(told)
        rows = told.select(
            "line", "offset", "caller", "op", "^arg[0-5]$", "rip", "on_insn", "domid", "vcpu", "pcpu",
            *stamps(told["text"]), place="line", kind=pl.lit("sample"),
        )  # fmt: skip
        sure = pl.when(pl.col("width") == 64).then(6).otherwise(4)
        others = [pl.col("tail").str.contains(x, literal=True) for x in _OTHERS]
        heads = [pl.col("head").str.contains(x, literal=True) for x in _HEADS]
        lines = good.select((sure + pl.sum_horizontal(*others, *heads)).sum()).item()
        return Part(rows, int(lines), bad.select("line", "offset", "text"))

    def _first(self, what: str, rows: pl.DataFrame) -> int:
        """Keep the place of the first row; return how many there are."""
        if len(rows) and what not in self.first:
            self.first[what] = (int(rows["line"][0]), int(rows["offset"][0]))
        return len(rows)

    def _tell(self, told: pl.DataFrame) -> None:
        """Keep what the dumps prove of their domains; a vCPU in 32-bit mode does not speak for an HVM domain."""
        known = told.filter(pl.col("caller") != "hvm32").drop_nulls("domid").with_columns(pl.col("caller").cast(pl.String))
        for domid, caller in known.select("domid", "caller").unique(maintain_order=True).iter_rows():
            self.domains[domid] = caller if self.domains.get(domid, caller) == caller else None

    def notes(self) -> list[tuple[int, int, str]]:
        """Say what the dumps did not tell, with the place of the first that did not (line, offset)."""
        out = []
        if self.silent:
            text = f"{self.silent:,} of {self.seen:,} vCPU dumps do not show whether they stand on a hypercall (first here)"
            out.append((*self.first["silent"], text))
        if self.unknown:
            text = f"{self.unknown:,} of {self.seen:,} vCPU dumps do not show the guest's ABI and were not used (first here)"
            out.append((*self.first["unknown"], text))
        return out

    def told(self) -> dict[int, Domain]:
        """Return what the dumps prove of the domains."""
        return {domid: Domain(caller=caller) for domid, caller in sorted(self.domains.items()) if caller is not None}


def _number(text: pl.Expr) -> pl.Expr:
    return text.str.to_integer(base=16, dtype=pl.UInt64, strict=False)


def _headed(view: View, guest: pl.DataFrame) -> pl.DataFrame:
    """Add ``domid``, ``vcpu`` and ``pcpu``: what CONTEXT: says, else the heading."""
    out = guest.with_columns(
        domid=pl.col("d").cast(pl.UInt16, strict=False),
        vcpu=pl.col("v").cast(pl.UInt32, strict=False),
        pcpu=pl.col("head").str.extract(_LOGICAL, 1).cast(pl.UInt32, strict=False),
    )
    open_ = out["d"].is_null()
    if not open_.any():
        return out
    some = out.filter(open_)
    head = joined(view.lines, some["floor"].to_numpy(), some["row"].to_numpy() + 1).alias("above")
    said = [pl.col("above").str.extract_groups(p) for p in _HEADINGS]
    found = some.select("line", head).select(
        "line",
        domid2=pl.coalesce(s.struct.field("1") for s in said).cast(pl.UInt16, strict=False),
        vcpu2=pl.coalesce(s.struct.field("2") for s in said).cast(pl.UInt32, strict=False),
    )
    return out.join(found, on="line", how="left", maintain_order="left").with_columns(
        domid=pl.coalesce("domid", "domid2"), vcpu=pl.coalesce("vcpu", "vcpu2")
    )


def _registers(guest: pl.DataFrame) -> pl.DataFrame:
    """Add what `judge` takes of each dump, null where a line of it is missing."""
    tail = pl.col("tail")
    pointer = pl.col("head").str.extract_groups(_POINTER).struct.rename_fields(["cs", "rip"])
    wide = {r: tail.str.extract(rf"\b{r}:[\s>]+([0-9a-f]{{16}})\b", 1) for r in _WIDE}
    out = guest.with_columns(pointer.alias("p"), flags=_number(pl.col("f")), code=pl.lit(None, pl.String), **wide).unnest("p")
    # A 32-bit Xen prints eight digits, a 64-bit one sixteen; a mixture is damage.
    out = out.with_columns(width=pl.when(pl.col("rax").is_not_null()).then(64).otherwise(32))
    fits = pl.col("rip").str.len_bytes() == pl.col("width") // 4
    out = out.with_columns(rip=pl.when(fits).then("rip"))
    short = pl.col("width") == 32
    if out.select(short.any()).item():
        narrow = {r: tail.str.extract(rf"\be{r[1:]}:[\s>]+([0-9a-f]{{8}})\b", 1) for r in _NARROW}
        out = out.with_columns(pl.when(short).then(e).otherwise(r).alias(r) for r, e in narrow.items())
    if (out["kind"] == "hvm").any():
        extras = {x: tail.str.extract(rf"\b{x}:[\s>]+([0-9a-f]{{8,16}})\b", 1) for x in _EXTRAS}
    else:
        extras = dict.fromkeys(_EXTRAS, pl.lit(None, pl.String))
    out = out.with_columns(**extras).with_columns(_number(pl.col(c)) for c in ("cs", *REGISTERS, *_EXTRAS))
    off = ((pl.col("cr0") & _CR0_PG) == 0) | ((pl.col("cr4") & _CR4_PAE) == 0)
    above = pl.any_horizontal(pl.col(c) >= _FOUR_GIB for c in ("rip", "rsp", "fsb", "gsb", "gss"))
    return out.with_columns(low=(off | short).fill_null(value=False), high=above.fill_null(value=False))
