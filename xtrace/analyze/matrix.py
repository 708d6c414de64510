"""Every release against every other: the worst that can become of a continuation in flight, for each kind of issuer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from xtrace.analyze import outcomes
from xtrace.analyze.compare import ISSUER, severity
from xtrace.analyze.representatives import left_behind
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtrace.replay.hypervisor import Decoded

__all__ = ("Cell", "matrix")


@dataclass(frozen=True, slots=True)
class Cell:
    """The worst outcome from one release to another, and the operation and caller that meet it."""

    outcome: str
    hypercall: str | None = None
    operation: str | None = None
    caller: str | None = None
    errno: str | None = None


_CLEAN = Cell("resumes")


def matrix(
    sources: Sequence[str], targets: Sequence[str], callers: Sequence[str], exposure: str, hypercalls: Sequence[int] | None = None
) -> dict[tuple[str, str], Cell]:
    """Return the worst outcome for each pair of releases.

    Args:
        sources: releases that leave the continuations.
        targets: releases that resume them.
        callers: ABIs of the callers.
        exposure: who issues the calls: ``guest`` (operations anybody may issue), ``device_model``, ``control``.
        hypercalls: numbers to look at; None for all with facts.
    """
    guard = {issuer: g for g, issuer in ISSUER.items()}[exposure]
    out = dict.fromkeys(((s, t) for s in sources for t in targets), _CLEAN)
    for caller in callers:
        for number in facts.files() if hypercalls is None else hypercalls:
            for s in sources:
                for t in targets:
                    cell = _worst(caller, number, guard, _class(s, caller, number), _class(t, caller, number))
                    if _rank(cell) < _rank(out[s, t]):
                        out[s, t] = cell
    return out


def _rank(cell: Cell) -> int:
    return severity(cell.outcome)


_SEEN: dict[tuple[str, int, str], str] = {}


@cache
def _class(release: str, caller: str, number: int) -> str:
    """Return the first release met that treats every continuation of a hypercall as this one does."""
    key = (caller, number, repr(facts.lookup(release, caller, number).fingerprint))
    return _SEEN.setdefault(key, release)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Everything that one hypercall may leave at a release behind one guard, in one go; ``unknown``: operations without facts."""

    states: States | None
    read: Decoded | None
    unknown: str | None


@cache
def _left(caller: str, number: int, guard: str, source: str) -> _Batch:
    call = facts.lookup(source, caller, number)
    parts: list[tuple[States, States]] = []
    unknown = None
    for b in call.by_number.values():
        if b.guard != guard:
            continue
        if b.codec == "unknown":
            unknown = b.operation
        for left in left_behind(source, caller, number, b, ISSUER[guard]):
            rows = np.flatnonzero(left.own)
            if len(rows):
                parts.append((left.states.take(rows), left.issued.take(rows)))
    if not parts:
        return _Batch(None, None, unknown)
    states, issued = (States.concat([p[k] for p in parts]) for k in (0, 1))
    return _Batch(states, Hypervisor(source, caller).decode(number, states, issued), unknown)


@cache
def _worst(caller: str, number: int, guard: str, source: str, target: str) -> Cell:
    """Judge all continuations of one hypercall that issuers behind ``guard`` may leave."""
    call, there = facts.lookup(source, caller, number), facts.lookup(target, caller, number)
    if call.status == "unknown":
        return Cell("unknown", call.name, None, caller)
    if call.status != "modelled":
        return _CLEAN
    batch = _left(caller, number, guard, source)
    found = _CLEAN
    if batch.unknown is not None:
        found = Cell("unknown", call.name, batch.unknown if call.command else None, caller)
    if batch.states is None or batch.read is None:
        return found
    if there.status == "unknown":
        return Cell("unknown", call.name, None, caller)
    v = outcomes.judge(batch.read, Hypervisor(target, caller).resume(number, batch.states, ISSUER[guard]))
    for i in np.unique((v.outcome.astype(np.int16) << 1) | v.harmless, return_index=True)[1]:
        outcome = "resumes" if v.harmless[i] else outcomes.NAMES[v.outcome[i]]
        cell = Cell(outcome, call.name, batch.read.operation(int(i)), caller, outcomes.ERRNOS[v.errno[i]])
        found = min(found, cell, key=_rank)
    return found
