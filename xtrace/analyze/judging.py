"""Judging continuations of one hypercall and caller at one target, the call inside a multicall included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from xtrace.analyze import outcomes
from xtrace.analyze.exposure import expose, guard_of
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.reading import MULTICALL, inner_states, null_reading, reading
from xtrace.replay.states import Column

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from xtrace.replay.hypervisor import Decoded
    from xtrace.replay.states import States

__all__ = ("Judged", "Side", "classes", "judge_at", "read_source")

RESUMES = outcomes.CODE["resumes"]


@dataclass(slots=True)
class Side:
    """How the source reads n continuations: the outer call, and the calls inside multicall entries."""

    release: str
    caller: str
    number: int
    states: States
    issued: States | None
    decoded: Decoded
    guards: list[str | None]  # guard that each behaviour proves as passed, and None at the end for rows without one
    inner: list[tuple[int, npt.NDArray[np.intp], Side]]

    @property
    def guard_of(self) -> npt.NDArray[np.intp]:
        """Index into ``guards`` for each row."""
        return np.where(self.decoded.which >= 0, self.decoded.which, len(self.guards) - 1)

    def reading(self) -> pl.Series:
        """Return the decoding as a column, the innermost first."""
        return reading(self.decoded, _nest(len(self.states), [(rows, s.decoded) for _, rows, s in self.inner]))

    def caveats(self) -> npt.NDArray[np.int16]:
        """Return the caveats of each row, as codes of ``outcomes.CAVEATS``."""
        table = np.array([*(outcomes.CAVEATS.code(b.caveats) for b in self.decoded.behaviours), 0], np.int16)
        out = table[self.decoded.which]
        for k, b in enumerate(self.decoded.behaviours):
            for location, value in b.domids_unless:
                column = self.states.at(location)
                low = column.value & np.uint64(0xFFFF)
                told = (self.decoded.which == k) & column.known & (self.decoded.special < 0)
                itself = low == np.uint64(value)
                out[told & ~itself] = outcomes.CAVEATS.code(tuple(dict.fromkeys((*b.caveats, "domids"))))
                out[told & itself] = outcomes.CAVEATS.code(tuple(c for c in b.caveats if c != "domids"))
        out[self.decoded.special >= 0] = 0  # such a form names neither a frame nor a domain
        for _, rows, side in self.inner:
            pairs, back = np.unique(np.stack([out[rows], side.caveats()]), axis=1, return_inverse=True)
            merged = [tuple(dict.fromkeys((*outcomes.CAVEATS[a], *outcomes.CAVEATS[b]))) for a, b in pairs.T]
            out[rows] = np.array([outcomes.CAVEATS.code(m) for m in merged], np.int16)[back.reshape(-1)]
        return out


@dataclass(slots=True)
class Judged:
    """Outcomes of n continuations at one target."""

    outcome: npt.NDArray[np.int8]  # index into outcomes.NAMES
    errno: npt.NDArray[np.int16]  # code of outcomes.ERRNOS
    harmless: npt.NDArray[np.bool_]
    target: Decoded
    inner: list[tuple[npt.NDArray[np.intp], Decoded]]

    def reading(self) -> pl.Series:
        """Return the target's decoding as a column."""
        shown = self.target
        again = (self.outcome == outcomes.CODE["restarts"]) & (shown.which >= 0) & ~shown.progress.known
        if again.any():
            # The target takes it for a first call.
            zero = Column(shown.progress.value, shown.progress.known | again)
            whole = Column(
                np.where(again & ~shown.total.known, shown.remaining.value, shown.total.value),
                shown.total.known | (again & shown.remaining.known),
            )
            shown = replace(shown, progress=zero, remaining=_where(again, whole, shown.remaining), total=whole)
        return reading(shown, _nest(len(self.outcome), self.inner))


def _where(rows: npt.NDArray[np.bool_], a: Column, b: Column) -> Column:
    return Column(np.where(rows, a.value, b.value), np.where(rows, a.known, b.known))


def _nest(n: int, parts: list[tuple[npt.NDArray[np.intp], Decoded]]) -> pl.Series | None:
    if not parts:
        return None
    rows = np.concatenate([r for r, _ in parts])
    values = pl.concat([reading(d).struct.unnest().drop("inner").to_struct("inner") for _, d in parts])
    at = np.full(n, -1, np.int64)
    at[rows] = np.arange(len(rows))
    index = pl.Series(at, dtype=pl.Int64)
    index = index.set(index < 0, None)
    return pl.concat([values, null_reading(1)]).gather(index.fill_null(len(values)))


def read_source(release: str, caller: str, number: int, states: States, issued: States | None) -> Side:
    """Read continuations as the release that left them does."""
    states = _passed(release, caller, number, states)
    decoded = Hypervisor(release, caller).decode(number, states, issued)
    dispatch = decoded.hypercall.dispatch
    guards = [*(guard_of(dispatch, b) for b in decoded.behaviours), None]
    side = Side(release, caller, number, states, issued, decoded, guards, [])
    if number == MULTICALL:
        for op, rows, inside, mark in inner_states(states):
            if op == MULTICALL:
                continue  # a multicall inside a multicall is refused by every release
            read = Hypervisor(release, caller).decode(op, inside)
            # An entry that has not begun is a call, not a continuation: leave it to the surface.
            begun = mark | read.marked
            if begun.any():
                keep = np.flatnonzero(begun)
                side.inner.append((op, rows[keep], read_source(release, caller, op, inside.take(keep), None)))
    return side


def _passed(release: str, caller: str, number: int, states: States) -> States:
    """Fill in what a continuation must hold because its source let it pass: an interface version that was not recorded."""
    dispatch = facts.lookup(release, caller, number).dispatch
    changes: dict[str, Column] = {}
    for check in dispatch.checks if dispatch is not None else ():
        column = states.at(check.at)
        if check.equals is None or check.spares or column.known.all():
            continue
        changes[check.at] = Column(np.where(column.known, column.value, np.uint64(check.equals)), np.ones(len(states), bool))
    return states.replace(changes) if changes else states


def judge_at(side: Side, target: str, issuer: str) -> Judged:
    """Judge continuations at ``target`` for an issuer of one kind."""
    resumed = Hypervisor(target, side.caller).resume(side.number, side.states, issuer, side.issued)
    v = outcomes.judge(side.decoded, resumed)
    out = Judged(v.outcome, v.errno, v.harmless, resumed.decoded, [])
    for _, rows, inside in side.inner:
        got = judge_at(inside, target, issuer)
        out.inner.append((rows, got.target))
        # What happens inside counts once the multicall itself goes on.
        through = v.outcome[rows] == RESUMES
        hit = rows[through]
        out.outcome[hit], out.errno[hit] = got.outcome[through], got.errno[through]
        out.harmless[hit] = got.harmless[through]
    return out


def issuers(side: Side, role: str | None) -> list[tuple[str, npt.NDArray[np.intp]]]:
    """Group the rows by who issued them (DESIGN §5)."""
    names = [expose(role, g, side.caller).issuer for g in side.guards]
    of = np.array([names.index(n) for n in names])[side.guard_of]
    return [(names[k], np.flatnonzero(of == k)) for k in np.unique(of)]


def classes(number: int, caller: str, releases: Iterable[str]) -> list[list[str]]:
    """Group releases that treat every continuation of a hypercall alike, in order of first appearance."""
    groups: dict[object, list[str]] = {}
    for r in releases:
        key: object = facts.lookup(r, caller, number).fingerprint
        if number == MULTICALL:
            key = (key, *(facts.lookup(r, caller, k).fingerprint for k in sorted(facts.files())))
        groups.setdefault(key, []).append(r)
    return list(groups.values())


def take(side: Side, rows: npt.NDArray[np.intp]) -> Side:
    """Return the side for some of its rows."""
    n = len(side.states)
    where = np.full(n, -1, np.intp)
    where[rows] = np.arange(len(rows))
    inner = []
    for op, at, inside in side.inner:
        kept = np.flatnonzero(where[at] >= 0)
        if len(kept):
            inner.append((op, where[at][kept], take(inside, kept)))
    issued = None if side.issued is None else side.issued.take(rows)
    return Side(
        side.release,
        side.caller,
        side.number,
        side.states.take(rows),
        issued,
        side.decoded.take(rows),
        side.guards,
        inner,
    )
