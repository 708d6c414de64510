"""The few ways in which Xen keeps the progress of a preempted hypercall.

A codec reads progress out of whole columns of states and writes it back; its parameters (which argument, which bits,
how wide a step) are facts of a release and come from ``abi/``. Two kinds of progress:

* *absolute*: the handler reads an index (bits of the command word, a field of the structure) and skips that many units;
* *relative*: the operands themselves were moved (pointer advanced, count reduced), so that the handler sees a shorter call.

Only an absolute index can be read differently by another release; relative progress travels inside the operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xtrace.errors import FactError
from xtrace.replay.states import LOW32, Column, location

if TYPE_CHECKING:
    from xtrace.replay.behaviour import Behaviour
    from xtrace.replay.states import U64, Mask, States

__all__ = ("CODECS", "Codec", "Progress", "codec")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a codec reads. All columns have n rows, in the operation's unit."""

    index: Column  # what the handler will skip; 0 for relative codecs
    progress: Column  # done before the preemption, counted from the call as issued
    remaining: Column
    total: Column
    marked: Mask  # the state itself shows that it is a continuation (flag bit, non-zero index)


class Codec(Protocol):
    """One way of keeping progress."""

    home: str

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        """Read progress out of ``s``; ``issued`` is the call as first made, where that is known."""
        ...

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        """Return the locations that differ from ``issued`` after ``progress`` units were done."""
        ...


def _minus(a: Column, b: Column) -> Column:
    """A − b where both are known and b ≤ a."""
    known = a.known & b.known & (a.value >= b.value)
    return Column(np.where(known, a.value - b.value, np.uint64(0)), known)


def _plus(a: Column, b: Column) -> Column:
    known = a.known & b.known
    return Column(np.where(known, a.value + b.value, np.uint64(0)), known)


def _or(a: Column, b: Column) -> Column:
    """A where known, else b."""
    return Column(np.where(a.known, a.value, b.value), a.known | b.known)


def _total(b: Behaviour, s: States) -> Column:
    return s.at(b.total) if b.total else Column.unknown(len(s))


class _Index:
    """Shared by the codecs whose progress is an index of its own."""

    home = "command_bits"

    def _read(self, b: Behaviour, s: States) -> Column:
        raise NotImplementedError

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        index = self._read(b, s)
        total = _total(b, s)
        if issued is not None:
            total = _or(total, _total(b, issued))
        return Progress(index, index, _minus(total, index), total, index.known & (index.value != 0))


class ShiftedIndex(_Index):
    """``command | progress << shift``: memory_op."""

    def _read(self, b: Behaviour, s: States) -> Column:
        reg = s.at(f"arg{b.params['arg']}")
        return Column(reg.value >> np.uint64(b.params["shift"]), reg.known)

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        where = f"arg{b.params['arg']}"
        reg, shift = issued.at(where), np.uint64(b.params["shift"])
        low = reg.value & ((np.uint64(1) << shift) - np.uint64(1))
        return {where: Column(low | (progress << shift), reg.known)}


class MaskedOffset(_Index):
    """``command | progress``, progress a multiple of the mask plus one: hvm_op of 4.5 to 4.8."""

    def _read(self, b: Behaviour, s: States) -> Column:
        reg = s.at(f"arg{b.params['arg']}")
        return Column(reg.value & ~np.uint64(b.params["mask"]), reg.known)

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        where = f"arg{b.params['arg']}"
        reg, mask = issued.at(where), np.uint64(b.params["mask"])
        return {where: Column((reg.value & mask) | (progress & ~mask), reg.known)}


class CountFlag:
    """Pointer advanced, count reduced, a flag bit in the count: mmu_update, mmuext_op."""

    home = "arguments"

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        n = len(s)
        reg, flag = s.at(f"arg{b.params['count']}"), np.uint64(b.params["flag"])
        count = reg.value & LOW32  # an unsigned int in every release
        marked = reg.known & ((count & flag) != 0)
        remaining = Column(np.where(reg.known, count & ~flag, np.uint64(0)), reg.known)
        # An unflagged call is a first one, whatever its done-count holds.
        progress = Column(np.zeros(n, np.uint64), reg.known & ~marked)
        if b.params.get("done"):
            done = s.at(location(b.params["done"]))
            progress = _or(progress, Column(done.value, done.known & marked))
        total = _plus(progress, remaining)
        if issued is not None:
            whole = issued.at(f"arg{b.params['count']}")
            whole = Column(whole.value & LOW32 & ~flag, whole.known)
            by_count = _minus(whole, remaining)
            progress, total = _or(by_count, progress), _or(whole, total)
        return Progress(Column.full(n, 0), progress, remaining, total, marked)

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        out = _advance(b, issued, progress)
        where, flag = f"arg{b.params['count']}", np.uint64(b.params["flag"])
        left = out[where]
        out[where] = Column((left.value & ~flag) | flag, left.known)
        if b.params.get("done"):
            done = location(b.params["done"])
            before, count = issued.at(done), issued.at(where)
            # A call that is a continuation itself counts on from what was done before.
            base = np.where((count.value & flag) != 0, before.value, np.uint64(0))
            out[done] = Column(base + progress, before.known)
        return out


class Advanced:
    """Pointer advanced and (or) count reduced, nothing else: grant_table_op, multicall, console_io, set_trap_table."""

    home = "arguments"

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        n = len(s)
        p = b.params
        remaining = Column.unknown(n)
        if p.get("count") is not None:
            remaining = _count(b, s)
        progress, total = Column.unknown(n), Column.unknown(n)
        if issued is not None:
            if p.get("count") is not None:
                total = _count(b, issued)
                progress = _minus(total, remaining)
            if p.get("pointer") is not None:
                moved = _minus(s.at(f"arg{p['pointer']}"), issued.at(f"arg{p['pointer']}"))
                progress = _or(progress, Column(moved.value // np.uint64(p["size"]), moved.known))
        marked = progress.known & (progress.value != 0)
        return Progress(Column.full(n, 0), progress, remaining, total, marked)

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        return _advance(b, issued, progress)


class GuestStructure:
    """A field of the caller's structure: an absolute index (XENMEM_exchange), or operands moved (hvm_op to 4.4)."""

    home = "guest_memory"

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        n = len(s)
        total = _total(b, s)
        if b.params.get("index"):
            index = s.at(location(b.params["index"]))
            if b.params.get("base"):
                # 0 stands for "from the base", anything else is a position (opaque of XENMEM_sharing_op).
                base = s.at(location(b.params["base"]))
                if b.params.get("total_is") == "last":
                    # The field names the last unit, not how many there are.
                    span = _minus(total, base)
                    total = Column(span.value + np.uint64(1), span.known)
                at = np.where(index.value == 0, base.value, index.value)
                index = _minus(Column(at, index.known & base.known), base)
            return Progress(index, index, _minus(total, index), total, index.known & (index.value != 0))
        progress = Column.unknown(n)
        if issued is not None:
            for name, step in b.params.get("advance", {}).items():
                moved = _minus(s.at(location(name)), issued.at(location(name)))
                progress = _or(progress, Column(moved.value // np.uint64(step), moved.known))
            for name, step in b.params.get("reduce", {}).items():
                moved = _minus(issued.at(location(name)), s.at(location(name)))
                progress = _or(progress, Column(moved.value // np.uint64(step), moved.known))
        marked = progress.known & (progress.value != 0)
        return Progress(Column.full(n, 0), progress, total, _plus(total, progress), marked)

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        if b.params.get("index"):
            known, at = np.ones(len(progress), bool), progress
            if b.params.get("base"):
                base = issued.at(location(b.params["base"]))
                known, at = base.known, base.value + progress
            return {location(b.params["index"]): Column(at, known)}
        out: dict[str, Column] = {}
        for name, step in b.params.get("advance", {}).items():
            col = issued.at(location(name))
            out[location(name)] = Column(col.value + progress * np.uint64(step), col.known)
        for name, step in b.params.get("reduce", {}).items():
            col = issued.at(location(name))
            out[location(name)] = Column(col.value - progress * np.uint64(step), col.known)
        return out


class Unchanged:
    """Registers as issued: nothing to read (``none``), all to do again (``restart``), or known to Xen only."""

    def __init__(self, home: str) -> None:
        self.home = home

    def decode(self, b: Behaviour, s: States, issued: States | None) -> Progress:
        n = len(s)
        progress = Column.unknown(n) if self.home == "hypervisor" else Column.full(n, 0)
        total = _total(b, s)
        return Progress(Column.full(n, 0), progress, _minus(total, progress), total, np.zeros(n, bool))

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        return {}


class Redirect(Unchanged):
    """Another number takes the place of the operation's; the continuation is one of that number (EVTCHNOP_reset_cont)."""

    def preempt(self, b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
        to = b.params.get("to_operation")
        if to is None or b.command_at is None:
            return {}
        return {b.command_at: Column.full(len(progress), int(to))}


def _count(b: Behaviour, s: States) -> Column:
    reg = s.at(f"arg{b.params['count']}")
    # unsigned int (grant_table_op) or unsigned long (multicall takes u32/unsigned long): the file says which.
    if b.params.get("count_width", 32) == 32:
        return Column(reg.value & LOW32, reg.known)
    return reg


def _advance(b: Behaviour, issued: States, progress: U64) -> dict[str, Column]:
    p = b.params
    out: dict[str, Column] = {}
    if p.get("pointer") is not None:
        reg = issued.at(f"arg{p['pointer']}")
        out[f"arg{p['pointer']}"] = Column(reg.value + progress * np.uint64(p["size"]), reg.known)
    if p.get("count") is not None:
        reg = issued.at(f"arg{p['count']}")
        out[f"arg{p['count']}"] = Column(reg.value - progress, reg.known)
    return out


CODECS: dict[str, Codec] = {
    "none": Unchanged("none"),
    "shifted_index": ShiftedIndex(),
    "masked_offset": MaskedOffset(),
    "count_flag": CountFlag(),
    "advanced": Advanced(),
    "guest_structure": GuestStructure(),
    "hypervisor": Unchanged("hypervisor"),
    "restart": Unchanged("none"),
    "redirect": Redirect("redirect"),
    "unknown": Unchanged("none"),
}


def codec(name: str) -> Codec:
    """Return the codec called ``name`` in the fact files.

    Raises:
        FactError: no such codec.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise FactError(f"no codec is called {name!r}; there are {', '.join(CODECS)}") from None
