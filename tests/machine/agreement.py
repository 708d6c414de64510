"""What becomes of one call by both roads: by the table (vectorised decoding and judging) and by execution."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from xtrace.analyze import outcomes
from xtrace.machine.guest import Guest, issue
from xtrace.machine.host import Entry, Host
from xtrace.machine.journey import Journey, Verdict, verdict
from xtrace.replay import facts
from xtrace.replay.behaviour import Behaviour
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

ISSUER = {"any": "guest", "device_model": "device_model", "control": "control"}


@dataclass
class Both:
    """One call preempted at A and resumed at B, as both roads see it."""

    source: str
    target: str
    caller: str
    operation: str
    total: int
    table: tuple[str, str | None]
    machine: Verdict
    first: Entry
    second: Entry
    left: Guest

    def __str__(self) -> str:
        args = " ".join(f"{a:#x}" for a in self.left.args[:4])
        return (
            f"{self.operation} of {self.total} ({self.caller}), preempted after {self.first.done} on {self.source}, left {args} "
            f"{self.left.memory}; {self.target}: by table {self.table}, by execution {self.machine}"
        )

    @property
    def agree(self) -> bool:
        """Say whether both come to the same outcome and errno; what the table leaves open is not compared."""
        name, errno = self.table
        if name == "undecidable":
            return True
        return name == self.machine.outcome and (errno is None or errno == self.machine.errno)


def continuing(release: str, caller: str, number: int) -> list[Behaviour]:
    call = facts.lookup(release, caller, number)
    if call.status != "modelled":
        return []
    return [b for b in call.by_number.values() if b.codec not in ("none", "unknown") and not b.never_left]


def both(a: str, b: str, caller: str, number: int, operation: Behaviour, total: int, stop: int, *, swapped: bool) -> Both | None:
    """Preempt a call on ``a`` after ``stop`` units and resume it on ``b``; None if ``a`` does not preempt it there."""
    call = facts.lookup(a, caller, number)
    issuer = ISSUER[operation.guard]
    guest = issue(call, operation, total, issuer, swapped=swapped)
    before = copy.deepcopy(guest)
    first = Host(a, 0).enter(guest, stop)
    if first.kind != "preempted":
        return None
    left = copy.deepcopy(guest)
    second = Host(b, 1).enter(guest)
    got = verdict(Journey(guest, [first, second], []))
    issued = States.of([before.args], {k: [v] for k, v in before.memory.items()})
    state = States.of([left.args], {k: [v] for k, v in left.memory.items()})
    read = Hypervisor(a, caller).decode(left.number, state, issued)
    v = outcomes.judge(read, Hypervisor(b, caller).resume(left.number, state, issuer, issued))
    table = (outcomes.NAMES[v.outcome[0]], outcomes.ERRNOS[v.errno[0]])
    return Both(a, b, caller, operation.operation, total, table, got, first, second, left)
