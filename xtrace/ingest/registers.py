"""What the registers of a stopped vCPU prove: its ABI, and whether it stands on a hypercall instruction.

For the readers of register dumps (`console`, `xenctx`); the numbers and their sources are in layouts/registers.toml. A dump
may show any instruction of the guest, so registers that look like a continuation prove nothing by themselves (a loop
counter in rdi, 12 in rax). Three answers, in the column ``on_insn``:

* true: it stands on the instruction. For a 64-bit PV kernel that takes ``cs`` 0xe033 and ``rcx`` = ``rip`` + 2 with ``r11`` =
  rflags: SYSCALL loads both, so the call was made and is to be made again, which is what a continuation is. In every
  parked 64-bit PV vCPU of the recordings it holds, in none of the others. For a 32-bit PV or an HVM vCPU it takes the
  code bytes at the instruction pointer; whether that call was made before, they do not say.
* null: no bytes are shown, but the pointer is where a hypercall page has the instruction for the number in eax. It is
  treated as any other record that may stand there: inferred at best.
* false: neither. For 64-bit PV that is an answer (not parked; ``rcx`` = ``rip``: just behind the call). For HVM and 32-bit PV
  it only means *not known*: kernels that do not use a hypercall page (xen_hypercall_pv of Linux 6.1.176, say) make calls elsewhere.

The caller stays null where the registers leave several open: user mode, and an HVM vCPU below 4 GiB with paging on.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Final

import polars as pl

from xtrace import schema

__all__ = ("NARROW", "REGISTERS", "WIDE", "judge")

#: Registers that `judge` takes, UInt64 (the names of a 64-bit dump; a 32-bit one fills eax as rax and so on).
REGISTERS: Final = ("rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11")
#: Registers with arg0…arg5: RELEASE-4.22.0:xen/include/public/arch-x86/xen-x86_64.h ("Hypercall interface") …
WIDE: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
#: … and xen-x86_32.h.
NARROW: Final = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")

_LOW: Final = 0xFFFFFFFF


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("xtrace.ingest").joinpath("layouts", "registers.toml").read_text(encoding="utf-8"))


def judge(dumps: pl.DataFrame) -> pl.DataFrame:
    """Turn register dumps into the columns of sample events.

    Args:
        dumps: one row a vCPU, with the columns of `REGISTERS` (UInt64), ``cs`` and ``flags`` (UInt64), ``width`` (bits of a
            register as printed), ``kind`` (``pv``, ``hvm`` or null: the dump does not say), ``high`` (some register
            holds what only a 64-bit kernel can have), ``low`` (paging or PAE is off: no 64-bit mode), ``code`` (hex digits
            of the bytes at rip, null where the dump shows none).

    Returns:
        ``dumps`` with ``caller``, ``on_insn``, ``op``, ``arg0`` … ``arg5``, and ``rip`` cut to the caller's width.
    """
    t = _table()
    ring = pl.col("cs") & 3
    caller = (
        pl.when((pl.col("kind").is_null() | (pl.col("kind") == "pv")) & (pl.col("width") == 64) & (pl.col("cs") == t["pv64"]["cs"]))
        .then(pl.lit("pv64"))
        .when((pl.col("kind") == "pv") & (ring == t["pv32"]["ring"]))
        .then(pl.lit("pv32"))
        .when((pl.col("kind") == "hvm") & pl.col("low"))
        .then(pl.lit("hvm32"))
        .when((pl.col("kind") == "hvm") & pl.col("high"))
        .then(pl.lit("hvm64"))
        .when(pl.col("kind").is_null() & (pl.col("width") == 32) & (ring == t["pv32"]["ring"]))
        .then(pl.lit("pv32"))
        .when(pl.col("kind").is_null() & (ring == t["hvm"]["ring"]))
        .then(pl.when(pl.col("width") == 64).then(pl.lit("hvm64")).otherwise(pl.lit("hvm32")))
        .cast(schema.EVENTS["caller"])
    )
    out = dumps.with_columns(caller=caller)
    narrow = pl.col("caller").is_in(["pv32", "hvm32"]).fill_null(value=False)
    out = out.with_columns(pl.when(narrow).then(pl.col(r) & _LOW).otherwise(r).alias(r) for r in REGISTERS)
    # Xen looks at the whole of rax for a 64-bit PV caller and at eax for all others.
    number = pl.when(pl.col("caller") == "pv64").then("rax").otherwise(pl.col("rax") & _LOW)
    out = out.with_columns(
        on_insn=_on_insn(number),
        op=(pl.col("rax") & _LOW).cast(pl.UInt32),
        **{a: pl.when(narrow).then(n).otherwise(w) for a, n, w in zip(schema.ARGS, NARROW, WIDE, strict=True)},
    )
    return out.with_columns(on_insn=pl.when(number <= _LOW).then("on_insn").otherwise(pl.lit(value=False)))


def _on_insn(number: pl.Expr) -> pl.Expr:
    """Say whether rip stands on a hypercall instruction (see the module)."""
    t = _table()
    pv64, code, shown = pl.col("caller") == "pv64", pl.col("code"), pl.col("code").is_not_null()
    # No wrap-around is missed: no instruction begins in the last two bytes of the address space.
    ran = (pl.col("rcx") >= t["pv64"]["insn_bytes"]) & (pl.col("rcx") - t["pv64"]["insn_bytes"] == pl.col("rip"))
    ran &= (pl.col("r11") ^ pl.col("flags")) | t["pv64"]["flags_ignored"] == t["pv64"]["flags_ignored"]
    out: Any = pl.when(pv64).then(ran & (~shown | _begins(code, t["pv64"]["insn"])))
    for name, callers in (("pv32", ["pv32"]), ("hvm", ["hvm32", "hvm64"])):
        here = pl.col("caller").is_in(callers)
        kernel = (pl.col("cs") & 3) == t[name]["ring"]
        stub = (pl.col("rip") & t["page"]["mask"]) == number * t["page"]["entry"] + t[name]["stub"]
        may = pl.when(stub & kernel).then(None).otherwise(pl.lit(value=False))
        out = out.when(here & shown).then(kernel & _begins(code, t[name]["insn"])).when(here).then(may)
    said: pl.Expr = out.otherwise(pl.lit(value=False))
    return said


def _begins(code: pl.Expr, insns: list[str]) -> pl.Expr:
    return pl.any_horizontal(*(code.str.starts_with(insn) for insn in insns)).fill_null(value=False)
