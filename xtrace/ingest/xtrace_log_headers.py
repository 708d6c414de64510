"""Header and domain lines of xtrace's own text log: few, so one at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xtrace import schema
from xtrace.ingest.base import Domain
from xtrace.ingest.xtrace_log_grammar import CALLER_ID, LIMITS

if TYPE_CHECKING:
    from xtrace.ingest.base import Observed

__all__ = ("BadLineError", "Updates", "domain", "header", "pairs_of", "show")

_HEX: Final = r"^0[xX][0-9a-fA-F]{1,16}$"
_DEC: Final = r"^[0-9]{1,20}$"


@dataclass(slots=True)
class Updates:
    """What header lines changed: parallel lists, each value holds from its line on (line 0: before this block)."""

    khz_line: list[int]
    khz: list[int]
    caller_line: list[int]
    caller_dom: list[int]
    caller: list[int]


class BadLineError(Exception):
    """A header line that is not understood; its text says why."""


def pairs_of(words: list[str]) -> dict[str, str]:
    """Return the keys and values of words; raises BadLineError."""
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise BadLineError(f"{show(word)} is not key=value")
        if key in pairs:
            raise BadLineError(f"{show(key)} is given twice")
        if not value:
            raise BadLineError(f"{show(word)} has no value")
        pairs[key] = value
    return pairs


def _number(text: str, low: int, high: int, key: str) -> int:
    if re.search(_HEX, text) or re.search(_DEC, text):
        value = int(text[2:], 16) if text[:2] in ("0x", "0X") else int(text)
        if low <= value <= high:
            return value
    raise BadLineError(f"{key}={show(text)} is not a number from {low} to {high}")


def show(text: str) -> str:
    """Return the start of a word, for a message."""
    return f"`{text[:60]}`"


def header(pairs: dict[str, str], line: int, observed: Observed, updates: Updates) -> None:
    """Take what a header line says; a value that differs from one said before is not taken."""
    khz = _number(pairs["tsc_khz"], 1, 10**9, "tsc_khz") if "tsc_khz" in pairs else None
    for key in ("release", "arch"):
        old, new = getattr(observed, key), pairs.get(key)
        if old is not None and new is not None and new != old:
            raise BadLineError(f"{key} is {show(new)} here and was {show(old)} before")
    if khz is not None and observed.tsc_khz not in (None, khz):
        raise BadLineError(f"tsc_khz is {khz} here and was {observed.tsc_khz} before")
    observed.release = pairs.get("release", observed.release)
    observed.arch = pairs.get("arch", observed.arch)
    if khz is not None:
        observed.tsc_khz = khz
        updates.khz_line.append(line)
        updates.khz.append(khz)


def domain(pairs: dict[str, str], line: int, observed: Observed, updates: Updates) -> None:
    """Take what a domain line says."""
    if "id" not in pairs:
        raise BadLineError("no id=")
    domid = _number(pairs["id"], 0, LIMITS["dom"], "id")
    caller = pairs.get("caller")
    if caller is not None and caller not in CALLER_ID:
        raise BadLineError(f"caller {show(caller)} is none of {', '.join(schema.CALLERS)}")
    said = observed.domains.setdefault(domid, Domain())
    said.role = pairs.get("role", said.role)
    said.name = pairs.get("name", said.name)
    if caller is not None:
        said.caller = caller
        updates.caller_line.append(line)
        updates.caller_dom.append(domid)
        updates.caller.append(CALLER_ID[caller])
