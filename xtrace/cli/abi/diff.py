"""``xtrace abi diff``: two releases held against each other, without a trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xtrace.analyze.compare import Change

NAME = "diff"


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="One release.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    caller: Annotated[list[str] | None, typer.Option("--caller", metavar="KIND", help="Caller ABI; all without it.")] = None,
    hypercall: Annotated[list[str] | None, typer.Option("--hypercall", metavar="NAME", help="All without it.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """List every continuation that differs between two releases, and what becomes of one in flight, each way.

    Exit status: 0 none breaks; 8 a guest's own continuation breaks from A to B; 4 one breaks from B to A, or one that only
    a device model or the control domain issues, or something is not known.
    """
    from xtrace.analyze.compare import as_dict, breaks, diff
    from xtrace.cli import common

    form = common.choose_format(format_)
    here, there = common.one_release(a, "A:"), common.one_release(b, "B:")
    changes = diff(here, there, common.callers(caller), common.hypercalls(hypercall))
    if form == "json":
        print(json.dumps({"a": here, "b": there, "changes": [as_dict(c) for c in changes]}, indent=1))
    else:
        show(here, there, changes)
    status = 0
    for c in changes:
        if breaks(c.forth):
            status |= 8 if c.guard == "any" else 4
        if breaks(c.back) or any(f.outcome in ("unknown", "undecidable") for f in (*c.forth, *c.back)):
            status |= 4
    return status


def show(a: str, b: str, changes: list[Change]) -> None:
    """Print changes, what is alike together."""
    from xtrace.cli.common import fate_text, wrap

    groups: dict[tuple[object, ...], list[Change]] = {}
    for c in changes:
        key = (c.hypercall, c.operation is None, c.guard, c.differences, fate_text(c.forth), fate_text(c.back), c.commits)
        groups.setdefault(key, []).append(c)
    for same in groups.values():
        c = same[0]
        names = list(dict.fromkeys(x.operation for x in same if x.operation not in (None, x.hypercall)))
        kinds = ", ".join(dict.fromkeys(x.caller for x in same))
        who = "" if c.guard == "any" else f"; issued by {c.guard}"
        print(wrap(f"{' '.join([c.hypercall, ', '.join(str(n) for n in names)]).strip()}: {kinds}{who}", "", "  "))
        for d in c.differences:
            print(wrap(f"{d.what}: {d.before or 'none'}  ->  {d.after or 'none'}", "    ", "      "))
        if c.commits:
            print(wrap(f"since commit {', '.join(x[:12] for x in c.commits)}", "    ", "      "))
        if c.operation is not None:
            print(wrap(f"{a} -> {b}: {fate_text(c.forth)}", "  ", "      "))
            print(wrap(f"{b} -> {a}: {fate_text(c.back)}", "  ", "      "))
    if not changes:
        print(f"No continuation differs between {a} and {b}.")
