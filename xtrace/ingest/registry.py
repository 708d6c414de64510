"""Which trace formats there are, and which one a file is in.

Every reader comes through one door, an entry point ``name = "module:READER"`` (see ``xtrace.ingest.base.Reader``): those
built in are listed here, others are installed packages that declare the group ``xtrace.readers``. A new format is one new
file and one line in :data:`BUILTIN`. Readers are loaded when first needed; a plug-in that cannot be used is named in
:func:`skipped` and costs nothing else. ``XTRACE_PLUGINS=0`` leaves all of them out.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, cast

from xtrace.errors import InputError, UsageError

if TYPE_CHECKING:
    from xtrace.ingest.base import Reader
    from xtrace.ingest.source import Source

__all__ = ("BUILTIN", "GROUP", "contradicted", "detect", "names", "reader", "skipped")

#: Group of the entry points.
GROUP: Final = "xtrace.readers"

#: Name of a format (its reader's ``name``) -> the module that reads it. Where two are equally sure of a file, the
#: earlier one gets it; plug-ins come after.
BUILTIN: Final[dict[str, str]] = {
    "xentrace": "xtrace.ingest.xentrace",
    "xentrace-fixed": "xtrace.ingest.xentrace_fixed",
    "xtrace-log": "xtrace.ingest.xtrace_log",
    "xenalyze": "xtrace.ingest.xenalyze_text",
    "xentrace-format": "xtrace.ingest.xentrace_format_text",
    "bare": "xtrace.ingest.bare",
    "linux-trace": "xtrace.ingest.linux_trace",
    "kvm-xen": "xtrace.ingest.kvm_events",
    "events": "xtrace.ingest.events_table",
    "console": "xtrace.ingest.console",
    "xenctx": "xtrace.ingest.xenctx",
}

#: How many of the first bytes an error shows.
_SHOWN: Final = 8

#: Plug-ins that cannot be used: name -> why.
_skipped: dict[str, str] = {}


def names() -> tuple[str, ...]:
    """Return the names of the formats, in the order in which they are tried. Loads no reader."""
    return tuple(_doors())


def skipped() -> dict[str, str]:
    """Return the plug-ins that could not be used so far: name -> why, one clause."""
    return dict(_skipped)


@cache
def _doors() -> dict[str, EntryPoint]:
    """Return the entry point of every format by name: those built in, then plug-ins by name."""
    doors = {name: EntryPoint(name, f"{module}:READER", GROUP) for name, module in BUILTIN.items()}
    if os.environ.get("XTRACE_PLUGINS") == "0":
        return doors
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        if point.name in doors:
            # Its own package is named too: two plug-ins may want one name.
            _skipped[f"{point.name} ({point.value})"] = "a reader of that name is there already"
        else:
            doors[point.name] = point
    return doors


def _load(point: EntryPoint) -> Reader:
    """Load a reader; a plug-in is checked and fenced in."""
    if point.name in BUILTIN:
        return cast("Reader", point.load())
    from xtrace.ingest.plugin import guarded

    return guarded(point, _skipped)


@cache
def reader(name: str) -> Reader:
    """Return the reader of a format.

    Raises:
        UsageError: there is no format of that name, or it is a plug-in that cannot be used.
    """
    doors = _doors()
    if name not in doors:
        near = difflib.get_close_matches(name, doors, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise UsageError(f"no trace format is called {name!r}; {hint}")
    return _load(doors[name])


def detect(source: Source, name: str | None = None) -> Reader:
    """Return the reader that is surest of the first bytes of ``source``, or the one called ``name``.

    Raises:
        InputError: no reader recognises it (exit bit 16); the message shows its first bytes.
        UsageError: there is no format of that name.
    """
    if name is not None:
        return reader(name)
    head = source.head()
    best = _surest(head)
    if best is None:
        from xtrace.ingest import refused

        why = refused.why(head)
        if why is not None:
            raise InputError(source.path, why, offset=0, exit_bits=16)
        shown = head[:_SHOWN].hex(" ") + (" …" if len(head) > _SHOWN else "")
        raise InputError(source.path, f"is not a trace that xtrace knows (it begins {shown})", offset=0, exit_bits=16)
    return best


def contradicted(source: Source, name: str) -> str | None:
    """Return the format that a source is in by its content, where the reader called ``name`` sees nothing of its own in it."""
    head = source.head()
    if reader(name).sniff(head) > 0:
        return None
    best = _surest(head)
    return None if best is None else best.name


def _surest(head: bytes) -> Reader | None:
    """Return the reader that is surest of the first bytes of an input."""
    best: Reader | None = None
    sureness = 0
    for each in names():
        try:
            candidate = reader(each)
        except UsageError:
            if each in BUILTIN:
                raise
            continue  # a broken plug-in: noted
        score = candidate.sniff(head)
        if score > sureness:
            best, sureness = candidate, score
    return best
