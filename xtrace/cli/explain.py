"""``xtrace explain``: what a code means."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xtrace.analyze.rules import Case, Rule

NAME = "explain"


def command(
    code: Annotated[
        str | None, typer.Argument(metavar="[CODE]", help="A code or name such as XT001 or misdirected; without: a list.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="The page of every code.")] = False,
    format_: Annotated[str, typer.Option("--format", metavar="text|json|markdown", help="Form of the output.")] = "text",
    example: Annotated[
        str | None, typer.Option("--example", metavar="NAME", help="Write one example trace of the code: bad, good.")
    ] = None,
) -> int:
    """Say what a finding's code means, why it matters and what to do, with a trace that shows it and one that does not."""
    from xtrace.analyze import rules
    from xtrace.cli.common import choose_format
    from xtrace.errors import UsageError

    form = choose_format(format_, ("text", "json", "markdown"))
    if all_ and code:
        raise UsageError("--all shows every code; leave the code out")
    if example is not None:
        if not code:
            raise UsageError("--example goes with a code")
        sys.stdout.write(_case(rules.get(code), example).log())
        return 0
    chosen = [rules.get(code)] if code else list(rules.rules().values())
    if form == "json":
        _json(chosen, one=code is not None)
    elif form == "markdown":
        from xtrace.report import rules_markdown

        for line in rules_markdown.section(chosen[0]) if code else rules_markdown.page(chosen):
            print(line)
    else:
        _text(chosen, listed=not code and not all_)
    return 0


def _case(rule: Rule, name: str) -> Case:
    from xtrace.errors import UsageError

    for case in rule.cases:
        if case.name == name:
            return case
    there = f"there are {' and '.join(c.name for c in rule.cases)}" if rule.cases else rule.no_case or "there is none"
    raise UsageError(f"{rule.code} has no example {name!r}: {there}")


def _text(chosen: list[Rule], *, listed: bool) -> None:
    from xtrace.report import rules_text

    if listed:
        for line in rules_text.listing(chosen):
            print(line)
        print("\nxtrace explain CODE says more.")
        return
    for k, rule in enumerate(chosen):
        if k:
            print(f"\n{'-' * 80}\n")
        for line in rules_text.lines(rule):
            print(line)


def _json(chosen: list[Rule], *, one: bool) -> None:
    import json
    from dataclasses import asdict

    rows = []
    for rule in chosen:
        row = asdict(rule)
        for case, shown in zip(rule.cases, row["cases"], strict=True):
            del shown["code"]
            shown |= {"command": case.command, "log": case.log()}
        rows.append(row)
    print(json.dumps(rows[0] if one else rows, indent=1))
