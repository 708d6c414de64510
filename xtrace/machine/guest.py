"""The abstract guest: one call with its registers and structure, and a record of what was done to each of its units.

Nothing here decodes: a unit is what the operation works on (an extent, a page, a grant, a multicall entry, a byte), known by
its place in the call as issued.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from xtrace.replay.behaviour import Behaviour, Check, Hypercall

__all__ = ("Done", "Guest", "issue", "named", "where_of")

MASK64: Final = (1 << 64) - 1
MASK32: Final = (1 << 32) - 1

#: Callers whose registers have 32 bits.
_NARROW: Final = frozenset({"pv32", "hvm32", "arm32"})

#: Where operands of an issued call lie, far enough apart that none runs into another.
_POINTERS: Final = 0x1000_0000


class Done(NamedTuple):
    """One unit that was worked on: by which operation, its place in the call as issued, on which host (quick to make: many)."""

    operation: str
    place: int
    host: int


@dataclass(slots=True)
class Guest:
    """A vCPU in a call.

    Attributes:
        caller: its ABI.
        issuer: guest, device_model or control.
        number: hypercall number it executes (Xen may change it: a redirect).
        operation: what it asked for.
        total: units that it asked for.
        args: its six argument registers.
        memory: the fields of the structure behind them, Xen's names.
        origin: args and memory as issued, for telling places from moved operands.
        layout: name of the structure's layout in memory; None if it has but one.
        done: what was done so far, in order.
        shift: units by which Xen moved the operands on: what stands in them is a shorter call.
        stops: places at which any handler stops: with an errno, or ``"progress"``: it returns how far it got (a frame that
            is no longer the guest's, a list that ends in unmapped memory).
        inside: it stands in an entry of a multicall.
    """

    caller: str
    issuer: str
    number: int
    operation: str
    total: int
    args: list[int]
    memory: dict[str, int]
    layout: str | None = None
    origin: dict[str, int] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    shift: int = 0
    stops: dict[int, str] = field(default_factory=dict)
    inside: bool = False
    number_left: int | None = None  # sub-operation number of the continuation, as the host that left it reads it

    @property
    def bits(self) -> int:
        """Width of its registers."""
        return 32 if self.caller in _NARROW else 64

    def get(self, where: str) -> int:
        """Return what stands at ``arg0`` … or ``mem.FIELD``; 0 where nothing was put."""
        return self.args[int(where[3:])] if where.startswith("arg") else self.memory.get(where.removeprefix("mem."), 0)

    def has(self, where: str) -> bool:
        """Say whether something was put there."""
        return where.startswith("arg") or where.removeprefix("mem.") in self.memory

    def put(self, where: str, value: int) -> None:
        """Write a register (as wide as it is) or a field."""
        if where.startswith("arg"):
            self.args[int(where[3:])] = value & (MASK32 if self.bits == 32 else MASK64)
        else:
            self.memory[where.removeprefix("mem.")] = value & MASK64

    def moved(self, where: str) -> int:
        """Return how far an operand was moved since the call was issued."""
        return (self.get(where) - self.origin.get(where, 0)) & MASK64

    def counts(self) -> dict[int, int]:
        """Return how often each unit asked for was done by the operation asked for."""
        out = dict.fromkeys(range(self.total), 0)
        for d in self.done:
            if d.operation == self.operation:
                out[d.place] = out.get(d.place, 0) + 1
        return out


def issue(call: Hypercall, b: Behaviour, total: int, issuer: str = "guest", *, swapped: bool = False) -> Guest:
    """Return a guest that makes a call of ``total`` units of operation ``b``, such that the release's own tests pass.

    Args:
        call: the hypercall at the release that it runs on first.
        b: the operation there.
        total: units asked for.
        issuer: who makes it.
        swapped: where the order of the work hangs on the operands: the case in which it begins at the far end.
    """
    args = [(_POINTERS * (k + 1)) & MASK32 for k in range(6)]
    g = Guest(call.caller, issuer, call.number, b.operation, total, args, {}, b.params.get("layout"))
    checks: list[Check] = [*(call.dispatch.checks if call.dispatch is not None else ()), *b.checks]
    if b.continues_when is not None:
        checks.append(b.continues_when)
    count = f"arg{b.params['count']}" if b.params.get("count") is not None else None
    for check in checks:
        where = where_of(check.at)
        if check.resumed_only or where in (b.total, count) or g.memory.get(where.removeprefix("mem.")):
            continue
        if check.equals is not None:
            g.put(where, check.equals)
        elif check.minimum is not None or check.maximum is not None:
            g.put(where, check.minimum if check.minimum is not None else min(check.maximum or 0, g.get(where)))
    if b.command_at is not None:
        g.put(b.command_at, b.number)
    if b.inner is not None and b.inner_operations:
        names = b.inner_continues
        number = next((n for n, name in b.inner_operations.items() if names is None or name in names), 0)
        g.put(where_of(b.inner), number)
        g.operation = named(b, g)
    for condition in b.orders:
        above, _, below, *_ = condition.split()
        g.put(below, 0x1000)
        g.put(above, 0x1001 if swapped else 0x800)
    if count is not None:
        g.put(count, total)
    if b.params.get("base"):
        g.put(where_of(str(b.params["base"])), 0x40)
    if b.total:
        g.put(b.total, total + 0x3F if b.params.get("total_is") == "last" else total)
    for name in b.params.get("advance", {}):
        if not g.has(where_of(name)):
            g.put(where_of(name), 0x1000)
    for name, step in b.params.get("reduce", {}).items():
        if where_of(name) != b.total:
            g.put(where_of(name), total * int(step))
    if b.params.get("index"):
        g.put(where_of(str(b.params["index"])), 0)
    if b.params.get("done"):
        g.put(where_of(str(b.params["done"])), 0)
    g.origin = {f"arg{k}": v for k, v in enumerate(g.args)} | {f"mem.{k}": v for k, v in g.memory.items()}
    return g


def named(b: Behaviour, g: Guest) -> str:
    """Return the name of an operation, with that of the command inside its structure where it has one."""
    if b.inner is None or not g.has(where_of(b.inner)):
        return b.operation
    inner = b.inner_operations.get(g.get(where_of(b.inner)))
    return f"{b.operation}/{inner}" if inner is not None else b.operation


def where_of(name: str) -> str:
    """Return a location with its ``mem.``, which the fact files may leave out."""
    return name if name.startswith(("arg", "mem.")) else f"mem.{name}"
