"""What the fact files say, as typed values: one class for each kind of entry of ``abi/FORMAT.md``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

__all__ = ("Behaviour", "Check", "Dispatch", "Hypercall", "Special", "Status")

Status = Literal["modelled", "absent", "never", "unknown"]

U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How a release splits the command word."""

    mask: int
    shift: int | None
    width: int
    unmatched: str
    cites: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()  # made before the command is looked at
    command_bits: str | None = None  # what bits above the command get, whatever the command names
    command_bits_except: tuple[int, ...] = ()
    guard: str = "any"
    guard_errno: str = "-EPERM"
    guards_also: tuple[str, ...] = ()
    sign_extend: bool = False  # an int on its way to an unsigned long

    def word(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the command word as the handler sees it."""
        if self.width == 64:
            return value
        low = value & np.uint64(0xFFFFFFFF)
        if not self.sign_extend:
            return low
        return np.where(low >> np.uint64(31) != 0, low | np.uint64(0xFFFFFFFF00000000), low)

    def progress_bits(self) -> int:
        """Bits of arg0 that the release looks at and that do not name the sub-operation."""
        seen = U64 if self.width == 64 else 0xFFFFFFFF
        return seen & ~self.mask


@dataclass(frozen=True, slots=True)
class Check:
    """A test that a handler makes on entry; see ``requires`` in FORMAT.md."""

    at: str
    errno: str
    maximum: int | None = None
    minimum: int | None = None
    equals: int | None = None
    not_equals: int | None = None
    spares: tuple[int, ...] = ()  # sub-operation numbers that a test of the dispatch is not made for
    zero_bits: int = 0
    resumed_only: bool = False
    width: int = 64


@dataclass(frozen=True, slots=True)
class Special:
    """A register pattern with a meaning of its own."""

    name: str
    match: tuple[tuple[str, int], ...]
    creates: bool
    result: str
    errno: str | None
    meaning: str
    harmless: bool
    issuers: tuple[str, ...]  # whom it applies to; empty: everybody
    cites: tuple[str, ...]
    match_min: tuple[tuple[str, int], ...] = ()
    returns: str | None = None  # location of the value that it returns, as signed 32 bits


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one operation does in one release for one caller."""

    operation: str
    number: int
    codec: str
    params: Mapping[str, Any]
    unit: str | None
    fields: tuple[str, ...]
    struct: str | None
    total: str | None
    first: int
    stride: int
    command_bits: str
    past_end: str | None
    max_total: int | None
    max_total_result: str | None
    checks: tuple[Check, ...]
    guard: str
    guard_errno: str
    caveats: tuple[str, ...]
    order: str
    restart_harmless: bool | None
    held: str | None
    held_effect: str | None
    breaks_own: str | None
    note: str | None
    specials: tuple[Special, ...]
    cites: tuple[str, ...]
    commit: str | None
    at_end: str | None = None  # result at progress equal to the total; past_end is then for more than that
    refuses: str | None = None  # fails so on the next unit, whatever the structure says
    last_total: bool = False  # a continuation may carry progress equal to the total
    max_progress: int | None = None  # largest progress that the release reads back as it wrote it
    continues_when: Check | None = None
    order_when: str | None = None
    orders: tuple[str, ...] = ()  # the conditions that any release puts on the order of this operation
    inner: str | None = None  # location of a sub-operation number inside the structure
    inner_operations: Mapping[int, str] = field(default_factory=dict)
    inner_continues: tuple[str, ...] | None = None  # those of them that the codec is for; null: all
    inner_unmatched: str = "-ENOSYS"
    domids_unless: tuple[tuple[str, int], ...] = ()  # the caveat domids holds unless all of these hold
    command_at: str | None = "arg0"  # location that names the operation
    never_left: bool = False  # progress is kept so, but nothing that could be resumed is left (breaks_own says why)
    guards_also: tuple[str, ...] = ()  # guards of other builds or domains of another kind: who passes one may get through
    ident: tuple[Any, ...] = field(compare=False, repr=False, default=())

    @property
    def keeps_index(self) -> bool:
        """Whether progress is an index of its own, counted from the call as issued."""
        return self.codec in ("shifted_index", "masked_offset") or (
            self.codec == "guest_structure" and self.params.get("index") is not None
        )

    @property
    def moves_operands(self) -> bool:
        """Whether progress stands in the operands: what is left is a shorter call."""
        return self.codec in ("advanced", "count_flag") or (self.codec == "guest_structure" and not self.keeps_index)

    @property
    def encoding(self) -> tuple[Any, ...]:
        """What two behaviours must share for a continuation of one to be read alike by the other."""
        p = self.params
        names = (
            "arg",
            "shift",
            "mask",
            "pointer",
            "size",
            "count",
            "flag",
            "index",
            "base",
            "to_hypercall",
            "to_operation",
        )
        moves = tuple(sorted(p.get("advance", {}).items())), tuple(sorted(p.get("reduce", {}).items()))
        return (self.codec, tuple(p.get(n) for n in names), moves, self.order, self.order_when)


@dataclass(frozen=True)
class Hypercall:
    """Everything known of one hypercall in one release for one caller."""

    name: str
    number: int
    release: str
    caller: str
    status: Status
    command: bool
    command_at: str | None  # location that names the sub-operation: arg0, mem.cmd
    parameters: tuple[str, ...]
    dispatch: Dispatch | None
    by_number: Mapping[int, Behaviour]
    absent_errno: str
    known_numbers: Mapping[int, str]  # of every release: what a number would have meant elsewhere
    never_operations: frozenset[int] | None  # status "never" for these only; null: for all
    why: str
    reaches: str | None = None  # absent: the hypercall whose handler this number ends up in

    @cached_property
    def fingerprint(self) -> tuple[Any, ...]:
        """Equal for releases that treat every continuation of this hypercall alike."""
        d = self.dispatch
        return (
            self.status,
            self.absent_errno,
            self.reaches,
            None if d is None else (d.mask, d.shift, d.width, d.unmatched, d.checks, d.command_bits, d.guard, d.sign_extend),
            tuple((n, b.ident, b.checks) for n, b in sorted(self.by_number.items())),
            None if self.never_operations is None else tuple(sorted(self.never_operations)),
        )

    def behaviour(self, operation: str) -> Behaviour | None:
        """Return the behaviour of the sub-operation with Xen's name ``operation``, if this release has it."""
        return next((b for b in self.by_number.values() if b.operation == operation), None)
