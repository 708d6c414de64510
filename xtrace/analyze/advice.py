"""What to do about it: advice computed from the tables, for what was seen and no more.

Each piece says what it rests on. A target is called safe, a release a way between, an order the better one, only if the
same judging that made the findings came to that for everything that was seen. Who issues an operation, and what keeps it
from being issued, stands in ``advice.toml``.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Final

from xtrace import release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ("Advice", "Drain", "Seen", "advise", "drains")

#: Targets for which a way is looked for, and releases tried to the end for each: it must stay a small part of an analysis.
_TARGETS: Final = 3
_TRIED: Final = 3

#: Kinds of migration that an operator may choose instead.
_WAYS: Final = {"cooperative": "a migration with the guest's help", "live_update": "a live update"}


@dataclass(frozen=True, slots=True)
class Advice:
    """One piece of advice.

    ``kind``: safe, through, order, migration, drain, identify, record. ``targets``: what it is about. ``through``: the release
    between. ``operations``: those to drain. ``migration``: kinds that catch nothing.
    """

    kind: str
    text: str
    targets: tuple[str, ...] = ()
    through: str | None = None
    operations: tuple[str, ...] = ()
    migration: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drain:
    """How to keep operations from being in flight; see ``advice.toml``."""

    operations: tuple[str, ...]
    issuer: str
    do: str
    cite: tuple[str, ...]


@cache
def drains() -> tuple[Drain, ...]:
    """Return all of them."""
    text = resources.files("xtrace.analyze").joinpath("advice.toml").read_text("utf-8")
    return tuple(
        Drain(tuple(d["operations"]), str(d["issuer"]), str(d["do"]), tuple(d["cite"])) for d in tomllib.loads(text)["drain"]
    )


def drain_of(operation: str) -> Drain | None:
    """Return what is known of draining ``hypercall`` or ``hypercall/sub-operation``."""
    names = (operation, operation.partition("/")[0])
    return next((d for d in drains() if any(n in d.operations for n in names)), None)


@dataclass(frozen=True, slots=True)
class Seen:
    """What an analysis found, as far as advice needs it.

    Attributes:
        sources: releases that may have written the traces.
        targets: releases that count, in the order of a report.
        bits: target -> exit bits.
        broken: target -> operations of which a continuation that was seen, or could have been left, breaks there.
        by_kind: target -> kind of migration -> exit bits if it alone were asked about.
        migration: kinds that were asked about; empty: all.
        blind: hypercalls whose sub-operation the recorder did not write.
        undecidable: some finding depends on what was not recorded.
        entries: hypercalls in the traces.
        alike: equal for releases that treat all that was seen alike.
        way: whether everything that was seen resumes at a release if a given one left it last (None: the source itself).
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    bits: Mapping[str, int]
    broken: Mapping[str, tuple[str, ...]]
    by_kind: Mapping[str, Mapping[str, int]]
    migration: frozenset[str]
    blind: tuple[str, ...]
    undecidable: bool
    entries: int
    alike: Callable[[str], object] = field(repr=False)
    way: Callable[[str | None, str], bool] = field(repr=False)


def advise(seen: Seen) -> list[Advice]:
    """Return advice in the order in which it is worth following."""
    if not seen.entries:
        return [Advice("record", "There is no hypercall in what was read. xtrace record xentrace says how to record one.")]
    out = []
    safe = tuple(t for t in seen.targets if not seen.bits[t])
    bad = [t for t in seen.targets if seen.bits[t]]
    if safe and bad:
        out.append(Advice("safe", f"For what was seen these are safe as they are: {release.fold_text(safe)}.", safe))
    broken = [t for t in bad if seen.broken[t]]
    if broken:
        out += _ways(seen, broken)
    out += _migrations(seen, bad)
    out += _drains(seen, broken)
    if len(seen.sources) > 1 and bad:
        out.append(
            Advice(
                "identify",
                f"Say which release wrote it (--from): {len(seen.sources)} are possible, and what one of them would leave counts.",
            )
        )
    if seen.blind or seen.undecidable:
        what = ", ".join(seen.blind) if seen.blind else "some calls"
        out.append(
            Advice(
                "record",
                f"Registers of {what} were not recorded. xtrace record ftrace (or bpftrace, printk) records those of "
                "preempted calls; with them the verdict is about what was really left.",
            )
        )
    return out


def _ways(seen: Seen, broken: Sequence[str]) -> Iterator[Advice]:
    """Look for a release between, and for the other direction."""
    if len(seen.sources) != 1:
        return  # which of them left it decides what resumes it
    source = seen.sources[0]
    alike: dict[tuple[str, ...], list[str]] = {}
    for t in broken:
        alike.setdefault(seen.broken[t], []).append(t)
    for group in list(alike.values())[-_TARGETS:]:
        target = group[-1]
        through = next(_between(seen, source, target), None)
        if through is not None:
            yield Advice(
                "through",
                f"To {target} go through {through}: it resumes everything that was seen, and {target} everything that "
                f"{through} would leave of it. Stay there until every call in flight has returned: what {source} left "
                f"breaks at {target} wherever it was in between.",
                (target,),
                through,
            )
        if release.base(target) != release.base(source) and seen.way(target, source):
            yield Advice(
                "order",
                f"The other way, from {target} to {source}, everything that was seen resumes: where two hosts change places, "
                f"or a pool is mixed, move towards {source}.",
                (target,),
            )


def _between(seen: Seen, source: str, target: str) -> Iterator[str]:
    """Yield releases between two, newest first, that resume what was seen and leave what the target resumes."""
    known = release.releases()
    place = {r.version: i for i, r in enumerate(known)}
    low, high = sorted((place[release.base(source)], place[release.base(target)]))
    # The newest of each kind: of releases that treat all alike one will do, and the newest is the one to be on.
    kinds: dict[object, str] = {seen.alike(r.version): r.version for r in known[low + 1 : high] if r.released}
    tried = 0
    for version in sorted(kinds.values(), key=place.__getitem__, reverse=True):
        if seen.broken.get(version) or not seen.way(version, target):
            continue
        tried += 1
        if seen.way(None, version):
            yield version
        if tried >= _TRIED:
            return


def _migrations(seen: Seen, bad: Sequence[str]) -> Iterator[Advice]:
    """Name the kinds of migration that catch nothing of what was seen."""
    if seen.migration:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for t in bad:
        kinds = tuple(k for k in _WAYS if not seen.by_kind[t][k])
        if kinds:
            groups.setdefault(kinds, []).append(t)
    for kinds, targets in groups.items():
        names = " or ".join(_WAYS[k] for k in kinds)
        options = " ".join(f"--migration {k}" for k in kinds)
        yield Advice(
            "migration",
            f"{names[:1].upper()}{names[1:]} to {release.fold_text(targets)} harms nothing that was seen ({options}).",
            tuple(targets),
            migration=kinds,
        )


def _drains(seen: Seen, broken: Sequence[str]) -> Iterator[Advice]:
    """Say how to keep from being in flight what breaks."""
    names = dict.fromkeys(name for t in broken for name in seen.broken[t])
    by: dict[Drain, list[str]] = {}
    for name in names:
        drain = drain_of(name)
        if drain is not None:
            by.setdefault(drain, []).append(name)
    for drain, operations in by.items():
        yield Advice(
            "drain",
            f"Drain {', '.join(operations)}, issued by {drain.issuer}: {drain.do}.",
            tuple(t for t in broken if set(seen.broken[t]) & set(operations)),
            operations=tuple(operations),
        )
