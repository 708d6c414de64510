"""``xtrace abi check``: what a proposed change of the encodings would break."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

NAME = "check"


def command(
    file: Annotated[str, typer.Argument(metavar="FILE.toml", help="A model: docs/models.md.")],
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Say which continuations in flight a proposed hypervisor breaks against its parent, both ways, and what it risks.

    Exit status: as of ``abi diff``; 4 also for bits accepted but unused and for progress that may outgrow its field.
    """
    from xtrace.analyze.compare import as_dict, breaks, diff
    from xtrace.analyze.lint import lint
    from xtrace.analyze.single import hypercall_number
    from xtrace.cli import common
    from xtrace.cli.abi.diff import show
    from xtrace.replay.models import load, registered
    from xtrace.schema import CALLERS

    form = common.choose_format(format_)
    model = load(file)
    assert registered(model.name) is model
    numbers = sorted(hypercall_number(h) for h in model.hypercalls())
    changes = diff(model.parent, model.name, CALLERS, numbers)
    # What the parent warns of too is no news.
    before = {(w.kind, w.caller, w.operation) for w in lint(model.parent, numbers, CALLERS)}
    warnings = [w for w in lint(model.name, numbers, CALLERS) if (w.kind, w.caller, w.operation) not in before]
    status = 4 if warnings else 0
    for c in changes:
        if breaks(c.forth):
            status |= 8 if c.guard == "any" else 4
        status |= 4 if breaks(c.back) else 0
    if form == "json":
        document = {
            "model": model.name,
            "parent": model.parent,
            "changes": [as_dict(c) for c in changes],
            "warnings": [asdict(w) for w in warnings],
        }
        print(json.dumps(document, indent=1))
        return status
    print(f"{model.name}, laid over {model.parent}")
    show(model.parent, model.name, changes)
    groups: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for w in warnings:
        groups.setdefault((w.kind, w.text), {}).setdefault((w.hypercall, w.operation), []).append(w.caller)
    for (kind, text), where in groups.items():
        print(common.wrap(f"warning, {kind.replace('_', ' ')}: {text}", "", "  "))
        same: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (hypercall, operation), callers in where.items():
            same.setdefault((hypercall, tuple(callers)), []).append(operation)
        for (hypercall, kinds), operations in same.items():
            print(common.wrap(f"{hypercall} ({', '.join(kinds)}): {', '.join(operations)}", "    ", "      "))
    return status
