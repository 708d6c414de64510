"""``xtrace replay`` as text and JSON lines, written a batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.pipeline import Replay

__all__ = ("closing", "write_jsonl", "write_text")


def write_text(rows: pl.DataFrame, out: TextIO) -> None:
    """Write one line for each call: place, domain and vCPU, kind, hypercall, sub-operation, progress."""
    who = pl.concat_str(
        pl.lit("d"),
        pl.col("domid").cast(pl.String).fill_null("?"),
        pl.lit("v"),
        pl.col("vcpu").cast(pl.String).fill_null("?"),
    )
    place = pl.coalesce(
        pl.concat_str(pl.lit("line "), pl.col("line").cast(pl.String)),
        pl.concat_str(pl.lit("byte "), pl.col("offset").cast(pl.String)),
        pl.lit("?"),
    )
    name = pl.concat_str(
        pl.col("hypercall"),
        pl.when(pl.col("subop").is_null()).then(pl.lit("")).otherwise(pl.concat_str(pl.lit("/"), pl.col("subop"))),
    )
    number = [pl.col(c).cast(pl.String).fill_null("?") for c in ("progress", "total", "remaining")]
    done = (
        pl.when(pl.col("unit").is_null())
        .then(pl.lit(""))
        .otherwise(
            pl.concat_str(
                pl.lit("  "), number[0], pl.lit(" of "), number[1], pl.lit(" "), pl.col("unit"), pl.lit(", "), number[2],
                pl.lit(" left"),
            )
        )
    )  # fmt: skip
    status = (
        pl.when(pl.col("status").is_in(["modelled", "never"])).then(pl.lit(""))
        .otherwise(pl.concat_str(pl.lit("  ["), pl.col("status"), pl.lit("]")))
    )  # fmt: skip
    again = (
        pl.when(pl.col("continuation").is_null()).then(pl.lit(""))
        .otherwise(pl.concat_str(pl.lit("  continuation, "), pl.col("continuation")))
    )  # fmt: skip
    line = pl.concat_str(place, pl.lit("  "), who, pl.lit("  "), pl.col("kind"), pl.lit("  "), name, done, status, again)
    for text in rows.select(line).to_series():
        out.write(f"{text}\n")


def write_jsonl(rows: pl.DataFrame, out: TextIO) -> None:
    """Write one object a line."""
    out.write(rows.write_ndjson())


def closing(run: Replay) -> Iterator[str]:
    """Say how much was explained, and what was not."""
    total = sum(run.account.counts.values())
    parts = ", ".join(f"{n:,} {name}" for name, n in sorted(run.account.counts.items()))
    yield f"{run.path}: {total:,} entries at {run.account.release}: {parts or 'none'}"
    if run.account.nameless:
        what = "entry" if run.account.nameless == 1 else "entries"
        yield f"{run.path}: left out: {run.account.nameless:,} {what} whose hypercall's number is not recorded"
    if run.account.elsewhere:
        yield f"{run.path}: left out: {run.account.elsewhere:,} register samples of vCPUs that stand on no hypercall instruction"
    for line in run.assumptions:
        yield f"assumed: {line}"
    d = run.account.divergence
    if d is None:
        yield "every record that the model covers is explained"
    else:
        place = f"line {d.line}" if d.line is not None else f"byte {d.offset}"
        yield f"{run.path}: {place}: first record that cannot be explained: {d.what}; expected: {d.expected}"
