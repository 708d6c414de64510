"""``xtrace abi``: the facts that verdicts stand on, one file for each command."""

from __future__ import annotations

import typer

from xtrace.cli.abi import chain, check, diff, export, matrix, show, verify, versions

NAME = "abi"

app = typer.Typer(
    help="Show and compare the facts about Xen's continuations, and check them against Xen's sources.", no_args_is_help=True
)

for module in (versions, show, diff, matrix, chain, check, export, verify):
    app.command(module.NAME)(module.command)
