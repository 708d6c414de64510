"""``xtrace abi export``: the whole table, for programs and for reading."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

NAME = "export"


def command(
    hypercall: Annotated[list[str] | None, typer.Option("--hypercall", metavar="NAME", help="All without it.")] = None,
    caller: Annotated[list[str] | None, typer.Option("--caller", metavar="KIND", help="Caller ABI; all without it.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="json|jsonl|csv|markdown", help="Form of the table.")] = "json",
) -> int:
    """Write every hypercall, operation and span of releases: what continues and how, what never does, what is absent."""
    import json
    from dataclasses import asdict

    from xtrace.analyze.table import rows
    from xtrace.cli import common

    form = common.choose_format(format_, ("json", "jsonl", "csv", "markdown"))
    found = rows(common.hypercalls(hypercall), common.callers(caller) if caller else None)
    if form == "markdown":
        from xtrace.report.abi_markdown import page

        for line in page(found):
            print(line)
    elif form == "jsonl":
        for row in found:
            print(json.dumps(asdict(row)))
    elif form == "json":
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        import csv

        out = csv.writer(sys.stdout, lineterminator="\n")
        head = None
        for row in found:
            plain = asdict(row)
            if head is None:
                head = list(plain)
                out.writerow(head)
            out.writerow([";".join(v) if isinstance(v, tuple) else v for v in plain.values()])
    return 0
