"""A host under load, simulated: many domains, vCPUs and pCPUs, calls preempted where the release looks, a move to another host.

Driven by one seeded generator: the same workload, releases and seed give the same records, byte for byte.
"""

from __future__ import annotations

import errno
import heapq
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from xtrace.errors import UsageError
from xtrace.machine.guest import issue
from xtrace.machine.ongoing import Nested, Plain, Stop
from xtrace.machine.recording import Record, Recording, instruction
from xtrace.machine.truth import Call, Left, Simulation, Where
from xtrace.machine.workload import MULTICALL, Domain, Kind, Workload
from xtrace.replay import facts

if TYPE_CHECKING:
    from xtrace.machine.host import Entry
    from xtrace.replay.behaviour import Behaviour, Hypercall

__all__ = ("simulate",)

#: Cycles of an entry, and of each unit in it; of the time between entries of a pCPU.
_ENTRY: Final = (800, 2500)
_UNIT: Final = 40
_GAP: Final = (2_000, 40_000)

#: Entries after which a call is left alone: some continuations make no headway.
_PATIENCE: Final = 200


@dataclass(slots=True)
class _Vcpu:
    """A vCPU: where it runs, and the call that it must go on with when it runs next."""

    domain: _Domain
    number: int
    pcpu: int | None = None
    call: Call | None = None


@dataclass(slots=True)
class _Domain:
    spec: Domain
    host: int = 0
    vcpus: list[_Vcpu] = field(default_factory=list)
    parked: list[Call] = field(default_factory=list)


@dataclass(slots=True)
class _Host:
    release: str
    number: int
    recording: Recording
    pcpus: list[_Vcpu | None]


def simulate(workload: Workload, source: str, seed: int = 0, target: str | None = None, at: int | None = None) -> Simulation:
    """Run a workload.

    Args:
        workload: what happens.
        source: release of the host.
        seed: of the random numbers.
        target: release of another host, to which the domains that migrate are moved; may be equal to ``source``.
        at: calls after which they move.

    Raises:
        UsageError: a call of the workload does not exist at ``source`` for its domain's caller.
    """
    for domain in workload.domains:
        for kind in domain.calls:
            for k in (kind, *kind.entries):
                _behaviours(source, domain, k, strict=True)
    run = _Run(workload, source, seed, target, at)
    run.go()
    recordings = [h.recording for h in run.hosts]
    return Simulation(workload, seed, source, target, at, recordings, run.calls)


def _behaviours(release: str, domain: Domain, kind: Kind, *, strict: bool = False) -> tuple[Hypercall, list[Behaviour]]:
    """Return a hypercall and the operations of it that a kind of call may be; none of them if it never continues.

    Raises:
        UsageError: ``strict``, and there is no such call.
    """
    import difflib

    call = facts.lookup(release, domain.caller, kind.number)
    if call.status == "never" and kind.operation is None:
        return call, []
    found = [b for b in call.by_number.values() if b.codec != "unknown"]
    if kind.operation is not None:
        found = [b for b in found if b.operation == kind.operation]
    elif len(found) > 1:
        # What a redirect goes on as is issued by Xen alone.
        redirects = {b.params.get("to_operation") for b in found}
        found = [b for b in found if b.codec != "none" and not b.never_left and b.number not in redirects]
    if strict and not found:
        who = f"{call.name} of domain {domain.domid} ({domain.caller})"
        if call.status != "modelled":
            why = call.why or ("has no operations that are told apart" if call.status == "never" else call.status)
            raise UsageError(f"{who}: {why}")
        if kind.operation is None:
            raise UsageError(f"{who}: no operation of it leaves a continuation at {release}; name one")
        names = [b.operation for b in call.by_number.values()]
        near = difflib.get_close_matches(kind.operation, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{who} has no operation {kind.operation!r} at {release}{hint}")
    return call, found


class _Run:
    """State of one simulation: a heap of what happens next on which pCPU."""

    def __init__(self, workload: Workload, source: str, seed: int, target: str | None, at: int | None) -> None:
        self.w, self.target, self.at = workload, target, at
        self.draw = random.Random(seed)
        self.hosts: list[_Host] = []
        for number, release in enumerate([source] if target is None else [source, target]):
            losses = random.Random(f"{seed}/{number}/lost")
            recording = Recording(release, workload.domains, workload.tsc_khz, losses, workload.lost, workload.lost_records)
            self.hosts.append(_Host(release, number, recording, [None] * workload.pcpus))
        self.domains = [_Domain(d) for d in workload.domains]
        for d in self.domains:
            d.vcpus = [_Vcpu(d, n) for n in range(d.spec.vcpus)]
        self.calls: list[Call] = []
        self.moved = target is None
        self.tsc = workload.tsc_khz * 1000  # a second after boot
        self.heap: list[tuple[int, int, int, int]] = []  # TSC, order, host, pCPU: what that pCPU does next
        self.ending: dict[tuple[int, int], tuple[Call, _Vcpu, Entry]] = {}
        self.order = 0
        self.skipped = 0  # calls that the host a domain moved to does not have

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def go(self) -> None:
        """Run until every call has ended."""
        self._wake(self.hosts[0])
        while self.heap or not self.moved:
            if not self.moved and (not self.heap or (len(self.calls) >= (self.at or 0) and not self.ending)):
                self._move()
                continue
            when, _, h, p = heapq.heappop(self.heap)
            self.tsc = max(self.tsc, when)
            host = self.hosts[h]
            if (h, p) in self.ending:
                self._end(host, p, *self.ending.pop((h, p)))
                self._later(host, p, self.draw.randint(*_GAP))
            elif not self.moved and len(self.calls) >= (self.at or 0):
                pass  # what is inside Xen comes out before the move; then every pCPU goes on
            elif self._begin(host, p) or self._busy(host):
                self._later(host, p, self.draw.randint(*_GAP))

    def _now(self) -> int:
        """Return the time, never the same twice, so that the order of records can be told by it on any pCPU."""
        self.tsc += 1
        return self.tsc

    def _later(self, host: _Host, pcpu: int, cycles: int) -> None:
        self.order += 1
        heapq.heappush(self.heap, (self.tsc + cycles, self.order, host.number, pcpu))

    def _wake(self, host: _Host) -> None:
        for p in range(self.w.pcpus):
            self._later(host, p, self.draw.randint(*_GAP))

    def _busy(self, host: _Host) -> bool:
        """Say whether something on the host will need a pCPU yet."""
        here = [d for d in self.domains if d.host == host.number]
        return bool(here) and (self._budget() or any(d.parked or any(v.call for v in d.vcpus) for d in here))

    def _budget(self) -> bool:
        return len(self.calls) + self.skipped < self.w.calls

    # ── one entry ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, host: _Host, p: int) -> bool:
        """Let a pCPU choose a vCPU and execute one entry; its end comes later. False: there is nothing to do."""
        vcpu = host.pcpus[p]
        free = [v for d in self.domains if d.host == host.number for v in d.vcpus if v.pcpu is None and self._wants(v)]
        if free and (vcpu is None or not self._wants(vcpu) or self.draw.random() < self.w.switch):
            vcpu = self._switch(host, p, self.draw.choice(free))
        if vcpu is None or not self._wants(vcpu):
            return False
        call = self._next(vcpu, host)
        if call is None:
            return True  # not implemented where it moved to: it thinks of something else next time
        stop = self._stop(call) if len(call.ran) < _PATIENCE and self.draw.random() < self.w.preempt else None
        self._run(host, p, vcpu, call, stop)
        return True

    def _wants(self, v: _Vcpu) -> bool:
        return v.call is not None or bool(v.domain.parked) or self._budget()

    def _switch(self, host: _Host, p: int, vcpu: _Vcpu) -> _Vcpu:
        old = host.pcpus[p]
        if old is not None:
            old.pcpu = None
        host.pcpus[p], vcpu.pcpu = vcpu, p
        before = None if old is None else (old.domain.spec.domid, old.number)
        host.recording.add(Record("schedule", self._now(), p, vcpu.domain.spec.domid, vcpu.number, before=before))
        return vcpu

    def _next(self, vcpu: _Vcpu, host: _Host) -> Call | None:
        """Return the call that a vCPU goes on with, or a new one."""
        d = vcpu.domain
        if vcpu.call is None and d.parked and (not self._budget() or self.draw.random() < self.w.wake):
            call = d.parked.pop(self.draw.randrange(len(d.parked)))
            call.base, call.vcpu_now = call.work.progress(), vcpu.number
            vcpu.call = call
        if vcpu.call is None and self._budget():
            vcpu.call = self._issue(vcpu, host)
            self.skipped += vcpu.call is None
        return vcpu.call

    def _issue(self, vcpu: _Vcpu, host: _Host) -> Call | None:
        d = vcpu.domain.spec
        kind = self.draw.choices(d.calls, [k.weight for k in d.calls])[0]
        made = self._make(host.release, d, kind)
        if made is None:
            return None
        work: Plain | Nested = made
        if kind.number == MULTICALL:
            n = made.guest.total
            kinds = self.draw.choices(kind.entries, [k.weight for k in kind.entries], k=n)
            inner = [c for c in (self._make(host.release, d, k) for k in kinds) if c is not None]
            if len(inner) < n:
                return None
            work = Nested(made.guest, inner, MULTICALL)
        memory = work.memory() if isinstance(work, Nested) else dict(work.guest.memory)
        call = Call(len(self.calls), d, vcpu.number, work, made.guest.operation, (tuple(made.guest.args), memory))
        call.vcpu_now = vcpu.number
        self.calls.append(call)
        return call

    def _make(self, release: str, d: Domain, kind: Kind) -> Plain | None:
        """Make a call of a kind; None where the release has none such."""
        call, found = _behaviours(release, d, kind)
        total = self.draw.randint(*kind.total)
        if not found:
            if call.status != "never":
                return None
            g = _stub(call, d)
            return Plain(g, kind.number, None)
        b = self.draw.choice(found)
        g = issue(call, b, total, d.issuer, swapped=kind.swapped)
        return Plain(g, kind.number, b.unit, steady=b.codec == "redirect")

    def _stop(self, call: Call) -> Stop:
        work = call.work
        if isinstance(work, Plain):
            return Stop(self.draw.randrange(work.left()))
        place = self.draw.randrange(work.left())
        at = work.guest.shift + place
        if at >= len(work.inner) or self.draw.random() < 0.4:
            return Stop(None, place)
        return Stop(self.draw.randrange(work.inner[at].left()), place)

    def _run(self, host: _Host, p: int, vcpu: _Vcpu, call: Call, stop: Stop | None) -> None:
        """Execute one entry and write what a recorder sees when it begins."""
        work, d, recording = call.work, vcpu.domain.spec, host.recording
        g = work.guest
        memory = work.memory() if isinstance(work, Nested) else dict(g.memory)
        now = self._now()
        _, behind = instruction(d.caller, work.op)
        first = recording.add(Record("call", now, p, d.domid, vcpu.number, g.number, _args(g, host.release), memory, behind))

        def started(inner: Plain) -> None:
            i = inner.guest
            recording.add(Record("subcall", self._now(), p, d.domid, vcpu.number, inner.op, _args(i, host.release), dict(i.memory)))

        if isinstance(work, Nested):
            entry = work.enter(host.release, host.number, stop, started)
        else:
            entry = work.enter(host.release, host.number, stop)
        call.ran.append((Where(host.number, first), vcpu.number, p, now, host.release, entry))
        self.ending[host.number, p] = call, vcpu, entry
        self._later(host, p, self.draw.randint(*_ENTRY) + _UNIT * entry.done)

    def _end(self, host: _Host, p: int, call: Call, vcpu: _Vcpu, entry: Entry) -> None:
        """Write what a recorder sees when an entry ends: a stopped vCPU, or the return."""
        d, g, work = vcpu.domain.spec, call.work.guest, call.work
        now = self._now()
        at, _ = instruction(d.caller, call.work.op)
        if entry.kind != "preempted":
            call.returned = _result(entry)
            host.recording.add(Record("return", now, p, d.domid, vcpu.number, work.op, result=call.returned))
            vcpu.call = None
            return
        memory = work.memory() if isinstance(work, Nested) else dict(g.memory)
        sample = Record("sample", now, p, d.domid, vcpu.number, g.number, _args(g, host.release), memory, at, True)
        where = Where(host.number, host.recording.add(sample))
        began = call.ran[-1][0].record
        intact = not host.recording.cut(-1 if began is None else began, -1 if where.record is None else where.record)
        inner = None
        if isinstance(work, Nested) and (place := work.current()) is not None and work.inner[place].begun:
            inside = work.inner[place]
            inner = inside.op, inside.guest.operation, inside.progress()
        left = Left(where, len(call.ran) - 1, vcpu.number, now, g.number, work.progress(), call.base, intact, inner)
        if self.target is not None and host.number == 0:
            left.verdict = work.verdict(self.target)
        if self.draw.random() < self.w.park:
            left.parked = True
            vcpu.domain.parked.append(call)
            vcpu.call = None
        call.left.append(left)

    # ── the move ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _move(self) -> None:
        """Suspend the domains that migrate, and go on with them on the other host."""
        here, there = self.hosts
        going = [d for d in self.domains if d.spec.migrates]
        for d in going:
            for v in d.vcpus:
                if self.w.cooperative and v.call is not None:
                    self._finish(here, v)
        for d in going:
            domid = d.spec.domid
            first = d.vcpus[0]
            p = first.pcpu if first.pcpu is not None else 0
            here.recording.add(Record("suspend", self._now(), p, domid, 0))
            for call in [*d.parked, *(v.call for v in d.vcpus if v.call is not None)]:
                if call.left:
                    call.left[-1].caught = True
            for v in d.vcpus:
                if v.pcpu is not None:
                    here.pcpus[v.pcpu], v.pcpu = None, None
            d.host = there.number
        self.tsc += self.w.tsc_khz * 50  # what a move takes: 50 ms
        for d in going:
            there.recording.add(Record("resume", self._now(), 0, d.spec.domid, 0))
        self.moved = True
        self.heap.clear()
        for host in self.hosts:
            self._wake(host)

    def _finish(self, host: _Host, vcpu: _Vcpu) -> None:
        """Let a vCPU go on with its call until it is out of Xen."""
        p = vcpu.pcpu if vcpu.pcpu is not None else 0
        if host.pcpus[p] is not vcpu:
            self._switch(host, p, vcpu)
        while vcpu.call is not None:
            self._run(host, p, vcpu, vcpu.call, None)
            self.tsc += _ENTRY[1]
            self._end(host, p, *self.ending.pop((host.number, p)))


def _stub(call: Hypercall, d: Domain) -> Any:
    """Return the guest of a call that never continues."""
    from xtrace.machine.guest import Guest

    return Guest(d.caller, d.issuer, call.number, call.name, 1, [0] * 6, {})


def _args(g: Any, release: str) -> tuple[int, ...]:
    """Return the registers that the hypercall uses; all of them where that is not known."""
    used = len(facts.lookup(release, g.caller, g.number).parameters)
    return tuple(g.args[: used or 6])


def _result(entry: Entry) -> int | None:
    """Return what the caller gets: a result, or an errno's number below zero."""
    if entry.errno is not None:
        return -int(getattr(errno, entry.errno.removeprefix("-"), errno.EINVAL))
    return entry.result
