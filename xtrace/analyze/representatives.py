"""Representative continuations: what a call of one operation could leave behind, enough of it to tell any two readings apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.analyze import outcomes
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import Column, States, location

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xtrace.replay.behaviour import Behaviour, Check, Special
    from xtrace.replay.hypervisor import Decoded
    from xtrace.replay.states import U64

__all__ = ("Fate", "Left", "calls", "fates", "left_behind", "special_states")

#: Totals tried where the trace does not say how much was asked for.
_TOTALS: Final = (2, 64, 512, 4096, 1 << 20)

#: Progress tried: enough to tell any two shifts apart (they differ modulo small powers of two), and large values.
_PROGRESS: Final = tuple(sorted({*range(65), *(1 << k for k in range(6, 31)), *((1 << k) + 1 for k in range(6, 31)), 1000}))

_MANY: Final = 1 << 62

#: Where a range begins that has a beginning of its own.
_BASE: Final = 0x40

#: Codecs whose registers stay as issued.
_STILL: Final = ("hypervisor", "restart", "redirect", "unknown")

_RESUMES: Final = outcomes.CODE["resumes"]


@dataclass(frozen=True, slots=True)
class Left:
    """What one operation left behind in n preemptions."""

    states: States
    issued: States  # the calls as made (for a special form, which stands for any, the form itself)
    read: Decoded  # as the source reads them
    own: np.ndarray[tuple[int], np.dtype[np.bool_]]  # the source itself would go on with it


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of some representatives at a target: outcome, errno, how many, and the registers of one of them."""

    outcome: str
    harmless: bool
    errno: str | None
    count: int
    progress: int | None
    total: int | None
    args: tuple[int | None, ...]


def calls(b: Behaviour, total: int | None = None, checks: Iterable[Check] = ()) -> tuple[States, U64]:
    """Return calls of one operation as issued, and the progress at which to preempt each.

    Args:
        b: the operation at the source release.
        total: most units that any call asked for; None if the trace does not say.
        checks: tests made before the operation is looked at (an interface version), so that the calls pass them.
    """
    totals = (total,) if total is not None else _TOTALS
    pairs = [
        (t, p)
        for t in totals
        for p in (_PROGRESS if b.codec not in _STILL else (0,))
        if b.first <= p < max(t, 1) and p % b.stride == 0
    ]
    if b.stride > 1:
        pairs += [(t, k * b.stride) for t in totals for k in (1, 2, 3, 16) if k * b.stride < t]
    if b.codec in _STILL and not pairs:
        pairs = [(totals[0], 0)]
    # Every command inside the structure that continues; none where there is no such field.
    inner = [n for n, name in b.inner_operations.items() if b.inner_continues is None or name in b.inner_continues]
    kinds: list[int | None] = [*inner] if b.inner is not None and inner else [None]
    # Where the order of the work hangs on the operands, both cases.
    ways = (False, True) if b.orders else (False,)
    rows = [(t, p, k, w) for k in kinds for w in ways for t, p in pairs]
    n = len(rows)
    t = np.array([t for t, *_ in rows], np.uint64)
    p = np.array([p for _, p, *_ in rows], np.uint64)
    states = States(tuple(Column.full(n, 0x1000_0000 * k) for k in range(6)), {})
    known = np.ones(n, bool)
    changes: dict[str, Column] = {}
    count = f"arg{b.params.get('count')}"
    for where, (low, high) in _bounds((*checks, *b.checks, *((b.continues_when,) if b.continues_when else ()))).items():
        if where not in (b.total, count):
            # The least and the greatest value that passes, in turn.
            changes[where] = Column(np.where(np.arange(n) % 2 == 0, np.uint64(low), np.uint64(high)), known)
    if b.command_at is not None:
        changes[b.command_at] = Column.full(n, b.number)
    if b.inner is not None and kinds != [None]:
        changes[location(b.inner)] = Column(np.array([k for _, _, k, _ in rows], np.uint64), known)
    for condition in b.orders:  # "mem.A > mem.B and …": A just above B, or below it
        above, _, below, *_ = condition.split()
        changes[below] = Column.full(n, 0x1000)
        changes[above] = Column(np.array([0x1001 if w else 0x800 for *_, w in rows], np.uint64), known)
    if b.params.get("count") is not None:
        changes[f"arg{b.params['count']}"] = Column(t, known)
    if b.total:
        # Where the field names the last unit, counted from the base.
        changes[b.total] = Column(t + np.uint64(_BASE - 1) if b.params.get("total_is") == "last" else t, known)
    for name in b.params.get("advance", {}):
        changes.setdefault(location(name), Column.full(n, 0x1000))
    for name, step in b.params.get("reduce", {}).items():
        changes.setdefault(location(name), Column(t * np.uint64(step), known))
    if b.params.get("base"):
        changes.setdefault(location(str(b.params["base"])), Column.full(n, _BASE))
    if b.params.get("done"):
        changes[location(str(b.params["done"]))] = Column.full(n, 0)
    return states.replace(changes), p


def _bounds(checks: Iterable[Check]) -> dict[str, tuple[int, int]]:
    """Return for each location the least and greatest value that passes every test made on a first entry."""
    out: dict[str, tuple[int, int]] = {}
    for check in checks:
        where = location(check.at)
        if check.resumed_only or (check.equals, check.minimum, check.maximum) == (None, None, None):
            continue
        low, high = out.get(where, (0, _MANY))
        if check.equals is not None:
            low = high = check.equals
        low = max(low, check.minimum or 0)
        high = min(high, check.maximum if check.maximum is not None else _MANY)
        out[where] = (low, high)
    for check in checks:
        low, high = out.get(location(check.at), (0, 0))
        if check.not_equals is not None and check.not_equals in (low, high) and low < high:
            out[location(check.at)] = (low + (low == check.not_equals), high - (high == check.not_equals))
    # No upper bound: the least will do.
    return {where: (low, low if high == _MANY else high) for where, (low, high) in out.items()}


def special_states(b: Behaviour, form: Special) -> States:
    """Return the one state that a special form stands for."""
    states = States(tuple(Column.full(1, 0) for _ in range(6)), {})
    changes = {where: Column.full(1, value) for where, value in form.match}
    if b.command_at is not None:
        changes.setdefault(b.command_at, Column.full(1, b.number))
    return states.replace(changes)


def left_behind(source: str, caller: str, op: int, b: Behaviour, issuer: str, total: int | None = None) -> list[Left]:
    """Return what ``source`` leaves of calls of one operation, special forms included.

    A redirected operation leaves a continuation of another number, which is not judged here but there.
    """
    return _left_behind(source, caller, op, b.number, issuer, total)


@lru_cache(maxsize=256)  # one call is held against many targets; a hypercall has fewer operations than this
def _left_behind(source: str, caller: str, op: int, number: int, issuer: str, total: int | None) -> list[Left]:
    b = facts.lookup(source, caller, op).by_number[number]
    xen = Hypervisor(source, caller)
    out: list[Left] = []
    restarts = b.codec == "redirect" and bool(b.params.get("also_restarts"))
    if (b.codec not in ("none", "redirect", "unknown") or restarts) and not b.never_left:
        dispatch = xen.hypercall(op).dispatch
        issued, progress = calls(b, total, () if dispatch is None else dispatch.checks)
        if len(progress):
            left = issued if restarts else xen.preempt(op, issued, progress)
            out.append(_left(xen, op, left, issued, issuer))
    for form in b.specials:
        if form.creates:
            out.append(_left(xen, op, special_states(b, form), None, issuer))
    return out


def _left(xen: Hypervisor, op: int, states: States, issued: States | None, issuer: str) -> Left:
    read = xen.decode(op, states, issued)
    verdict = outcomes.judge(read, xen.resume(op, states, issuer, issued))
    # Work held inside Xen goes on where it stopped as long as it is the same Xen, and so does what only a move refuses.
    still = np.array([b.codec in _STILL or b.refuses is not None for b in read.behaviours] + [False])[read.which]
    return Left(states, states if issued is None else issued, read, (verdict.outcome == _RESUMES) | still | (read.special >= 0))


def fates(source: str, caller: str, op: int, b: Behaviour, target: str, issuer: str, total: int | None = None) -> list[Fate]:
    """Judge what one operation could leave at ``source``, at ``target``.

    States that the source itself would not go on with are no matter of the target and are left out.

    Args:
        source: release that would leave it.
        caller: ABI of the caller.
        op: hypercall number.
        b: the operation at the source.
        target: release asked to resume it.
        issuer: who makes the call.
        total: most units asked for; None if not recorded.
    """
    out: dict[tuple[str, bool, str | None], Fate] = {}
    lefts = [(op, left) for left in left_behind(source, caller, op, b, issuer, total)]
    for number, onward in _onward(source, caller, op, b):
        lefts += [(number, left) for left in left_behind(source, caller, number, onward, issuer, total)]
    xen = Hypervisor(target, caller)
    for number, left in lefts:
        rows = np.flatnonzero(left.own)
        if not len(rows):
            continue
        states, read = left.states.take(rows), left.read.take(rows)
        v = outcomes.judge(read, xen.resume(number, states, issuer))
        code = (v.outcome.astype(np.int64) << 32) | (v.errno.astype(np.int64) << 1) | v.harmless
        for value, at, n in zip(*np.unique(code, return_index=True, return_counts=True), strict=True):
            name, errno = outcomes.NAMES[int(value) >> 32], outcomes.ERRNOS[(int(value) >> 1) & 0xFFFF]
            key = (name, bool(value & 1), errno)
            i = int(at)
            before = out[key].count if key in out else 0
            out[key] = Fate(
                name, key[1], errno, before + int(n), read.progress.item(i), read.total.item(i),
                tuple(a.item(i) for a in states.args),
            )  # fmt: skip
    return list(out.values())


def _onward(source: str, caller: str, op: int, b: Behaviour) -> list[tuple[int, Behaviour]]:
    """Return what a redirected operation goes on as: (hypercall number, operation)."""
    if b.codec != "redirect":
        return []
    number = int(b.params.get("to_hypercall", op))
    to = b.params.get("to_operation")
    there = facts.lookup(source, caller, number).by_number
    return [(number, k) for n, k in there.items() if (to is None or n == to) and k.codec not in ("none", "redirect")]
