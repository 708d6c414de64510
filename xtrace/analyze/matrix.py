"""Every release against every other: the worst that can become of a continuation in flight, for each kind of issuer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from xtrace.analyze import outcomes
from xtrace.analyze.compare import ISSUER, SEVERITY
from xtrace.analyze.representatives import left_behind
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

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
                    cell = _worst(caller, number, guard, *_representative(s, t, caller, number))
                    if _rank(cell) < _rank(out[s, t]):
                        out[s, t] = cell
    return out


def _rank(cell: Cell) -> int:
    return SEVERITY.index(cell.outcome)


@cache
def _class(release: str, caller: str, number: int) -> str:
    """Return the first release that treats every continuation of a hypercall as this one does."""
    return _first(facts.lookup(release, caller, number).fingerprint, release, caller, number)


_SEEN: dict[object, str] = {}


def _first(fingerprint: object, release: str, caller: str, number: int) -> str:
    return _SEEN.setdefault((caller, number, repr(fingerprint)), release)


def _representative(source: str, target: str, caller: str, number: int) -> tuple[str, str]:
    return _class(source, caller, number), _class(target, caller, number)


@cache
def _worst(caller: str, number: int, guard: str, source: str, target: str) -> Cell:
    """Judge all continuations of one hypercall that issuers behind ``guard`` may leave."""
    call, there = facts.lookup(source, caller, number), facts.lookup(target, caller, number)
    if call.status == "unknown":
        return Cell("unknown", call.name, None, caller)
    if call.status != "modelled":
        return _CLEAN
    found = _CLEAN
    for b in call.by_number.values():
        if b.guard != guard or (b.codec == "none" and not b.specials):
            continue
        if b.codec == "unknown" or there.status == "unknown":
            cell = Cell("unknown", call.name, b.operation if call.command else None, caller)
            found = min(found, cell, key=_rank)
            continue
        for left in left_behind(source, caller, number, b, ISSUER[guard]):
            rows = np.flatnonzero(left.own)
            if not len(rows):
                continue
            v = outcomes.judge(
                left.read.take(rows), Hypervisor(target, caller).resume(number, left.states.take(rows), ISSUER[guard])
            )
            for i in np.unique(v.outcome * 2 + v.harmless, return_index=True)[1]:
                outcome = "resumes" if v.harmless[i] else outcomes.NAMES[v.outcome[i]]
                cell = Cell(outcome, call.name, b.operation if call.command else None, caller, outcomes.ERRNOS[v.errno[i]])
                found = min(found, cell, key=_rank)
    return found
