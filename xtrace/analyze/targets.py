"""Which releases a trace is judged against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrace import release

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Targets", "choose")


@dataclass(frozen=True, slots=True)
class Targets:
    """Releases to judge against, in version order, and those that stand there for information only."""

    versions: tuple[str, ...]
    rollback: frozenset[str]
    notes: tuple[str, ...]


def choose(sources: Sequence[str], wanted: Sequence[str]) -> Targets:
    """Return what the user named, else the same release, every later one, and the series before as a rollback line.

    The development branch is judged only when it is named.
    Upstream promises no downgrade: the rollback line does not count for the exit status unless it is asked for by name.

    Raises:
        UnknownRelease: a name in ``wanted`` is no Xen release.
    """
    known = release.releases()
    if wanted:
        notes: list[str] = []
        chosen: set[str] = set()
        for text in wanted:
            selection = release.parse(text)
            chosen |= {r.version for r in selection.releases}
            if selection.note:
                notes.append(selection.note)
        order = sorted(chosen, key=lambda v: (release.index(release.base(v)), v))
        return Targets(tuple(order), frozenset(), tuple(notes))
    plain = {release.base(s) for s in sources}
    first = next(i for i, r in enumerate(known) if r.version in plain)
    later = [r.version for r in known[first:] if r.released or r.version in sources]
    # The same release on another host has the same fixes.
    later = [*(s for s in sources if release.base(s) != s), *later]
    series = known[first].series
    before = [r for r in known[:first] if r.series != series]
    rollback = [r.version for r in before if r.series == before[-1].series] if before else []
    return Targets((*rollback, *later), frozenset(rollback), ())
