"""Rules as a page (``docs/rules.md``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xtrace.analyze.rules import Reference, Rule

__all__ = ("page", "section")

_COMMIT: Final = "https://xenbits.xen.org/gitweb/?p=xen.git;a=commit;h="
_ADVISORY: Final = "https://xenbits.xen.org/xsa/advisory-"

_HEAD: Final = """\
# Codes

What the codes of findings mean, why they matter and what to do. A code is never reused; one that is retired stays here with the
reason. `xtrace explain XT001` shows the same in a terminal.

This page is written by `xtrace explain --all --format markdown`; a test keeps it current."""


def page(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield the lines of the whole page."""
    some = list(rules)
    yield from _HEAD.splitlines()
    yield ""
    yield "| code | name | what it says |"
    yield "|---|---|---|"
    for rule in some:
        gone = " (retired)" if rule.retired is not None else ""
        yield f"| [{rule.code}](#{rule.code.lower()}) | {rule.name} | {rule.title}{gone} |"
    for rule in some:
        yield ""
        yield from section(rule)


def section(rule: Rule) -> Iterator[str]:
    """Yield the lines of one rule."""
    yield f"## {rule.code}"
    yield ""
    yield f"**{rule.name}: {rule.title}.** {rule.why}"
    if rule.retired is not None:
        yield ""
        yield f"*Retired.* {rule.retired}"
    yield ""
    yield f"*What to do.* {rule.what_to_do}"
    yield ""
    yield f"*How loud.* {rule.severity.words}"
    if rule.references:
        yield ""
        yield from (f"- {_linked(r)}: {r.text}" for r in rule.references)
    if rule.example:
        yield from ("", "Without a trace:", "", "```sh", f"xtrace {rule.example}", "```")
    shown: dict[str, str] = {}
    for case in rule.cases:
        yield from ("", f"`{case.name}`: {case.text}")
        log = case.log()
        if log in shown:
            yield f"The trace is that of `{shown[log]}`."
        else:
            yield from ("", "```xtrace-log", *log.splitlines(), "```")
        shown.setdefault(log, case.name)
        yield ""
        yield from ("```sh", f"{case.command}   # exit status {case.status}", "```")
    if rule.no_case is not None:
        yield ""
        yield rule.no_case


def _linked(reference: Reference) -> str:
    if reference.commit is None:
        return f"`{reference.place}`"
    out = f"[`{reference.commit}`]({_COMMIT}{reference.commit})"
    if reference.xsa:
        out += f" ([XSA-{reference.xsa}]({_ADVISORY}{reference.xsa}.html))"
    return f"{out}, in {reference.since}"
