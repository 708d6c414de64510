"""Rows that stand for records which damage may have cost, put among the records of a round.

They become ``lost`` events without a number or count, from the last TSC known of the pCPU to that of its next record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.ingest.layout import ACTIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("BEFORE", "GAP", "insert")

#: Code of the rows that stand for a loss.
GAP: Final = ACTIONS.index("gap")

#: In the header made up for a gap: it stands before a window, at its header.
BEFORE: Final = np.uint32(1)


def insert(
    pos: NDArray[np.int64],
    head: NDArray[np.uint32],
    code: NDArray[np.uint8],
    count: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    pieces: NDArray[np.int64],
    missing: NDArray[np.bool_],
    lossy: NDArray[np.bool_],
    ended: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """Put in rows for records that may be missing; ``count`` is brought up to date.

    Such a row stands before the first record of the next piece of that pCPU and has its TSC; if no piece follows
    (``ended``), behind the last record before the damage.
    """
    ends = np.cumsum(pieces)
    first = np.zeros(len(count), dtype=np.bool_)
    first[ends - pieces] = True
    before = missing.copy()
    before[1:] |= lossy[:-1] & ~first[1:]
    behind = np.zeros(len(count), dtype=np.bool_)
    behind[ends - 1] = lossy[ends - 1] & ended
    bounds = np.append(0, np.cumsum(count))
    a, z = np.flatnonzero(before), np.flatnonzero(behind)
    # The TSC of the record that follows is taken along with its place: same word, same flag.
    timed = np.full(len(a), BEFORE)
    some = count[a] > 0
    timed[some] |= head[bounds[a[some]]] & np.uint32(1 << 31)
    at = np.append(bounds[a], bounds[z + 1])
    # Of one place the row behind the piece before comes first.
    order = np.lexsort((np.append(np.ones(len(a)), np.zeros(len(z))), np.append(a, z + 1), at))
    at = at[order]
    pos = np.insert(pos, at, np.append(start[a], stop[z])[order])
    head = np.insert(head, at, np.append(timed, np.zeros(len(z), dtype=np.uint32))[order])
    code = np.insert(code, at, GAP)
    count[a] += 1
    count[z] += 1
    return pos, head, code
