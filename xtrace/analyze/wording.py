"""One sentence for each finding, with its own numbers, for whole frames at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("sentence", "span")


def span(targets: Sequence[str]) -> str:
    """Return how a sentence names the releases it is about."""
    return targets[0] if len(targets) == 1 else f"{targets[0]} to {targets[-1]}"


def _field(side: str, key: str, default: str) -> pl.Expr:
    """Return a field of a decoding: of the call inside a multicall where there is one."""
    decode = pl.col(side)
    inner = decode.struct.field("inner").struct.field(key).cast(pl.String)
    return pl.when(_nested()).then(inner).otherwise(decode.struct.field(key).cast(pl.String)).fill_null(default)


def _nested() -> pl.Expr:
    return pl.col("source_decode").struct.field("inner").struct.field("hypercall").is_not_null()


def _name(side: str, default: str) -> pl.Expr:
    own = _field(side, "subop", "")
    return pl.when(own == "").then(_field(side, "hypercall", default)).otherwise(own)


def _errno(words: str) -> pl.Expr:
    given = pl.concat_str(pl.lit(words), pl.col("errno"))
    return pl.when(pl.col("errno").is_null()).then(pl.lit("")).otherwise(given)


def sentence(outcome: str, harmless: bool, targets: Sequence[str]) -> pl.Expr:
    """Return the sentence of findings that share an outcome.

    Args:
        outcome: one of ``outcomes.NAMES``.
        harmless: of a restart or of lost work.
        targets: the releases that treat them so.

    Returns:
        An expression over frames with ``source_decode``, ``target_decode`` and ``errno``.
    """
    target = span(targets)
    left = pl.concat_str(
        pl.when(_nested()).then(pl.lit("inside a multicall: ")).otherwise(pl.lit("")),
        _name("source_decode", "the call"),
        pl.lit(" left after "),
        _field("source_decode", "progress", "an unknown number of"),
        pl.lit(" "),
        _field("source_decode", "unit", "units"),
    )
    read = pl.concat_str(
        pl.lit(f"{target} reads "),
        _name("target_decode", "no operation"),
        pl.lit(" with "),
        _field("target_decode", "progress", "an unknown number"),
        pl.lit(" done"),
    )
    again = "which is harmless" if harmless else "doing done work again"
    rebuilt = " (harmless: the target rebuilds that state)" if harmless else ""
    end = {
        "absent": pl.concat_str(pl.lit(f"{target} does not implement it for this caller: it ends"), _errno(" with ")),
        "misdirected": pl.concat_str(read, _errno(" and ends with ")),
        "refused": pl.concat_str(pl.lit(f"{target} refuses it"), _errno(" with ")),
        "skips": pl.concat_str(read, pl.lit(": units in between are never done")),
        "redoes": pl.concat_str(read, pl.lit(": some units are done twice")),
        "restarts": pl.lit(f"{target} begins again from 0, {again}"),
        "lost": pl.lit(f"{target} ends it without error though work held inside the source's Xen was not finished{rebuilt}"),
        "wrong_result": pl.lit(f"{target} finishes it wrongly"),
        "resumes": pl.lit(f"{target} resumes it"),
        "undecidable": pl.lit(f"what becomes of it at {target} depends on what the trace does not record"),
        "unknown": pl.lit(f"not modelled at the source or at {target}"),
    }
    return pl.concat_str(left, pl.lit("; "), end[outcome])
