"""What really happened in a simulation, for holding against what a reader of the trace finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from xtrace.machine.ongoing import Nested
from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtrace.machine.guest import Guest
    from xtrace.machine.host import Entry
    from xtrace.machine.journey import Verdict
    from xtrace.machine.ongoing import Plain
    from xtrace.machine.recording import Recording
    from xtrace.machine.workload import Domain, Workload

__all__ = ("VERSION", "Call", "Left", "Simulation", "Where", "truth")

#: Version of the document.
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Where:
    """A record: the host's number, and its place among that host's records (None: the recorder lost it)."""

    host: int
    record: int | None


@dataclass(slots=True)
class Left:
    """One continuation as it was left.

    Attributes:
        where: its sample. entry: number of the entry that left it, from 0.
        progress: units of the call done. inner: the same of the call inside a multicall's entry, where that one was preempted.
        base: units done when this vCPU took the call up again after the task had slept; 0 for one that never did.
        intact: the entry that left it and its sample were recorded and nothing was lost in between.
        parked: its task slept. caught: it was in flight when the domain moved.
        verdict: what the target would make of it, had the domain moved here.
    """

    where: Where
    entry: int
    vcpu: int
    tsc: int
    op: int
    progress: int
    base: int
    intact: bool
    inner: tuple[int, str, int] | None = None
    parked: bool = False
    caught: bool = False
    verdict: Verdict | None = None


@dataclass(slots=True)
class Call:
    """One logical call: ``work`` is its state, ``ran`` one (where, vCPU, pCPU, TSC, release, what it came to) for each entry."""

    number: int
    domain: Domain
    vcpu: int
    work: Plain | Nested
    operation: str
    issued: tuple[tuple[int, ...], dict[str, int]]
    ran: list[tuple[Where, int, int, int, str, Entry]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    returned: int | None = None
    base: int = 0
    vcpu_now: int = 0


@dataclass(slots=True)
class Simulation:
    """What was simulated: one recording for each host, and every call."""

    workload: Workload
    seed: int
    source: str
    target: str | None
    at: int | None
    recordings: list[Recording]
    calls: list[Call]


def truth(s: Simulation, traces: Sequence[str], unit: str, places: Sequence[list[int | None]]) -> dict[str, Any]:
    """Return the ground truth as plain values (docs/simulate.md).

    Args:
        s: what was simulated.
        traces: file name of each host's recording.
        unit: what ``places`` count: ``line`` or ``offset``.
        places: for each host where each of its records stands in its file.
    """

    def at(where: Where) -> int | None:
        return None if where.record is None else places[where.host][where.record]

    return {
        "version": VERSION,
        "workload": s.workload.name,
        "seed": s.seed,
        "source": s.source,
        "target": s.target,
        "at": s.at,
        "traces": list(traces),
        "domains": [
            {"id": d.domid, "caller": d.caller, "role": d.role, "issuer": d.issuer, "vcpus": d.vcpus, "migrates": d.migrates}
            for d in s.workload.domains
        ],
        "calls": [_call(c, unit, at) for c in s.calls],
    }


def _call(c: Call, unit: str, at: Any) -> dict[str, Any]:
    g = c.work.guest
    names = facts.hypercall_names()
    out: dict[str, Any] = {
        "call": c.number, "domid": c.domain.domid, "vcpu": c.vcpu, "caller": c.domain.caller, "op": c.work.op,
        "hypercall": names.get(c.work.op, str(c.work.op)), "operation": c.operation, "total": g.total, "unit": c.work.unit,
        "args": [f"{v:#x}" for v in c.issued[0]],
        "memory": {k: f"{v:#x}" for k, v in c.issued[1].items()},
        "entries": [
            {
                unit: at(where), "host": where.host, "release": release, "vcpu": vcpu, "pcpu": pcpu, "tsc": tsc, "kind": e.kind,
                "handler": e.handler, "start": e.start, "done": e.done, "errno": e.errno,
            }
            for where, vcpu, pcpu, tsc, release, e in c.ran
        ],
        "continuations": [_left(left, unit, at) for left in c.left],
        "result": c.returned,
        "ended": c.work.ended,
        "items": _items(g),
    }  # fmt: skip
    if isinstance(c.work, Nested):
        out["inside"] = [
            {
                "op": i.op, "hypercall": names.get(i.op, str(i.op)), "operation": i.guest.operation, "total": i.guest.total,
                "unit": i.unit, "entries": len(i.entries), "items": _items(i.guest),
            }
            for i in c.work.inner
        ]  # fmt: skip
    return out


def _left(left: Left, unit: str, at: Any) -> dict[str, Any]:
    inner = None
    if left.inner is not None:
        op, operation, progress = left.inner
        inner = {"op": op, "operation": operation, "progress": progress}
    return {
        unit: at(left.where), "host": left.where.host, "entry": left.entry, "vcpu": left.vcpu, "tsc": left.tsc, "op": left.op,
        "progress": left.progress, "base": left.base, "inner": inner, "intact": left.intact, "parked": left.parked,
        "caught": left.caught, "at_target": _verdict(left.verdict),
    }  # fmt: skip


def _verdict(v: Verdict | None) -> dict[str, Any] | None:
    if v is None:
        return None
    return {"outcome": v.outcome, "errno": v.errno, "never": v.never, "twice": v.twice}


def _items(g: Guest) -> dict[str, Any]:
    """Count the units asked for by how often they were done; those done by another operation apart."""
    counts = g.counts()
    return {
        "once": sum(1 for n in counts.values() if n == 1),
        "twice": sum(1 for n in counts.values() if n > 1),
        "never": sum(1 for n in counts.values() if n == 0),
        "by_other_operation": sum(1 for d in g.done if d.operation not in (g.operation, g.operation.partition("/")[0])),
    }
