"""The guest memory behind a hypercall, under the field names of the facts (docs/xtrace-log.md), by layouts/structs.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xtrace.image.base import Vcpu
    from xtrace.image.memory import Memory

__all__ = ("MULTICALL", "finished_entries", "memory_behind")

#: __HYPERVISOR_multicall
MULTICALL: Final = 13

#: Entries of a multicall that are looked at before the current one.
_MOST_ENTRIES: Final = 1 << 17

_MEMORY_OP: Final = 12


@dataclass(frozen=True, slots=True)
class _Struct:
    op: int
    commands: frozenset[int] | None
    at: int
    via: int | None
    select: tuple[str, frozenset[int]] | None
    size: Mapping[int, int]  # by bytes of a word
    fields: Mapping[int, Mapping[str, tuple[int, int]]]


@cache
def _structs() -> tuple[_Struct, ...]:
    text = files("xtrace.image").joinpath("layouts", "structs.toml").read_text(encoding="utf-8")
    out = []
    for t in tomllib.loads(text)["struct"]:
        fields = {
            width: {name: (int(at), int(n)) for name, (at, n) in t.get(f"fields{8 * width}", t.get("fields", {})).items()}
            for width in (8, 4)
        }
        out.append(
            _Struct(
                int(t["op"]),
                frozenset(t["commands"]) if "commands" in t else None,
                int(t["at"]),
                t.get("via"),
                (t["select"], frozenset(t["values"])) if "select" in t else None,
                {8: int(t["size64"]), 4: int(t["size32"])},
                fields,
            )
        )
    return tuple(out)


def memory_behind(
    memory: Memory, vcpu: Vcpu, op: int, command: int | None, args: Sequence[int]
) -> dict[str, int]:  # fmt: skip
    """Return the fields of the structure that a call's arguments point to; empty where there is none or it cannot be read.

    Args:
        memory: of the guest.
        vcpu: whose page tables are walked.
        op: hypercall number.
        command: number of the sub-operation, without progress bits; None if there is none or it is in the structure.
        args: argument registers.
    """
    word = 8 if vcpu.bits == 64 else 4
    for struct in _structs():
        if struct.op != op or (struct.commands is not None and command not in struct.commands):
            continue
        address = args[struct.at]
        if struct.via is not None:
            raw = memory.read(address + struct.via * word, word, vcpu.space)
            if raw is None:
                return {}
            address = int.from_bytes(raw, "little")
        if address == 0:
            return {}
        raw = memory.read(address, struct.size[word], vcpu.space)
        if raw is None:
            continue  # the head alone may still be there
        found = {name: int.from_bytes(raw[at : at + n], "little") for name, (at, n) in struct.fields[word].items()}
        if struct.select is None or found.get(struct.select[0]) in struct.select[1]:
            return found
    return {}


def finished_entries(memory: Memory, vcpu: Vcpu, address: int) -> tuple[int, bool]:
    """Count the multicall entries that stand before ``address`` without a gap: those that are done, if the list began there.

    An entry is a known hypercall number (set_trap_table, 0, is passed over: a zeroed page would be full of it) in a full
    word. That they belong to the same call is not written anywhere: the count is inferred.

    Returns:
        how many, and whether the results show it: one of them holds a result that is neither 0 nor its number.
    """
    word = 8 if vcpu.bits == 64 else 4
    size = 8 * word
    count, shown = 0, False
    end = address
    while count < _MOST_ENTRIES:
        # As much as one page holds of whole entries, then entry by entry where one crosses into the page before.
        n = max(1, (end - 1) % PAGE + 1) // size * size or size
        raw = memory.read(end - n, n, vcpu.space) if end >= n else None
        if raw is None:
            break
        table = np.frombuffer(raw, f"<u{word}").reshape(-1, 8)[::-1]
        good = (table[:, 0] > 0) & (table[:, 0] < 64)
        run = len(good) if good.all() else int(np.argmin(good))
        part = table[:run]
        shown |= bool(((part[:, 1] != 0) & (part[:, 1] != part[:, 0])).any())
        count += run
        if run < len(good):
            break
        end -= n
    return count, shown
