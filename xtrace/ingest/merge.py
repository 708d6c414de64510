"""Putting the events of all pCPUs in order of (segment, TSC, pCPU, file), with no more of them in memory than must wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xtrace.ingest.records import Rows, concat, take

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("Merge",)


class Merge:
    """Sorted runs of events that wait until no pCPU can have an earlier one any more.

    A run is only touched where it is cut or joined with one of about its size, so many events that wait for a slow pCPU
    cost nothing in the rounds that read on there.
    """

    def __init__(self, pcpus: int) -> None:
        """Wait for events of ``pcpus`` pCPUs (dense numbers)."""
        self.behind = np.zeros(pcpus, dtype=np.int64)  # how many events of each pCPU wait
        self._runs: list[tuple[Rows, int]] = []  # oldest first: sorted rows, and how many of them are gone

    def add(self, rows: Rows) -> None:
        """Take the events of one round: grouped by pCPU, in file order, none earlier than those of the pCPU before."""
        if len(rows["code"]):
            self.behind += np.bincount(rows["pcpu"], minlength=len(self.behind))
            self._runs.append((_sorted(rows), 0))

    def ripe(self, key: tuple[int, int, int] | None) -> Rows | None:
        """Return, in order, what is not behind ``key`` = (segment, TSC, pCPU); everything if None.

        With the key that the slowest pCPU stands at nothing earlier can follow: of records with this very key, those of lower
        pCPUs are known completely, and its own come in file order.
        """
        parts, runs = [], []
        for rows, gone in self._runs:
            cut = len(rows["code"]) if key is None else _place(rows, gone, key)
            if cut > gone:
                parts.append({name: column[gone:cut] for name, column in rows.items()})
            left = len(rows["code"]) - cut
            if left and left * 2 < len(rows["code"]):
                # A copy, so that a few rows that wait do not keep a whole round's alive.
                runs.append(({name: column[cut:].copy() for name, column in rows.items()}, 0))
            elif left:
                runs.append((rows, cut))
        self._runs = _joined(runs)
        if not parts:
            return None
        out = parts[0] if len(parts) == 1 else _sorted(concat(parts))
        self.behind -= np.bincount(out["pcpu"], minlength=len(self.behind))
        return out


def _joined(runs: list[tuple[Rows, int]]) -> list[tuple[Rows, int]]:
    """Join neighbouring runs of about the same size, so that there are only a few (a logarithm of the rows)."""
    out: list[tuple[Rows, int]] = []
    for run in runs:
        out.append(run)
        while len(out) > 1 and _left(out[-2]) <= 2 * _left(out[-1]):
            (new, new_gone), (old, old_gone) = out.pop(), out.pop()
            parts = [{name: column[gone:] for name, column in rows.items()} for rows, gone in ((old, old_gone), (new, new_gone))]
            out.append((_sorted(concat(parts)), 0))
    return out


def _left(run: tuple[Rows, int]) -> int:
    return len(run[0]["code"]) - run[1]


def _sorted(rows: Rows) -> Rows:
    """Sort rows by (segment, TSC, pCPU); equal ones stay in their order. The columns given may be changed."""
    segment, tsc, pcpu = rows["segment"], rows["tsc"], rows["pcpu"]
    if not (segment == segment[0]).all():
        return take(rows, np.lexsort((pcpu, tsc, segment)))
    if not (tsc[1:] >= tsc[:-1]).all():
        rows = take(rows, np.argsort(tsc, kind="stable"))
        tsc, pcpu = rows["tsc"], rows["pcpu"]
    same = np.flatnonzero(tsc[1:] == tsc[:-1])
    if len(same) and (pcpu[same + 1] < pcpu[same]).any():
        at = np.union1d(same, same + 1)
        order = at[np.lexsort((pcpu[at], tsc[at]))]
        for column in rows.values():
            column[at] = column[order]
    return rows


def _place(rows: Rows, low: int, key: tuple[int, int, int]) -> int:
    """Return how many of ``rows``, sorted, are not behind ``key``; the first ``low`` are known not to be."""
    high = len(rows["code"])
    for name, value in zip(("segment", "tsc"), key, strict=False):
        low, high = _equal(rows[name], value, low, high)
    return _equal(rows["pcpu"], key[2], low, high)[1]


def _equal(column: NDArray[Any], value: int, low: int, high: int) -> tuple[int, int]:
    """Return which part of ``column[low:high]``, which is sorted, equals ``value``."""
    part, key = column[low:high], column.dtype.type(value)
    return low + int(np.searchsorted(part, key)), low + int(np.searchsorted(part, key, side="right"))
