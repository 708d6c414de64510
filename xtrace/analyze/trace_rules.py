"""What is wrong with a trace itself, as findings XT030 and up.

Losses, damage, a release that its records contradict, states that no release leaves.

What a finding proves and what it does not:

* XT030, XT031, XT037 are the reader's own ledger: that something is missing, not what it was.
* XT032: a record that the named release does not write, or something that it cannot have done (``replay.identify``). It proves
  that the name is wrong or that the host was patched, not which release it was.
* XT033: two states of one call, the later one with less done. Only where progress is an index of its own (bits of the command, a
  field of the structure), the pointer is the same, and nothing recorded lies between that may have ended the call. Counts are not
  looked at: two tasks that are preempted in turn leave them in any order.
* XT034: a continuation that none of the possible sources leaves for the call that it belongs to. Left out where XT032 tells why.

Only continuations are decoded, so a trace with few of them costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import polars as pl

from xtrace import release
from xtrace.analyze import judging
from xtrace.analyze.exposure import EXIT_INCOMPLETE, EXIT_REVIEW
from xtrace.replay import facts, links
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.identify import Identifier
from xtrace.replay.links import CODE
from xtrace.replay.states import States
from xtrace.replay.unexplained import unexplained
from xtrace.schema import ARGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xtrace.replay.identify import Evidence, Identification
    from xtrace.replay.stitch import Stitched

__all__ = ("Checks", "TraceFinding", "of_ledger")

#: Columns of a row that later ones are compared with.
_KEPT: Final = (
    "seq", "offset", "line", "domid", "vcpu", "pcpu", "segment", "epoch", "caller", "kind", "op", *ARGS, "cut", "memory", "input",
    "marked",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceFinding:
    """One thing that is wrong with an input.

    Attributes:
        code: XT030…
        input: index into the inputs.
        text: one clause.
        bits: exit bits that it stands for.
        count: how many records show it; None where that has no meaning.
        seq, offset, line: the first of them, as far as the format has them.
    """

    code: str
    input: int
    text: str
    bits: int
    count: int | None = None
    seq: int | None = None
    offset: int | None = None
    line: int | None = None


class _Ledger(Protocol):
    """The part of ``ingest.base.Ledger`` that is looked at."""

    lost_records: int
    lost_events: int
    skipped_bytes: int
    skipped_lines: int
    nameless: int
    truncated: bool


def of_ledger(index: int, ledger: _Ledger, *, entries: int, places: Sequence[tuple[int | None, int | None]]) -> list[TraceFinding]:
    """Return what the reader's account of input ``index`` shows: XT030, XT031, XT037.

    Args:
        index: of the input.
        ledger: its ledger, complete.
        entries: hypercalls of any kind in it.
        places: (offset, line) of the first loss, if known, and of the first problem, if there is one.
    """
    out = []
    lost, damage = (*places, (None, None), (None, None))[:2]
    if ledger.lost_records or ledger.lost_events:
        n = ledger.lost_events
        where = f" in {n:,} place{'' if n == 1 else 's'}" if n else ""
        text = f"the recorder lost {ledger.lost_records:,} record{'' if ledger.lost_records == 1 else 's'}{where}"
        out.append(TraceFinding("XT030", index, text, EXIT_INCOMPLETE, n or None, None, *lost))
    parts = []
    if ledger.skipped_bytes:
        parts.append(f"{ledger.skipped_bytes:,} bytes could not be read")
    if ledger.skipped_lines:
        parts.append(f"{ledger.skipped_lines:,} line{'' if ledger.skipped_lines == 1 else 's'} could not be understood")
    if ledger.nameless:
        parts.append(f"{ledger.nameless:,} hypercalls' numbers are not in it")
    if ledger.truncated:
        parts.append("it ends inside a record")
    if parts:
        out.append(TraceFinding("XT031", index, "; ".join(parts), EXIT_INCOMPLETE, None, None, *damage))
    if not entries:
        out.append(TraceFinding("XT037", index, "there is no hypercall in it", EXIT_INCOMPLETE))
    return out


@dataclass(slots=True)
class _First:
    """The first row that shows something, and how many do."""

    seq: int
    offset: int | None
    line: int | None
    input: int
    text: str
    count: int = 0


@dataclass(slots=True)
class Checks:
    """Looks at one recording while it is analysed.

    Args:
        sources: releases that may have written it.
        origin: what named the release (``--from``, …); None: nothing did, and there is nothing to contradict.
        callers: caller by domain as the user or a sidecar says, None for all domains.
    """

    sources: Sequence[str]
    origin: str | None
    callers: Mapping[int | None, str] = field(default_factory=dict)
    _seen: Identifier | None = None
    _diverged: _First | None = None
    _backwards: _First | None = None
    _tail: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        if self.origin is not None:
            self._seen = Identifier(self.callers, frozenset(map(release.base, self.sources)))

    def feed(self, events: pl.DataFrame, stitched: Stitched) -> None:
        """Take one batch: events as read, and what stitching made of them."""
        if self._seen is not None:
            self._seen.feed(events)
        if len(stitched.continuations):
            self._explain(stitched.continuations)
        self._order(stitched.entries)

    def findings(self, index: int, identified: Identification | None) -> list[TraceFinding]:
        """Return XT032, XT033 and XT034 of a recording whose first input has the number ``index``.

        Args:
            index: of the first input.
            identified: what :attr:`identifier` concluded; None where nothing was asked.
        """
        out = []
        against = self._against(identified)
        if against is not None and identified is not None:
            named = release.fold_text(self.sources)
            text = f"{named}, named by {self.origin}, cannot have written {against.what}: {against.why}"
            out.append(TraceFinding("XT032", index, text, EXIT_REVIEW, None, against.seq, against.offset, against.line))
        for code, first in (("XT033", self._backwards), ("XT034", self._diverged if against is None else None)):
            if first is not None:
                place = (first.seq, first.offset, first.line)
                out.append(TraceFinding(code, index + first.input, first.text, EXIT_REVIEW, first.count, *place))
        return out

    @property
    def identifier(self) -> Identifier | None:
        """What gathered the evidence on the release; None where nothing named one."""
        return self._seen

    def _against(self, identified: Identification | None) -> Evidence | None:
        """Return the evidence against the named release, if none of its point releases is left."""
        if identified is None:
            return None
        bases = dict.fromkeys(map(release.base, self.sources))
        if not bases or any(v in identified.left for v in bases):
            return None
        return identified.against(next(reversed(bases)))

    # --- XT034 --------------------------------------------------------------------------------------------------------------

    def _explain(self, rows: pl.DataFrame) -> None:
        """Look for continuations that no possible source leaves."""
        for (op, caller), part in rows.group_by("op", "caller", maintain_order=True):
            if op is None or caller is None:
                continue
            number, states, issued = int(str(op)), States.from_frame(part), States.from_frame(part, prefix="issued_")
            shown = np.ones(len(part), bool)
            none, text = shown, ""
            for group in judging.classes(number, str(caller), self.sources):
                xen = Hypervisor(group[0], str(caller))
                reasons = unexplained(xen, number, xen.decode(number, states, issued), states, issued, shown)
                mask = np.zeros(len(part), bool)
                for reason in reasons:
                    mask |= reason.rows
                none = none & mask
                if not none.any():
                    break
                first = int(np.flatnonzero(none)[0])
                why = next(r for r in reasons if r.rows[first])
                text = f"{release.fold_text(self.sources)} cannot have left {why.what}: the model expects {why.expected}"
            else:
                self._diverged = _note(self._diverged, part, none, text)

    # --- XT033 --------------------------------------------------------------------------------------------------------------

    def _order(self, entries: pl.DataFrame) -> None:
        """Look for states of one call that show less done than an earlier one."""
        marked = np.flatnonzero(entries.get_column("marked").to_numpy())
        if not len(marked) and self._tail is None:
            return
        some = entries[marked].select("op", "caller").unique().drop_nulls()
        indexed = {int(n) for n, caller in some.iter_rows() if _keeps_index(self.sources[-1], str(caller), int(n))}
        if self._tail is not None:
            indexed |= set(self._tail.get_column("op").to_list())
        if not indexed:
            return
        kind = entries.get_column("kind").to_physical().to_numpy()
        elsewhere = ~entries.get_column("on_insn").fill_null(value=True).to_numpy()
        state = ((kind == CODE["hypercall"]) | (kind == CODE["vmmcall"]) | (kind == CODE["sample"])) & ~elsewhere
        state &= np.isin(entries.get_column("op").fill_null(0).to_numpy(), list(indexed))
        new = entries.filter(pl.Series(state | (kind == CODE["return"]))).select(_KEPT)
        table = new.with_columns(begun=pl.lit(value=False))
        if self._tail is not None:
            table = pl.concat([self._tail, table])
        old = 0 if self._tail is None else len(self._tail)
        table = table.with_columns(pl.Series("key", links.keys(table)), pl.Series("fresh", np.arange(len(table)) >= old))
        ret = pl.col("kind") == "return"
        table = table.with_columns(ret.cum_sum().over("key").alias("ended"), ret.sum().over("key").alias("ends"))
        table = _with_progress(table.filter(~ret), self.sources[-1])
        one = ("key", "op", "ended", "epoch", "segment")
        table = table.with_columns((pl.col("begun") | (pl.col("kind") != "sample")).cum_max().over(one).alias("begun"))
        before = {c: pl.col(c).shift(1).over(one) for c in ("progress", "number", "arg1", "begun")}
        less = (
            pl.col("fresh") & pl.col("marked") & before["begun"] & (pl.col("progress") < before["progress"])
            & (pl.col("number") == before["number"]) & (pl.col("arg1") == before["arg1"])
        )  # fmt: skip
        hit = table.with_columns(before["progress"].alias("before")).filter(less.fill_null(value=False)).sort("seq")
        if len(hit):
            row = hit.row(0, named=True)
            name = facts.operation_label(row["op"], row["number"]) or facts.hypercall_names().get(row["op"], str(row["op"]))
            text = f"{_who(row)}: {name} with {row['progress']:,} done, after a state of the same call with {row['before']:,}"
            self._backwards = _note(self._backwards, hit, np.ones(len(hit), bool), text)
        last = table.filter(pl.col("ended") == pl.col("ends")).group_by("key", "op", maintain_order=True).last()
        last = last.filter(pl.col("progress") > 0).select(*_KEPT, "begun")
        self._tail = last if len(last) else None


def _note(found: _First | None, rows: pl.DataFrame, mask: np.ndarray[tuple[int], np.dtype[np.bool_]], text: str) -> _First | None:
    """Count the rows of ``mask``, and keep the earliest."""
    if not mask.any():
        return found
    row = rows.row(int(np.flatnonzero(mask)[0]), named=True)
    count = int(mask.sum()) + (found.count if found is not None else 0)
    if found is None or row["seq"] < found.seq:
        found = _First(row["seq"], row["offset"], row["line"], row["input"] or 0, text)
    found.count = count
    return found


def _who(row: Mapping[str, object]) -> str:
    if row["domid"] is None:
        return f"pCPU {row['pcpu']}"
    return f"domain {row['domid']}" + ("" if row["vcpu"] is None else f" vCPU {row['vcpu']}")


def _with_progress(table: pl.DataFrame, source: str) -> pl.DataFrame:
    """Add ``progress`` and ``number`` to states: 0 of what is a first entry, null of what cannot be read."""
    arg0 = table.get_column("arg0")
    progress = np.zeros(len(table), np.int64)
    known = arg0.is_not_null().to_numpy().copy()
    number = np.full(len(table), -1, np.int64)
    marked = np.flatnonzero(table.get_column("marked").to_numpy())
    known[marked] = False
    group = table.select("op", "caller")[marked].with_row_index("at")
    for (op, caller), part in group.group_by("op", "caller", maintain_order=True):
        rows = marked[part.get_column("at").to_numpy()]
        states = States.from_frame(table[rows].select(*ARGS, "cut", "memory"))
        read = Hypervisor(source, str(caller)).decode(int(str(op)), states)
        keeps = np.array([*(b.keeps_index for b in read.behaviours), False])[read.which]
        sure = keeps & read.index.known & (read.index.value < np.uint64(1 << 62))
        progress[rows[sure]], number[rows] = read.index.value[sure].astype(np.int64), read.number
        known[rows[sure]] = True
    return table.with_columns(
        pl.Series("progress", progress).set(pl.Series(~known), None), pl.Series("number", number, dtype=pl.Int64)
    )


@cache
def _keeps_index(source: str, caller: str, number: int) -> bool:
    """Say whether some operation of a hypercall keeps an index of its own at ``source``."""
    return any(b.keeps_index for b in facts.lookup(source, caller, number).by_number.values())
