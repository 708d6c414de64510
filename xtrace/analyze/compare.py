"""Two releases held against each other without a trace: what differs, and what becomes of a continuation in flight.

Every operation that may leave a continuation is preempted at representative points on one side and resumed on the other,
in both directions, by the same rules that judge a recorded one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from xtrace.analyze.exposure import BREAKS
from xtrace.analyze.representatives import Fate, fates
from xtrace.replay import facts
from xtrace.replay.codecs import codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xtrace.replay.behaviour import Behaviour, Dispatch, Hypercall

__all__ = (
    "ISSUER", "SEVERITY", "Change", "Difference", "as_dict", "breaks", "checks_text", "compare", "diff", "dispatch_text",
    "encoding_text", "limit_text", "severity", "specials_text",
)  # fmt: skip

#: Who issues an operation with a given guard, for judging: the least privileged that may.
ISSUER: Final = {"any": "guest", "device_model": "device_model", "control": "control"}

#: Outcomes from worst to best: silent damage before a refusal that the guest sees.
SEVERITY: Final = (
    "misdirected", "wrong_result", "skips", "redoes", "restarts", "lost", "absent", "refused", "undecidable", "unknown",
    "resumes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that differs between two releases, as text."""

    what: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """One operation of one caller at two releases: what differs, and the fate of its continuations each way."""

    caller: str
    hypercall: str
    operation: str | None  # None: how the hypercall's command word is split
    guard: str  # who may issue it: any, device_model, control
    differences: tuple[Difference, ...]
    forth: tuple[Fate, ...]
    back: tuple[Fate, ...]
    commits: tuple[str, ...]
    caveats: tuple[str, ...]


def breaks(some: Iterable[Fate]) -> bool:
    """Say whether any representative breaks (a harmless restart does not)."""
    return any(f.outcome in BREAKS and not (f.outcome == "restarts" and f.harmless) for f in some)


def severity(outcome: str, *, harmless: bool = False) -> int:
    """Return the place of an outcome among all, 0 the worst; a harmless one counts as a resume."""
    return SEVERITY.index("resumes" if harmless else outcome)


def _operations(call: Hypercall) -> dict[str, Behaviour]:
    """Return the operations that a hypercall has at its release, by Xen's name."""
    return {b.operation: b for b in call.by_number.values()} if call.status == "modelled" else {}


def diff(a: str, b: str, callers: Sequence[str], hypercalls: Sequence[int] | None = None) -> list[Change]:
    """Return every continuation that differs between two releases, or that one of them does not resume as its own.

    Args:
        a: one release.
        b: the other.
        callers: ABIs to look at.
        hypercalls: numbers to look at; None for all with facts.
    """
    numbers = facts.files() if hypercalls is None else hypercalls
    return [change for number in numbers for caller in callers for change in compare(a, b, caller, number)]


def compare(a: str, b: str, caller: str, number: int) -> list[Change]:
    """Return the changes of one hypercall for one caller."""
    here, there = facts.lookup(a, caller, number), facts.lookup(b, caller, number)
    if here.fingerprint == there.fingerprint:
        return []
    ours, theirs = _operations(here), _operations(there)
    out = []
    split = dispatch_text(here.dispatch), dispatch_text(there.dispatch)
    if split[0] != split[1] and None not in split:
        found = [Difference("dispatch", *split)]
        out.append(Change(caller, here.name, None, "any", tuple(found), (), (), (), ()))
    for name in dict.fromkeys([*ours, *theirs]):
        x, y = ours.get(name), theirs.get(name)
        if not any(_continues(k) for k in (x, y)):
            continue
        forth = () if x is None else _fates(a, b, caller, number, x)
        back = () if y is None else _fates(b, a, caller, number, y)
        found = _differences(here, there, x, y)
        # A fate that another host of the same release has in store too is no difference between releases.
        changed = any(
            k is not None and _kinds(away) != _kinds(_fates(r, r, caller, number, k))
            for k, away, r in ((x, forth, a), (y, back, b))
        )
        if found or changed:
            one = y or x
            assert one is not None
            guard = min((k.guard for k in (x, y) if k is not None), key=("any", "device_model", "control").index)
            commits = tuple(dict.fromkeys(k.commit for k in (y, x) if k is not None and k.commit))
            caveats = tuple(dict.fromkeys(c for k in (x, y) if k is not None for c in k.caveats))
            out.append(Change(caller, here.name, name, guard, tuple(found), forth, back, commits, caveats))
    return out


def _continues(b: Behaviour | None) -> bool:
    return b is not None and not b.never_left and (b.codec != "none" or any(form.creates for form in b.specials))


def _fates(source: str, target: str, caller: str, number: int, b: Behaviour) -> tuple[Fate, ...]:
    if b.codec == "unknown" or facts.lookup(target, caller, number).status == "unknown":
        return (Fate("unknown", False, None, 1, None, None, ()),)
    return tuple(fates(source, caller, number, b, target, ISSUER[b.guard]))


def _kinds(some: Iterable[Fate]) -> set[tuple[str, bool, str | None]]:
    return {(f.outcome, f.harmless, f.errno) for f in some}


def _differences(here: Hypercall, there: Hypercall, x: Behaviour | None, y: Behaviour | None) -> list[Difference]:
    if x is None or y is None:
        return [Difference("implemented", _presence(here, x), _presence(there, y))]
    out = []
    for what, before, after in (
        ("number", x.number, y.number),
        ("home", codec(x.codec).home, codec(y.codec).home),
        ("encoding", encoding_text(x), encoding_text(y)),
        ("unit", x.unit, y.unit),
        ("first", x.first, y.first),
        ("stride", x.stride, y.stride),
        ("limit", limit_text(x), limit_text(y)),
        ("past end", x.past_end, y.past_end),
        ("order", x.order, y.order),
        ("layout", x.params.get("layout"), y.params.get("layout")),
        ("commands inside", _inside(x), _inside(y)),
        ("checks", checks_text(here.dispatch, x), checks_text(there.dispatch, y)),
        ("guard", x.guard, y.guard),
        ("held", x.held, y.held),
        ("special forms", specials_text(x), specials_text(y)),
        ("breaks its own", x.breaks_own, y.breaks_own),
        ("caveats", ", ".join(x.caveats), ", ".join(y.caveats)),
    ):
        if before != after:
            out.append(Difference(what, _text(before), _text(after)))
    return out


def _presence(call: Hypercall, b: Behaviour | None) -> str:
    if b is not None:
        return "yes"
    return {"absent": "no: not in this caller's hypercall table", "unknown": "unknown"}.get(call.status, "no")


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def encoding_text(b: Behaviour) -> str:
    """Return in words where a behaviour keeps its progress n, and how."""
    p = b.params

    def moved() -> list[str]:
        out = []
        if p.get("pointer") is not None:
            out.append(f"arg{p['pointer']} + {p['size']}n")
        if p.get("count") is not None:
            flag = f" with flag {int(p['flag']):#x}" if p.get("flag") else ""
            width = f" ({p['count_width']} bits)" if p.get("count_width") else ""
            out.append(f"arg{p['count']} - n{flag}{width}")
        if p.get("done"):
            out.append(f"done count at {p['done']}")
        return out

    if b.codec == "shifted_index":
        return f"n in the bits of arg{p['arg']} from {p['shift']} up"
    if b.codec == "masked_offset":
        return f"n in the bits of arg{p['arg']} above {int(p['mask']):#x}, in steps of {int(p['mask']) + 1}"
    if b.codec in ("count_flag", "advanced"):
        return ", ".join(moved())
    if b.codec == "guest_structure":
        steps = [f"{name} + {_times(step)}n" for name, step in sorted(p.get("advance", {}).items())]
        steps += [f"{name} - {_times(step)}n" for name, step in sorted(p.get("reduce", {}).items())]
        if p.get("index"):
            steps = [f"{p['index']} = " + (f"{p['base']} + n" if p.get("base") else "n")]
        return ", ".join(steps)
    if b.codec == "redirect":
        to = [f"hypercall {p['to_hypercall']}"] if p.get("to_hypercall") is not None else []
        to += [f"operation {p['to_operation']}"] if p.get("to_operation") is not None else []
        return f"goes on as {' '.join(to)}"
    return {
        "none": "never continues",
        "hypervisor": "n inside Xen, registers as issued",
        "restart": "registers as issued",
    }.get(b.codec, b.codec)


def _times(step: int) -> str:
    return "" if step == 1 else str(step)


def dispatch_text(d: Dispatch | None) -> str | None:
    """Return in words how a release splits the command word."""
    if d is None:
        return None
    shift = "" if d.shift is None else f", progress from bit {d.shift}"
    sign = ", sign-extended" if d.sign_extend else ""
    mask = "" if d.mask.bit_length() >= d.width else f" & {d.mask:#x}"
    return f"command of {d.width} bits{mask}{shift}{sign}, no operation: {d.unmatched}"


def limit_text(b: Behaviour) -> str:
    """Return the largest total and progress; empty without any."""
    parts = []
    if b.max_total is not None:
        parts.append(f"total {b.max_total:#x}, more: {b.max_total_result}")
    if b.max_progress is not None:
        parts.append(f"progress {b.max_progress:#x}")
    return ", ".join(parts)


def checks_text(d: Dispatch | None, b: Behaviour | None) -> str:
    """Return the tests on entry, in Xen's order, those of the dispatch first."""
    out = []
    for c in (*(d.checks if d is not None else ()), *(b.checks if b is not None else ())):
        tests = [
            f"max {c.maximum:#x}" if c.maximum is not None else "",
            f"min {c.minimum:#x}" if c.minimum is not None else "",
            f"= {c.equals:#x}" if c.equals is not None else "",
            f"not {c.not_equals:#x}" if c.not_equals is not None else "",
            f"no bits of {c.zero_bits:#x}" if c.zero_bits else "",
        ]
        when = " when resumed" if c.resumed_only else ""
        out.append(f"{c.at} {' '.join(t for t in tests if t)}{when}: {c.errno}")
    return "; ".join(out)


def _inside(b: Behaviour) -> str:
    return ", ".join(f"{n} {name}" for n, name in sorted(b.inner_operations.items()))


def specials_text(b: Behaviour) -> str:
    """Return the register patterns with a meaning of their own."""
    return ", ".join(f"{s.name} ({'left, ' if s.creates else ''}{s.result})" for s in b.specials)


def as_dict(change: Change) -> dict[str, Any]:
    """Return a change as plain values, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Difference | Fate):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    out = {f.name: plain(getattr(change, f.name)) for f in fields(change)}
    for way in ("forth", "back"):
        for fate in out[way]:
            # Registers as hex text: 64 bits do not survive every JSON reader (docs/json.md).
            fate["args"] = [None if v is None else f"{v:#x}" for v in fate["args"]]
    return out
