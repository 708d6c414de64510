"""``xtrace abi show``: one hypercall at one release."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xtrace.replay.behaviour import Behaviour

NAME = "show"


def command(
    hypercall: Annotated[str, typer.Argument(metavar="HYPERCALL", help="Name or number.")],
    at: Annotated[str | None, typer.Option("--at", metavar="RELEASE", help="One release; the newest without it.")] = None,
    caller: Annotated[str, typer.Option("--caller", metavar="KIND", help="Caller ABI.")] = "pv64",
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Show how one release keeps the progress of a hypercall's operations, what it checks, and who may issue them."""
    from xtrace import release
    from xtrace.analyze.single import hypercall_number
    from xtrace.cli import common
    from xtrace.replay import facts

    form = common.choose_format(format_)
    (kind,) = common.callers([caller])
    version = common.one_release(at, "--at") if at else release.newest().version
    call = facts.lookup(version, kind, hypercall_number(hypercall))
    rows = [_row(b) for _, b in sorted(call.by_number.items())]
    if form == "json":
        head = {"hypercall": call.name, "number": call.number, "release": call.release, "caller": caller, "status": call.status}
        print(json.dumps({**head, "why": call.why, "operations": rows}, indent=1))
        return 0
    print(f"{call.name} ({call.number}) at {call.release} for {caller}: {call.status}" + (f", {call.why}" if call.why else ""))
    if call.dispatch is not None:
        d = call.dispatch
        mask = "" if d.mask.bit_length() >= d.width else f" & {d.mask:#x}"
        shift = "" if d.shift is None else f", progress from bit {d.shift}"
        print(common.wrap(f"command: {call.command_at}{mask}{shift}; a number without operation gets {d.unmatched}", "  ", "    "))
        for check in d.checks:
            if check.equals is not None:
                print(f"  {check.at} must be {check.equals:#x}, else {check.errno}")
    for row in rows:
        number = f"{row['number']:3} " if call.command else ""
        keeps = {"none": "never continues", "unknown": "may continue; how is not known"}.get(
            row["codec"], f"{row['codec']}, progress in {row['home']}"
        )
        who = "" if row["guard"] == "any" else f", issued by {row['guard']}"
        notes = f", {' and '.join(row['caveats'])}" if row["caveats"] else ""
        print(common.wrap(f"{number}{row['operation']}: {keeps}{who}{notes}", "  ", "        "))
        for key in ("breaks_own", "note"):
            if row[key] and (row["codec"] != "none" or key == "breaks_own"):
                print(common.wrap(f"{'breaks its own: ' if key == 'breaks_own' else ''}{row[key]}", "        ", "        "))
    return 0


def _row(b: Behaviour) -> dict[str, Any]:
    from xtrace.replay.codecs import codec

    return {
        "number": b.number,
        "operation": b.operation,
        "codec": b.codec,
        "home": codec(b.codec).home,
        "unit": b.unit,
        "total": b.total,
        "first": b.first,
        "stride": b.stride,
        "max_total": b.max_total,
        "max_progress": b.max_progress,
        "past_end": b.past_end,
        "guard": b.guard,
        "caveats": list(b.caveats),
        "held": b.held,
        "breaks_own": b.breaks_own,
        "note": b.note,
        "commit": b.commit,
        "cites": list(b.cites),
    }
