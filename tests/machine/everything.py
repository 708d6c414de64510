"""Workloads of everything that can be left in flight, for the tests and for benchmarks/simulated.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrace.machine import workload as workloads
from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ("domains",)


def domains(
    source: str, callers: tuple[str, ...], units: tuple[int, int], *, without: Collection[int] = ()
) -> tuple[workloads.Domain, ...]:
    """Return a domain for each caller that makes every hypercall that leaves continuations, alone and in multicalls.

    Args:
        source: release that runs them.
        callers: ABI of each domain; every second one is a control domain.
        units: fewest and most units asked for.
        without: hypercalls that are not made.
    """
    out = []
    for domid, caller in enumerate(callers):
        kinds = []
        for number in facts.files():
            call = facts.lookup(source, caller, number)
            operations = [b for b in call.by_number.values() if b.codec not in ("none", "unknown") and not b.never_left]
            if number != workloads.MULTICALL and number not in without and operations:
                kinds.append(workloads.Kind(number, None, 1.0, units))
        if facts.lookup(source, caller, workloads.MULTICALL).status == "modelled":
            kinds.append(workloads.Kind(workloads.MULTICALL, None, 4.0, (2, 6), entries=tuple(kinds)))
        if kinds:
            role = "control" if domid % 2 else "guest"
            out.append(workloads.Domain(domid, caller, role, None, 2, True, tuple(kinds)))
    return tuple(out)
