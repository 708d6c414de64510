"""Which trace formats there are, and which one a file is in.

A reader is named here by its module and loaded when first needed. A new format is one new file that exposes ``READER``
(see ``xtrace.ingest.base.Reader``) and one line in :data:`BUILTIN`.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Final, cast

from xtrace.errors import InputError, UsageError

if TYPE_CHECKING:
    from xtrace.ingest.base import Reader
    from xtrace.ingest.source import Source

__all__ = ("BUILTIN", "detect", "names", "reader")

#: Name of a format (its reader's ``name``) -> the module that reads it. Where two are equally sure of a file, the
#: earlier one gets it.
BUILTIN: Final[dict[str, str]] = {
    "xentrace": "xtrace.ingest.xentrace",
    "xtrace-log": "xtrace.ingest.xtrace_log",
    "bare": "xtrace.ingest.bare",
    "ftrace-parked": "xtrace.ingest.parked",
}

#: How many of the first bytes an error shows.
_SHOWN: Final = 8


def names() -> tuple[str, ...]:
    """Return the names of the formats, in the order in which they are tried. Loads no reader."""
    return tuple(BUILTIN)


@cache
def reader(name: str) -> Reader:
    """Return the reader of a format.

    Raises:
        UsageError: there is no format of that name.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise UsageError(f"no trace format is called {name!r}; {hint}")
    return cast("Reader", import_module(BUILTIN[name]).READER)


def detect(source: Source) -> Reader:
    """Return the reader that is surest of the first bytes of ``source``.

    Raises:
        InputError: no reader recognises it (exit bit 16); the message shows its first bytes.
    """
    head = source.head()
    best: Reader | None = None
    sureness = 0
    for name in names():
        candidate = reader(name)
        score = candidate.sniff(head)
        if score > sureness:
            best, sureness = candidate, score
    if best is None:
        shown = head[:_SHOWN].hex(" ") + (" …" if len(head) > _SHOWN else "")
        raise InputError(source.path, f"is not a trace that xtrace knows (it begins {shown})", offset=0, exit_bits=16)
    return best
