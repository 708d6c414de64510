"""``xtrace abi chain``: a continuation that travels over several hosts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

NAME = "chain"


def command(
    hosts: Annotated[list[str], typer.Argument(metavar="A B C…", help="Releases in the order in which the guest meets them.")],
    caller: Annotated[list[str] | None, typer.Option("--caller", metavar="KIND", help="Caller ABI; all without it.")] = None,
    hypercall: Annotated[list[str] | None, typer.Option("--hypercall", metavar="NAME", help="All without it.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Follow continuations born on A through the other hosts: parked all the while, or driven on and preempted again.

    Exit status: 0 all resume everywhere, 8 a guest's own breaks somewhere, 4 one that only others issue, or not known.
    """
    from xtrace.analyze.chain import chain
    from xtrace.analyze.exposure import BREAKS
    from xtrace.cli import common
    from xtrace.errors import UsageError

    form = common.choose_format(format_)
    if len(hosts) < 2:
        raise UsageError("chain takes two or more releases")
    names = [common.one_release(h, "host") for h in hosts]
    steps = chain(names, common.callers(caller), common.hypercalls(hypercall))
    status = 0
    for s in steps:
        if set(s.outcomes) & BREAKS:
            status |= 8 if s.guard == "any" else 4
        elif set(s.outcomes) - {"resumes"}:
            status |= 4
    if form == "json":
        rows = [{k: getattr(s, k) for k in s.__slots__} for s in steps]
        print(json.dumps({"hosts": names, "steps": rows}, indent=1))
        return status
    if not steps:
        print(f"Every continuation born on {names[0]} resumes on {', '.join(names[1:])}.")
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for s in steps:
        what = ", ".join(sorted(s.outcomes, key=lambda k: (k == "resumes", k)))
        errno = f" ({', '.join(s.errnos)})" if s.errnos else ""
        name = s.hypercall if s.operation == s.hypercall else f"{s.hypercall} {s.operation}"
        who = "" if s.guard == "any" else f", issued by {s.guard}"
        groups.setdefault((name, who, s.last, s.host, what + errno), []).append(s.caller)
    shown: object = None
    for (name, who, last, host, what), kinds in groups.items():
        if (name, who) != shown:
            print(f"{name}{who}")
            shown = (name, who)
        print(common.wrap(f"last left by {last}, at {host}: {what} [{', '.join(kinds)}]", "  ", "      "))
    return status
