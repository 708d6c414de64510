"""What the tracing code's own records say about the release: event ids, layouts, which hypercall numbers are recorded.

The facts are ``abi/trace_events.toml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from xtrace import release
from xtrace.replay.factfiles import expand, hypercall_names, in_table, load

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ("Finding", "Place", "judge", "numbers", "subcalls")

#: seq, byte offset and line of a record, as far as it has them.
Place = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a trace shows, and the releases that it rules out."""

    what: str
    why: str
    releases: frozenset[str]
    seq: int | None
    offset: int | None
    line: int | None


#: The id that stands for the container of fixed-size records (an event has a class, so its id is not 0).
_FIXED = 0


@cache
def _by_id(table: str = "record") -> dict[int, dict[str, Any]]:
    return {event: row for row in load("trace_events.toml")[table] for event in row["ids"]}


def _spans(row: Mapping[str, Any]) -> frozenset[str]:
    return expand(tuple(row["releases"]))


def _only(releases: Iterable[str]) -> str:
    return f"only {release.fold_text(releases)} write it"


def judge(
    known: Sequence[str],
    event_ids: Iterable[int],
    forms: Mapping[tuple[int, int, bool], int],
    peaks: Mapping[tuple[int, int], tuple[int, int]],
) -> list[Finding]:
    """Return what event ids, forms and values rule out; see ``Identifier.conclude``. Ids of one record count once.

    Where ``forms`` has id 0, the records are of a fixed size, and ids mean what Xen 3.0 and 3.1 mean by them.
    """
    everything = frozenset(known)
    by_id = _by_id("fixed" if any(event == _FIXED for event, _, _ in forms) else "record")
    first: dict[int, int] = {}
    for (event, _, _), offset in forms.items():
        first[event] = min(offset, first.get(event, offset))
    found: dict[tuple[str, str], Finding] = {}

    def note(row: Mapping[str, Any], event: int, what: str, writers: frozenset[str], offset: int | None) -> None:
        gone = everything - writers
        old = found.get((row["name"], what))
        if gone and (old is None or (offset is not None and (old.offset is None or offset < old.offset))):
            text = row["name"] if event == _FIXED else f"{row['name']} ({event:#x}){what}"
            found[row["name"], what] = Finding(text, _only(writers), gone, None, offset, None)

    for event in sorted(event_ids):
        row = by_id.get(event)
        if row is not None:
            note(row, event, "", _spans(row), first.get(event))
    for (event, words, tsc), offset in sorted(forms.items(), key=lambda f: f[1]):
        row = by_id.get(event, {})
        fits = [f for f in row.get("forms", ()) if f.get("words", words) == words and f.get("tsc", tsc) == tsc]
        if fits:
            what = f" with {words} word{'' if words == 1 else 's'}{'' if tsc else ' and no TSC'}"
            note(row, event, what, frozenset[str]().union(*(_spans(f) for f in fits)), offset)
    for (event, word), (value, offset) in sorted(peaks.items()):
        row = by_id.get(event, {})
        for rule in row.get("peaks", ()):
            if rule["word"] == word and value > rule["max"]:
                note(row, event, f" with {value:#x} in word {word}", _spans(row) - _spans(rule), offset)
    # The narrowest first: an id says less than its form, and both less than what only few releases do.
    return sorted(found.values(), key=lambda f: (-len(f.releases), f.offset or 0))


def numbers(known: Sequence[str], event_ids: Iterable[int], seen: Mapping[int, Place]) -> list[Finding]:
    """Return what the hypercall numbers of PV entry records rule out: a release tests the number before it records.

    Args:
        known: releases to judge.
        event_ids: trace event ids seen.
        seen: number -> its first record, of PV entries whose caller no record tells apart from others.
    """
    ids = frozenset(event_ids)
    out = []
    rules = [row for row in load("trace_events.toml").get("numbers", []) if ids & frozenset(row["ids"])]
    for number, place in sorted(seen.items(), key=lambda s: s[1][0] or 0):
        gone: dict[str, set[str]] = {}
        for row in rules:
            for v in known:
                if v not in _spans(row):
                    continue
                tables = [in_table(v, caller, number) for caller in row.get("in_table", ())]
                if number >= row["below"] or (tables and all(there is False for there in tables)):
                    gone.setdefault(str(row["note"]), set()).add(v)
        name = hypercall_names().get(number)
        what = f"an entry of hypercall {number}" + (f" ({name})" if name else "")
        out += [Finding(what, why, frozenset(vs), *place) for why, vs in gone.items()]
    return out


def subcalls(known: Sequence[str], event_ids: Iterable[int], place: Place | None) -> list[Finding]:
    """Return what sub-call records of an HVM guest's multicall rule out.

    Args:
        known: releases to judge.
        event_ids: trace event ids seen. Without PV entry records a multicall of a PV guest would look the same.
        place: the first sub-call record behind a multicall of an HVM guest.
    """
    if place is None or 0x20100D not in frozenset(event_ids):
        return []
    writers = frozenset[str]().union(*(_spans(row) for row in load("trace_events.toml").get("subcalls", [])))
    what = "a sub-call record of an HVM guest's multicall"
    return [Finding(what, _only(writers), frozenset(known) - writers, *place)]
