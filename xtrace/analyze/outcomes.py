"""From two readings of the same registers to an outcome: what the source meant, what the target does.

The order of the tests is the order of ``schema.OUTCOMES``: the first that applies is the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xtrace.replay import hypervisor as hv
from xtrace.schema import OUTCOMES

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.replay.behaviour import Behaviour
    from xtrace.replay.hypervisor import Decoded, Resumed

__all__ = ("CAVEATS", "CODE", "ERRNOS", "NAMES", "Verdicts", "judge")

#: Names of the outcome codes: DESIGN's outcomes, then what is no outcome.
NAMES: Final = (*OUTCOMES, "undecidable", "unknown")

#: Outcome name -> code.
CODE: Final = {name: i for i, name in enumerate(NAMES)}


class Interned:
    """Values numbered in the order in which they were first seen, so that columns of them are small integers."""

    def __init__(self, *first: Any) -> None:
        """Start with the given values."""
        self._code = {value: i for i, value in enumerate(first)}
        self._value = list(first)

    def code(self, value: Any) -> int:
        """Return the number of ``value``."""
        if value not in self._code:
            self._code[value] = len(self._value)
            self._value.append(value)
        return self._code[value]

    def __getitem__(self, code: int) -> Any:
        return self._value[code]


#: Errno names; code 0 is "none".
ERRNOS: Final = Interned(None)

#: Tuples of caveats; code 0 is "none".
CAVEATS: Final = Interned(())


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Outcomes of n continuations at one target."""

    outcome: npt.NDArray[np.int8]  # index into NAMES
    errno: npt.NDArray[np.int16]  # of ERRNOS; 0 is none
    harmless: npt.NDArray[np.bool_]  # for restarts, and lost work that does not matter


def judge(source: Decoded, target: Resumed) -> Verdicts:
    """Judge n continuations, decoded by their source, at a target that was asked to resume them."""
    t = target.decoded
    n = len(source.status)
    outcome = np.full(n, -1, np.int8)
    harmless = np.zeros(n, bool)

    def settle(rows: npt.NDArray[np.bool_], name: str) -> None:
        outcome[rows & (outcome < 0)] = CODE[name]

    settle(source.status == hv.NEVER, "resumes")
    settle(source.status == hv.UNRECORDED, "undecidable")
    # The source's own tables do not know the state: its release is wrong, or the model is incomplete.
    settle(source.status != hv.MODELLED, "unknown")
    if t.hypercall.reaches is not None:
        settle(t.status == hv.ABSENT, "misdirected")
    settle(t.status == hv.ABSENT, "absent")
    # Refused before the operation is looked at: no handler is entered, of this operation or of another.
    settle(target.before & (target.disposition == hv.REFUSED), "refused")
    settle(np.isin(t.status, (hv.UNKNOWN, hv.NEVER)), "unknown")
    settle(t.status == hv.UNRECORDED, "undecidable")
    same_number = source.number == t.number
    settle((t.status == hv.UNMATCHED) & same_number, "absent")
    settle(t.status == hv.UNMATCHED, "refused")
    # Every row left is decoded to a behaviour on both sides; look at each pair of behaviours once.
    left = outcome < 0
    pairs = np.unique(np.stack([source.which[left], t.which[left]]), axis=1) if left.any() else np.empty((2, 0), int)
    for a, b in pairs.T:
        rows = np.flatnonzero(left & (source.which == a) & (t.which == b))
        outcome[rows], harmless[rows] = _pair(source.behaviours[a], t.behaviours[b], rows, source, target)
    assert (outcome >= 0).all()
    # An errno goes with an outcome only where the call really ends with it.
    shown = np.isin(outcome, (CODE["absent"], CODE["misdirected"], CODE["refused"]))
    if t.hypercall.reaches is not None:
        shown &= outcome != CODE["misdirected"]  # what the other hypercall makes of it is not known
    codes = np.array([*(ERRNOS.code(e) for e in target.errnos), 0], np.int16)
    errno = np.where(shown, codes[target.errno], np.int16(0))
    for a, b in pairs.T:
        before, after = source.behaviours[a], t.behaviours[b]
        if before.operation == after.operation and before.params.get("layout") != after.params.get("layout"):
            rows = left & (source.which == a) & (t.which == b) & (errno == 0) & (outcome == CODE["refused"])
            errno[rows] = ERRNOS.code(after.params.get("other_layout"))
    return Verdicts(outcome, errno, harmless)


def _asked(d: Decoded) -> tuple[Any, ...]:
    return () if d.hypercall.dispatch is None else d.hypercall.dispatch.checks


def _inside(
    a: Behaviour, b: Behaviour, rows: npt.NDArray[np.intp], source: Decoded, t: Decoded, outcome: npt.NDArray[np.int8],
    harmless: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:  # fmt: skip
    """Compare what the number inside the structure means on both sides."""
    inside = source.inside.take(rows)
    outcome[~inside.known & (outcome == CODE["resumes"])] = CODE["undecidable"]
    for number in np.unique(inside.value[inside.known]):
        here, there = a.inner_operations.get(int(number)), b.inner_operations.get(int(number))
        if there is not None and here != there:
            hit = inside.known & (inside.value == number)
            outcome[hit], harmless[hit] = CODE["misdirected"], False
    return outcome, harmless


def _pair(
    a: Behaviour, b: Behaviour, rows: npt.NDArray[np.intp], source: Decoded, target: Resumed
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    t = target.decoded
    n = len(rows)
    outcome = np.full(n, CODE["resumes"], np.int8)
    harmless = np.zeros(n, bool)
    if a.never_left:
        # What the source leaves cannot be gone on with on any host.
        outcome[:] = CODE["wrong_result"]
        return outcome, harmless
    if a.operation != b.operation:
        outcome[:] = CODE["misdirected"]
        return outcome, harmless
    s_index, t_index = source.index.take(rows), t.index.take(rows)
    comparable = s_index.known & t_index.known
    done = source.progress.take(rows)
    some = ~done.known | (done.value > 0)
    if a.codec == "hypervisor" or b.codec == "hypervisor":
        effect = a.held_effect or b.held_effect or "redone"
        # A source that leaves nothing done loses nothing.
        hit = np.ones(n, bool) if a.codec == "hypervisor" else some
        outcome[hit] = CODE["lost" if effect == "lost" else "restarts"]
        harmless[hit] = bool(b.restart_harmless if b.restart_harmless is not None else effect == "redone")
    elif b.codec == "restart" and a.moves_operands:
        pass  # operands that were moved are moved for the target too: it finishes what is left
    elif a.codec == "restart" or b.codec == "restart":
        outcome[some] = CODE["restarts"] if a.codec != b.codec else CODE["resumes"]
        harmless[:] = b.restart_harmless is True
    elif a.encoding != b.encoding:
        outcome[~comparable] = CODE["undecidable"]
        outcome[comparable & (t_index.value > s_index.value)] = CODE["skips"]
        less = comparable & (t_index.value < s_index.value)
        # Operands that the source moved are moved for the target too: it starts from 0 only where nothing was folded in.
        outcome[less] = CODE["redoes"]
        outcome[less & (t_index.value == 0)] = CODE["restarts"]
        harmless[less & (t_index.value == 0)] = b.restart_harmless is True
    elif t.hypercall.dispatch is not None and t.hypercall.dispatch.sign_extend:
        # Progress that reached bit 31 of an int comes back enormous; only the sign can have put it beyond 32 bits.
        outcome[t_index.known & (t_index.value >= np.uint64(1 << 32))] = CODE["skips"]
    if (a.order, a.order_when) != (b.order, b.order_when):
        # Progress counted from the other end: what was done is not what the target takes for done.
        far_s, far_t = source.descending.take(rows), t.descending.take(rows)
        sure = far_s.known & far_t.known
        level = some & (outcome == CODE["resumes"])
        outcome[level & ~sure] = CODE["undecidable"]
        outcome[level & sure & (far_s.value != far_t.value)] = CODE["wrong_result"]
    if a.inner and b.inner and a.inner_operations != b.inner_operations:
        outcome, harmless = _inside(a, b, rows, source, t, outcome, harmless)
    # A test that the source makes too was passed there; only a new one on something unrecorded leaves doubt.
    if a.checks != b.checks or _asked(source) != _asked(t):
        outcome[target.doubt[rows]] = CODE["undecidable"]
    disposition = target.disposition[rows]
    if a.params.get("layout") != b.params.get("layout"):
        # The structure itself was re-laid: the target reads its fields at other offsets (hvm_op, e8b87b57b4df).
        outcome[:] = CODE["refused" if str(b.params.get("other_layout", "")).startswith("-E") else "wrong_result"]
    outcome[(disposition == hv.REFUSED) & (outcome != CODE["misdirected"])] = CODE["refused"]
    # It returns what it was given although something is left: a limit of the target stops it, without an errno.
    left = t.total.take(rows)
    short = left.known & t_index.known & (t_index.value < left.value) & (outcome == CODE["resumes"])
    outcome[(disposition == hv.ENDS) & short] = CODE["refused"]
    # A test of the target ends it with success though something is left.
    outcome[target.idle[rows] & (outcome == CODE["resumes"]) & (a.checks != b.checks)] = CODE["wrong_result"]
    for k, form in enumerate(t.specials):
        hit = (disposition == hv.SPECIAL) & (t.special[rows] == k)
        outcome[hit] = CODE[form.result]
        harmless[hit] = form.harmless
    # Only a restart or lost work can be harmless: a refusal that comes on top of one is not.
    harmless &= np.isin(outcome, (CODE["restarts"], CODE["lost"]))
    return outcome, harmless
