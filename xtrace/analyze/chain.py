"""A continuation over several hosts: born on the first, carried or driven on by those between, resumed on the last.

On each host the call may run and be preempted again, or stay parked all the while. So at every host the state may be one
last left by any host before it; pairs alone do not show what becomes of it (A to B and B to C may both be fine, and a
state of A that B drove on may still mean something else to C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xtrace.analyze import outcomes
from xtrace.analyze.compare import ISSUER
from xtrace.analyze.representatives import Left, left_behind
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from xtrace.replay.hypervisor import Decoded
    from xtrace.replay.states import States

__all__ = ("Step", "chain", "drive")

_RESUMES = outcomes.CODE["resumes"]

#: Codecs of which a host leaves nothing that goes by the same number: it is never preempted, goes on as another, or how is unknown.
_ENDS = ("none", "redirect", "unknown")


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes at one host of a continuation last left by an earlier one."""

    caller: str
    hypercall: str
    operation: str
    guard: str
    last: str  # release that left it
    host: str  # release asked to resume it
    outcomes: dict[str, int]
    errnos: tuple[str, ...]


def chain(hosts: Sequence[str], callers: Sequence[str], hypercalls: Sequence[int] | None = None) -> list[Step]:
    """Return the steps at which a continuation does not simply resume.

    Args:
        hosts: two or more releases, in the order in which the guest meets them.
        callers: ABIs of the callers.
        hypercalls: numbers to look at; None for all with facts.
    """
    out: list[Step] = []
    for caller in callers:
        for number in facts.files() if hypercalls is None else hypercalls:
            call = facts.lookup(hosts[0], caller, number)
            if call.status != "modelled":
                continue
            for b in call.by_number.values():
                for left in left_behind(hosts[0], caller, number, b, ISSUER[b.guard]):
                    for last, host, seen, errnos in _walk(hosts, caller, number, left, ISSUER[b.guard]):
                        if set(seen) - {"resumes"}:
                            out.append(Step(caller, call.name, b.operation, b.guard, last, host, seen, errnos))
    return out


def _walk(
    hosts: Sequence[str], caller: str, number: int, left: Left, issuer: str
) -> list[tuple[str, str, dict[str, int], tuple[str, ...]]]:
    """Judge at each host what each host before it may have left last."""
    out = []
    rows = np.flatnonzero(left.own)
    states: list[tuple[str, States, Decoded]] = []
    if len(rows):
        states.append((hosts[0], left.states.take(rows), left.read.take(rows)))
    for host in hosts[1:]:
        xen = Hypervisor(host, caller)
        driven: tuple[str, States, Decoded] | None = None
        for last, state, read in states:
            v = outcomes.judge(read, xen.resume(number, state, issuer))
            codes, counts = np.unique(np.where(v.harmless, _RESUMES, v.outcome), return_counts=True)
            seen = {outcomes.NAMES[c]: int(n) for c, n in zip(codes, counts, strict=True)}
            errnos = tuple(sorted({e for e in (outcomes.ERRNOS[c] for c in np.unique(v.errno)) if e}))
            out.append((last, host, seen, errnos))
            if last == states[-1][0]:
                good = np.flatnonzero(v.outcome == _RESUMES)
                if len(good):
                    again = drive(xen, number, state.take(good))[1]
                    driven = (host, again, xen.decode(number, again)) if len(again) else None
        if driven is not None:
            states.append(driven)
    return out


def drive(xen: Hypervisor, number: int, states: States) -> tuple[npt.NDArray[np.intp], States]:
    """Let a host do one step more of each continuation that it goes on with, and preempt it again.

    Returns:
        The rows of which something is then left, and what it leaves of them.
    """
    read = xen.decode(number, states)
    steps = np.zeros(len(states), np.uint64)
    for k, b in enumerate(read.behaviours):
        if b.codec in _ENDS or b.never_left:
            continue
        hit = read.which == k
        step = np.uint64(b.stride)
        more = read.remaining.known & (read.remaining.value > step) & hit & (read.special < 0)
        # Without an index of its own it counts on from operands already moved.
        base = read.index.value if b.keeps_index else np.zeros(len(states), np.uint64)
        steps[more] = base[more] + step
        # With no more to do than one step it is as good as done: nothing is left to preempt.
        steps[hit & ~more] = base[hit & ~more]
    keep = np.flatnonzero(steps > 0)
    return keep, xen.preempt(number, states.take(keep), steps[keep])
