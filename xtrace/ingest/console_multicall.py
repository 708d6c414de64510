r"""Linux's dumps of multicalls that failed, old and new: the calls a PV kernel made, with their arguments.

Printed by ``xen_mc_flush`` (Linux arch/x86/xen/multicalls.c)::

    [    1.815967] 1 of 2 multicall(s) failed: cpu 0
    [    1.816769]   call  1: op=1 arg=[ffff88817fe1faf0] result=-16

    [   44.575695]   call  1: op=1 result=-1 caller=xen_extend_mmu_update+0x4e/0xd0 pars=ffff888267e25ad0 1 0 7ff0 args=9ba37a678 …

* ``N multicall(s) failed: cpu C`` and ``call i/M: op= arg=[] result=`` (2.6.32, with MC_DEBUG): M entries were issued
  together, all of them are listed.
* ``N of M multicall(s) failed: cpu C``: M entries, of which those that failed are listed. **M = 1 is no multicall**: Linux
  then makes the call itself (``xen_single_call``), so the event is that hypercall.
* ``pars=`` (since mid 2024, print_debug_data, with ``xen_mc_debug`` on the command line): the parameters as issued, as
  many as the hypercall has (``hpcpars``). ``arg=[]``: the first one; without MC_DEBUG it is read after the call, when a
  preempted entry holds the arguments of its continuation.
* The CPU is the kernel's, which is its vCPU. The domain is whoever owns the log: null. An argument of more than 32 bits
  proves a 64-bit PV kernel (HVM kernels do not use this code); else the caller is null.
* A multicall that returns something else than 0 stops the kernel (BUG), so it returned 0. Each entry's result stands in
  its own row. What is printed is over by then: a dump shows calls that are made, never one in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.console_text import AHEAD, NOTHING, Part, View, joined, stamps
from xtrace.ingest.hypercalls import HYPERCALLS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("LITERALS", "read")

LITERALS: Final = ("multicall(s) failed: cpu ", ": op=")

_HEAD: Final = r"\b([0-9]{1,4})(?: of ([0-9]{1,4}))? multicall\(s\) failed: cpu ([0-9]{1,5})\b"
_CALL: Final = (
    r"\bcall +([0-9]{1,4})(?:/([0-9]{1,4}))?: op=([0-9]{1,10})(?:[\s>]+arg=\[([0-9a-f]{1,16})\])?[\s>]+result=(-?[0-9]{1,19})\b"
    r"(?:[^\n]*?[\s>]+(?:caller=[^\n]*?[\s>]+)?pars=((?:[0-9a-f]{1,16}\b[\s>]*){1,6}))?"
)
_FOLDED: Final = 3
_NARROW: Final = 1 << 32


def read(view: View, stops: NDArray[np.intp]) -> Part:
    """Read the multicalls whose first line is due; what belongs to one does not cross ``stops``."""
    anchors = view.having(LITERALS[0])
    at = anchors[view.due(anchors)]
    if not len(at):
        return Part(NOTHING, 0, NOTHING)
    walls = np.append(np.union1d(anchors, stops), len(view.lines))
    end = np.minimum(walls[np.searchsorted(walls, at, side="right")], at + AHEAD)
    heads = pl.concat([view.places(at), _heads(view.lines["text"].gather(at))], how="horizontal").with_columns(
        stamps(view.lines["text"].gather(at)), place="line", group=np.arange(len(at))
    )
    calls = _calls(view, at, end)
    listed = calls.group_by("group").agg(listed=pl.len(), of=pl.col("of").max(), high=pl.col("high").any())
    heads = heads.join(listed, on="group", how="left", maintain_order="left").with_columns(
        total=pl.coalesce("total", "of"), listed=pl.col("listed").fill_null(0)
    )
    single = pl.col("failed").is_not_null() & pl.col("said") & (pl.col("total") == 1)
    whole = pl.col("failed").is_not_null() & ~(single & (pl.col("listed") == 0))
    good, bad = heads.filter(whole), heads.filter(~whole)
    calls = calls.join(
        good.select("group", "place", "vcpu", single=single, total="total"), on="group", how="inner", maintain_order="left"
    )
    rows = pl.concat([_multicalls(good.filter(~single)), _entries(calls)], how="diagonal")
    rows = rows.sort("place", "rank", maintain_order=True).drop("rank")
    return Part(rows, len(good) + len(calls), bad.select("line", "offset", "text"))


def _heads(text: pl.Series) -> pl.DataFrame:
    groups = text.str.extract_groups(_HEAD).struct.rename_fields(["failed", "total", "vcpu"]).struct.unnest()
    return groups.with_columns(pl.all().cast(pl.UInt32, strict=False), said=pl.col("total").is_not_null())


def _calls(view: View, at: NDArray[np.intp], end: NDArray[np.intp]) -> pl.DataFrame:
    """Read the entries listed behind each first line."""
    lines = view.having(LITERALS[1])
    group = np.searchsorted(at, lines, side="right") - 1
    mine = (group >= 0) & (lines < end[np.maximum(group, 0)])
    lines, group = lines[mine], group[mine]
    last = np.minimum(np.append(lines[1:], len(view.lines)), end[group])
    text = joined(view.lines, lines, np.minimum(lines + _FOLDED, last))
    # What follows an entry that is not folded is a line of its own: it begins with a time stamp, or is no list of numbers.
    text = text.str.replace(r"\n[> \t]*[^>\spac0-9a-f][\s\S]*$", "")
    fields = text.str.extract_groups(_CALL).struct.rename_fields(["index", "of", "op", "arg", "result", "pars"]).struct.unnest()
    pars = pl.col("pars").str.replace_all(r"[\s>]+", " ").str.strip_chars().str.split(" ")
    args = {
        a: pl.coalesce(pars.list.get(k, null_on_oob=True), pl.col("arg") if k == 0 else pl.lit(None, pl.String))
        .str.to_integer(base=16, dtype=pl.UInt64, strict=False)
        for k, a in enumerate(schema.ARGS)
    }  # fmt: skip
    out = pl.concat([view.places(lines), fields], how="horizontal").with_columns(
        **args,
        group=group,
        index=pl.col("index").cast(pl.Int64, strict=False),
        of=pl.col("of").cast(pl.UInt32, strict=False),
        op=pl.col("op").cast(pl.UInt32, strict=False),
        result=pl.col("result").cast(pl.Int64, strict=False),
    )
    out = out.with_columns(
        stamps(out["text"]), high=pl.any_horizontal(pl.col(a) >= _NARROW for a in schema.ARGS).fill_null(value=False)
    )
    return out.filter(pl.col("op").is_not_null() & pl.col("result").is_not_null())


def _caller(high: pl.Expr) -> pl.Expr:
    return pl.when(high).then(pl.lit("pv64")).cast(schema.EVENTS["caller"])


def _multicalls(heads: pl.DataFrame) -> pl.DataFrame:
    """Return a hypercall and its return for each first line that is a multicall."""
    op = pl.lit(HYPERCALLS["multicall"], pl.UInt32)
    common = ("line", "offset", "place", "vcpu", "tsc", "time_ns")
    caller = _caller(pl.col("high").fill_null(value=False))
    calls = heads.select(
        *common, op=op, arg1=pl.col("total").cast(pl.UInt64), kind=pl.lit("hypercall"), caller=caller, rank=pl.lit(0, pl.Int64)
    )
    ends = heads.select(
        *common, op=op, result=pl.lit(0, pl.Int64), kind=pl.lit("return"), caller=caller, rank=pl.lit(1 << 40, pl.Int64)
    )
    return pl.concat([calls, ends], how="diagonal")


def _entries(calls: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each entry, and one for the return of those that were made alone."""
    common = ("line", "offset", "place", "vcpu", "tsc", "time_ns", "op", *schema.ARGS)
    alone = pl.col("single")
    own = calls.select(
        *common,
        result=pl.when(~alone).then("result"),
        kind=pl.when(alone).then(pl.lit("hypercall")).otherwise(pl.lit("subcall")),
        caller=_caller(pl.col("high")),
        rank=2 * pl.col("line").cast(pl.Int64),
    )
    ends = calls.filter(alone).select(
        "line", "offset", "place", "vcpu", "tsc", "time_ns", "op", "result",
        kind=pl.lit("return"), caller=_caller(pl.col("high")), rank=2 * pl.col("line").cast(pl.Int64) + 1,
    )  # fmt: skip
    return pl.concat([own, ends], how="diagonal")
