"""The table of continuations as a page: one section for each hypercall, its transitions in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrace import release

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xtrace.analyze.table import Row

__all__ = ("page",)

_HEAD = """# The continuation ABI of Xen

Generated from `xtrace/replay/abi` by `xtrace abi export --format markdown`; do not edit. Facts and their cites stand in the
data; `xtrace abi verify --xen-git DIR` checks them against Xen's sources, `xtrace abi export --format json` gives the same
table to programs.

A row is a span of releases in which an operation keeps its progress alike; the next row of the same operation and caller is a
transition, with the commit that made it. *Kept in* is the progress home, n the progress; *first* is the smallest n that a
continuation can carry (0: preempted before the first unit). What is listed under *never* leaves no continuation; what is
*absent* is not in that caller's hypercall table. Nothing else is left out.
"""


def page(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the page line by line."""
    yield from _HEAD.splitlines()
    sections: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        sections.setdefault((row.number, row.hypercall), []).append(row)
    quiet = []
    for (number, name), found in sections.items():
        if any(r.status in ("continues", "unknown") for r in found):
            yield from _section(number, name, found)
        elif any(r.status == "never" and r.operation is None for r in found):
            quiet.append((number, name, found))
    yield ""
    yield "## Hypercalls that never leave a continuation"
    yield ""
    yield "| number | hypercall | callers: releases |"
    yield "|---|---|---|"
    for number, name, found in quiet:
        yield f"| {number} | {name} | {_where([r for r in found if r.status == 'never'])} |"


def _section(number: int, name: str, found: list[Row]) -> Iterator[str]:
    yield ""
    yield f"## {name} ({number})" if number < 64 else f"## {name}"
    yield ""
    told = [r for r in found if r.status == "continues"]
    before: dict[str, list[Row]] = {}
    for r in told:
        if r.checks_before:
            before.setdefault(r.checks_before, []).append(r)
    if before:
        yield "Checked before the operation is looked at:"
        yield ""
        order = {r.version: i for i, r in enumerate(release.releases())}
        for text, rows in sorted(before.items(), key=lambda x: min(order[v] for r in x[1] for v in release.expand(r.releases))):
            yield f"- {text} ({_where(rows)})"
        yield ""
    if told:
        yield "| operation | callers | releases | kept in | unit, first | limits and checks | issued by | since |"
        yield "|---|---|---|---|---|---|---|---|"
        yield from _continuing(name, told)
    for status, lead in (("never", "Never leave a continuation"), ("unknown", "Not known"), ("absent", "Absent")):
        rows = [r for r in found if r.status == status]
        if not rows:
            continue
        yield ""
        if status == "absent" or all(r.operation is None for r in rows):
            yield f"{lead}: {_where(rows)}."
            continue
        names: dict[str, list[Row]] = {}
        for r in rows:
            names.setdefault(r.operation or name, []).append(r)
        same: dict[str, list[str]] = {}
        for operation, part in names.items():
            same.setdefault(_where(part), []).append(operation)
        yield f"{lead}:"
        yield ""
        for where, operations in same.items():
            yield f"- {', '.join(f'`{o}`' for o in operations)}: {where}"


def _continuing(name: str, rows: list[Row]) -> Iterator[str]:
    """Yield a line for each span of releases that reads alike here, whatever else the data tell apart."""
    order = {r.version: i for i, r in enumerate(release.releases())}
    alike: dict[tuple[str, ...], dict[str, set[str]]] = {}
    commits: dict[tuple[str, ...], list[str]] = {}
    for r in rows:
        operation = name if r.operation is None else f"`{r.operation}` ({r.operation_number})"
        kept = [
            f"{r.home}: {r.encoding}" if r.home != "none" else r.encoding,
            r.command,
            r.held and f"also inside Xen: {r.held}",
            r.special_forms and f"special: {r.special_forms}",
        ]
        limits = [
            r.limit,
            r.past_end and f"past the end: {r.past_end}",
            r.checks,
            r.breaks_own and f"**breaks its own**: {r.breaks_own}",
        ]
        caveats = f" ({', '.join(r.caveats)})" if r.caveats else ""
        key = (
            operation,
            "; ".join(t for t in kept if t),
            f"{r.unit or '-'}, {'-' if r.first is None else r.first}",
            "; ".join(t for t in limits if t),
            f"{r.guard}{caveats}",
        )
        for caller in r.callers:
            alike.setdefault(key, {}).setdefault(caller, set()).update(release.expand(r.releases))
        if r.commit:
            commits.setdefault(key, []).append(f"`{r.commit[:12]}`")
    # Operations that are alike in everything share a line.
    shared: dict[tuple[str, ...], list[str]] = {}
    starts: dict[tuple[str, ...], int] = {}
    for content, by_caller in alike.items():
        same: dict[tuple[str, ...], list[str]] = {}
        for caller, versions in by_caller.items():
            same.setdefault(tuple(release.spans(versions)), []).append(caller)
        for spans, kinds in same.items():
            since = " ".join(dict.fromkeys(commits.get(content, [])))
            cells = (", ".join(kinds), release.fold_text(release.expand(spans)), *content[1:], since)
            shared.setdefault(cells, []).append(content[0])
            starts[cells] = order[spans[0].partition("..")[0]]
    places = {operation: k for k, operation in enumerate(dict.fromkeys(key[0] for key in alike))}
    for cells, operations in sorted(shared.items(), key=lambda x: (places[x[1][0]], starts[x[0]])):
        yield "| " + " | ".join(_cell(c) for c in (", ".join(operations), *cells)) + " |"


def _where(rows: Iterable[Row]) -> str:
    """Return ``pv64, hvm64 3.3–4.22; …``."""
    by_caller: dict[str, set[str]] = {}
    for r in rows:
        for caller in r.callers:
            by_caller.setdefault(caller, set()).update(release.expand(r.releases))
    same: dict[str, list[str]] = {}
    for caller, versions in by_caller.items():
        same.setdefault(release.fold_text(versions), []).append(caller)
    return "; ".join(f"{', '.join(c)} {spans}" for spans, c in same.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
