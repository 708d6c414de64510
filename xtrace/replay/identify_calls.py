"""What calls and continuations say about the release: which releases could have done what a trace shows, batch by batch.

Three things count, each judged once for each class of releases with equal facts, over whole columns:

* a vCPU stopped on the instruction of a call in progress, or a flagged count: a continuation that a release must be able to leave;
* a call that ended without an error: an operation that a release must have, and accept;
* paging_domctl_cont behind a domctl: nobody but Xen issues it.

What no release explains is not a continuation of the call before it (a nested call, a register that a debug build spoilt), and is
left aside. A call that failed proves nothing: a guest may call what is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from xtrace import release
from xtrace.replay import facts, links
from xtrace.replay import identify_pairs as pairs
from xtrace.replay.factfiles import documents, in_table
from xtrace.replay.identify_records import Finding, Place
from xtrace.replay.links import CODE, PAGING_DOMCTL_CONT
from xtrace.replay.reading import MULTICALL
from xtrace.replay.states import States
from xtrace.schema import ARGS, CALLERS, EVENTS, empty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    Rows = npt.NDArray[np.intp]
    Judge = Callable[[str, str, int], tuple[pairs.Codes, pairs.Codes]]

__all__ = ("Calls",)

_KINDS: Final = ("hypercall", "vmmcall", "subcall", "sample", "return")

#: A vCPU may be stopped on the instruction before the call has run at all. Not this often, at the same hypercall.
#: The same where no record says that the call before has not ended yet.
_ENOUGH: Final = 3

#: __HYPERVISOR_xen_version, of which sub-operation 0 is XENVER_version.
_VERSION: Final = 17

#: __HYPERVISOR_domctl.
_DOMCTL: Final = 36

#: Who may have made a call whose caller nothing says, by the kind of record. Formats without trace records may be of Arm too.
_POSSIBLE: Final[dict[str, tuple[str, ...]]] = {
    "pv": ("pv64", "pv32"),
    "hvm": ("hvm64", "hvm32", "pvh64"),
    "x86": ("pv64", "pv32", "hvm64", "hvm32", "pvh64"),
    "all": CALLERS,
}
_GROUPS: Final = [(c,) for c in CALLERS] + list(_POSSIBLE.values())

_CARRIED: Final = pl.Schema({**EVENTS, "epoch": pl.UInt32()})


@dataclass(slots=True)
class _Against:
    """What counts against one release for one reason."""

    times: int
    seq: int
    offset: int | None
    line: int | None
    what: str


@dataclass(slots=True)
class Calls:
    """Takes the events of a trace in time order.

    Args:
        known: releases to judge, in order.
        callers: caller by domain; None is for all.
        suspects: if given, only what counts against one of these releases is of interest; what counts against others is then
            found in part.

    Attributes:
        numbers: hypercall number -> first PV entry record of it.
        hvm_subcall: the first sub-call record behind a multicall of an HVM guest on the same pCPU.
    """

    known: Sequence[str]
    callers: Mapping[int | None, str] = field(default_factory=dict)
    suspects: frozenset[str] = frozenset()
    numbers: dict[int, Place] = field(default_factory=dict)
    hvm_subcall: Place | None = None
    _epoch: int = 0
    _returns: bool = False  # the trace says when calls end
    _tail: pl.DataFrame = field(default_factory=lambda: empty(_CARRIED))
    _last: dict[int, bool] = field(default_factory=dict)  # by pCPU: its last entry is a multicall of an HVM guest
    _found: dict[tuple[str, int, tuple[str, ...], int, bool], dict[str, _Against]] = field(default_factory=dict)

    def feed(self, events: pl.DataFrame) -> None:
        """Look at one batch of ``schema.EVENTS``."""
        kind = events.get_column("kind").to_physical().to_numpy()
        lost = kind == CODE["lost"]
        epoch = (np.cumsum(lost) + self._epoch).astype(np.uint32)
        self._epoch = int(epoch[-1]) if len(epoch) else self._epoch
        takes = np.isin(kind, [CODE[k] for k in _KINDS])
        rows = events.with_columns(pl.Series("epoch", epoch))
        if not takes.all():
            rows = rows.filter(pl.Series("takes", takes))
        self._numbers(rows)
        self._subcalls(rows)
        rows = rows.filter(self._wanted(rows))
        old = len(self._tail)
        table = pl.concat([self._tail, rows.select(_CARRIED.names())])
        if not len(table):
            return
        kind = table.get_column("kind").to_physical().to_numpy()
        op = table.get_column("op").fill_null(0xFFFFFFFF).to_numpy()
        entry = ((kind == CODE["hypercall"]) | (kind == CODE["vmmcall"])) & ~links.is_iret(op)
        ret, sample, sub = (kind == CODE[k] for k in ("return", "sample", "subcall"))
        key = links.keys(table)
        owner, before = links.fill(np.where(entry, np.arange(len(table)), -1), entry | ret, key)
        # An entry that stands before another one of its vCPU without a return: its predecessor.
        owner = np.where(ret | entry, before, owner)
        o = np.maximum(owner, 0)
        for column in ("segment", "epoch"):
            value = table.get_column(column).fill_null(0).to_numpy()
            owner = np.where(value == value[o], owner, -1)
        same = (owner >= 0) & ((op == op[o]) | (ret & table.get_column("op").is_null().to_numpy()))
        who = self._who(table)
        fresh = np.arange(len(table)) >= old
        on = table.get_column("on_insn").fill_null(False).to_numpy()
        self._returns |= bool((ret & fresh).any())
        stopped = np.flatnonzero(sample & on & same & fresh)
        ended = np.flatnonzero(ret & same & fresh & (table.get_column("result").fill_null(-1) >= 0).to_numpy())
        off = ~table.get_column("on_insn").fill_null(True).to_numpy()  # registers of a vCPU that stands elsewhere
        flagged = np.flatnonzero(_flagged(table, op) & (entry | sub | (sample & ~off)) & fresh)
        self._each("stopped", table, stopped, owner[stopped], op, who)
        self._each("ended", table, ended, owner[ended], op, who)
        self._versions(table, ended, owner[ended], who)
        self._each("flagged", table, flagged, flagged, op, who)
        goes_on = fresh & entry & (op == PAGING_DOMCTL_CONT) & (owner >= 0) & np.isin(op[o], (_DOMCTL, PAGING_DOMCTL_CONT))
        # Where nobody knows who runs, what stands before it may be another's.
        goes_on &= table.get_column("domid").is_not_null().to_numpy()
        self._domctl(table, np.flatnonzero(goes_on), who)
        keep = np.zeros(len(table), bool)
        last = np.flatnonzero(entry | ret)
        order = last[links.by_group(key[last])]
        if len(order):
            end = np.append(key[order[1:]] != key[order[:-1]], True)
            keep[order[end]] = True
        self._tail = table.filter(pl.Series(keep & entry))

    # --- records that are only noted --------------------------------------------------------------------------------------

    def _numbers(self, rows: pl.DataFrame) -> None:
        """Note the first PV entry of each number, of traces of records."""
        op, line = rows.get_column("op"), rows.get_column("line")
        new = rows.get_column("kind").to_physical().to_numpy() == CODE["hypercall"]
        for column, wanted in ((op, False), (line, True)):
            if column.null_count() != (len(column) if wanted else 0):
                new &= column.is_null().to_numpy() == wanted
        number = op.to_numpy() if not op.null_count() else op.fill_null(0).to_numpy()
        at = np.flatnonzero(new & ~np.isin(number, np.fromiter(self.numbers, number.dtype, len(self.numbers))))
        if len(at):
            first = at[np.unique(number[at], return_index=True)[1]]
            for value, seq, offset, place in rows[np.sort(first)].select("op", "seq", "offset", "line").iter_rows():
                self.numbers[value] = (seq, offset, place)

    def _subcalls(self, rows: pl.DataFrame) -> None:
        """Note the first sub-call whose pCPU last recorded a multicall of an HVM guest; Xen itself is not preempted between."""
        if self.hvm_subcall is not None:
            return
        if not self._last:
            vmmcall = np.flatnonzero(rows.get_column("kind").to_physical().to_numpy() == CODE["vmmcall"])
            if not (rows.get_column("op")[vmmcall] == MULTICALL).any():
                return
        part = rows.filter(pl.col("kind").is_in(["hypercall", "vmmcall", "subcall"]) & pl.col("pcpu").is_not_null())
        if not len(part):
            return
        hvm = (pl.col("kind") == "vmmcall") & (pl.col("op") == MULTICALL)
        entry = pl.col("kind") != "subcall"
        part = part.select("seq", "offset", "line", "pcpu", "kind", pl.when(entry).then(hvm).alias("hvm"))
        if not self._last and not part.get_column("hvm").any():
            return
        behind = part.with_columns(pl.col("hvm").forward_fill().over("pcpu").alias("now"))
        carried = (
            behind.get_column("pcpu").replace_strict(self._last, default=False, return_dtype=pl.Boolean) if self._last else None
        )
        now = behind.get_column("now").fill_null(False) if carried is None else behind.get_column("now").fill_null(carried)
        hit = behind.filter((behind.get_column("kind") == "subcall") & now)
        if len(hit):
            seq, offset, line = hit.select("seq", "offset", "line").row(0)
            self.hvm_subcall = (seq, offset, line)
        ends = behind.with_columns(now.alias("now")).group_by("pcpu").agg(pl.col("now").last())
        self._last |= {int(p): bool(n) for p, n in ends.iter_rows()}

    def _wanted(self, rows: pl.DataFrame) -> pl.Series:
        """Choose what can say anything: in traces of records few rows are, and the rest need not be looked at."""
        text = pl.col("line").is_not_null() | pl.col("kind").is_in(["sample", "return"])
        if rows.select(text.any()).item():
            return pl.Series(np.ones(len(rows), bool))
        op = rows.get_column("op").fill_null(0xFFFFFFFF).to_numpy()
        flagged = _flagged(rows, op)
        return pl.Series(flagged | (op == _DOMCTL) | (op == PAGING_DOMCTL_CONT))

    # --- who called ---------------------------------------------------------------------------------------------------------

    def _who(self, table: pl.DataFrame) -> npt.NDArray[np.int64]:
        """Return, for each row, the place in ``_GROUPS`` of those who may have made the call."""
        told: pl.Expr = pl.lit(None, dtype=EVENTS["caller"])
        named = {k: c for k, c in self.callers.items() if k is not None}
        if named:
            told = pl.col("domid").replace_strict(named, default=None, return_dtype=EVENTS["caller"])
        caller = pl.coalesce(told, pl.lit(self.callers.get(None), dtype=EVENTS["caller"]), pl.col("caller"))
        n = len(CALLERS)
        records = pl.col("line").is_null()
        kind = (
            pl.when(~records)
            .then(n + 3)
            .when(pl.col("kind") == "hypercall")
            .then(n)
            .when(pl.col("kind") == "vmmcall")
            .then(n + 1)
            .otherwise(n + 2)
        )
        out = table.select(pl.coalesce(caller.to_physical().cast(pl.Int64), kind.cast(pl.Int64)).alias("who"))
        return out.to_series().to_numpy()

    # --- judging --------------------------------------------------------------------------------------------------------------

    def _each(
        self, sort: str, table: pl.DataFrame, rows: Rows, owner: Rows, op: npt.NDArray[np.uint32], who: npt.NDArray[np.int64]
    ) -> None:
        """Judge rows of one sort, one group of hypercall and caller at a time."""
        if not len(rows):
            return
        source = owner if sort == "ended" else rows
        group = op[source].astype(np.int64) * len(_GROUPS) + who[source]
        narrow = table.select(*ARGS, "cut", "memory")
        for value in np.unique(group):
            at = np.flatnonzero(group == value)
            number, callers = int(value) // len(_GROUPS), _GROUPS[int(value) % len(_GROUPS)]
            call, found = States.from_frame(narrow[owner[at]]), States.from_frame(narrow[rows[at]])
            judge: Judge
            if sort == "stopped":
                judge = partial(pairs.judge_pairs, call=call, found=found)
            elif sort == "ended":
                judge = partial(pairs.judge_success, call=call)
            else:
                judge = partial(pairs.judge_flagged, found=found)
            told = _told(number, (call, found))
            self._group(sort, table, rows[at], owner[at], number, callers, told, judge)

    def _group(
        self, sort: str, table: pl.DataFrame, rows: Rows, owner: Rows, number: int, callers: tuple[str, ...],
        told: frozenset[int] | None, judge: Judge,
    ) -> None:  # fmt: skip
        classes = _classes(tuple(self.known), callers, number, told)
        if self.suspects:
            # Others matter only where a suspect fails: what nobody explains counts against nobody.
            some = [c for c in classes if self.suspects.intersection(c)]
            if all((verdict == pairs.OK).all() for verdict, _ in self._verdicts(some, rows, callers, number, judge)):
                return
        verdicts = self._verdicts(classes, rows, callers, number, judge)
        explained = np.zeros(len(rows), bool)
        for verdict, _ in verdicts:
            explained |= verdict == pairs.OK
        for releases, (verdict, why) in zip(classes, verdicts, strict=True):
            for weak in (False, True):
                hit = explained & (verdict == (pairs.WEAK if weak else pairs.NO))
                for reason in np.unique(why[hit]) if hit.any() else ():
                    at = np.flatnonzero(hit & (why == reason))
                    key = (sort, number, callers, int(reason), weak)
                    self._note(key, releases, len(at), table, int(rows[at[0]]), int(owner[at[0]]))

    @staticmethod
    def _verdicts(
        classes: Sequence[tuple[str, ...]], rows: Rows, callers: tuple[str, ...], number: int, judge: Judge
    ) -> list[tuple[pairs.Codes, pairs.Codes]]:
        """Judge rows for each class of releases: what the caller that explains most makes of each."""
        verdicts = []
        for releases in classes:
            worst: tuple[pairs.Codes, pairs.Codes] | None = None
            for caller in callers:
                if len(callers) > 1 and in_table(releases[0], caller, 12) is None:
                    continue  # no such caller there, or nothing is known of it
                now = judge(releases[0], caller, number)
                better = now[0] < worst[0] if worst is not None else np.ones(len(rows), bool)
                worst = now if worst is None else (np.where(better, now[0], worst[0]), np.where(better, now[1], worst[1]))
            verdicts.append(worst if worst is not None else (np.zeros(len(rows), np.int8), np.zeros(len(rows), np.int8)))
        return verdicts

    def _note(
        self, key: tuple[str, int, tuple[str, ...], int, bool], releases: Sequence[str], times: int, table: pl.DataFrame,
        row: int, owner: int,
    ) -> None:  # fmt: skip
        found = self._found.setdefault(key, {})
        new: _Against | None = None
        for version in releases:
            old = found.get(version)
            if old is not None:
                old.times += times
                continue
            if new is None:
                place = table.row(row, named=True)
                what = _what(key[0], key[1], table.row(owner, named=True), place)
                new = _Against(times, place["seq"], place["offset"], place["line"], what)
            found[version] = _Against(new.times, new.seq, new.offset, new.line, new.what)

    def _versions(self, table: pl.DataFrame, rows: Rows, owner: Rows, who: npt.NDArray[np.int64]) -> None:
        """What XENVER_version returned is what the hypervisor says of itself: major << 16 | minor."""
        asked = (table.get_column("arg0").fill_null(1).to_numpy()[owner] == 0) & (
            table.get_column("op").to_numpy()[owner] == _VERSION
        )
        rows, owner = rows[asked], owner[asked]
        said, first = np.unique(table.get_column("result").fill_null(0).to_numpy()[rows], return_index=True)
        for value, i in zip(said.tolist(), first.tolist(), strict=True):
            gone = [v for v in self.known if release.get(v).key[:2] != (value >> 16, value & 0xFFFF)]
            key = ("ended", _VERSION, _GROUPS[int(who[owner[i]])], pairs.VERSION, False)
            if len(gone) < len(self.known):
                self._note(key, gone, 1, table, int(rows[i]), int(owner[i]))

    def _domctl(self, table: pl.DataFrame, rows: Rows, who: npt.NDArray[np.int64]) -> None:
        """A paging_domctl_cont behind a domctl: only releases that have it can have issued it."""
        for row in rows[:1]:
            gone = [
                v
                for v in self.known
                if all(
                    facts.lookup(v, c, PAGING_DOMCTL_CONT).status == "absent"
                    for c in _GROUPS[int(who[row])]
                    if in_table(v, c, 12) is not None
                )
            ]
            self._note(("domctl", PAGING_DOMCTL_CONT, _GROUPS[int(who[row])], 1, False), gone, 1, table, int(row), int(row))

    # --- the result -----------------------------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """Return what was found, what needs no counting first, then in the order of the trace."""
        out: list[tuple[bool, Finding]] = []
        for (sort, _, _, reason, weak), found in self._found.items():
            grouped: dict[tuple[int, str], list[str]] = {}
            for version, a in found.items():
                if a.times >= _ENOUGH or not (weak or (sort == "stopped" and not self._returns)):
                    grouped.setdefault((a.seq, a.what), []).append(version)
            for (seq, what), versions in grouped.items():
                a = found[versions[0]]
                text = what + (f", and {a.times - 1} more like it" if weak and a.times > 1 else "")
                out.append((weak, Finding(text, pairs.REASONS[reason], frozenset(versions), seq, a.offset, a.line)))
        out.sort(key=lambda f: (f[0], f[1].seq or 0, -len(f[1].releases)))
        return [f for _, f in out]


def _flagged(table: pl.DataFrame, op: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Return the rows whose count carries Xen's flag."""
    out = np.zeros(len(table), bool)
    for number, (arg, flag) in pairs.flags().items():
        rows = np.flatnonzero(op == number)
        if len(rows):
            value = table.get_column(f"arg{arg}").fill_null(0).to_numpy()[rows]
            out[rows] = (value & np.uint64(flag)) != 0
    return out


def _told(number: int, states: Sequence[States]) -> frozenset[int] | None:
    """Return the sub-operation numbers that some release may read in the states; None for too many to tell apart."""
    if facts.command_at(number) != "arg0":
        return None
    values = np.unique(np.concatenate([s.args[0].value[s.args[0].known] for s in states]))
    if len(values) > 4096:
        return None
    out: set[int] = set()
    for mask in _masks(number):
        out.update(int(v) for v in np.unique(values & np.uint64(mask)))
    return frozenset(out) if len(out) <= 256 else None


@cache
def _masks(number: int) -> tuple[int, ...]:
    found = {0xFFFFFFFF}
    for _, doc in documents(number):
        found |= {int(row["mask"]) for row in doc.get("dispatch", []) if "mask" in row}
    return tuple(sorted(found))


@cache
def _classes(
    known: tuple[str, ...], callers: tuple[str, ...], number: int, told: frozenset[int] | None
) -> tuple[tuple[str, ...], ...]:
    """Return the releases by equal facts about some sub-operations of a hypercall for some callers."""
    out: dict[tuple[Any, ...], list[str]] = {}
    for version in known:
        key = []
        for caller in callers:
            whole = facts.lookup(version, caller, number).fingerprint
            if told is not None and whole[4]:
                # Of the operations only those that are called; everything else about the hypercall.
                whole = (*whole[:4], tuple(row for row in whole[4] if row[0] in told), *whole[5:])
            key.append((whole, in_table(version, caller, 12) is None))
        out.setdefault(tuple(key), []).append(version)
    return tuple(tuple(vs) for vs in out.values())


def _what(sort: str, number: int, call: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Say what the trace shows, in the words of a reader."""
    first, now = _registers(call), _registers(found)
    name = facts.hypercall_names().get(number, f"hypercall {number}")
    if facts.command_at(number) == "arg0":
        name = facts.operation_names(number).get(first.get("arg0", -1), name)
    if sort == "ended":
        shown = ", ".join(f"{k}={v:#x}" for k, v in list(first.items())[:3])
        return f"{name}({shown}) returned {found['result']}"
    if sort == "flagged":
        shown = ", ".join(f"{k}={v:#x}" for k, v in list(now.items())[:2])
        return f"{name} left with {shown}"
    if sort == "domctl":
        return f"{name} (a domctl that goes on)"
    moved = ", ".join(f"{k} {first[k]:#x} → {v:#x}" for k, v in now.items() if first.get(k, v) != v)
    return (
        f"{name}(arg0={first['arg0']:#x}) left with {moved}" if moved and "arg0" in first else f"{name} left {moved or 'as called'}"
    )


def _registers(row: Mapping[str, Any]) -> dict[str, int]:
    return {k: int(row[k]) for k in ARGS if row[k] is not None}
