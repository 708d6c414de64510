"""Whether a release could have left a continuation of a call, for whole columns: the judgement under ``identify_calls``.

A *pair* is a call as it was executed and the registers that a vCPU was then found with on its hypercall instruction. A release
explains it if what it leaves for that call, preempted somewhere, is what was found.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.factfiles import documents
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import LOW32, Column, States

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from xtrace.replay.behaviour import Behaviour
    from xtrace.replay.states import Mask

    Codes = npt.NDArray[np.int8]

__all__ = ("NO", "OK", "REASONS", "VERSION", "WEAK", "flags", "judge_flagged", "judge_pairs", "judge_success")

#: A pair can be what the release left; it cannot, unless the vCPU was stopped before the call ran at all; it cannot.
OK: Final = 0
WEAK: Final = 1
NO: Final = 2

#: Reason code -> what keeps a release from it.
REASONS: Final = (
    "",
    "there is no such hypercall for that caller",
    "there is no such sub-operation",
    "no continuation of it is ever left there",
    "its progress is kept otherwise there",
    "more of it is done there before the first look for a reason to stop",
    "that call is refused there",
    "that form is never left there",
    "such a call ends there instead",
    "it stops at other steps there",
    "those say another version of themselves",
)
_ABSENT, _UNMATCHED, _NEVER, _OTHERWISE, _FIRST, _REFUSED, _FORM, _BEYOND, _STEPS = range(1, 10)
VERSION: Final = 10  # index into REASONS


@cache
def _homes() -> dict[str, frozenset[str]]:
    """Return operation -> the fields of its structure in which any release keeps progress."""
    out: dict[str, set[str]] = {}
    for number in facts.files():
        for _, doc in documents(number):
            for op in doc.get("operation", []):
                for row in op.get("behaviour", []):
                    if row["codec"] == "guest_structure":
                        out.setdefault(str(op["name"]), set()).update(_fields(row))
    return {name: frozenset(fields) for name, fields in out.items()}


def _fields(params: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields that a behaviour (its parameters, or its entry in a fact file) moves."""
    names = [*params.get("advance", {}), *params.get("reduce", {}), *([params["index"]] if params.get("index") else [])]
    return frozenset(n.removeprefix("mem.") for n in names if not n.startswith("arg"))


@cache
def flags() -> dict[int, tuple[int, int]]:
    """Return hypercall number -> (argument, flag) of those that some release marks with a flag in a count."""
    out: dict[int, tuple[int, int]] = {}
    for number in facts.files():
        for _, doc in documents(number):
            for op in doc.get("operation", []):
                for row in op.get("behaviour", []):
                    if row["codec"] == "count_flag":
                        out[number] = (int(str(row["count"]).removeprefix("arg")), int(row["flag"]))
    return out


def differ(a: Column, b: Column, narrow: Mask) -> Mask:
    """Return where two columns are known and differ; of values recorded as 32 bits the low halves count."""
    x = a.value ^ b.value
    out: Mask = a.known & b.known & (np.where(narrow, x & LOW32, x) != 0)
    return out


def _narrow(a: States, b: States, k: int) -> Mask:
    out = np.zeros(len(a), bool)
    for s in (a, b):
        if s.cut is not None:
            out |= (s.cut >> np.uint8(k) & np.uint8(1)) != 0
    return out


def _unlike(a: States, b: States) -> Mask:
    out = np.zeros(len(a), bool)
    for k in range(6):
        out |= differ(a.args[k], b.args[k], _narrow(a, b, k))
    return out


def _moved(before: States, after: States, fields: frozenset[str]) -> Mask:
    out = np.zeros(len(before), bool)
    for name in fields:
        out |= differ(before.at(f"mem.{name}"), after.at(f"mem.{name}"), np.zeros(len(before), bool))
    return out


def judge_pairs(version: str, caller: str, number: int, call: States, found: States) -> tuple[Codes, Codes]:
    """Judge n pairs of one hypercall at one release.

    Args:
        version: the release. caller: one of ``schema.CALLERS``. number: the hypercall.
        call: registers and memory when the call was executed. found: the same when the vCPU was found stopped.

    Returns:
        ``OK``, ``WEAK`` or ``NO`` for each, and the index into ``REASONS``.
    """
    n = len(call)
    out, why = np.zeros(n, np.int8), np.zeros(n, np.int8)
    xen = Hypervisor(version, caller)
    known = xen.hypercall(number)
    if known.status == "unknown" or known.reaches is not None:
        return out, why
    changed = _unlike(call, found)

    def against(rows: npt.NDArray[np.intp], hit: Mask, reason: int, *, weak: bool = True) -> None:
        verdict = np.where(changed[rows], NO, WEAK if weak else OK).astype(np.int8)
        new = hit & (verdict > out[rows])
        out[rows[new]], why[rows[new]] = verdict[new], reason

    every = np.arange(n)
    if known.status == "absent":
        against(every, np.ones(n, bool), _ABSENT)
        return out, why
    read = xen.decode(number, call)
    against(every, read.status == hv.NEVER, _NEVER)
    against(every, read.status == hv.UNMATCHED, _UNMATCHED)
    if not (read.status == hv.MODELLED).any():
        return out, why
    after = xen.decode(number, found, call)
    entered = xen.resume(number, call, "unknown")
    refused = (entered.disposition == hv.REFUSED) & ~entered.doubt & (read.status == hv.MODELLED)
    for k, b in enumerate(read.behaviours):
        rows = np.flatnonzero((read.which == k) & (read.status == hv.MODELLED))
        homes = _homes().get(b.operation, frozenset())
        was, now = call.take(rows), found.take(rows)
        changed[rows] |= _moved(was, now, homes)
        against(rows, refused[rows], _REFUSED)
        if b.codec == "none" or b.never_left:
            against(rows, np.ones(len(rows), bool), _NEVER)
            continue
        forms = np.array([f.creates for f in after.specials] + [False], bool)
        form = after.special[rows]
        against(rows, (form >= 0) & ~forms[form], _FORM, weak=False)
        rows = rows[(form < 0)]
        if len(rows):
            _leaves(xen, number, b, rows, call, found, after, homes, against)
    return out, why


def _leaves(
    xen: Hypervisor, number: int, b: Behaviour, rows: npt.NDArray[np.intp], call: States, found: States, after: hv.Decoded,
    homes: frozenset[str], say: Callable[..., None],
) -> None:  # fmt: skip
    """Compare what was found with what the release leaves at the progress that it reads there."""
    was, now = call.take(rows), found.take(rows)
    progress, total = after.progress.take(rows), after.total.take(rows)
    held = b.codec in ("hypervisor", "restart", "redirect")
    done = np.where(progress.known & (not held), progress.value, np.uint64(0))
    left = xen.preempt(number, was, done)
    told = progress.known | held
    wrong = _unlike(left, now) | _moved(was, now, homes - _fields(b.params))
    for name in _fields(b.params) if not b.params.get("index") else ():
        at = f"mem.{name}"
        wrong |= was.at(at).known & differ(left.at(at), now.at(at), np.zeros(len(rows), bool))
    if b.params.get("also_restarts"):
        wrong &= _unlike(was, now)
    say(rows, told & wrong, _OTHERWISE)
    if held:
        return
    say(rows, progress.known & (done < np.uint64(b.first)), _FIRST)
    over = total.known & ((done > total.value) | ((done == total.value) & (total.value > 0) & (not b.last_total)))
    say(rows, progress.known & over, _BEYOND, weak=False)
    if b.stride > 1 and "stride_hardware_domain" not in b.params:
        say(rows, progress.known & (done % np.uint64(b.stride) != 0), _STEPS, weak=False)


def judge_flagged(version: str, caller: str, number: int, found: States) -> tuple[Codes, Codes]:
    """Judge n states of which the flag of a count says that Xen left them; see ``judge_pairs``."""
    n = len(found)
    out, why = np.zeros(n, np.int8), np.zeros(n, np.int8)
    xen = Hypervisor(version, caller)
    known = xen.hypercall(number)
    if known.status == "unknown" or known.reaches is not None:
        return out, why
    read = xen.decode(number, found)
    forms = np.array([f.creates for f in read.specials] + [False], bool)
    for hit, reason in (
        (read.status == hv.ABSENT, _ABSENT),
        (read.status == hv.UNMATCHED, _UNMATCHED),
        (read.status == hv.NEVER, _NEVER),
        ((read.special >= 0) & ~forms[read.special], _FORM),
        ((read.special < 0) & (read.status == hv.MODELLED) & read.remaining.known & (read.remaining.value == 0), _FORM),
    ):
        new = hit & (out == OK)
        out[new], why[new] = NO, reason
    return out, why


def judge_success(version: str, caller: str, number: int, call: States) -> tuple[Codes, Codes]:
    """Judge n calls that ended without an error; see ``judge_pairs``."""
    n = len(call)
    out, why = np.zeros(n, np.int8), np.zeros(n, np.int8)
    xen = Hypervisor(version, caller)
    known = xen.hypercall(number)
    if known.status in ("unknown", "never") or known.reaches is not None:
        return out, why
    entered = xen.resume(number, call, "unknown")
    refused = (entered.disposition == hv.REFUSED) & ~entered.doubt
    out[refused] = NO
    status = entered.decoded.status
    why[refused] = np.where(status[refused] == hv.ABSENT, _ABSENT, np.where(status[refused] == hv.UNMATCHED, _UNMATCHED, _REFUSED))
    return out, why
