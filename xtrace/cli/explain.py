"""``xtrace explain``: what a code means."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "explain"


def command(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="A code such as XT001; all of them without one.")] = None,
) -> int:
    """Say what a finding's code means, why it matters and what to do."""
    from xtrace.analyze import rules

    chosen = [rules.get(code)] if code else list(rules.rules().values())
    for k, rule in enumerate(chosen):
        if k:
            typer.echo("")
        typer.echo(f"{rule.code} {rule.name}: {rule.title}")
        typer.echo(f"  Why: {rule.why}")
        typer.echo(f"  What to do: {rule.what_to_do}")
        if rule.example:
            typer.echo(f"  Example: xtrace {rule.example}")
    return 0
