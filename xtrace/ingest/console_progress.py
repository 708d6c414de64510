"""The lines in which Xen says how far a memory_op got: ``(XEN) common/memory.c:277:d0v10 Could not allocate … (3 of 4)``.

``increase_reservation`` and ``populate_physmap`` print them when the host has no memory left (xen/common/memory.c:
3.1.0-branched :72 and :121, RELEASE-4.17.0:135 and :278, RELEASE-4.22.0:140 and :363). ``(i of n)``: i extents are done,
``n`` is ``nr_extents`` of the reservation. The call ends there: ``a->nr_done = i``, which do_memory_op returns. So each line is
a call and its return:

* caller of the hypercall: ``d0v10``, the prefix of gdprintk (``d0`` alone up to 4.4, none in 3.0). ``id=`` is the domain
  that gets the memory, not the caller.
* The command: ``memflags=0x…`` (``%#x``) is printed by populate_physmap alone, in the 93 release tags from 4.6 on; both print
  ``%x`` before that, increase_reservation to this day. So ``0x`` gives arg0 as the call was issued, and its absence nothing.
* Not in the line, hence null: the other registers, how often it was preempted, the ABI. Of a 32-bit PV caller ``n`` is the
  end of the piece that Xen translated, not of the whole call (compat_memory_op).
* gdprintk prints in debug builds of Xen only, and at guest log level "info": absence shows nothing.

No other printk of Xen 3.0 to 4.22 tells how far a hypercall got: the format strings of xen/common and xen/arch/x86 were
searched for "of" and "/" between numbers; argo's "page %u of %u" and grant_table's "error reading req %d/%u" end in an
error, not in a continuation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.ingest.console_text import NOTHING, Part, View, joined, stamps
from xtrace.ingest.hypercalls import HYPERCALLS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("LITERALS", "read")

LITERALS: Final = ("Could not allocate order=",)

_LINE: Final = (
    r"(?::[0-9]{1,6}:d([0-9]{1,5})(?:v([0-9]{1,5}))? )?Could not allocate order=[0-9]{1,3}[\s>]+extent:[\s>]+id=[0-9]{1,5}"
    r"[\s>]+(?:mem)?flags=(0x)?[0-9a-f]{1,8}[\s>]+\(([0-9]{1,10})[\s>]+of[\s>]+([0-9]{1,10})\)"
)
_FOLDED: Final = 3
#: XENMEM_populate_physmap, RELEASE-4.17.0:xen/include/public/memory.h:40.
_POPULATE: Final = 6


def read(view: View, stops: NDArray[np.intp]) -> Part:
    """Read the progress lines that are due; a folded one does not cross ``stops``."""
    anchors = view.having(LITERALS[0])
    at = anchors[view.due(anchors)]
    if not len(at):
        return Part(NOTHING, 0, NOTHING)
    walls = np.append(np.union1d(anchors, stops), len(view.lines))
    text = joined(view.lines, at, np.minimum(at + _FOLDED, walls[np.searchsorted(walls, at, side="right")]))
    found = pl.concat([view.places(at), _fields(text)], how="horizontal")
    whole = pl.col("done").is_not_null() & pl.col("all").is_not_null() & (pl.col("done") <= pl.col("all"))
    good, bad = found.filter(whole), found.filter(~whole)
    common = good.select(
        "line", "offset", *stamps(good["text"]), place="line",
        domid=pl.col("d").cast(pl.UInt16, strict=False), vcpu=pl.col("v").cast(pl.UInt32, strict=False),
        op=pl.lit(HYPERCALLS["memory_op"], pl.UInt32), all="all", done="done",
        arg0=pl.when(pl.col("sharp").is_not_null()).then(pl.lit(_POPULATE, pl.UInt64)),
    )  # fmt: skip
    memory = pl.concat_list(pl.struct(pl.lit("nr_extents").alias("field"), pl.col("all").cast(pl.UInt64).alias("value")))
    calls = common.select(pl.exclude("all", "done"), kind=pl.lit("hypercall"), memory=memory, rank=pl.lit(0))
    ends = common.select(pl.exclude("all", "done", "arg0"), kind=pl.lit("return"), result=pl.col("done"), rank=pl.lit(1))
    rows = pl.concat([calls, ends], how="diagonal").sort("place", "rank", maintain_order=True).drop("rank")
    return Part(rows, len(good), bad.select("line", "offset", "text"))


def _fields(text: pl.Series) -> pl.DataFrame:
    groups = text.str.extract_groups(_LINE).struct.rename_fields(["d", "v", "sharp", "done", "all"]).struct.unnest()
    return groups.with_columns(pl.col("done").cast(pl.Int64, strict=False), pl.col("all").cast(pl.Int64, strict=False))
