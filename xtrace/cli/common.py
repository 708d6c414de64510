"""What several commands share: reading releases, callers and hypercalls from options, and lines that fit a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xtrace.analyze.representatives import Fate
    from xtrace.pipeline import Input

__all__ = ("announce", "callers", "choose_format", "fate_text", "hypercalls", "newest_points", "one_release", "wrap")


def announce(item: Input, problems: int = 3, *, losses: bool = False) -> None:
    """Say on standard error how an input was read, the first problems in it, and which plug-ins could not be used.

    Args:
        item: the input, read to its end.
        problems: so many are shown; the rest is counted.
        losses: say the whole loss ledger, too: of commands whose report has no place for it.
    """
    from xtrace.ingest import registry
    from xtrace.report.common import clean
    from xtrace.report.ledger import found, lines, read_as

    for name, why in registry.skipped().items():
        print(f"xtrace: plug-in reader {clean(name)} skipped: {clean(why)}", file=sys.stderr)
    print(f"xtrace: {clean(read_as(item))}", file=sys.stderr)
    said = found(item, problems)
    if losses:
        said += [*lines(item), *(() if item.entries else ("there is no hypercall in it",))]
    for text in said:
        print(f"xtrace: {clean(item.path)}: {clean(text)}", file=sys.stderr)


def one_release(text: str, what: str) -> str:
    """Return the version that a text names.

    Raises:
        UsageError: it is a series of several.
        UnknownRelease: no release is near.
    """
    from xtrace import release
    from xtrace.errors import UsageError

    chosen = release.parse(text)
    if len(chosen.releases) != 1:
        points = ", ".join(r.version for r in chosen.releases)
        raise UsageError(f"{what} {text} is a series; name one of {points}")
    if chosen.note:
        print(f"xtrace: {chosen.note}", file=sys.stderr)
    return chosen.releases[0].version


def callers(names: Sequence[str] | None) -> list[str]:
    """Return the callers named, all without any.

    Raises:
        UsageError: there is no such caller.
    """
    from xtrace.errors import UsageError
    from xtrace.schema import CALLERS

    for name in names or ():
        if name not in CALLERS:
            raise UsageError(f"no caller is called {name!r}; there are {', '.join(CALLERS)}")
    return list(dict.fromkeys(names)) if names else list(CALLERS)


def hypercalls(names: Sequence[str] | None) -> list[int] | None:
    """Return the numbers of the hypercalls named; None without any.

    Raises:
        UnknownHypercall: no release has one.
    """
    from xtrace.analyze.single import hypercall_number

    return [hypercall_number(n) for n in names] if names else None


def choose_format(value: str, known: tuple[str, ...] = ("text", "json")) -> str:
    """Return the output format.

    Raises:
        UsageError: there is no such format.
    """
    from xtrace.errors import UsageError

    if value not in known:
        raise UsageError(f"--format {value}: there are {' and '.join(known)}")
    return value


def newest_points(texts: Sequence[str] | None) -> list[str]:
    """Return the releases named, in order; without any the newest point release of each series and the snapshot."""
    from xtrace import release

    if not texts:
        newest = {r.series: r.version for r in release.releases()}
        return list(newest.values())
    out: dict[str, None] = {}
    for text in texts:
        for item in text.split(","):
            chosen = release.parse(item)
            if chosen.note:
                print(f"xtrace: {chosen.note}", file=sys.stderr)
            out.update(dict.fromkeys(chosen.versions))
    return list(out)


def wrap(text: str, first: str, rest: str, width: int = 80) -> str:
    """Break a line at blanks so that it fits a terminal."""
    import textwrap

    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False)


def fate_text(some: Iterable[Fate]) -> str:
    """Return the outcomes of representatives, the worst first, with the errno that must follow."""
    from xtrace.analyze.compare import severity

    parts: dict[str, None] = {}
    for f in sorted(some, key=lambda f: severity(f.outcome, harmless=f.harmless)):
        text = f.outcome + (" (harmless)" if f.harmless else "") + (f" {f.errno}" if f.errno else "")
        parts[text] = None
    return ", ".join(parts) or "leaves none"
