"""One host: a Xen release that executes hypercalls of an abstract guest, one entry at a time, and may be preempted.

Written from the facts alone, one state at a time and in the order in which Xen does things; it shares no code with the
vectorised decoding, so that a verdict can be derived twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from xtrace.machine.guest import MASK32, MASK64, Done, Guest, named, where_of
from xtrace.replay import facts

if TYPE_CHECKING:
    from xtrace.replay.behaviour import Behaviour, Check, Dispatch, Hypercall, Special

__all__ = ("Entry", "Host")

_PASSES = {
    "any": ("guest", "device_model", "control"),
    "device_model": ("device_model", "control"),
    "control": ("control",),
}


@dataclass(slots=True)
class Entry:
    """What one execution of the hypercall instruction came to.

    ``kind``: ``returned``, ``preempted`` (a continuation was left), ``refused`` (an errno, nothing done), ``stopped`` (at one of
    the guest's ``stops``, with its errno), ``unknown``.
    """

    host: int
    release: str
    kind: str
    number: int | None = None  # sub-operation number that it read
    handler: str | None = None  # the operation whose handler was entered
    start: int | None = None  # units that it took for done
    done: int = 0  # units done in this entry
    result: int | None = None
    errno: str | None = None
    why: str = ""  # absent, unmatched, before (refused before the operation is looked at), check, limit, form
    form: Special | None = None
    far: bool = False  # the work began at the far end
    far_left: bool = False  # what was left would go on from the far end here
    layout: bool = False  # the structure was read in a layout that it does not have


@dataclass(slots=True)
class Host:
    """A release, and what it holds inside about calls in progress."""

    release: str
    place: int = 0
    inside: dict[tuple[int, str], int] = field(default_factory=dict)

    def enter(self, g: Guest, stop: int | None = None) -> Entry:
        """Execute the guest's hypercall once.

        Args:
            g: the guest; its registers, structure and record are changed as Xen would.
            stop: units of this entry after which an event is pending; None: nothing preempts it. Xen looks only where the
                facts say, so that it may go on beyond.
        """
        call = facts.lookup(self.release, g.caller, g.number)
        e = Entry(self.place, self.release, "refused")
        if call.status == "unknown":
            e.kind = "unknown"
            return e
        if call.status == "absent":
            e.handler, e.errno, e.why = call.reaches, call.absent_errno, "absent"
            return e
        if call.status == "never":
            e.kind, e.result = "returned", 0
            return e
        b = self._dispatch(call, g, e)
        if b is None:
            return e
        e.handler = named(b, g)
        e.number = b.number if e.number is None else e.number
        if b.codec == "unknown":
            e.kind = "unknown"
            return e
        form = next((s for s in b.specials if _fits(s, g) and (not s.issuers or g.issuer in s.issuers)), None)
        refused = self._refused(call, b, g, e)
        if form is not None and not (refused and e.why == "before"):
            e.form, e.errno, e.kind, e.why = form, form.errno, "refused" if form.errno else "returned", "form"
            if form.returns is not None:
                e.result = ((g.get(form.returns) & MASK32) ^ 1 << 31) - (1 << 31)
            return e
        if refused:
            return e
        if b.params.get("layout") != g.layout:
            e.layout, e.errno = True, str(b.params.get("other_layout", ""))
            if e.errno.startswith("-E"):
                return e
            e.errno = None
        return self._work(call, b, g, e, stop)

    def _dispatch(self, call: Hypercall, g: Guest, e: Entry) -> Behaviour | None:
        """Find the operation, or refuse."""
        d = call.dispatch
        if d is None:
            return next(iter(call.by_number.values()), None)
        word = _word(d, g.get(call.command_at or "arg0"))
        number = word & d.mask
        stray = word & d.progress_bits()
        if not any(_may(g.issuer, guard) for guard in (d.guard, *d.guards_also)):
            e.errno, e.why = d.guard_errno, "before"
            return None
        for check in d.checks:
            if number not in check.spares and _fails(check, g):
                e.errno, e.why = check.errno, "before"
                return None
        if d.command_bits is not None and stray and number not in d.command_bits_except:
            e.errno, e.why = d.command_bits, "before"
            return None
        b = call.by_number.get(number)
        if b is not None and b.command_bits == "unmatched" and stray:
            b, number = None, word
        if b is None:
            e.errno, e.why = d.unmatched, "unmatched"
            if not d.unmatched.startswith("-E"):
                e.kind, e.errno, e.result = "returned", None, 0
        e.number = number
        return b

    def _refused(self, call: Hypercall, b: Behaviour, g: Guest, e: Entry) -> bool:
        """Make the tests of the operation's handler, in Xen's order; True if one stops it."""

        def stop(text: str, why: str = "check") -> bool:
            e.why = why
            if text.startswith("-E"):
                e.errno = text
            else:
                e.kind = "returned"
                e.result = index if text == "progress" else 0
            return True

        index = _index(call, b, g)
        e.start = index
        d = call.dispatch
        if d is not None and b.codec not in ("shifted_index", "masked_offset"):
            word = _word(d, g.get(call.command_at or "arg0"))
            if word & d.progress_bits() and b.command_bits not in ("ignored", "unmatched"):
                return stop(b.command_bits)
        if not any(_may(g.issuer, guard) for guard in (b.guard, *b.guards_also)):
            return stop(b.guard_errno)
        resumed = bool(index) or _flagged(b, g)
        for check in b.checks:
            if (resumed or not check.resumed_only) and g.has(where_of(check.at)) and _fails(check, g):
                return stop(check.errno)
        if b.refuses is not None and _continues(b, g):
            return stop(b.refuses)
        if (
            b.inner is not None
            and b.inner_operations
            and g.has(where_of(b.inner))
            and g.get(where_of(b.inner)) not in b.inner_operations
        ):
            return stop(b.inner_unmatched)
        total = _total(b, g)
        if b.max_total is not None and total is not None and total > b.max_total:
            return stop(b.max_total_result or "progress", "limit")
        if index and total is not None and index >= total and b.past_end is not None:
            return stop((b.at_end if index == total and b.at_end else b.past_end), "limit")
        return False

    def _work(self, call: Hypercall, b: Behaviour, g: Guest, e: Entry, stop: int | None) -> Entry:
        """Do the units from where the handler takes the call to be, until the end or a preemption."""
        start, todo = self._places(call, b, g)
        e.start, e.far = start, _far(b, g)
        if b.codec == "redirect" and stop is not None:
            self._redirect(b, g)
            e.kind = "preempted"
            g.number_left, g.operation = self._left(g)
            return e
        legal = None if stop is None else _where_it_looks(call, b, g, start, stop, len(todo))
        blocked = next((k for k, place in enumerate(todo) if place in g.stops), None) if g.stops else None
        k = min(n for n in (legal, blocked, len(todo)) if n is not None)
        g.done += map(Done, repeat(e.handler or b.operation), todo[:k], repeat(self.place))
        e.done = k
        if k == legal and k < len(todo):
            self._leave(call, b, g, start, k)
            e.kind, e.far_left = "preempted", _far(b, g)
            g.number_left = b.number
            return e
        e.kind = "returned"
        if k == blocked and g.stops[todo[k]].startswith("-E"):
            e.kind, e.errno = "stopped", g.stops[todo[k]]
        self.inside.pop((call.number, b.operation), None)
        _account(b, g, k)
        if e.kind == "returned":
            e.result = start + k if b.max_total_result == "progress" else 0
        return e

    def _places(self, call: Hypercall, b: Behaviour, g: Guest) -> tuple[int, range]:
        """Return how many units are taken for done, and the places in the call of those to do, in order."""
        p, far = b.params, _far(b, g)
        if b.codec in ("count_flag", "advanced"):
            first, left = g.shift, g.total - g.shift
            if p.get("pointer") is not None:
                # Where the pointer stands tells, in this release's units.
                first = g.moved(f"arg{p['pointer']}") // int(p["size"])
                left = g.total - first
            if p.get("count") is not None:
                left = _count(b, g)
                first = g.total - left if p.get("pointer") is None else first
            return 0, range(first, first + left)
        start = 0
        if b.codec == "hypervisor":
            start = self.inside.get((call.number, b.operation), 0)
        elif b.codec in ("shifted_index", "masked_offset", "guest_structure"):
            start = _index(call, b, g)
        # What stands in the structure may be the rest of a call whose operands were moved.
        whole = _total(b, g)
        end = g.total - g.shift if whole is None else whole
        if far:
            return start, range(g.shift + end - 1 - start, g.shift - 1, -1)
        return start, range(g.shift + start, g.shift + max(start, end))

    def _leave(self, call: Hypercall, b: Behaviour, g: Guest, start: int, k: int) -> None:
        """Write a continuation after ``k`` units of this entry."""
        p = b.params
        progress = start + k
        if b.codec == "shifted_index":
            where, shift = f"arg{p['arg']}", int(p["shift"])
            g.put(where, (g.get(where) & ((1 << shift) - 1)) | progress << shift)
        elif b.codec == "masked_offset":
            where, mask = f"arg{p['arg']}", int(p["mask"])
            g.put(where, (g.get(where) & mask) | (progress & ~mask & MASK64))
        elif b.codec in ("count_flag", "advanced"):
            if p.get("pointer") is not None:
                where = f"arg{p['pointer']}"
                g.put(where, g.get(where) + k * int(p["size"]))
            g.shift += k
            if p.get("count") is not None:
                where = f"arg{p['count']}"
                flag = int(p.get("flag", 0))
                _account(b, g, k)
                left = (g.get(where) & ~flag) - k
                if g.inside and p.get("chunk"):
                    # The 32-bit layer translates a list in chunks; in a multicall it writes what is left of the chunk only.
                    chunk = int(p["chunk"])
                    left = min(left, chunk - k % chunk)
                g.put(where, left | flag)
        elif b.codec == "guest_structure":
            if p.get("index"):
                base = g.get(where_of(str(p["base"]))) if p.get("base") else 0
                g.put(where_of(str(p["index"])), base + progress)
            elif not _far(b, g):
                g.shift += k
            for name, step in p.get("advance", {}).items():
                g.put(where_of(name), g.get(where_of(name)) + k * int(step))
            for name, step in p.get("reduce", {}).items():
                g.put(where_of(name), g.get(where_of(name)) - k * int(step))
        elif b.codec == "hypervisor":
            self.inside[call.number, b.operation] = progress
        elif b.codec == "restart":
            # What this entry did is done anew by the next: nothing of it counts.
            del g.done[len(g.done) - k :]

    def _left(self, g: Guest) -> tuple[int | None, str]:
        """Return the number and name of the operation that a redirected call goes on as, on this host."""
        call = facts.lookup(self.release, g.caller, g.number)
        number = 0
        if call.dispatch is not None:
            number = _word(call.dispatch, g.get(call.command_at or "arg0")) & call.dispatch.mask
        b = call.by_number.get(number) or next(iter(call.by_number.values()), None)
        return number, call.name if b is None else named(b, g)

    def _redirect(self, b: Behaviour, g: Guest) -> None:
        if b.params.get("to_operation") is not None and b.command_at is not None:
            g.put(b.command_at, int(b.params["to_operation"]))
        if b.params.get("to_hypercall") is not None:
            g.number = int(b.params["to_hypercall"])


def _account(b: Behaviour, g: Guest, k: int) -> None:
    """Count ``k`` requests of this entry up in the field that tells how many are done (unsigned int), if there is one."""
    if b.params.get("done"):
        where = where_of(str(b.params["done"]))
        g.put(where, ((g.get(where) if _flagged(b, g) else 0) + k) & MASK32)


def _where_it_looks(call: Hypercall, b: Behaviour, g: Guest, start: int, stop: int, todo: int) -> int | None:
    """Return after how many units of this entry Xen sees the event: at or after ``stop``; None if not before the end."""
    if b.codec == "none" or b.never_left or not _continues(b, g):
        return None
    absolute = start if b.codec in ("shifted_index", "masked_offset", "guest_structure", "hypervisor") else 0
    first = b.first if not (start or _flagged(b, g)) else max(b.first, 0)
    last = todo if b.last_total else todo - 1
    for k in range(stop, last + 1):
        if (absolute + k) % b.stride == 0 and (k >= first or (absolute and k > 0)):
            return k
    return None


def _continues(b: Behaviour, g: Guest) -> bool:
    """Say whether the call is of a kind that continues."""
    if b.continues_when is not None and g.has(where_of(b.continues_when.at)) and _fails(b.continues_when, g):
        return False
    if b.inner is not None and b.inner_continues is not None and g.has(where_of(b.inner)):
        return b.inner_operations.get(g.get(where_of(b.inner))) in b.inner_continues
    return True


def _word(d: Dispatch, value: int) -> int:
    if d.width == 64:
        return value
    value &= MASK32
    return value | (MASK64 ^ MASK32) if d.sign_extend and value >> 31 else value


def _may(issuer: str, guard: str) -> bool:
    return issuer in _PASSES.get(guard, _PASSES["any"])


def _fails(c: Check, g: Guest) -> bool:
    value = g.get(where_of(c.at)) & (MASK32 if c.width == 32 else MASK64)
    return (
        (c.maximum is not None and value > c.maximum)
        or (c.minimum is not None and value < c.minimum)
        or (c.equals is not None and value != c.equals)
        or (c.not_equals is not None and value == c.not_equals)
        or bool(value & c.zero_bits)
    )


def _fits(form: Special, g: Guest) -> bool:
    exact = all(g.get(where) == value & MASK64 for where, value in form.match)
    return exact and all(g.get(where) >= value for where, value in form.match_min) and bool(form.match or form.match_min)


def _flagged(b: Behaviour, g: Guest) -> bool:
    return b.codec == "count_flag" and bool(g.get(f"arg{b.params['count']}") & int(b.params["flag"]))


def _count(b: Behaviour, g: Guest) -> int:
    value = g.get(f"arg{b.params['count']}")
    if b.codec == "count_flag":
        return value & MASK32 & ~int(b.params["flag"])
    return value & MASK32 if int(b.params.get("count_width", 32)) == 32 else value


def _total(b: Behaviour, g: Guest) -> int | None:
    if not b.total or not g.has(b.total):
        return None
    value = g.get(b.total)
    if b.params.get("total_is") == "last":
        return value - g.get(where_of(str(b.params["base"]))) + 1
    return value


def _index(call: Hypercall, b: Behaviour, g: Guest) -> int:
    """Return the progress that the handler reads where it keeps an index of its own; else 0."""
    p = b.params
    if b.codec in ("shifted_index", "masked_offset"):
        value = g.get(f"arg{p['arg']}")
        if call.dispatch is not None and f"arg{p['arg']}" == call.command_at:
            value = _word(call.dispatch, value)
        return value >> int(p["shift"]) if b.codec == "shifted_index" else value & ~int(p["mask"]) & MASK64
    if b.codec == "guest_structure" and p.get("index"):
        value = g.get(where_of(str(p["index"])))
        if p.get("base"):
            base = g.get(where_of(str(p["base"])))
            return (value or base) - base
        return value
    return 0


def _far(b: Behaviour, g: Guest) -> bool:
    """Say whether the work begins at the far end."""
    if b.order != "descending":
        return False
    for clause in (b.order_when or "").split(" and ") if b.order_when else ():
        left, sign, *right = clause.split()
        total = sum(g.get(t) for t in right[::2])
        if not (g.get(left) > total if sign == ">" else g.get(left) < total):
            return False
    return True
