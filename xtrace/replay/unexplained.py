"""What no release could have left: continuations that a model of the source does not explain, with what it expected instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xtrace.replay import facts
from xtrace.replay import hypervisor as hv

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.replay.hypervisor import Decoded, Hypervisor
    from xtrace.replay.states import States

__all__ = ("Reason", "unexplained")


@dataclass(frozen=True, slots=True)
class Reason:
    """Rows that are unexplained for one reason.

    Attributes:
        rows: mask over the rows looked at; at least one is set.
        what: what the first of them shows. expected: what the model says instead.
    """

    rows: npt.NDArray[np.bool_]
    what: str
    expected: str


def unexplained(
    xen: Hypervisor, op: int, read: Decoded, states: States, issued: States, shown: npt.NDArray[np.bool_]
) -> list[Reason]:
    """Return why rows of one hypercall and caller cannot be what ``xen`` left.

    Args:
        xen: the release, for the caller.
        op: number of the hypercall.
        read: ``xen.decode`` of the states.
        states: registers and memory of each row.
        issued: the call as first made, as far as it is known.
        shown: rows that got beyond a first entry (continuations, calls that succeeded): a call of something that the
            release does not have is explained, it fails.
    """
    out: list[Reason] = []

    def note(rows: npt.NDArray[np.bool_], what: str, expected: str) -> None:
        if rows.any():
            out.append(Reason(rows, what, expected))

    name = facts.hypercall_names().get(op, str(op))
    bad = np.isin(read.status, (hv.ABSENT, hv.UNMATCHED)) & shown
    if read.hypercall.status == "absent":
        note(bad, f"{name} is called", f"{name} is not in the {xen.caller} hypercall table of {xen.release}")
    else:
        numbers = read.number[bad]
        note(bad, f"{name} with sub-operation {numbers[0] if len(numbers) else '?'}",
             f"{xen.release} has no such sub-operation for {xen.caller}")  # fmt: skip
    back = read.progress.known & read.total.known & (read.progress.value > read.total.value)
    note(back, f"{name} with progress beyond its total", "progress between 0 and the total")
    # What Xen left must be what the model leaves for the same call and the same progress.
    begun = issued.args[0].known | issued.args[1].known
    rows = np.flatnonzero(begun & (read.status == hv.MODELLED) & read.progress.known & (read.special < 0))
    if not len(rows):
        return out
    left = xen.preempt(op, issued.take(rows), read.progress.value[rows])
    seen = states.take(rows)
    wrong = np.zeros(len(read.status), bool)
    detail: dict[int, str] = {}
    for k in range(6):
        a, b = left.args[k], seen.args[k]
        differ = a.known & b.known & (a.value != b.value)
        for i in np.flatnonzero(differ)[:1]:
            detail.setdefault(int(rows[i]), f"arg{k} = {int(a.value[i]):#x}, not {int(b.value[i]):#x}")
        wrong[rows[differ]] = True
    first = int(np.flatnonzero(wrong)[0]) if wrong.any() else -1
    note(wrong, f"a continuation of {name}", detail.get(first, "other registers"))
    return out
