"""Any line of xtrace's own text log: its words judged with Polars, one by one, with a reason for each that is refused.

The plain lines, nearly all of a log, are read by `xtrace_log_fast` instead.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.ingest.lines import magnitudes
from xtrace.ingest.xtrace_log_grammar import CALLER_ID, ENTRIES, KEY_ID, KINDS, LIMITS, MEM, SIGNED, Records

__all__ = ("judged", "marked", "taken_apart")

# The number before the marker must not be part of a longer word: "myxtrace:", "a.xtrace:" and "/xtrace:" are not it.
_BEFORE: Final = r"(?:^|[^A-Za-z0-9_.\-/])"
_MARKER: Final = rf"(?s){_BEFORE}(xtrace:(?:[ \t].*)?)$"
_WORD: Final = r"[^ \t\r\n]+"
_FIELD: Final = r"^mem\.[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*$"
_END: Final = ";"


def marked(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the lines with a marker.

    Args:
        frame: lines with ``text`` and other columns.

    Returns:
        Those columns but the text, ``words`` (from the marker on, without the end mark) and ``ended`` (there was one).
    """
    return (
        frame.filter(pl.col("text").str.contains("xtrace:", literal=True))
        .with_columns(words=pl.col("text").str.extract(_MARKER, 1).str.extract_all(_WORD))
        .filter(pl.col("words").list.len() > 0)
        .drop("text")
        .with_columns(ended=pl.col("words").list.last() == _END)
        .with_columns(words=pl.col("words").list.head(pl.col("words").list.len() - pl.col("ended")))
    )


def judged(lines: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split records into words and judge each.

    Returns:
        words: row (UInt32), key, id (UInt8, null = unknown key), value (UInt64 magnitude), neg, one row a word;
        bad: row, why (String), one row a line that is not understood.
    """
    rows = lines.with_row_index("row")
    words = (
        rows.select("row", word="words")
        .explode("word")
        .drop_nulls("word")
        .with_columns(pl.col("word").str.splitn("=", 2).struct.rename_fields(["key", "text"]).struct.unnest())
        .with_columns(
            id=pl.when(pl.col("key").str.contains(_FIELD))
            .then(pl.lit(MEM))
            .otherwise(pl.col("key").replace_strict(KEY_ID, default=None, return_dtype=pl.Int32))
            .cast(pl.UInt8),
            neg=pl.col("text").str.starts_with("-"),
        )
        .with_columns(value=magnitudes(pl.col("text").str.strip_prefix("-")))
    )
    name = pl.col("text").str.strip_prefix("__HYPERVISOR_")
    words = words.with_columns(
        value=pl.when(pl.col("id") == KEY_ID["op"])
        .then(pl.coalesce("value", name.replace_strict(HYPERCALLS, default=None, return_dtype=pl.UInt64)))
        .when(pl.col("id") == KEY_ID["caller"])
        .then(pl.col("text").replace_strict(CALLER_ID, default=None, return_dtype=pl.UInt64))
        .otherwise("value")
    )
    limit = pl.col("id").replace_strict(
        {**{KEY_ID[key]: limit for key, limit in LIMITS.items()}, MEM: (1 << 64) - 1},
        default=None,
        return_dtype=pl.UInt64,
    )
    signed = pl.col("id").is_in(SIGNED)
    # a1= and a1~= are the same argument.
    same = pl.struct("row", pl.col("key").str.strip_suffix("~")).is_duplicated() & pl.col("id").is_not_null()
    shown = pl.col("word").str.slice(0, 60)
    words = words.with_columns(
        why=pl.when(pl.col("text").is_null() | (pl.col("key") == ""))
        .then(pl.format("`{}` is not key=value", shown))
        .when(same)
        .then(pl.format("`{}` is given twice", pl.col("key").str.slice(0, 60)))
        .when(pl.col("id").is_null())
        .then(None)
        .when((pl.col("id") == KEY_ID["op"]) & pl.col("value").is_null())
        .then(pl.format("`{}` is no hypercall that is known; give its number", shown))
        .when(pl.col("value").is_null())
        .then(pl.format("`{}` is not a value", shown))
        .when(pl.col("neg") & ~signed)
        .then(pl.format("`{}` cannot be negative", shown))
        .when((pl.col("value") > limit) | (pl.col("neg") & (pl.col("value") > 1 << 63)))
        .then(pl.format("`{}` is out of range", shown))
    )
    kind = pl.col("kind")
    unknown = ~kind.is_in(list(KINDS)).fill_null(value=False)
    whole = rows.select(
        "row",
        why=pl.when(kind.is_null())
        .then(pl.lit("nothing follows the marker"))
        .when(unknown)
        .then(pl.format("`{}` is no kind of record", kind.str.slice(0, 60)))
        .when(kind.is_in(ENTRIES) & ~pl.col("row").is_in(words.filter(id=KEY_ID["op"])["row"].implode()))
        .then(pl.format("a {} without op=", kind)),
    )
    bad = pl.concat([whole, words.select("row", "why")]).drop_nulls("why").unique("row", keep="first", maintain_order=True)
    return words.select("row", "key", "id", "value", "neg"), bad


def taken_apart(lines: pl.DataFrame, words: pl.DataFrame) -> Records:
    """Put judged words, of lines that are all understood, into records.

    Args:
        lines: ``row``, ``at`` (index of the line in its block) and ``kind``.
        words: ``row``, ``key``, ``id``, ``value``, ``neg``, as `judged` gives them.
    """
    numbers = {kind: i for i, kind in enumerate(KINDS)}
    # Rows that were refused leave gaps in the row numbers.
    words = words.filter(pl.col("id").is_not_null())
    at = np.searchsorted(lines["row"].to_numpy(), words["row"].to_numpy())
    value, neg = words["value"].to_numpy(), words["neg"].to_numpy()
    # Two's complement, as Xen's unsigned fields hold a negative errno.
    value = np.where(neg, ~value + np.uint64(1), value)
    key = words["id"].to_numpy()
    memory = key == MEM
    fields = words.filter(pl.Series(memory, dtype=pl.Boolean))["key"].str.slice(4)
    names = fields.unique(maintain_order=True)
    return Records(
        lines["at"].to_numpy().astype(np.intp),
        lines["kind"].replace_strict(numbers, return_dtype=pl.UInt8).to_numpy(),
        at[~memory],
        key[~memory],
        value[~memory],
        at[memory],
        fields.replace_strict(names, np.arange(len(names)), return_dtype=pl.Int64).to_numpy().astype(np.intp),
        value[memory],
        names.to_list(),
    )
