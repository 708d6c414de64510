"""A call in progress on any host: a plain one, or a multicall with calls inside that may be preempted themselves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from xtrace.machine.guest import MASK64, Done, Guest
from xtrace.machine.host import Entry, Host
from xtrace.machine.journey import Journey, Verdict, verdict
from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Nested", "Plain", "Stop", "copied")

#: A host that is only asked what it would do.
_ELSEWHERE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Stop:
    """When an event comes in: after ``units`` of the entry; of a multicall's ``place``-th call, or before it (None)."""

    units: int | None
    place: int = 0


def copied(g: Guest) -> Guest:
    """Return a guest that shares nothing that changes."""
    return replace(g, args=list(g.args), memory=dict(g.memory), done=list(g.done))


@dataclass(slots=True)
class Plain:
    """One call: its guest, the host that it is on and every entry so far."""

    guest: Guest
    op: int  # number of the hypercall as issued
    unit: str | None
    host: Host | None = None
    entries: list[Entry] = field(default_factory=list)
    begun: bool = False  # inside a multicall: it was preempted and waits for its re-entry
    steady: bool = False  # inside a multicall: nothing preempts it
    ended: bool = False

    def copy(self) -> Plain:
        """Return one that can be run without a trace left on this one."""
        host = None if self.host is None else replace(self.host, inside=dict(self.host.inside))
        return replace(self, guest=copied(self.guest), host=host, entries=list(self.entries))

    def enter(self, release: str, place: int, stop: Stop | None) -> Entry:
        """Execute its hypercall once on the host number ``place``, which is a ``release``."""
        if self.host is None or self.host.place != place:
            # What Xen holds inside about a call is about this call alone, and stays behind.
            self.host = Host(release, place)
        entry = self.host.enter(self.guest, None if stop is None else stop.units)
        self.entries.append(entry)
        self.ended = entry.kind != "preempted"
        return entry

    def left(self) -> int:
        """Return how many units are still to do, 1 at least."""
        return max(self.guest.total - len(self.guest.done), 1)

    def progress(self) -> int:
        """Return how many of the units asked for are done."""
        return sum(1 for n in self.guest.counts().values() if n)

    def verdict(self, release: str) -> Verdict:
        """Say what ``release`` would do with the call as it stands, undisturbed to its end."""
        other = self.copy()
        other.enter(release, _ELSEWHERE, None)
        return verdict(Journey(other.guest, other.entries, []))


@dataclass(slots=True)
class Nested:
    """A multicall: the batch itself as a guest whose units are its entries, and the calls that stand in them."""

    guest: Guest
    inner: list[Plain]
    op: int
    unit: str | None = "entries"
    entries: list[Entry] = field(default_factory=list)
    ended: bool = False
    results: dict[int, Entry] = field(default_factory=dict)  # how the calls inside ended, by place

    def copy(self) -> Nested:
        """Return one that can be run without a trace left on this one."""
        inner = [c.copy() for c in self.inner]
        return replace(self, guest=copied(self.guest), inner=inner, entries=list(self.entries), results=dict(self.results))

    def current(self) -> int | None:
        """Return the place of the entry that the list pointer stands at; None behind the last."""
        at = self.guest.shift
        return at if at < len(self.inner) else None

    def enter(self, release: str, place: int, stop: Stop | None, started: Callable[[Plain], None] | None = None) -> Entry:
        """Execute the multicall once.

        Args:
            release: the release of the host.
            place: number of the host.
            stop: when an event comes in; it stays pending until Xen looks.
            started: called with each call inside before it runs.
        """
        g = self.guest
        probe = copied(g)
        entry = Host(release, place).enter(probe, None)
        self.entries.append(entry)
        places = [d.place for d in probe.done[len(g.done) :]]
        if entry.kind != "returned" or entry.form is not None or (not places and len(self.entries) > 1):
            self.guest, self.ended = probe, True
            return entry
        b = next(iter(facts.lookup(release, g.caller, g.number).by_number.values()))
        check_from = int(b.params.get("check_from", b.first))
        entry.done = 0
        for i, at in enumerate(places):
            pending = stop is not None and (i > stop.place or (i == stop.place and stop.units is None))
            if pending and i >= check_from:
                return self._leave(release, entry, i)
            if at < len(self.inner):
                call = self.inner[at]
                if started is not None:
                    started(call)
                here = stop is not None and stop.units is not None and i == stop.place and not call.steady
                inside = Stop(stop.units) if here and stop is not None else None
                got = call.enter(release, place, inside)
                call.begun = not call.ended
                if call.begun:
                    return self._leave(release, entry, i)
                self.results[at] = got
            g.done.append(Done(entry.handler or g.operation, at, place))
            entry.done = i + 1
        entry.kind, entry.result, self.ended = "returned", 0, True
        return entry

    def _leave(self, release: str, entry: Entry, k: int) -> Entry:
        """Leave the batch after ``k`` entries of this execution: the list moved on, the count reduced (in any release)."""
        b = next(iter(facts.lookup(release, self.guest.caller, self.guest.number).by_number.values()))
        g, pointer, count = self.guest, f"arg{b.params['pointer']}", f"arg{b.params['count']}"
        g.put(pointer, g.get(pointer) + k * int(b.params["size"]))
        g.put(count, (g.get(count) - k) & MASK64)
        g.shift += k
        g.number_left = b.number
        entry.kind, entry.done, entry.result = "preempted", k, None
        return entry

    def left(self) -> int:
        """Return how many entries are still to do, 1 at least."""
        return max(len(self.inner) - self.guest.shift, 1)

    def progress(self) -> int:
        """Return how many entries are done."""
        return sum(1 for n in self.guest.counts().values() if n)

    def memory(self) -> dict[str, int]:
        """Return what stands in the entry that the list pointer stands at, under the names of docs/xtrace-log.md."""
        at = self.current()
        if at is None:
            return {}
        call = self.inner[at]
        out = {"entry.op": call.op}
        if call.begun or call.op:
            # Xen marks an entry that was preempted inside by the number it goes on as.
            out["entry.result"] = call.guest.number if call.begun else 0
        out |= {f"entry.arg{k}": v for k, v in enumerate(call.guest.args)}
        return out | {f"entry.memory.{k}": v for k, v in call.guest.memory.items()}

    def verdict(self, release: str) -> Verdict:
        """Say what ``release`` would do with it: what becomes of the call inside counts once the batch itself goes on."""
        at = self.current()
        other = self.copy()
        other.enter(release, _ELSEWHERE, None)
        own = verdict(Journey(other.guest, other.entries, []))
        if own.outcome != "resumes" or at is None or not self.inner[at].begun:
            return own
        return self.inner[at].verdict(release)
