"""The record layouts in ``layouts/xentrace.toml``, loaded once into tables that answer for whole columns of event ids."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ("ACTIONS", "BAD", "Layout", "load")

#: What the reader can do with a record. The position in this tuple is the code used in columns; 0 = only count it. "gap" is
#: no record: the reader puts it where damage may have cost some.
ACTIONS: Final = (
    "count",
    "bad",
    "v1_32",
    "v1_64",
    "v2",
    "subcall",
    "vmmcall",
    "shutdown",
    "lost",
    "runs",
    "stops",
    "switch",
    "exit32",
    "exit64",
    "exit_81003",
    "exit_other",
    "entry",
    "gap",
)

#: Code of an event id that no Xen can have written.
BAD: Final = ACTIONS.index("bad")

_COLUMNS = 1 << 12  # event number: bits 11..0
_CPU_CHANGE = 0x1F003


@dataclass(frozen=True, slots=True)
class Layout:
    """Tables over event ids.

    An id's *slot* is ``rows[id >> 12] + (id & 0xfff)``. Classes and subclasses that Xen defines have slots of their own;
    the others that Xen could write share one row.
    """

    rows: NDArray[np.int64]  # by class and subclass (16 bits): first slot of its row
    codes: NDArray[np.uint8]  # by slot: index into ACTIONS
    needs: NDArray[np.uint8]  # by code: fewest extra words
    ids: NDArray[np.uint32]  # by slot: the event id (meaningless in the shared row)
    shared: int  # first slot of the shared row
    likely: NDArray[np.bool_]  # by class and subclass: Xen's own headers use it
    names: Mapping[int, str]  # event id -> Xen's name, of the records listed
    evidence: tuple[tuple[frozenset[int], str, str], ...]  # ids, since, until
    dom_word: frozenset[int]  # ids of the era whose HVM records carry dom/vcpu
    peaks: tuple[tuple[int, int, int], ...] = ()  # slot, event id, extra word: whose largest value is kept

    def era(self, ids: set[int]) -> str:
        """Name the range of releases that the event ids leave, such as ``4.3-4.22`` or ``3.2-3.3``."""
        since, until = [(3, 2)], [(4, 22)]
        for known, first, last in self.evidence:
            if ids & known:
                if first:
                    since.append(_series(first))
                if last:
                    until.append(_series(last))
        return "{}.{}-{}.{}".format(*max(since), *min(until))


def _series(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


#: Argument registers that a record of a PV hypercall holds, 32 bits of each, since 4.3.0
#: (RELEASE-4.17.0:xen/common/trace.c, __trace_hypercall, 86b35acb00).
REGISTERS: Final = {
    "mmu_update": (1,),
    "multicall": (1,),
    "grant_table_op": (0, 2),
    "vcpu_op": (0, 1),
    "mmuext_op": (1,),
    "sched_op": (0,),
}


def _subclasses() -> list[int]:
    """List the class and subclass pairs (bits 27..12) that Xen's own headers use."""
    pairs = [0x001F, 0x002F, 0x0021, 0x0022, 0x0028, 0x0041, 0x0081, 0x0082, 0x0084, 0x010F, 0x020F, 0x0201, 0x0202]
    return [*pairs, 0x040F, 0x0801, 0x0802, 0x080F, 0x800F]


@cache
def load() -> Layout:
    """Load the layouts (once).

    Raises:
        ValueError: an action or id in the file is not known to this module.
    """
    with (Path(__file__).parent / "layouts" / "xentrace.toml").open("rb") as file:
        data: dict[str, Any] = tomllib.load(file)
    known = _subclasses()
    shared, bad = len(known) * _COLUMNS, (len(known) + 1) * _COLUMNS
    # __trace_var drops an event whose class or subclass bits are all zero, and every class is one bit
    # (RELEASE-4.17.0:xen/common/trace.c, "match class", "match subclass"), so other ids are damage.
    top = np.arange(1 << 16, dtype=np.int64)
    cls, sub = top >> 4, top & 0xF
    possible = (cls > 0) & (cls & (cls - 1) == 0) & (sub > 0)
    rows = np.where(possible, shared, bad).astype(np.int64)
    ids = np.zeros(bad + _COLUMNS, dtype=np.uint32)
    for i, pair in enumerate(known):
        rows[pair] = i * _COLUMNS
        ids[i * _COLUMNS : (i + 1) * _COLUMNS] = (pair << 12) + np.arange(_COLUMNS)
    codes = np.zeros(bad + _COLUMNS, dtype=np.uint8)
    codes[bad:] = BAD
    needs = np.zeros(len(ACTIONS), dtype=np.uint8)
    names: dict[int, str] = {}
    for record in data["record"]:
        code = ACTIONS.index(record["action"])
        needs[code] = record["words"]
        for event in record["ids"]:
            if event >> 12 not in known:
                raise ValueError(f"layouts/xentrace.toml: {event:#x} is of no class and subclass of Xen's")
            codes[rows[event >> 12] + (event & 0xFFF)] = code
            names[event] = record["name"]
    # Window headers are xentrace's, not Xen's: inside a window one cannot be.
    codes[rows[_CPU_CHANGE >> 12] + (_CPU_CHANGE & 0xFFF)] = BAD
    evidence = tuple((frozenset(e["ids"]), e.get("since", ""), e.get("until", "")) for e in data["evidence"])
    dom_word = frozenset(event for e in data["evidence"] if e.get("dom_word") for event in e["ids"])
    peaks = tuple(
        (int(rows[p["id"] >> 12]) + (p["id"] & 0xFFF), p["id"], word) for p in data.get("peak", ()) for word in p["words"]
    )
    return Layout(rows, codes, needs, ids, shared, rows < shared, names, evidence, dom_word, peaks)
