"""Rules for a terminal of 80 columns (``xtrace explain``)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xtrace.analyze.rules import Rule

__all__ = ("lines", "listing")

_WIDTH: Final = 80


def listing(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield one line for each rule."""
    for rule in rules:
        gone = " (retired)" if rule.retired is not None else ""
        yield from _fold(f"{rule.code} {rule.name:<21} {rule.title}{gone}", "", " " * 28)


def lines(rule: Rule) -> Iterator[str]:
    """Yield the whole page of one rule."""
    yield from _fold(f"{rule.code} {rule.name}: {rule.title}", "", "  ")
    if rule.retired is not None:
        yield from _part("Retired", [rule.retired])
    yield from _part("Why", [rule.why])
    yield from _part("What to do", [rule.what_to_do])
    yield from _part("How loud", [rule.severity.words])
    if rule.references:
        yield from _part("References", [f"{r.place}: {r.text}" for r in rule.references])
    if rule.example:
        yield from _part("Without a trace", [f"$ xtrace {rule.example}"])
    shown: dict[str, str] = {}
    for case in rule.cases:
        yield from _part(f"Example ({case.name})", [case.text])
        yield ""
        log = case.log()
        if log in shown:
            yield f"    the same trace as {shown[log]}"
        else:
            for line in log.splitlines():
                yield from _fold(line, "    ", "      ")
        shown.setdefault(log, case.name)
        yield ""
        yield from _fold(f"$ {case.command}", "    ", "        ")
        yield f"    exit status {case.status}"
    if rule.no_case is not None:
        yield from _part("Examples", [rule.no_case])


def _part(head: str, paragraphs: Iterable[str]) -> Iterator[str]:
    yield ""
    yield f"{head}:"
    for text in paragraphs:
        yield from _fold(text, "  ", "      " if text.startswith("$") else "  ")


def _fold(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False)
