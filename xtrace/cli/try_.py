"""``xtrace try``: one call's fate, step by step, on its own release and on another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xtrace.machine.guest import Guest
    from xtrace.machine.host import Entry
    from xtrace.machine.journey import Verdict

NAME = "try"

_REGISTERS = {
    "wide": ("rdi", "rsi", "rdx", "r10", "r8", "r9"),
    "narrow": ("ebx", "ecx", "edx", "esi", "edi", "ebp"),
    "arm": ("r0", "r1", "r2", "r3", "r4", "r5"),
}


def command(
    hypercall: Annotated[str, typer.Argument(metavar="HYPERCALL", help="Name or number.")],
    operation: Annotated[str | None, typer.Argument(metavar="[OPERATION]", help="Xen's constant or its number.")] = None,
    source: Annotated[str, typer.Option("--from", metavar="RELEASE", help="Release on which the call is made.")] = "",
    to: Annotated[str, typer.Option("--to", metavar="RELEASE", help="Release on which it goes on.")] = "",
    total: Annotated[
        int, typer.Option("--total", "--extents", "--pages", "--entries", "--items", metavar="N", help="Units asked for.")
    ] = 64,
    at: Annotated[int, typer.Option("--preempt-at", metavar="K", help="Units after which an event is pending.")] = 1,
    again: Annotated[
        int | None, typer.Option("--preempt-again", metavar="K", help="Units after which it is preempted once more, on the target.")
    ] = None,
    caller: Annotated[str, typer.Option("--caller", metavar="KIND", help="Caller ABI.")] = "pv64",
    issuer: Annotated[str | None, typer.Option("--issuer", metavar="WHO", help="guest, device_model or control.")] = None,
    overlapping: Annotated[
        bool, typer.Option("--overlapping", help="Where the order of the work hangs on the operands: let the ranges overlap.")
    ] = False,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Make a call on one release, preempt it, let it go on there and on another, and show what was done to each unit.

    Derived by executing the modelled hypervisor, not from the tables that ``decode`` and ``analyze`` use.

    Exit status: 0 the target finishes it as the source would, 8 it does not, 4 not known.
    """
    from xtrace.analyze.compare import ISSUER
    from xtrace.analyze.single import hypercall_number
    from xtrace.cli import common
    from xtrace.errors import UsageError
    from xtrace.machine.guest import issue
    from xtrace.machine.journey import travel, verdict
    from xtrace.replay import facts

    form = common.choose_format(format_)
    (kind,) = common.callers([caller])
    if not source or not to:
        raise UsageError(f"{'--from' if not source else '--to'} is missing")
    if total < 1 or at < 0:
        raise UsageError("--total is 1 or more, --preempt-at 0 or more")
    a, b = common.one_release(source, "--from"), common.one_release(to, "--to")
    call = facts.lookup(a, kind, hypercall_number(hypercall))
    if call.status != "modelled":
        raise UsageError(f"{call.why or call.name + ' leaves no continuation at ' + a}")
    behaviour = _operation(call, operation, a)
    who = issuer or ISSUER[behaviour.guard]
    if who not in ISSUER.values():
        raise UsageError(f"no issuer is called {who!r}; there are {', '.join(ISSUER.values())}")

    def run(stops: list[tuple[str, int | None]]) -> Any:
        return travel(issue(call, behaviour, total, who, swapped=overlapping), stops)

    more = [] if again is None else [again]
    own = run([(a, at), *((a, k) for k in more), (a, None)])
    there = run([(a, at), *((b, k) for k in more), (b, None)])
    issued = issue(call, behaviour, total, who, swapped=overlapping)
    used = len(call.parameters) or 6
    left = len(own.entries) > 1
    answer = verdict(there) if left else None
    if form == "json":
        print(json.dumps(_document(a, b, kind, who, behaviour.operation, total, issued, own, there, answer), indent=1))
    else:
        _text(a, b, kind, who, call.name, behaviour, total, issued, own, there, answer, used)
    if answer is None or (answer.outcome == "resumes") or answer.harmless:
        return 0
    return 4 if answer.outcome == "unknown" else 8


def _operation(call: Any, text: str | None, release: str) -> Any:
    """Find the operation named."""
    import difflib

    from xtrace.errors import UsageError

    if not call.command:
        return next(iter(call.by_number.values()))
    names = {b.operation: b for b in call.by_number.values()}
    if text is None:
        raise UsageError(f"{call.name} needs an operation; at {release} there are {', '.join(names)}")
    if text in names:
        return names[text]
    if text.isdigit() and int(text) in call.by_number:
        return call.by_number[int(text)]
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{call.name} has no operation {text!r} at {release}{hint}")


def _registers(g: Guest, used: int = 6) -> list[str]:
    names = _REGISTERS["arm" if g.caller.startswith("arm") else "narrow" if g.bits == 32 else "wide"]
    return [f"{n} {v:#x}" for n, v in zip(names[:used], g.args, strict=False)] + [f"{k} {v:#x}" for k, v in g.memory.items()]


def _changes(before: Guest, after: Guest) -> str:
    old, new = _registers(before), _registers(after)
    changed = [b for b in new if b not in old]
    number = [f"hypercall {after.number}"] if after.number != before.number else []
    return ", ".join([*number, *changed]) or "nothing changed"


def _entry(e: Entry, total: int) -> list[str]:
    """Say what one execution came to."""
    if e.kind == "unknown":
        return ["not known"]
    if e.why == "absent":
        return [f"reaches {e.handler}" if e.handler else "not in the hypercall table", e.errno or ""]
    lines = [f"enters {e.handler}" if e.handler else f"number {e.number}: no operation"]
    if e.form is not None:
        lines.append(f"takes it for: {e.form.meaning or e.form.name}")
    elif e.kind != "refused" and e.why != "check":
        lines.append(f"takes {e.start or 0} for done, does {e.done}")
    if e.kind == "refused":
        lines.append(f"ends with {e.errno}")
    elif e.kind == "preempted":
        lines.append("preempted")
    else:
        lines.append(f"returns {e.result if e.result is not None else 0}")
    return lines


def _text(
    a: str, b: str, caller: str, issuer: str, name: str, behaviour: Any, total: int, issued: Guest, own: Any, there: Any,
    answer: Verdict | None, used: int,
) -> None:  # fmt: skip
    import textwrap

    from xtrace.cli.common import wrap

    unit = behaviour.unit or "units"
    title = name if behaviour.operation == name else f"{name} {behaviour.operation}"
    print(wrap(f"{title}: {total} {unit}, {caller}, issued by {issuer}", "", "  "))
    print(wrap(f"issued: {', '.join(_registers(issued, used))}", "  ", "    "))
    first = own.entries[0]
    print(wrap(f"{a}: {'; '.join(t for t in _entry(first, total) if t)}", "  ", "    "))
    if len(own.entries) == 1:
        print("  It is not preempted there: no continuation is left.")
        return
    print(wrap(f"left: {_changes(issued, own.after[0])}", "  ", "    "))
    width = 37
    print(f"\n  {'goes on at ' + a:{width}}  goes on at {b}")
    for k in range(1, max(len(own.entries), len(there.entries))):
        columns = []
        for j in (own, there):
            lines: list[str] = []
            if k < len(j.entries):
                for text in _entry(j.entries[k], total):
                    lines += textwrap.wrap(text, width) if text else []
                if j.entries[k].kind == "preempted":
                    lines += textwrap.wrap(f"left: {_changes(j.after[k - 1], j.after[k])}", width)
            columns.append(lines)
        for i in range(max(map(len, columns))):
            left, right = (c[i] if i < len(c) else "" for c in columns)
            print(f"  {left:{width}}  {right}".rstrip())
    for j, release in ((own, a), (there, b)):
        print(wrap(f"{release}: {_tally(j.guest, unit)}", "  ", "    "))
    assert answer is not None
    errno = f", {answer.errno}" if answer.errno else ""
    print(f"\n{answer.outcome}{' (harmless)' if answer.harmless else ''}{errno}")


def _tally(g: Guest, unit: str) -> str:
    counts = g.counts()
    once, twice = (sum(1 for n in counts.values() if (n == 1 if k == 1 else n > 1)) for k in (1, 2))
    never = sum(1 for n in counts.values() if n == 0)
    other = sum(1 for d in g.done if d.operation != g.operation)
    parts = [f"{once} {unit} done once"]
    parts += [f"{twice} more than once"] if twice else []
    parts += [f"{never} never ({_ranges([p for p, n in counts.items() if n == 0])})"] if never else []
    parts += [f"{other} done by another operation"] if other else []
    return ", ".join(parts)


def _ranges(places: list[int]) -> str:
    """Return ``5–19, 30``, shortened."""
    out: list[list[int]] = []
    for p in places:
        if out and out[-1][1] == p - 1:
            out[-1][1] = p
        else:
            out.append([p, p])
    text = [str(x) if x == y else f"{x}–{y}" for x, y in out[:4]]
    return ", ".join(text) + (", …" if len(out) > 4 else "")


def _document(
    a: str, b: str, caller: str, issuer: str, operation: str, total: int, issued: Guest, own: Any, there: Any,
    answer: Verdict | None,
) -> dict[str, Any]:  # fmt: skip
    def entry(e: Entry) -> dict[str, Any]:
        return {
            "release": e.release, "kind": e.kind, "handler": e.handler, "number": e.number, "start": e.start, "done": e.done,
            "result": e.result, "errno": e.errno, "why": e.why or None,
        }  # fmt: skip

    def state(g: Guest) -> dict[str, Any]:
        return {"hypercall": g.number, "args": [f"{v:#x}" for v in g.args], "memory": {k: f"{v:#x}" for k, v in g.memory.items()}}

    def side(j: Any) -> dict[str, Any]:
        counts = j.guest.counts()
        return {
            "entries": [entry(e) for e in j.entries],
            "states": [state(g) for g in j.after],
            "never": [p for p, n in counts.items() if n == 0],
            "twice": [p for p, n in counts.items() if n > 1],
        }

    return {
        "source": a, "target": b, "caller": caller, "issuer": issuer, "operation": operation, "total": total,
        "issued": state(issued), "at_source": side(own), "at_target": side(there),
        "outcome": None if answer is None else answer.outcome, "errno": None if answer is None else answer.errno,
        "harmless": None if answer is None else answer.harmless,
    }  # fmt: skip
