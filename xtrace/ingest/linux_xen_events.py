"""Linux's own account of its multicalls: tracepoints xen_mc_entry, xen_mc_extend_args and xen_mc_flush.

A PV kernel queues calls for each CPU and issues them together (arch/x86/xen/multicalls.c)::

    xen_mc_entry_alloc: alloc entry 24 arg bytes                                    place for one, and for its list
    xen_mc_entry: op 26(mmuext_op) args [ffff88803e71ead0, 1, 0, 7ff0, 0, 0]        queued, with its arguments
    xen_mc_extend_args: extending op 26(mmuext_op) by 24 bytes res OK               one more in the list of the last one queued
    xen_mc_flush: flushing 2 hypercalls, 72 arg bytes, 0 callbacks                  now issued

* The flush is the hypercall. Of one entry it is that hypercall itself (``xen_single_call``, in every kernel that has these
  tracepoints), of more it is ``multicall`` with that count; its list lies in the CPU's buffer at an address that is not printed.
* What was queued on a CPU since its last flush is what the flush issues, in that order. The CPU cannot change in between
  (preemption is off), an interrupt's own calls join the same queue.
* arg1 of mmu_update and mmuext_op is 1 when queued and grows with each ``extend`` that says OK. The flush prints the bytes of all
  lists, ``xen_mc_entry_alloc`` (before its entry) those of one as queued: where they do not add up, extensions are missing (their
  event was off). The bytes then tell the count of an entry that is alone in its batch; else it is not known: null.
* trace-cmd and perf (libtraceevent 1.7) do not know the kernel's enumeration and print ``res NO_SPACE`` for OK and ``???`` for the
  rest (samples/linux: the same recording with ``-R``). So a NO_SPACE counts as made where the bytes of the flush say so.
* Arguments that an entry does not have are printed as 0 and left null here (layouts/linux.toml says how many it has).
* libtraceevent without its Xen plug-in prints the bare fields (``op=26 nargs=4 args=ARRAY[d0, ea, …]``), bytes of 6 words.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace.ingest.lines import by_value
from xtrace.schema import ARGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ("EVENTS", "KINDS", "Batches", "decode")

EVENTS: Final = ("xen_mc_entry", "xen_mc_flush", "xen_mc_extend_args", "xen_mc_entry_alloc")

#: What a row of a batch is; ``lost``: records of this CPU are missing here.
KINDS: Final = {"entry": 0, "flush": 1, "extend": 2, "alloc": 3, "lost": 4}

_HEX6: Final = r"[0-9a-f]{1,16}(?:, [0-9a-f]{1,16}){5}"
_OP: Final = r"op ([0-9]{1,10})(?:\([a-z0-9_]*\))?"
_RAW: Final = r"^(?:\[FAILED TO PARSE\] *)?"
_ENTRY: Final = rf"^{_OP} args \[({_HEX6})\]\s*$"
_RAW_ENTRY: Final = rf"{_RAW}op=([0-9]{{1,10}}) nargs=([0-6]) args=ARRAY\[([0-9a-f]{{2}}(?:, [0-9a-f]{{2}})*)\]\s*$"
_FLUSH: Final = r"^flushing ([0-9]{1,10}) hypercalls, ([0-9]{1,9}) arg bytes, [0-9]+ callbacks\s*$"
_RAW_FLUSH: Final = rf"{_RAW}mcidx=([0-9]{{1,10}}) argidx=([0-9]{{1,9}}) cbidx=[0-9]+\s*$"
_EXTEND: Final = rf"^extending {_OP} by ([0-9]{{1,9}}) bytes res (OK|BAD_OP|NO_SPACE|\?\?\?)\s*$"
_RAW_EXTEND: Final = rf"{_RAW}op=([0-9]{{1,10}}) args=([0-9]{{1,9}}) res=([0-9]+)\s*$"
_ALLOC: Final = r"^alloc entry ([0-9]{1,9}) arg bytes\s*$"
_RAW_ALLOC: Final = rf"{_RAW}args=([0-9]{{1,9}})\s*$"
_XE_OK: Final = "0"  # enum xen_mc_extend_args
_WORDS: Final = 6

#: Linux's queue has 32 places (MC_BATCH); a patched kernel may have more.
_MOST: Final = 256
#: An entry that was queued so many lines before a flush is not of it: records are missing. Bounds what is carried.
_STALE: Final = 1 << 18

#: Columns of a batch's rows.
_COLUMNS: Final = {
    "line": pl.UInt64,
    "offset": pl.UInt64,
    "kind": pl.UInt8,
    "key": pl.UInt64,
    "vcpu": pl.UInt32,
    "tsc": pl.UInt64,
    "time_ns": pl.Int64,
    "op": pl.UInt32,
    "n": pl.UInt32,
    "size": pl.Int64,
    "nargs": pl.UInt8,
    "extra": pl.UInt32,
    "more": pl.Int64,
    "extra2": pl.UInt32,
    "more2": pl.Int64,
    "narrow": pl.Boolean,
    **dict.fromkeys(ARGS, pl.UInt64),
}


def decode(parsed: pl.DataFrame) -> pl.DataFrame:
    """Read the fields of the events in `EVENTS`.

    Args:
        parsed: lines with ``event`` and ``fields``.

    Returns:
        The rows with ``kind`` (UInt8, of `KINDS`; null: not understood), ``op``, ``n`` (UInt32: entries flushed; 1 for an
        extension that was made, 2 for one that may have been, else 0), ``size`` (Int64, bytes of lists), ``nargs`` (UInt8, where
        printed), ``arg0`` … ``arg5`` and ``caller`` (String: what the printed words prove).
    """
    out = []
    for event, read in zip(EVENTS, (_entries, _flushes, _extensions, _places), strict=True):
        part = parsed.filter(pl.col("event") == event)
        if len(part):
            # An entry's words differ from call to call; the other events say few different things.
            said = _ordered(part["fields"], read) if read is _entries else by_value(part["fields"], partial(_ordered, read=read))
            out.append(part.with_columns(said.get_columns()))
    if not out:
        return _blank(parsed.clear())
    return pl.concat(out, how="diagonal").pipe(_blank)


def _ordered(fields: pl.Series, read: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    return read(fields.to_frame().with_row_index("_row")).sort("_row").drop("_row", "fields")


def _blank(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the columns that are missing."""
    types = {name: _COLUMNS[name] for name in ("kind", "op", "n", "size", "nargs", *ARGS)} | {"caller": pl.String}
    return rows.with_columns((pl.col(n) if n in rows.columns else pl.lit(None)).cast(t).alias(n) for n, t in types.items())


def _kind(name: str, *parts: pl.Expr) -> pl.Expr:
    return pl.when(pl.all_horizontal(p.is_not_null() for p in parts)).then(pl.lit(KINDS[name], pl.UInt8)).alias("kind")


def _entries(rows: pl.DataFrame) -> pl.DataFrame:
    out = rows.with_columns(
        pl.col("fields").str.extract_groups(_ENTRY).struct.rename_fields(["op", "words"]).struct.unnest()
    ).with_columns(pl.col("words").str.split_exact(", ", _WORDS - 1).struct.rename_fields(list(ARGS)).struct.unnest())
    out = out.with_columns(
        pl.col("op").cast(pl.UInt32, strict=False),
        *(pl.col(a).str.to_integer(base=16, dtype=pl.UInt64, strict=False) for a in ARGS),
        nargs=pl.lit(None, pl.UInt8),
        caller=pl.lit(None, pl.String),
    ).drop("words")
    odd = out["op"].is_null()
    if odd.any():
        out = pl.concat([out.filter(~odd), _raw_entries(rows.filter(odd))], how="diagonal")
    wide = pl.any_horizontal(pl.col(a) >= 1 << 32 for a in ARGS)
    # A 64-bit kernel's own pointers lie in the upper half; a 32-bit kernel has no words above 32 bits.
    low = pl.col("op").is_in([1, 26]) & pl.col("arg0").is_between(1, (1 << 32) - 1)
    proof = pl.coalesce("caller", pl.when(wide).then(pl.lit("pv64")).when(low).then(pl.lit("pv32")))
    return out.with_columns(_kind("entry", pl.col("op"), *(pl.col(a) for a in ARGS)), caller=proof)


def _raw_entries(rows: pl.DataFrame) -> pl.DataFrame:
    """Read entries whose six words are printed byte by byte: 48 bytes of a 64-bit kernel, 24 of a 32-bit one."""
    out = rows.with_columns(
        pl.col("fields").str.extract_groups(_RAW_ENTRY).struct.rename_fields(["op", "nargs", "bytes"]).struct.unnest()
    )
    size = (out["bytes"].str.len_bytes() + 2) // 4
    done = []
    for word, caller in ((8, "pv64"), (4, "pv32")):
        part = out.filter((size == word * _WORDS).fill_null(value=False))
        raw = part["bytes"].str.split(", ").explode().str.to_integer(base=16, dtype=pl.UInt8, strict=False)
        words = raw.fill_null(0).to_numpy().reshape(-1, word * _WORDS).copy().view(f"<u{word}").astype(np.uint64)
        done.append(part.with_columns(*(pl.Series(a, words[:, i]) for i, a in enumerate(ARGS)), caller=pl.lit(caller)))
    done.append(out.filter(~size.is_in([8 * _WORDS, 4 * _WORDS]).fill_null(value=False)).with_columns(op=pl.lit(None, pl.String)))
    return (
        pl.concat(done, how="diagonal")
        .drop("bytes")
        .with_columns(pl.col("op").cast(pl.UInt32, strict=False), pl.col("nargs").cast(pl.UInt8, strict=False))
    )


def _split(rows: pl.DataFrame, pattern: str, raw: str, *names: str) -> pl.DataFrame:
    """Take the groups of ``pattern`` from the fields, or of ``raw`` where that does not match, as text columns."""

    def take(part: pl.DataFrame, which: str) -> pl.DataFrame:
        return part.with_columns(pl.col("fields").str.extract_groups(which).struct.rename_fields(names).struct.unnest())

    out = take(rows, pattern)
    odd = out[names[0]].is_null()
    return pl.concat([out.filter(~odd), take(rows.filter(odd), raw)]) if odd.any() else out


def _flushes(rows: pl.DataFrame) -> pl.DataFrame:
    out = _split(rows, _FLUSH, _RAW_FLUSH, "n", "size")
    return out.with_columns(pl.col("n").cast(pl.UInt32, strict=False), pl.col("size").cast(pl.Int64)).with_columns(
        _kind("flush", pl.col("n"))
    )


def _extensions(rows: pl.DataFrame) -> pl.DataFrame:
    out = _split(rows, _EXTEND, _RAW_EXTEND, "op", "size", "_res")
    return out.with_columns(
        pl.col("op").cast(pl.UInt32, strict=False),
        pl.col("size").cast(pl.Int64),
        n=pl.when(pl.col("_res").is_in(["OK", _XE_OK]))
        .then(1)
        .when(pl.col("_res") == "NO_SPACE")
        .then(2)
        .otherwise(0)
        .cast(pl.UInt32),
    ).select(pl.exclude("_res"), _kind("extend", pl.col("op")))


def _places(rows: pl.DataFrame) -> pl.DataFrame:
    out = _split(rows, _ALLOC, _RAW_ALLOC, "size")
    return out.with_columns(pl.col("size").cast(pl.Int64)).with_columns(_kind("alloc", pl.col("size")))


class Batches:
    """Brings each flush together with what was queued before it, from block to block."""

    def __init__(self, lists: dict[int, tuple[int, int]]) -> None:
        """Start with empty queues.

        Args:
            lists: hypercalls whose arg1 grows with each extension -> bytes of one element, of a 64-bit and of a 32-bit kernel.
        """
        self._lists = lists
        self._queued = pl.DataFrame(schema=_COLUMNS)
        self._first: int | None = None  # line of the first entry
        self.unnamed = 0  # hypercalls issued before entries were traced
        self.unnamed_at: tuple[int, int] = (0, 0)  # line and offset of the first

    def feed(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Take the next rows in order of the file.

        Args:
            rows: ``line``, ``offset``, ``kind`` (of `KINDS`), ``key`` (whose queue), ``vcpu``, ``tsc``, ``time_ns``, ``op``, ``n``,
                ``size``, ``nargs``, ``narrow`` (a 32-bit kernel), ``arg0`` … ``arg5``.

        Returns:
            What was issued: ``line``, ``offset`` (of the entry, or of the flush of several), ``at`` (line of the flush), ``sub``
            (order in it), ``kind`` (hypercall, subcall, lost), ``vcpu``, ``tsc``, ``time_ns``, ``op``, ``nargs``, ``arg0`` …
            ``arg5``, ``result`` (lost: how many entries are missing).
        """
        new = rows.with_columns(pl.lit(0).alias(c) for c in ("extra", "more", "extra2", "more2"))
        new = new.select(pl.col(name).cast(dtype) for name, dtype in _COLUMNS.items())
        table = pl.concat([self._queued, new]).sort("key", "line", maintain_order=True)
        kind, key, line, n = (table[c].fill_null(0).to_numpy() for c in ("kind", "key", "line", "n"))
        entry, flush = kind == KINDS["entry"], kind == KINDS["flush"]
        if self._first is None and entry.any():
            self._first = int(line[entry].min())
        size = len(table)
        index = np.arange(size)
        ends = flush | (kind == KINDS["lost"])
        change = np.append(True, key[1:] != key[:-1])[:size]
        # A queue ends behind a flush or a loss, and where the next CPU's rows begin.
        queue = np.cumsum(np.append(0, ends[:-1])[:size] | change)
        table = self._placed(self._extended(table, kind, queue, entry), kind, key, entry)
        # The row that ends each row's queue; none for the last queue of a CPU.
        end = np.minimum.accumulate(np.where(ends, index, size)[::-1])[::-1]
        e = np.minimum(end, max(size - 1, 0))
        ended = (end < size) & (queue[e] == queue) if size else np.zeros(0, bool)
        # Entries of the same queue behind this one.
        total = np.cumsum(entry)
        last = np.searchsorted(queue, queue, side="right") - 1
        behind = total[last] - total
        fresh = int(line.max(initial=0)) - line.astype(np.int64) <= _STALE
        # A place may be made before the flush that makes room for it: the last one of a CPU waits for its entry.
        place = self._waiting(kind, key, entry)
        self._queued = table[np.flatnonzero(fresh & ((entry & ~ended & (behind < _MOST)) | place))]
        issued = entry & ended & flush[e] & (behind < np.minimum(n[e], _MOST)) & (line[e].astype(np.int64) - line <= _STALE)
        return self._rows(table, np.flatnonzero(issued), e, np.flatnonzero(flush & (n > 0)), line)

    @staticmethod
    def _waiting(kind: NDArray[np.uint8], key: NDArray[np.uint64], entry: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mark the last place of each CPU, if no entry took it."""
        rows = np.flatnonzero(entry | (kind == KINDS["alloc"]))
        out = np.zeros(len(kind), bool)
        if len(rows):
            final = rows[np.append(key[rows[1:]] != key[rows[:-1]], True)]
            out[final[~entry[final]]] = True
        return out

    @staticmethod
    def _placed(table: pl.DataFrame, kind: NDArray[np.uint8], key: NDArray[np.uint64], entry: NDArray[np.bool_]) -> pl.DataFrame:
        """Give each entry the bytes of the place that was made for it: the row before it, of its CPU, among entries and places."""
        rows = np.flatnonzero(entry | (kind == KINDS["alloc"]))
        taken = np.flatnonzero(entry[rows][1:] & ~entry[rows][:-1] & (key[rows[1:]] == key[rows[:-1]]))
        of = np.arange(len(table))
        of[rows[taken + 1]] = rows[taken]
        return table.with_columns(table["size"].gather(pl.Series(of)))

    def _extended(
        self, table: pl.DataFrame, kind: NDArray[np.uint8], queue: NDArray[np.int64], entry: NDArray[np.bool_]
    ) -> pl.DataFrame:
        """Count the extensions of each entry: those that follow it, before the next one of its queue, and name its hypercall."""
        op = table["op"].fill_null(0).to_numpy()
        size = table["size"].fill_null(0).to_numpy()
        many = table["n"].fill_null(0).to_numpy()
        before = np.maximum.accumulate(np.where(entry, np.arange(len(table)), -1))
        for sort, counts, sums in ((1, "extra", "more"), (2, "extra2", "more2")):
            made = np.flatnonzero((kind == KINDS["extend"]) & (many == sort))
            of = before[made]
            made, of = made[of >= 0], of[of >= 0]
            fits = (queue[of] == queue[made]) & (op[of] == op[made]) & np.isin(op[made], list(self._lists))
            extra, more = table[counts].to_numpy().copy(), table[sums].to_numpy().copy()
            np.add.at(extra, of[fits], 1)
            np.add.at(more, of[fits], size[made[fits]])
            table = table.with_columns(pl.Series(counts, extra), pl.Series(sums, more))
        return table

    def _rows(
        self,
        table: pl.DataFrame,
        issued: NDArray[np.intp],
        e: NDArray[np.intp],
        flushes: NDArray[np.intp],
        line: NDArray[np.uint64],
    ) -> pl.DataFrame:
        n = table["n"].fill_null(0).to_numpy()
        owner = e[issued]
        seen = np.bincount(owner, minlength=len(table)) if len(table) else np.zeros(0, np.int64)
        missing = n[flushes].astype(np.int64) - seen[flushes]
        first = np.iinfo(np.int64).max if self._first is None else self._first
        early = line[flushes].astype(np.int64) < first
        several = n[flushes] > 1
        nameless = flushes[(missing > 0) & ~several & early]
        if len(nameless):
            place = table[nameless].select("line", "offset").sort("line").row(0)
            self.unnamed_at = self.unnamed_at if self.unnamed else place
            self.unnamed += len(nameless)
        stamps = ("vcpu", "tsc", "time_ns")
        # An entry runs when its batch is issued.
        calls = table[issued].with_columns(
            *(table[c].gather(pl.Series(owner)) for c in stamps),
            pl.Series("at", line[owner]),
            pl.Series("alone", n[owner] == 1),
            pl.Series("complete", seen[owner] >= n[owner]),
            pl.Series("flushed", table["size"].gather(pl.Series(owner))),
            pl.Series("owner", owner),
            sub=pl.lit(2, pl.UInt8),
        )
        kinds = pl.when("alone").then(pl.lit("hypercall")).otherwise(pl.lit("subcall"))
        calls = self._counted(calls).with_columns(kind=kinds)
        gone = (missing > 0) & (several | ~early)
        multi = table[flushes[several]].select(
            "line", "offset", *stamps, at="line", sub=pl.lit(1, pl.UInt8), kind=pl.lit("hypercall"), op=pl.lit(13, pl.UInt32),
            arg1=pl.col("n").cast(pl.UInt64),
        )  # fmt: skip
        lost = table[flushes[gone]].select(
            "line", "offset", *stamps, pl.Series("result", missing[gone]), at="line", sub=pl.lit(0, pl.UInt8), kind=pl.lit("lost")
        )
        keep = ("line", "offset", "at", "sub", "kind", *stamps, "op", "nargs", *ARGS)
        return pl.concat([calls.select(keep), multi, lost], how="diagonal")

    def _counted(self, calls: pl.DataFrame) -> pl.DataFrame:
        """Work out arg1 of entries with a list, where the bytes that the flush printed agree."""
        wide, narrow = (
            pl.col("op").replace_strict({op: s[i] for op, s in self._lists.items()}, default=None, return_dtype=pl.Int64)
            for i in (0, 1)
        )
        each = pl.when(pl.col("narrow").fill_null(value=False)).then(narrow).otherwise(wide)
        printed = pl.min_horizontal(pl.col("arg1"), pl.lit(1 << 20, pl.UInt64)).cast(pl.Int64)
        own = pl.coalesce("size", (each * printed).fill_null(0))
        calls = calls.with_columns(_each=each, _left=pl.col("flushed") - (own + pl.col("more")).sum().over("owner"))
        # Each place begins at a multiple of eight.
        padding = pl.when(pl.col("narrow").fill_null(value=False)).then(8 * pl.len().over("owner")).otherwise(0).cast(pl.Int64)
        agrees = pl.col("complete") & pl.col("_left").is_between(0, padding)
        doubted = pl.col("complete") & (pl.col("_left") - pl.col("more2").sum().over("owner")).is_between(0, padding)
        grown = pl.col("arg1") + pl.col("extra").cast(pl.UInt64)
        tells = pl.col("alone") & pl.col("complete") & pl.col("size").is_not_null() & (pl.col("_left") > 0)
        tells &= pl.col("_left") % pl.col("_each") == 0
        missed = (pl.col("_left") // pl.col("_each")).cast(pl.UInt64, strict=False)
        return calls.with_columns(
            arg1=pl.when(pl.col("_each").is_null() | agrees)
            .then(grown)
            .when(doubted)
            .then(grown + pl.col("extra2").cast(pl.UInt64))
            .when(tells)
            .then(grown + missed)
        )
