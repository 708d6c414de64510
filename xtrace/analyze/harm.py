"""Harm in words: what was half done, what is done twice or never, what the caller sees, what may be damaged.

One or two sentences for a finding, made of what the finding holds (outcome, errno, progress at both ends), of what the fact
files say of the operation at both releases (unit, whether doing it again is harmless, what Xen holds inside and what becomes
of it, the structure that it reads) and of ``harm.toml`` (what the operation does to a unit). What none of them says is not
said, and that it is not known is said.

Made on demand, one finding at a time, for reports: nothing of it is on the way from a trace to findings.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xtrace.replay.behaviour import Behaviour

__all__ = ("CAVEATS", "Nature", "nature", "natures", "sentence")


#: What each caveat means for a call that goes on.
CAVEATS: Final = {
    "machine_frames": "its operands are machine frames of the old host: on another host the same numbers are other memory",
    "domids": "it names a domain by number, which may be another domain, or none, after the move",
}


@dataclass(frozen=True, slots=True)
class Nature:
    """What an operation does to a unit; see ``harm.toml``."""

    did: str = "done"
    do: str = "do"
    undone: str = ""
    cite: tuple[str, ...] = ()


@cache
def natures() -> dict[str, Nature]:
    """Return hypercall, or hypercall/sub-operation -> nature."""
    text = resources.files("xtrace.analyze").joinpath("harm.toml").read_text("utf-8")
    return {key: Nature(**{**row, "cite": tuple(row["cite"])}) for key, row in tomllib.loads(text).items()}


def nature(hypercall: str, subop: str | None) -> Nature:
    """Return what is known of an operation; the plainest words if nothing is."""
    known = natures()
    return known.get(f"{hypercall}/{subop}") or known.get(hypercall) or Nature()


@dataclass(frozen=True, slots=True)
class _Sides:
    """The operation as the source and as the target knows it; None where it does not."""

    nature: Nature
    source: Behaviour | None
    target: Behaviour | None


@lru_cache(maxsize=4096)
def _sides(
    source: str, target: str, caller: str, hypercall: str, subop: str | None, there: str | None, there_subop: str | None
) -> _Sides:
    return _Sides(
        nature(hypercall, subop), _behaviour(source, caller, hypercall, subop), _behaviour(target, caller, there, there_subop)
    )


@cache
def _numbers() -> dict[str, int]:
    return {name: number for number, name in facts.hypercall_names().items()}


def _behaviour(release: str, caller: str, hypercall: str | None, subop: str | None) -> Behaviour | None:
    number = _numbers().get(hypercall or "")
    if number is None:
        return None
    call = facts.lookup(release, caller, number)
    # The number inside a structure is named after the operation: XENMEM_access_op/XENMEM_access_op_set_access.
    own = (subop or call.name).partition("/")[0]
    return call.behaviour(own) or (None if call.command else next(iter(call.by_number.values()), None))


@dataclass(frozen=True, slots=True)
class _Told:
    """A finding's own numbers, of the call inside a multicall where there is one."""

    row: Mapping[str, Any]
    sides: _Sides
    read: Mapping[str, Any]
    there: Mapping[str, Any]
    nested: bool

    @property
    def target(self) -> str:
        """Name the release whose word it is."""
        targets = self.row["targets"]
        return str(targets[0]) if len(targets) == 1 else "the target"

    @property
    def who(self) -> str:
        return "that entry of the multicall gets" if self.nested else "the caller gets"

    def units(self, n: int | None, *, of: bool = False) -> str:
        """Return a number of units in words."""
        unit, total = self.read["unit"] or "units", self.read["total"]
        if n is None:
            return f"an unknown number of {unit}"
        if of and total is not None and total >= n:
            return f"{n:,} of {total:,} {unit}"
        return f"{n:,} {unit if n != 1 else _one(unit)}"

    def done(self) -> str:
        """Return what was done before the preemption, as a clause."""
        did, n = self.sides.nature.did, self.read["progress"]
        a = self.sides.source
        if a is not None and a.codec == "hypervisor":
            return "part of the work may have been done inside the source's Xen"
        if self.read["unit"] is None or (a is not None and a.codec == "restart"):
            return "the call had begun"
        if n == 0:
            return f"no {_one(self.read['unit'])} was {did} yet"
        return f"{self.units(n, of=True)} {_was(n)} {did}"

    def left(self) -> str:
        """Return what becomes of what was not done, as a clause that follows ``done``; empty if nothing is known."""
        n, undone = self.read["remaining"], self.sides.nature.undone
        if n == 0 or self.read["unit"] is None:
            return ""
        if self.read["progress"] == 0:
            count = "all of them" if n is None else self.units(n)
        elif self.read["progress"] is None:
            count = "the rest" if n is None else f"the {n:,} that {_is(n)} left"
        else:
            count = "the rest" if n is None else "the other one" if n == 1 else f"the other {n:,}"
        # The words in parentheses are of several units.
        return f"; {count} {_is(n)} not" + (f" ({undone})" if undone and n != 1 else "")


def _one(unit: str) -> str:
    """Return the singular of a unit, of which some are phrases."""
    head, space, rest = unit.partition(" ")
    if unit.startswith("grant references"):
        return unit.replace("references", "reference", 1)
    singular = {"entries": "entry"}.get(head, head.removesuffix("s"))
    return singular + space + rest


def _was(n: int | None) -> str:
    return "was" if n == 1 else "were"


def _is(n: int | None) -> str:
    return "is" if n == 1 else "are"


def sentence(row: Mapping[str, Any]) -> str:
    """Return the harm of one finding.

    Args:
        row: of ``schema.FINDINGS``.
    """
    read, there = row["source_decode"], row["target_decode"]
    nested = bool(read.get("inner") and read["inner"]["hypercall"])
    if nested:
        read = read["inner"]
        inner = there.get("inner")
        there = inner if inner and inner["hypercall"] else there
    sides = _sides(
        row["source"].split("/")[-1], row["targets"][0], str(row["caller"]), read["hypercall"] or row["hypercall"],
        read["subop"], there["hypercall"], there["subop"],
    )  # fmt: skip
    text = _OUTCOMES[row["outcome"]](_Told(row, sides, read, there, nested))
    said = [text] if text else []
    if row["outcome"] in ("resumes", "restarts"):
        said += _caveats(row, text)
    return " ".join(s[:1].upper() + s[1:] for s in said)


def _ends(t: _Told) -> str:
    errno = t.row["errno"]
    done, left = t.done(), t.left()
    half = {None: "may be", 0: ""}.get(t.read["progress"], "is") if t.read["remaining"] != 0 else ""
    got = f"{t.who} {errno}" if errno else "it ends early, without an errno"
    tail = f" for a call that {half} half done" if errno and half else ""
    return f"{done}{left}; {got}{tail}."


def _misdirected(t: _Told) -> str:
    other = t.there["subop"] or t.there["hypercall"] or "another operation"
    out = f"{t.done()}{t.left()}; {t.target} runs {other} instead"
    a, b = t.sides.source, t.sides.target
    if a is not None and b is not None and a.struct and b.struct and a.struct != b.struct:
        out += f", whose structure is a {b.struct}, not the caller's {a.struct}"
    return out + (f"; {t.who} {t.row['errno']}." if t.row["errno"] else f"; {t.who} whatever that returns.")


def _skips(t: _Told) -> str:
    mine, theirs, total = t.read["progress"], t.there["progress"], t.read["total"]
    n = None
    if mine is not None and theirs is not None and (total is not None or theirs < 1 << 32):
        n = (theirs if total is None else min(theirs, total)) - mine
    undone = f" ({t.sides.nature.undone})" if t.sides.nature.undone and n != 1 else ""
    return f"{t.units(n)} {_is(n)} never {t.sides.nature.did}{undone}, and no errno tells the caller."


def _again(t: _Told, n: int | None) -> str:
    harmless = t.sides.target.restart_harmless if t.sides.target is not None else None
    end = {True: "which is harmless", False: "which is not harmless", None: "and what that does is not known"}[harmless]
    return f"Xen is asked a second time to {t.sides.nature.do} {t.units(n)}, {end}; no errno tells the caller."


def _redoes(t: _Told) -> str:
    mine, theirs = t.read["progress"], t.there["progress"]
    return _again(t, None if mine is None or theirs is None else mine - theirs)


def _restarts(t: _Told) -> str:
    a = t.sides.source
    harmless = t.row["harmless"]
    held = a.held if a is not None and a.codec == "hypervisor" and a.held else None
    if held:
        what = f"what the source's Xen held ({held}) is made anew"
        return f"harmless, it restarts: {what}." if harmless else f"{what}; what doing it again changes is not known."
    if harmless:
        return "harmless, it restarts: doing again what was done changes nothing."
    if t.read["unit"] is None:
        return "the call is made again from its beginning; what doing it again changes is not known."
    return _again(t, t.read["progress"])


def _lost(t: _Told) -> str:
    held = next((b.held for b in (t.sides.source, t.sides.target) if b is not None and b.held), None)
    inside = f" ({held})" if held else ""
    if t.row["harmless"]:
        return f"harmless: what the source's Xen held{inside} is gone, and the target has no use for it."
    return f"the work that the source's Xen held{inside} is never finished; the call ends as if it were."


def _wrong(t: _Told) -> str:
    a, b = t.sides.source, t.sides.target
    if a is not None and a.never_left:
        why = f" ({a.breaks_own})" if a.breaks_own else ""
        return f"what the source left cannot be gone on with on any host, its own release included{why}."
    if a is not None and b is not None and a.params.get("layout") != b.params.get("layout"):
        return (
            f"{t.target} reads the fields of the caller's structure at other offsets: what it works on is not what was asked for."
        )
    if a is not None and b is not None and (a.order, a.order_when) != (b.order, b.order_when):
        units, did = t.read["unit"] or "units", t.sides.nature.did
        ends = f"some {units} are {did} twice and others never, and no errno tells the caller."
        return f"{t.target} goes on from the other end: {ends}"
    return f"{t.done()}{t.left()}, and no errno tells the caller."


def _undecidable(t: _Told) -> str:
    return "not known: the trace does not record what decides it."


def _unknown(t: _Told) -> str:
    return "not known: this operation is not modelled at the source or at the target."


def _resumes(t: _Told) -> str:
    return "" if t.row["caveats"] else "none: it goes on where it stopped."


def _caveats(row: Mapping[str, Any], text: str) -> list[str]:
    goes = "" if text else "it goes on where it stopped, but "
    out = []
    for name in row["caveats"]:
        out.append(f"{goes}{CAVEATS[name]}.")
        goes = ""
    return out


_OUTCOMES = {
    "absent": _ends,
    "refused": _ends,
    "misdirected": _misdirected,
    "skips": _skips,
    "redoes": _redoes,
    "restarts": _restarts,
    "lost": _lost,
    "wrong_result": _wrong,
    "undecidable": _undecidable,
    "unknown": _unknown,
    "resumes": _resumes,
}
