"""Register samples in lines of Linux's tracers: an event that prints the registers of an interrupted frame.

A kprobe on the PV event upcall, for one, prints the frame that the event interrupted (samples/dom0-4.17.7)::

    hcload-138 [001] d.h. 78514840775: up: (__xen_pv_evtchn_do_upcall+0x0/0x30) ip=0xffffffff81a39073 ax=0xc di=0xda86 …

Any event with the fields ``ip`` and ``ax`` (``rip``, ``eip``, ``rax`` … as well) is a sample, in whatever order they stand.

* An instruction pointer above 32 bits is of a 64-bit frame: the arguments are di si dx r10 r8 r9. A smaller one with bx and cx and
  none of r8 to r10 is of a 32-bit frame: bx cx dx si di bp. What the probe does not print is null.
* The probed function proves that the caller is PV, where only a PV kernel has it (layouts/linux.toml).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from xtrace.ingest.lines import magnitudes
from xtrace.schema import ARGS

__all__ = ("LOOKS", "samples")

#: Fields that make a line a sample.
LOOKS: Final = r"(?:^| )[re]?ip=\S*.* [re]?ax=|(?:^| )[re]?ax=\S*.* [re]?ip="
_WIDE: Final = ("di", "si", "dx", "r10", "r8", "r9")
_NARROW: Final = ("bx", "cx", "dx", "si", "di", "bp")
_NAMES: Final = ("ip", "ax", *dict.fromkeys((*_WIDE, *_NARROW)))
_FUNCTION: Final = r"^\(([^\s+()]+)(?:\+[^\s()]*)?\) "
_BITS: Final = 1 << 32


def _pattern(name: str) -> str:
    return rf" {'' if name.startswith('r') else '[re]?'}{name}=([^ \r]*)[ \r]"


def samples(parsed: pl.DataFrame, pv_functions: tuple[str, ...]) -> pl.DataFrame:
    """Read samples.

    Args:
        parsed: lines as `xtrace.ingest.linux_lines.parse` returns them, whose ``fields`` match `LOOKS`.
        pv_functions: functions that prove a PV caller.

    Returns:
        The rows with ``rip`` and ``arg0`` … ``arg5`` (UInt64), ``op`` (UInt32), ``caller`` (String) and ``good`` (false: a field
        holds no number, or ax has more than 32 bits).
    """
    if not len(parsed):
        none = {"rip": pl.UInt64, "op": pl.UInt32, **dict.fromkeys(ARGS, pl.UInt64), "caller": pl.String, "good": pl.Boolean}
        return parsed.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in none.items())
    line = pl.concat_str(pl.lit(" "), pl.col("fields"), pl.lit(" ")).alias("_line")
    out = parsed.with_columns(line, _function=pl.col("fields").str.extract(_FUNCTION))
    out = out.with_columns(pl.col("_line").str.extract(_pattern(name)).alias(f"_{name}") for name in _NAMES)
    texts = out.select(f"_{name}" for name in _NAMES)
    there = [name for name in texts.columns if texts[name].null_count() < len(texts)]
    values = texts.with_columns(magnitudes(pl.col(n)) if n in there else pl.lit(None, pl.UInt64).alias(n) for n in texts.columns)
    # A field that holds no number.
    wrong = pl.Series("_wrong", np.zeros(len(out), bool))
    for name in there:
        wrong |= texts[name].is_not_null() & values[name].is_null()
    out = out.with_columns(wrong, *values)
    no_wide = pl.all_horizontal(pl.col(f"_{n}").is_null() for n in ("r10", "r8", "r9"))
    narrow = (pl.col("_ip") < _BITS) & pl.col("_bx").is_not_null() & pl.col("_cx").is_not_null() & no_wide
    wide = pl.col("_ip") >= _BITS
    pv = pl.col("_function").is_in(pv_functions)
    return out.with_columns(
        *(
            pl.when(narrow).then(f"_{b}").otherwise(f"_{a}").alias(f"arg{i}")
            for i, (a, b) in enumerate(zip(_WIDE, _NARROW, strict=True))
        ),
        rip=pl.col("_ip"),
        op=pl.col("_ax").cast(pl.UInt32, strict=False),
        caller=pl.when(pv & narrow).then(pl.lit("pv32")).when(pv & (wide | ~no_wide)).then(pl.lit("pv64")),
        good=(~pl.col("_wrong") & pl.col("_ip").is_not_null() & (pl.col("_ax") < _BITS)).fill_null(value=False),
    ).drop("_wrong", "_function", "_line", *(f"_{n}" for n in _NAMES))
