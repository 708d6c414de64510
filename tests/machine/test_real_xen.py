"""The machine does what six real releases did with continuations that others left (samples/resume): 9,000 experiments.

Each row is built as a guest and executed once on the row's release. Compared are: refused or not and the errno, the value
returned, the items that this call did, the handler that was entered, and what the guest's memory holds.
"""

from __future__ import annotations

import errno as errnos
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xtrace.machine.guest import Done, Guest
from xtrace.machine.host import Entry, Host
from xtrace.machine.journey import Journey, verdict
from xtrace.machine.ongoing import Stop
from xtrace.replay import facts

sys.path.insert(0, str(Path(__file__).parent))

from real_xen import BASE, FAMILIES, MULTICALL, Row, batch, enter, guest, rows, sub_call  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Known:
    """A disagreement that is understood: rows by prefix of the id, what the hypervisor answered, why the machine cannot."""

    prefix: str
    real: str
    why: str
    callers: tuple[str, ...] = ("pv64", "pv32")


#: What the machine has no way to know: the rest of Xen, or of the structure.
KNOWN = (
    Known("mem-memory_map-", "-ENOSYS", "the handler itself: no map was set for that domain"),
    Known("mem-machphys_compat-", "-ENOSYS", "with 4 bits of command XENMEM_memory_map again: no map was set"),
    Known("mmuext-req", "-ENOSYS", "a request of the list whose own number the release does not know"),
    Known("mmuext-req", "-EOPNOTSUPP", "the same, as 4.13 calls it"),
    Known("mmuext-req17", "-EINVAL", "the request itself: its operand"),
    Known("mmu-list-count80000000-0", "-ESRCH", "names the caller by number as foreign domain"),
    Known("mmu-list-count80000000-ea", "-ESRCH", "names a foreign domain that does not exist"),
    Known("mmu-list-count80000000-ea", "-EINVAL", "names an owner of page tables that does not exist"),
    Known("mmuext-list-count80000000-0", "-ESRCH", "names the caller by number as foreign domain"),
    Known("mmuext-list-count80000000-ea", "-ESRCH", "names a foreign domain that does not exist"),
    Known("acq-", "-ESRCH", "resources of oneself are refused before the index is looked at"),
    Known("vcpu-14-v3", "-ENOENT", "the domain has no such vCPU, which is looked up before the command"),
    Known("evt-reset_cont_dom5000", "-ESRCH", "there is no such domain"),
    Known("evt14-dom5000", "-ESRCH", "there is no such domain"),
    Known("hvm-7-plain", "-ESRCH", "there is no domain 5000, which is looked up before the structure is tested"),
    Known("hvm-8-plain", "-ESRCH", "the same"),
    Known("h03-8", "-ESRCH", "the same; 3.3 and 3.4 would refuse the other layout"),
    Known("hd-domctl23", "-EINVAL", "the domain was not shut down for a soft reset"),
    Known("dmop-0bufs", "-ESRCH", "there is no domain 5000; without a buffer nothing names an operation"),
    Known("hc-41", "-EPERM", "a domain number of random bits"),
    Known("hc-49", "-EFAULT", "no structure where arg0 points"),
    Known("hc49-self-", "-ESRCH", "a domain cannot name itself here"),
    Known("gnt-copy-", "items", "a 32-bit copy that goes well leaves 0 in a status that was 0", ("pv32",)),
)

#: Operations whose rows have contents of which every item can be done.
SOUND = {*FAMILIES.values(), "XENMEM_acquire_resource", "mmu_update", "mmuext_op"}

#: Comparisons that there must be at least.
LEAST = {
    "errno": 5300,
    "value": 1750,
    "items": 1200,
    "success": 1150,
    "handler": 950,
    "as without bits": 390,
    "preempted": 470,
    "counter": 270,
    "counters": 108,
    "outcome": 950,
    "right": 32,
    "wrong": 32,
    "result": 200,
}

BITS = re.compile(r"-(plain|b\d+(-\d+)?)$")


@dataclass
class Answer:
    """One row, what the machine did with it, and in what they differ."""

    row: Row
    entry: Entry | None
    compared: list[str] = field(default_factory=list)
    differ: list[tuple[str, str]] = field(default_factory=list)  # (what the hypervisor answered, sentence)

    def same(self, what: str, machine: object, real: object, answer: str = "") -> None:
        """Compare one thing."""
        self.compared.append(what)
        if machine != real:
            self.differ.append((answer or what, f"{what}: the machine says {machine}, {self.row.target} {real}"))


def signed(r: Row) -> int:
    """Return the answer; 3.3 and 3.4 return some errors as unsigned 32 bits."""
    return r.ret - (1 << 32) if r.errno is not None and r.ret > 1 << 31 else r.ret


def judge(r: Row) -> Answer:
    """Execute one row and compare."""
    if r.op == MULTICALL:
        return judge_batch(r)
    g, e = enter(r)
    out = Answer(r, e)
    call = facts.lookup(r.version, r.caller, r.op)
    if r.family == "stat":
        return out  # statistics over many calls
    if e.kind == "unknown" or call.status == "never":
        return out
    if e.kind == "refused":
        out.same("errno", e.errno, r.errno, r.errno or "")
    elif e.kind == "returned" and e.why:
        out.same("value", e.result or 0, signed(r), r.errno or "")
    elif r.id.startswith("xchg") and r.errno is not None and r.items:
        split_inside(out)
    else:
        own = r.items is not None and e.handler in SOUND | {FAMILIES.get(r.family)}
        if e.kind == "stopped":
            out.same("errno", e.errno, r.errno, r.errno or "")
        elif own or r.errno == "-ENOSYS":
            out.same("success", None, r.errno, r.errno or "")
        if own and r.errno is None:
            out.same("value", e.result, r.ret)
        items(out, g, e)
    handler(out, e)
    return out


def items(out: Answer, g: Guest, e: Entry) -> None:
    """Compare what was done: items, the guest's own counter, or what stands in its memory afterwards."""
    r = out.row
    assert e.kind in ("returned", "stopped")
    if r.items is None or r.errno not in (None, e.errno):
        return
    if "overlap" in r.id or "relocate" in r.id:
        moved(out)
    elif "pdone" in r.after:
        out.same("counter", g.get("mem.pdone"), r.after["pdone"])
    elif "modmem-opaque256" in r.id:
        pages = (1, 1, 1000)  # of the three extents; of the one in hand 256 pages are done
        out.same("items", sum(pages[: e.done]) - r.before["opaque"], r.items)
    elif "pfinfo3" in r.id and r.caller == "pv32":
        out.same("items", e.done, r.items * 2)  # seen in slots of 8 bytes, where its entries have 4
    else:
        out.same("items", e.done, r.items)


def moved(out: Answer) -> None:
    """Move pages in the machine's order and compare where each of them stands in the end."""
    r = out.row
    top, size = "top" in r.id, r.before["size"]
    done = r.before.get("really_moved_before", 16)
    if "relocate" in r.id:
        size += done
        first, to = BASE, BASE + (128 if top else 0x1000)
    else:
        first, to = BASE + int(r.before["idx"][2:], 0), BASE + int(r.before["gpfn"][2:], 0)
    pages = {first + i: i for i in range(size)}

    def move(i: int) -> None:
        page = pages.pop(first + i, None)
        if page is not None:
            pages[to + i] = page

    for i in range(size - 1, size - 1 - done, -1) if top else range(done):
        move(i)
    g, _ = enter(r)
    below = done if "relocate" in r.id and not top else 0  # the structure was advanced
    for d in g.done:
        move(d.place + below)
    out.same("right", spans(i for i in range(size) if pages.get(to + i) == i), str(r.after["dest_right"]))
    out.same("wrong", spans(i for i in range(size) if pages.get(to + i, i) != i), str(r.after["dest_wrong_page"]))


def spans(numbers: Iterable[int]) -> str:
    """Write numbers as the rows do: ``0-15,80-111``."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out) or "none"


def split_inside(out: Answer) -> None:
    """Xen went on with its own continuation, unseen by the guest: the machine, left and entered again there, does the same."""
    r = out.row
    g, host = guest(r), Host(r.version)
    first = host.enter(g, r.items)
    out.same("items", (first.kind, first.done), ("preempted", r.items))
    # A 32-bit list is cut into batches; the second is called with what was done in the command word too.
    d = facts.lookup(r.version, r.caller, r.op).dispatch
    assert d is not None
    assert d.shift is not None
    g.put("arg0", g.get("arg0") | g.get("mem.nr_exchanged") << d.shift)
    out.same("errno", host.enter(g).errno, r.errno)


def handler(out: Answer, e: Entry) -> None:
    """Compare what became of a reservation with the recorder's sentence."""
    r = out.row
    own = FAMILIES.get(r.family)
    done = r.before.get("really_done_before")
    if own not in list(FAMILIES.values())[:3] or done is None:
        return
    start = e.start if e.start is not None else -1
    says = {
        "misdirected": e.handler not in (None, own),
        "refused as unknown": e.why == "unmatched",
        "start beyond the list": e.why == "limit",
        "nothing left": e.handler == own and e.done == 0,
        "resumed": e.handler == own and start == done,
        "redone": e.handler == own and start < done,
        "started again": e.handler == own and start < done,
        "begun": e.handler == own and start < done,
        "only": e.handler == own and start > done,
        "released": e.handler == own and start > done,
    }
    phrase = next((p for p in says if r.said.startswith(p)), None)
    out.same("handler", phrase is not None and says[phrase], True)
    real = OUTCOMES.get(phrase or "", "restarts" if start == 0 else "redoes")
    if phrase == "start beyond the list" and done == r.before["nr_extents"]:
        real = "resumes"  # 0 extents not released
    out.same("outcome", outcome(r, own, done), real)


#: What the recorder's sentences are called; the others begin too early: redoes, or restarts from 0.
OUTCOMES = {
    "misdirected": "misdirected",
    "refused as unknown": "refused",
    "start beyond the list": "skips",
    "nothing left": "resumes",
    "resumed": "resumes",
    "only": "skips",
    "released": "skips",
}


def outcome(r: Row, own: str, done: int) -> str:
    """Return the outcome of the call of which the source had done so much, whatever became of the frames."""
    g = guest(r)
    g.stops, g.total = {}, r.before["nr_extents"]
    g.number_left = g.args[0] & 0xF
    g.done = [Done(own, k, 1) for k in range(done)]
    before = Entry(1, "source", "preempted", number=g.number_left, handler=own, done=done)
    return verdict(Journey(g, [before, Host(r.version).enter(g)], [])).outcome


def result_of(entry: Entry) -> int:
    """Return what an entry of a multicall holds as its result."""
    if entry.errno is not None:
        return -int(getattr(errnos, entry.errno[1:]))
    return entry.result or 0


def judge_batch(r: Row) -> Answer:
    """Execute a multicall with what is known of its entries."""
    out = Answer(r, None)
    results = r.after.get("results", [])
    if r.family == "stat":
        return out
    if r.id.startswith(("mc-mmuext", "mc1-mmuext")):
        lists(out)
        return out
    inner = []
    if "args0" in r.before:
        g = sub_call(r, r.before["op"], [int(r.before["args0"], 0), 0x1000], {"nr_extents": r.before["nr_extents"]})
        if "dec" in r.id:
            g.guest.stops = dict.fromkeys(range(r.before["really_done_before"]), "progress")
        inner, results = [g], results[1:]
    elif r.id == "mc-null-forms":
        wide = (1 << (64 if r.caller == "pv64" else 32)) - 22
        inner = [sub_call(r, op, [0, 1 << 31, 0, arg3]) for op in (26, 1) for arg3 in (0, 0xFFFFFFEA, wide)]
    elif r.id == "c02-mc-grant600":
        inner, results = [sub_call(r, 20, [0, 0x1000, 600])], results[1:]
    elif r.id == "c01-mc-mmu":
        inner = [sub_call(r, 1, [0x1000, 1 << 31 | 4, 0x2000, 0x7FF0], {"pdone": r.before["pdone"]})]
    whole = batch(r, inner)
    e = out.entry = whole.enter(r.version, 0, None)
    out.same("value", (e.kind, e.result), ("returned", r.ret))
    for k in range(len(inner)):
        wide = results[k] - (1 << 32) if results[k] > 1 << 31 else results[k]  # as in signed()
        out.same("result", result_of(whole.results[k]), wide)
    if r.items is not None and r.id.startswith(("mc-", "c0")) and inner and inner[0].op != 1:
        out.same("items", whole.results[0].done, r.items)
    if r.id == "c01-mc-mmu":
        out.same("counter", inner[0].guest.memory["pdone"], r.after["pdone"])
    return out


def lists(out: Answer) -> None:
    """A multicall of mmuext_op lists, each preempted by the hypervisor's own work where the rewritten entry says."""
    r = out.row
    one = "count" in r.before
    n = r.args[1]
    count = r.before["count"] if one else r.before["count_each"]
    done = [r.after["pdone"]] if one else r.after["pdone"]
    args1 = [int(v, 0) for v in ([r.after["args1_now"]] if one else r.after["args1_now"])]
    inner = [sub_call(r, 26, [0x10000 * (k + 1), count, 0x1000, 0x7FF0], {"pdone": 0}) for k in range(n)]
    whole = batch(r, inner)
    for k, left in enumerate(args1):
        if left & 1 << 31:
            e = whole.enter(r.version, 0, Stop(done[k] - (left & 0x7FFFFFFF), k - whole.guest.shift))
            out.same("preempted", (e.kind, inner[k].guest.args[1]), ("preempted", left))
    e = out.entry = whole.enter(r.version, 0, None)
    out.same("value", (e.kind, e.result), ("returned", r.ret))
    out.same("counters", [c.guest.memory["pdone"] for c in inner], done)
    out.same("items", sum(c.guest.memory["pdone"] for c in inner), r.items)


@cache
def answers() -> tuple[Answer, ...]:
    out = [judge(r) for r in rows()]
    # A call with stray bits that the machine takes for the one without them got the same answer.
    plain = {(a.row.target, a.row.caller, a.row.op, BITS.sub("", a.row.id)): a for a in out if a.row.id.endswith("-plain")}
    for a in out:
        r, e = a.row, a.entry
        p = plain.get((r.target, r.caller, r.op, BITS.sub("", r.id)))
        if p is None or p is a or e is None or p.entry is None or e.kind != "returned" or p.entry.kind != "returned":
            continue
        if (e.handler, e.start, e.why) == (p.entry.handler, p.entry.start, p.entry.why):
            a.same("as without bits", p.row.ret, r.ret)
    return tuple(out)


def excused(a: Answer) -> Known | None:
    """Return the exception that covers a disagreement."""
    return next(
        (
            k
            for k in KNOWN
            if a.row.id.startswith(k.prefix) and a.row.caller in k.callers and all(real == k.real for real, _ in a.differ)
        ),
        None,
    )


FAMILY = sorted({(r.op, r.family) for r in rows()})


@pytest.mark.parametrize(("op", "family"), FAMILY)
def test_family(op: int, family: str) -> None:
    bad = [a for a in answers() if (a.row.op, a.row.family) == (op, family) and a.differ and excused(a) is None]
    assert not bad, "\n".join(f"{a.row.target} {a.row.caller} {a.row.id}: {s}" for a in bad[:10] for _, s in a.differ)


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: f"{k.prefix}{k.real}")
def test_exceptions_are_still_needed(known: Known) -> None:
    assert any(a.differ and excused(a) is known for a in answers())


def test_how_much_was_compared() -> None:
    """At least so many rows, and so many comparisons of each kind; printed by family with -s."""
    compared: dict[str, Counter[str]] = {}
    for a in answers():
        compared.setdefault(f"{a.row.op}/{a.row.family}", Counter()).update(a.compared or ["entered"])
    for name, counts in sorted(compared.items(), key=lambda kv: int(kv[0].split("/")[0])):
        print(f"{name:14} {', '.join(f'{what} {n:,}' for what, n in sorted(counts.items()))}")
    total = Counter[str]()
    for counts in compared.values():
        total.update(counts)
    print(dict(total))
    assert len(answers()) > 9000
    for what, least in LEAST.items():
        assert total[what] >= least, what
