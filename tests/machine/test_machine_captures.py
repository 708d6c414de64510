"""The machine leaves what real releases left: every call of samples/bare is executed, preempted where Xen preempted it."""

from __future__ import annotations

import copy
import errno
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from xtrace.machine.guest import Guest
from xtrace.machine.host import Entry, Host
from xtrace.machine.ongoing import Nested, Plain, Stop
from xtrace.replay import facts
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))

from test_captures import FILES, stitched  # noqa: E402

MULTICALL = 13
MEMORY_OP = 12

#: Units of a list whose end only its contents tell (set_trap_table: an entry of zeroes).
OPEN_END = 1 << 16

#: Pairs of XENMEM_exchange that the 32-bit layer does at once, where the orders are equal.
BATCH = 507

#: file -> least number of states left alike by a call inside a multicall
LEAST = {
    "bare-3.4.0-rc3": 57,
    "bare-4.1.6.1": 270,
    "bare-4.4.4": 277,
    "bare-4.13.5": 146,
    "bare-4.17.7": 192,
    "bare-4.22.0": 168,
    "bare-pdone-4.17.7": 143,
    "barehvm64-4.17.7": 66,
    "bare32-3.4.0-rc3": 72,
    "bare32-4.4.4": 145,
    "bare32-4.13.5": 142,
    "bare32-pdone-4.4.4": 146,
}


@dataclass
class Sample:
    """Registers and memory of the stopped vCPU, and the progress that the table reads in them (None: a special form)."""

    line: int
    args: list[int | None]
    memory: dict[str, int]
    progress: int | None


@dataclass
class Call:
    """One call of a capture: as issued, the states in which it was seen stopped, what it returned."""

    version: str
    op: int
    caller: str
    args: list[int]
    result: int | None
    samples: list[Sample] = field(default_factory=list)


@cache
def calls(name: str) -> tuple[Call, ...]:
    """Return every call of a file that was seen stopped, with its samples in order."""
    version, _, entries, rows = stitched(name)
    returned = dict(entries.filter(pl.col("kind") == "return").select("call", "result").iter_rows())
    out: dict[int, Call] = {}
    for (op, caller), part in rows.sort("seq").group_by("op", "caller", maintain_order=True):
        read = Hypervisor(version, str(caller)).decode(
            int(str(op)), States.from_frame(part), States.from_frame(part, prefix="issued_")
        )
        for i, row in enumerate(part.iter_rows(named=True)):
            call = out.get(row["call"])
            if call is None:
                args = [row[f"issued_arg{k}"] or 0 for k in range(6)]
                call = out[row["call"]] = Call(version, row["op"], row["caller"], args, returned.get(row["call"]))
            memory = {m["field"]: m["value"] for m in row["memory"] or ()}
            plain = read.special[i] < 0
            assert not plain or read.progress.known[i]
            call.samples.append(
                Sample(row["line"], [row[f"arg{k}"] for k in range(6)], memory, int(read.progress.value[i]) if plain else None)
            )
    return tuple(out.values())


def guest(op: int, caller: str, args: list[int], memory: dict[str, int]) -> Guest:
    """Return a guest in the call that these registers make."""
    g = Guest(caller, "control", op, "?", OPEN_END, list(args), dict(memory))
    g.origin = {f"arg{k}": v for k, v in enumerate(args)} | {f"mem.{k}": v for k, v in memory.items()}
    return g


def issued(call: Call) -> Guest:
    """Return the call as made. Its structure was recorded at the samples only; what Xen writes there was 0 before."""
    memory = {k: v for k, v in call.samples[0].memory.items() if not k.startswith("entry.")}
    b = behaviour(call.version, call.op, call.caller, call.args)
    written = {str(b.params[k]).removeprefix("mem.") for k in ("index", "done") if b.params.get(k)}
    assert not b.params.get("advance")
    return guest(call.op, call.caller, call.args, {k: 0 if k in written else v for k, v in memory.items()})


def behaviour(version: str, op: int, caller: str, args: list[int]) -> Any:
    call = facts.lookup(version, caller, op)
    number = 0 if call.dispatch is None else args[0] & call.dispatch.mask
    return call.by_number.get(number) or next(iter(call.by_number.values()))


def differs(e: Entry, g: Guest, s: Sample) -> str | None:
    """Say in what the machine's state is not the one that was seen."""
    if e.kind != "preempted":
        return f"line {s.line}: {e.kind} {e.errno or ''} {e.why} after {e.done}"
    for k, was in enumerate(s.args):
        if was is not None and was != g.args[k]:
            return f"line {s.line}: arg{k} is {g.args[k]:#x}, was {was:#x}"
    for name, value in s.memory.items():
        if name in g.memory and g.memory[name] != value:
            return f"line {s.line}: {name} is {g.memory[name]:#x}, was {value:#x}"
    return None


def follow(call: Call, seen: Counter[str]) -> list[str]:
    """Execute a call to its end, preempted at each sample; return what differs."""
    g, host, at = issued(call), Host(call.version), 0
    before: Sample | None = None
    forms = 0
    for s in call.samples:
        if s.progress is None:
            # All requests done, a page table still being dropped: the form is taken for what it is, as often as it is seen.
            e = host.enter(guest(call.op, call.caller, [a or 0 for a in s.args], s.memory))
            forms += 1
            if e.form is None or not e.form.creates or e.result != call.result:
                return [f"line {s.line}: {e}"]
            continue
        if forms:
            return [f"line {s.line}: went on after the form"]
        if before is not None and s.args == before.args and s.memory == before.memory and not again(call, g):
            # An event came in between the return to the guest and the instruction: nothing was executed.
            seen["seen twice"] += 1
            continue
        e = host.enter(g, s.progress - at)
        g.done.clear()
        bad = differs(e, g, s)
        if bad is not None:
            return [bad]
        seen["alike"] += 1
        at, before = s.progress, s
    seen["form"] += forms
    if forms:
        return []
    left = copy.deepcopy(g)
    e = host.enter(g)
    result = value(e)
    if result != call.result and e.handler == "XENMEM_exchange" and call.caller == "pv32":
        result = second_batch(call, left)
        seen["second batch"] += 1
    return [] if result == call.result else [f"line {call.samples[-1].line}: {e.kind} {result}, was {call.result}"]


def value(e: Entry) -> int | None:
    """Return what the caller gets."""
    return -int(getattr(errno, e.errno[1:])) if e.errno else e.result


def second_batch(call: Call, g: Guest) -> int | None:
    """Go on to the end of the batch into which the 32-bit layer cuts the lists; it passes what was done in the command too."""
    host = Host(call.version)
    assert host.enter(g, BATCH).kind == "preempted"
    d = facts.lookup(call.version, call.caller, call.op).dispatch
    assert d is not None
    assert d.shift is not None
    g.put("arg0", g.get("arg0") | g.get("mem.nr_exchanged") << d.shift)
    return value(host.enter(g))


def again(call: Call, g: Guest) -> bool:
    """Say whether the release looks for an event before the first unit of a re-entry."""
    return bool(behaviour(call.version, call.op, call.caller, g.args).first == 0)


@pytest.mark.parametrize("name", FILES)
def test_calls_leave_the_same_registers(name: str) -> None:
    seen: Counter[str] = Counter()
    bad = [text for call in calls(name) for text in follow(call, seen)]
    assert not bad, bad[:10]
    print(name, dict(seen))
    assert seen["seen twice"] <= 7
    assert seen["alike"] + seen["seen twice"] + seen["form"] == sum(len(c.samples) for c in calls(name)) == FILES[name][1]


def inside(s: Sample, caller: str) -> Plain:
    """Return the call that stands in the entry at the list pointer."""
    args = [s.memory[f"entry.arg{k}"] for k in range(6)]
    memory = {k.removeprefix("entry.memory."): v for k, v in s.memory.items() if k.startswith("entry.memory.")}
    g = guest(s.memory["entry.op"], caller, args, memory)
    g.inside = True
    return Plain(g, g.number, None)


def moved(version: str, before: Guest, after: Guest) -> int | None:
    """Return the units between two states of a call inside; None if the second is a special form."""
    b = behaviour(version, before.number, before.caller, before.args)
    xen = Hypervisor(version, before.caller)
    issued, then = States.of([before.args]), States.of([after.args])
    read = xen.decode(before.number, then, issued)
    if read.special[0] >= 0:
        return None
    if b.params.get("chunk"):
        # The count is that of the chunk of the 32-bit layer, see mmuext_op-32.toml; the pointer tells.
        at = f"arg{b.params['pointer']}"
        return (after.get(at) - before.get(at)) // int(b.params["size"])
    return int(read.progress.value[0]) - int(xen.decode(before.number, issued, issued).progress.value[0])


def begun(s: Sample) -> bool:
    """Say whether the entry at the list pointer was preempted itself: its result is the number it goes on as."""
    return bool(s.memory["entry.op"]) and s.memory["entry.op"] == s.memory["entry.result"]


@pytest.mark.parametrize("name", FILES)
def test_calls_inside_a_multicall(name: str) -> None:
    """A batch that was stopped twice at one entry: executed from the first state, the second is left."""
    alike = 0
    for call in calls(name):
        if call.op != MULTICALL:
            continue
        for a, b in pairwise(call.samples):
            if a.args != b.args or not begun(b) or a.memory == b.memory:
                continue
            sub, then = inside(a, call.caller), inside(b, call.caller)
            used = len(facts.lookup(call.version, call.caller, sub.op).parameters)  # what stands behind them means nothing
            where = f"line {b.line}"
            units = moved(call.version, sub.guest, then.guest)
            if units is None:
                e = Host(call.version).enter(then.guest)
                assert e.form is not None, where
                assert e.form.creates, where
                continue
            if sub.op == MEMORY_OP:
                sub.guest.memory["nr_extents"] = OPEN_END  # the structure of a call inside was not recorded
            whole = Nested(guest(MULTICALL, call.caller, [v or 0 for v in a.args], {}), [sub], MULTICALL)
            e = whole.enter(call.version, 0, Stop(units))
            assert (e.kind, e.done) == ("preempted", 0), where
            assert whole.guest.args == [v or 0 for v in b.args], where
            assert sub.guest.args[:used] == then.guest.args[:used], where
            alike += 1
    print("inside", name, alike)
    assert alike >= LEAST[name]
