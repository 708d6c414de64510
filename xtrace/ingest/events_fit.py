"""Fits the rows of an events table, of whatever integer, text or list types, to ``schema.EVENTS``, and accounts for each.

A value that does not fit its column (a number too large, a kind that is none) costs its row, which is counted and named;
half a row is worse than none. A column that is missing, or empty in a row, was *not recorded*: null.

``seq`` and ``segment`` are trusted where the table has them, because not all of what they were made from is in the table
(a TSC that stepped back in a record which is no event, several boots, pCPUs merged by TSC). So rows must stand in the order
of ``seq``, each above the one before: a table sorted otherwise is refused, as sorting it would need all of it in memory.
Gaps are fine (rows were filtered). A table whose first row has no ``seq`` is numbered in its own order; one whose first row
has no ``segment`` gets segments from the TSC of each pCPU (without one, of each vCPU).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest.base import Ledger
from xtrace.ingest.clock import Clock, nanoseconds

if TYPE_CHECKING:
    from xtrace.ingest.base import Observed, ReadOptions

__all__ = ("OFFSET", "ROW", "Fit")

#: Extra columns of the frames that are fitted: number of the row or line from 1, byte of the line (text only).
ROW: Final = "_row"
OFFSET: Final = "_offset"

_ENTRIES: Final = ("hypercall", "vmmcall", "subcall")
# Memory as the writer of CSV writes it; anything else goes through a JSON parser.
_PAIR: Final = r'"[A-Za-z0-9_.]+": [0-9]{1,20}'
_OBJECT: Final = rf"^\{{{_PAIR}(?:, {_PAIR})*\}}$"
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}")


class Fit:
    """Takes frames in order, gives events; counts into a ledger.

    Args:
        path: name of the input, for errors.
        options: TSC frequency.
        ledger: its counts of rows by kind are made here; all others are, unless they are carried.
        carried: the ledger and what was observed came with the table; ``observed`` is not touched then.
        unit: what a row is called: ``row`` or ``line``.
    """

    def __init__(self, path: str, options: ReadOptions, ledger: Ledger, observed: Observed, *, carried: bool, unit: str) -> None:
        self._path, self._options, self._ledger, self._observed = path, options, ledger, observed
        self._carried, self._unit = carried, unit
        observed.unsourced |= not carried
        self._clock = Clock()
        self._number: bool | None = None  # seq is counted here; None: no row was seen yet
        self._cut: bool | None = None  # segments are made here
        self._last = -1  # seq of the last row
        self._pcpus: set[int] = set()

    def events(self, rows: pl.DataFrame, refuse: list[tuple[int, int | None, str]] | None = None) -> pl.DataFrame:
        """Fit some rows.

        Args:
            rows: any of the columns of ``schema.EVENTS``, :data:`ROW` and perhaps :data:`OFFSET`.
            refuse: further rows that could not be read: (row or line, byte, why).

        Returns:
            A frame of ``schema.EVENTS``.

        Raises:
            InputError: the rows are not in the order of ``seq``.
        """
        rows = rows.with_columns(pl.lit(None, pl.UInt64).alias(n) for n in (OFFSET,) if n not in rows.columns)
        told = [name for name in schema.EVENTS if name in rows.columns and rows.schema[name] != pl.Null]
        fitted = rows.select(
            ROW,
            OFFSET,
            *(
                (_cast(rows[name], name) if name in told else pl.lit(None)).cast(dtype).alias(name)
                for name, dtype in schema.EVENTS.items()
            ),
        )
        if self._number is None and len(rows):
            self._number = fitted["seq"][0] is None
            self._cut = fitted["segment"][0] is None
        bad = pl.Series(fitted["kind"].is_null())
        for name in told:
            bad |= fitted[name].is_null() & rows[name].is_not_null()
        bad |= fitted["seq"].is_null() & (not self._number)
        bad |= fitted["segment"].is_null() & (not self._cut)
        self._refuse(rows.filter(bad), fitted.filter(bad), told, refuse or [])
        return self._ordered(fitted.filter(~bad))

    def _refuse(self, was: pl.DataFrame, now: pl.DataFrame, told: list[str], more: list[tuple[int, int | None, str]]) -> None:
        self._ledger.skipped_lines += len(was) + len(more)
        notes = list(more)
        for old, new in zip(was.head(Ledger.KEEP).iter_rows(named=True), now.iter_rows(named=True), strict=False):
            wrong = next((n for n in told if new[n] is None and old[n] is not None), None)
            if wrong is None:
                needed = ("kind", *(() if self._number else ("seq",)), *(() if self._cut else ("segment",)))
                empty = next(n for n in needed if new[n] is None)
                why = f"column {empty} is empty"
            else:
                why = f"column {wrong} holds {_shown(old[wrong])}, which is no {_wanted(wrong)}"
            notes.append((old[ROW], old[OFFSET], why))
        for row, offset, why in sorted(notes, key=lambda note: note[0])[: Ledger.KEEP]:
            text = why if self._unit == "line" else f"row {row}: {why}"
            self._ledger.problem(text, offset=offset, line=row if self._unit == "line" else None)
        self._ledger.problems_dropped += max(0, len(was) + len(more) - Ledger.KEEP)

    def _ordered(self, frame: pl.DataFrame) -> pl.DataFrame:
        n = len(frame)
        if self._number:
            start = self._last + 1
            frame = frame.with_columns(seq=np.arange(start, start + n, dtype=np.uint64))
        elif n:
            seq = frame["seq"].to_numpy()
            wrong = np.flatnonzero(seq[1:] <= seq[:-1]) + 1
            at = 0 if int(seq[0]) <= self._last else int(wrong[0]) if len(wrong) else None
            if at is not None:
                before = self._last if at == 0 else int(seq[at - 1])
                raise InputError(
                    self._path,
                    f"{self._unit} {frame[ROW][at]} has seq {seq[at]} after {before}; the rows of an events table must stand "
                    "in the order of seq, each once (sort the table by seq)",
                    exit_bits=16,
                )
        if n:
            self._last = int(frame["seq"][-1])
        if self._cut and n:
            domid, vcpu = (pl.col(c).cast(pl.UInt64).fill_null((1 << 32) - 1) for c in ("domid", "vcpu"))
            group = frame.select(
                pl.when(pl.col("pcpu").is_not_null())
                .then(pl.col("pcpu").cast(pl.UInt64))
                .otherwise(pl.lit(1 << 63, pl.UInt64) + domid % (1 << 17) * (1 << 33) + vcpu)
            ).to_series()
            tsc, segment = self._clock.advance(group, frame["tsc"])
            frame = frame.with_columns(tsc=tsc, segment=segment)
        if self._options.tsc_khz and n:
            khz = np.full(n, self._options.tsc_khz, dtype=np.uint64)
            known = frame["tsc"].is_not_null().to_numpy()
            times = nanoseconds(frame["tsc"].fill_null(0).to_numpy(), khz, known)
            frame = frame.with_columns(time_ns=pl.coalesce("time_ns", times))
        self._count(frame)
        return frame.with_columns(pl.col("cut").fill_null(0)).select(schema.EVENTS.names())

    def _count(self, frame: pl.DataFrame) -> None:
        ledger, seen = self._ledger, self._observed
        kinds = dict(frame["kind"].cast(pl.String).value_counts().iter_rows())
        ledger.hypercalls += kinds.get("hypercall", 0)
        ledger.vmmcalls += kinds.get("vmmcall", 0)
        ledger.subcalls += kinds.get("subcall", 0)
        ledger.samples += kinds.get("sample", 0)
        if self._carried:
            return
        ledger.records += len(frame)
        nameless = pl.col("kind").is_in((*_ENTRIES, "sample")) & pl.col("op").is_null()
        ledger.nameless += int(frame.select(nameless.sum()).item())
        ledger.lost_events += kinds.get("lost", 0)
        lost = frame.filter(pl.col("kind") == "lost")["result"].cast(pl.Int128)
        ledger.lost_records += int(lost.clip(lower_bound=0).sum() or 0)
        entry = pl.col("kind").is_in(_ENTRIES) & pl.col("domid").is_null() & pl.col("vcpu").is_null()
        ledger.unattributed += int(frame.select(entry.sum()).item())
        if len(self._pcpus) < 1 << 16:
            self._pcpus.update(frame["pcpu"].unique().drop_nulls().to_list())
        seen.pcpus = len(self._pcpus)
        known = frame["tsc"].drop_nulls()
        if len(known):
            low, high = int(known.min()), int(known.max())  # type: ignore[arg-type]
            seen.first_tsc = low if seen.first_tsc is None else min(low, seen.first_tsc)
            seen.last_tsc = high if seen.last_tsc is None else max(high, seen.last_tsc)


def _cast(values: pl.Series, name: str) -> pl.Series:
    """Turn a column into its type in ``schema.EVENTS``; what does not fit becomes null."""
    dtype = schema.EVENTS[name]
    if values.dtype == pl.String:
        if name == "memory":
            return _memory(values)
        if dtype == pl.Boolean:
            return values.replace_strict(
                {"true": True, "false": False, "True": True, "False": False}, default=None, return_dtype=pl.Boolean
            )
        if dtype.is_integer():
            # Polars also takes "+1".
            values = pl.select(pl.when(values.str.contains(r"^-?[0-9]+$")).then(values)).to_series()
    if name == "memory":
        # A field out of range must not become one that was not recorded, nor half a field one at all.
        wide = values.cast(pl.List(pl.Struct({"field": pl.String, "value": pl.Int128})), strict=False)
        field, value = (pl.element().struct.field(name) for name in ("field", "value"))
        fits = wide.list.eval(field.is_not_null() & value.is_between(0, (1 << 64) - 1).fill_null(value=False)).list.all()
        values = pl.select(pl.when(fits).then(wide)).to_series()
    return values.cast(dtype, strict=False)


def _memory(values: pl.Series) -> pl.Series:
    """Read guest memory as a JSON object of numbers."""
    plain = values.str.contains(_OBJECT).fill_null(value=False)
    items = (
        values.to_frame("text")
        .with_row_index("at")
        .filter(plain)
        .with_columns(item=pl.col("text").str.slice(1, pl.col("text").str.len_bytes() - 2).str.split(", "))
        .explode("item")
        .select("at", parts=pl.col("item").str.splitn(": ", 2).struct.rename_fields(["field", "value"]))
        .unnest("parts")
        .with_columns(field=pl.col("field").str.strip_chars('"'), value=pl.col("value").cast(pl.UInt64, strict=False))
        .group_by("at", maintain_order=True)
        .agg(
            memory=pl.struct("field", "value"),
            fits=pl.col("value").is_not_null().all() & (pl.col("field").n_unique() == pl.len()),
        )
        .filter("fits")
        .select("at", "memory")
    )
    other = values.to_frame("text").with_row_index("at").filter(~plain & pl.col("text").is_not_null())
    read = [(at, _parsed(text)) for at, text in other.iter_rows()]
    types: dict[str, pl.DataType | type[pl.DataType]] = {"at": pl.UInt32, "memory": schema.MEMORY}
    more = pl.DataFrame([row for row in read if row[1] is not None], schema=types, orient="row")
    every = pl.DataFrame({"at": pl.Series(np.arange(len(values)), dtype=pl.UInt32)})
    found = pl.concat([items.cast(types), more])  # type: ignore[arg-type]
    return every.join(found, on="at", how="left", maintain_order="left")["memory"]


def _parsed(text: str) -> list[dict[str, object]] | None:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs, parse_int=_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or text.lstrip()[:1] != "{":
        return None
    if any(type(value) is not int or not 0 <= value < 1 << 64 for _, value in pairs) or len(dict(pairs)) != len(pairs):
        return None
    return [{"field": field, "value": value} for field, value in pairs]


def _number(text: str) -> int:
    """Read an integer of a JSON text; Python refuses thousands of digits with another error."""
    if not _INTEGER.fullmatch(text):
        raise ValueError(text[:40])
    return int(text)


def _wanted(name: str) -> str:
    dtype = schema.EVENTS[name]
    if isinstance(dtype, pl.Enum):
        return f"{name} ({', '.join(dtype.categories)})" if name == "caller" else "kind of event"
    if dtype == pl.Boolean:
        return "true or false"
    if name == "memory":
        return "list of fields and values"
    return f"{dtype}"


def _shown(value: object) -> str:
    text = str(value)
    return f"`{text if len(text) <= 40 else text[:39] + '…'}`"
