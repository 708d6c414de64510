"""What may stand in xtrace's own text log (docs/xtrace-log.md), and its records taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = (
    "CALLER_ID",
    "CUT_IDS",
    "ENTRIES",
    "KEY_ID",
    "KINDS",
    "LIMITS",
    "MEM",
    "SIGNED",
    "Records",
    "merged",
    "one_after_another",
)

#: Word on the line -> kind of event. ``call`` becomes hypercall or vmmcall by its caller.
KINDS: Final = {
    "call": "call",
    **{k: k for k in ("hypercall", "vmmcall", "subcall", "return", "sample", "schedule", "suspend", "resume", "lost")},
}
#: Kinds that must say ``op``.
ENTRIES: Final = ("call", "hypercall", "vmmcall", "subcall")

_U64: Final = (1 << 64) - 1
_I63: Final = (1 << 63) - 1
#: Key -> largest value. Processor and domain numbers fit 16 bits in every Xen, which bounds what is remembered.
LIMITS: Final[dict[str, int]] = {
    "tsc": _U64,
    "time_ns": _I63,
    "pcpu": 0xFFFF,
    "dom": 0xFFFF,
    "vcpu": 0xFFFF,
    "caller": len(schema.CALLERS) - 1,
    "op": 0xFFFFFFFF,
    **{f"a{n}": _U64 for n in range(6)},
    **{f"a{n}~": 0xFFFFFFFF for n in range(6)},
    "rip": _U64,
    "on_insn": 1,
    "result": _U64,
    "n": _I63,
}
KEY_ID: Final = {key: i for i, key in enumerate(LIMITS)}
#: Id of every mem.FIELD key.
MEM: Final = len(KEY_ID)
#: Ids of a0~ … a5~.
CUT_IDS: Final = tuple(KEY_ID[f"a{n}~"] for n in range(6))
#: Ids of values that may be negative.
SIGNED: Final = (KEY_ID["result"], MEM)
CALLER_ID: Final = {name: i for i, name in enumerate(schema.CALLERS)}


@dataclass(slots=True)
class Records:
    """Records of a block, taken apart.

    Attributes:
        line: intp[n], index of each record's line in the block, rising.
        kind: uint8[n], number of its word in :data:`KINDS`.
        at: intp[m], record of each value.
        key: uint8[m], id of its key, mem.FIELD left out.
        value: uint64[m], negative ones in two's complement.
        mem_at: intp[k], record of each mem.FIELD, rising.
        mem_name: intp[k], number of its FIELD in ``names``.
        mem_value: uint64[k].
    """

    line: NDArray[np.intp]
    kind: NDArray[np.uint8]
    at: NDArray[np.intp]
    key: NDArray[np.uint8]
    value: NDArray[np.uint64]
    mem_at: NDArray[np.intp]
    mem_name: NDArray[np.intp]
    mem_value: NDArray[np.uint64]
    names: list[str]


def merged(a: Records, b: Records) -> Records:
    """Put two sets of records of one block together, in the order of their lines."""
    if not len(b.line):
        return a
    if not len(a.line):
        return b
    line = np.concatenate([a.line, b.line])
    order = np.argsort(line, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    mem_at = place[np.concatenate([a.mem_at, b.mem_at + len(a.line)])]
    mem_order = np.argsort(mem_at, kind="stable")
    return Records(
        line[order],
        np.concatenate([a.kind, b.kind])[order],
        place[np.concatenate([a.at, b.at + len(a.line)])],
        np.concatenate([a.key, b.key]),
        np.concatenate([a.value, b.value]),
        mem_at[mem_order],
        np.concatenate([a.mem_name, b.mem_name + len(a.names)])[mem_order],
        np.concatenate([a.mem_value, b.mem_value])[mem_order],
        a.names + b.names,
    )


def one_after_another(parts: list[tuple[Records, int]]) -> Records:
    """Join the records of parts of a block, each with the number of its lines."""
    if not parts:
        none = np.zeros(0, dtype=np.intp)
        return Records(none, none.astype(np.uint8), none, none.astype(np.uint8), none.astype(np.uint64), none, none,
                       none.astype(np.uint64), [])  # fmt: skip
    lines = np.cumsum([0, *(n for _, n in parts)])
    records = np.cumsum([0, *(len(part.line) for part, _ in parts)])
    names = np.cumsum([0, *(len(part.names) for part, _ in parts)])
    every = [part for part, _ in parts]
    return Records(
        np.concatenate([part.line + lines[i] for i, part in enumerate(every)]),
        np.concatenate([part.kind for part in every]),
        np.concatenate([part.at + records[i] for i, part in enumerate(every)]),
        np.concatenate([part.key for part in every]),
        np.concatenate([part.value for part in every]),
        np.concatenate([part.mem_at + records[i] for i, part in enumerate(every)]),
        np.concatenate([part.mem_name + names[i] for i, part in enumerate(every)]),
        np.concatenate([part.mem_value for part in every]),
        [name for part in every for name in part.names],
    )


def memory(records: Records, n: int) -> pl.Series:
    """Return the guest memory of n records; null where none was recorded."""
    import pyarrow as pa

    if not len(records.mem_at):
        return pl.Series("memory", [None], dtype=schema.MEMORY).new_from_index(0, n)
    count = np.bincount(records.mem_at, minlength=n)
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(count, out=offsets[1:])
    fields = pa.array(records.names, pa.large_string()).take(pa.array(records.mem_name))
    items = pa.StructArray.from_arrays([fields, pa.array(records.mem_value)], names=["field", "value"])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), items, mask=pa.array(count == 0))
    return pl.Series("memory", lists, dtype=schema.MEMORY)
