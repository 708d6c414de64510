"""What a proposed encoding risks by itself: bits that are accepted and mean nothing, progress that outgrows its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xtrace.replay.behaviour import Behaviour, Hypercall

__all__ = ("Warning_", "lint")

_NARROW = ("pv32", "hvm32", "arm32")


@dataclass(frozen=True, slots=True)
class Warning_:
    """One risk: ``unused_bits`` (the rule of 2014), ``overflow``, ``no_limit``."""

    kind: str
    caller: str
    hypercall: str
    operation: str
    text: str


def lint(version: str, hypercalls: Iterable[int], callers: Iterable[str]) -> Iterator[Warning_]:
    """Yield the risks of some hypercalls at a version.

    Args:
        version: a release or a model.
        hypercalls: numbers to look at.
        callers: ABIs to look at.
    """
    numbers = list(hypercalls)
    for caller in callers:
        for number in numbers:
            call = facts.lookup(version, caller, number)
            for b in call.by_number.values():
                yield from _unused_bits(call, b)
                yield from _overflow(call, b)


def _unused_bits(call: Hypercall, b: Behaviour) -> Iterator[Warning_]:
    """Bits above a command that an operation does not use must be refused, so that they stay free (4ef6b5f16c8a)."""
    d = call.dispatch
    if d is None or not d.progress_bits() or b.codec in ("shifted_index", "masked_offset", "unknown"):
        return
    refused = d.command_bits is not None and b.number not in d.command_bits_except
    if b.command_bits == "ignored" and not refused:
        text = f"bits {d.progress_bits():#x} of the command are accepted and mean nothing: they cannot be given a meaning later"
        yield Warning_("unused_bits", call.caller, call.name, b.operation, text)


def _overflow(call: Hypercall, b: Behaviour) -> Iterator[Warning_]:
    """The largest progress that the operation's limit allows must fit where it is kept."""
    width = 32 if call.caller in _NARROW else 64
    if call.dispatch is not None:
        width = min(width, call.dispatch.width - bool(call.dispatch.sign_extend))
    if b.codec == "shifted_index":
        room = (1 << (width - int(b.params["shift"]))) - 1
    elif b.codec == "masked_offset":
        room = (1 << width) - 1
    elif b.codec == "count_flag":
        room = int(b.params["flag"]) - 1
    else:
        return
    if b.max_progress is not None:
        room = min(room, b.max_progress)
    if b.codec == "count_flag":
        return  # a count with the flag set is a continuation by definition, and refused or taken as one
    if b.max_total is not None and b.max_total > room + 1:
        text = f"totals up to {b.max_total:#x} are accepted, progress fits only up to {room:#x}"
        yield Warning_("overflow", call.caller, call.name, b.operation, text)
    elif b.max_total is None and width < 64:
        text = f"no limit on the total is known, progress fits only up to {room:#x}"
        yield Warning_("no_limit", call.caller, call.name, b.operation, text)
