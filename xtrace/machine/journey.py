"""A call over several hosts, and what came of it: done once, twice, never, or to the wrong thing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrace.machine.host import Entry, Host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtrace.machine.guest import Guest

__all__ = ("Journey", "Verdict", "travel", "verdict")


@dataclass(slots=True)
class Journey:
    """The guest at the end, every entry, and the guest as it stood after each."""

    guest: Guest
    entries: list[Entry]
    after: list[Guest]


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome of DESIGN §5 derived from what was done, the errno that the caller saw, and the units concerned."""

    outcome: str
    errno: str | None
    never: int
    twice: int
    harmless: bool = False


def travel(guest: Guest, stops: Sequence[tuple[str, int | None]]) -> Journey:
    """Run a call: on each release in turn one entry, preempted after so many units of it; the last one to its end.

    Args:
        guest: as ``guest.issue`` made it; it is changed.
        stops: (release, units after which an event is pending; None: run to the end). Equal neighbours are one host.
    """
    out = Journey(guest, [], [])
    host: Host | None = None
    for k, (release, stop) in enumerate(stops):
        if host is None or host.release != release or stops[k - 1][0] != release:
            host = Host(release, k)
        entry = host.enter(guest, stop)
        out.entries.append(entry)
        out.after.append(copy.deepcopy(guest))
        if entry.kind != "preempted":
            break
    return out


def verdict(journey: Journey) -> Verdict:
    """Derive the outcome of the last entry from what the guest's units saw.

    Args:
        journey: at least two entries, the last of them on the target.
    """
    g, last, before = journey.guest, journey.entries[-1], journey.entries[:-1]
    if last.kind == "unknown":
        return Verdict("unknown", None, 0, 0)
    if last.why == "absent":
        return Verdict("misdirected" if last.handler else "absent", last.errno, 0, 0)
    if last.why == "before":
        return Verdict("refused", last.errno, 0, 0)
    if last.why == "unmatched":
        return Verdict("absent" if last.number == g.number_left else "refused", last.errno, 0, 0)
    # An unknown command inside the structure is the business of the same handler.
    if last.handler not in (g.operation, g.operation.partition("/")[0]):
        return Verdict("misdirected", last.errno, 0, 0)
    if last.form is not None:
        return Verdict(last.form.result, last.errno, 0, 0, last.form.harmless)
    if last.kind == "refused":
        return Verdict("refused", last.errno, 0, 0)
    counts = g.counts()
    never = sum(1 for n in counts.values() if n == 0)
    twice = sum(1 for place, n in counts.items() if n > 1 or (n and place >= g.total))
    if last.layout:
        return Verdict("wrong_result", None, never, twice)
    if last.why == "limit" and never and (last.start or 0) < g.total:
        return Verdict("refused", None, never, twice)
    if last.why == "check" and never:
        return Verdict("wrong_result", None, never, twice)  # a test ends it with success though something is left
    # What is left is taken from the other end than where the host before stopped.
    turned = bool(before) and before[-1].done > 0 and before[-1].far_left != last.far
    if turned or (never and twice):
        return Verdict("wrong_result", None, never, twice)
    if never:
        return Verdict("skips", None, never, twice)
    if twice:
        return Verdict("redoes" if last.start else "restarts", None, never, twice)
    return Verdict("resumes", None, 0, 0)
