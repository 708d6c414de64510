"""``xtrace abi``: the facts that verdicts stand on."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

NAME = "abi"

app = typer.Typer(help="Show the facts about Xen's continuations, and check them against Xen's sources.", no_args_is_help=True)


@app.command()
def versions() -> int:
    """List every release known, with its tag and date."""
    from xtrace.release import releases
    from xtrace.replay.facts import modelled_releases

    known = modelled_releases()
    for r in releases():
        print(f"{r.version:9} {r.date} {r.tag:18} {r.commit[:12]} {'modelled' if r.version in known else 'not modelled'}")
    return 0


@app.command()
def show(
    hypercall: Annotated[str, typer.Argument(metavar="HYPERCALL", help="Name or number.")],
    at: Annotated[str | None, typer.Option("--at", metavar="RELEASE", help="One release; the newest without it.")] = None,
    caller: Annotated[str, typer.Option("--caller", metavar="KIND", help="Caller ABI.")] = "pv64",
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Show how one release keeps the progress of a hypercall's operations, and who may issue them."""
    from xtrace import release
    from xtrace.analyze.single import hypercall_number
    from xtrace.errors import UsageError
    from xtrace.replay import facts
    from xtrace.replay.codecs import codec
    from xtrace.schema import CALLERS

    if caller not in CALLERS:
        raise UsageError(f"no caller is called {caller!r}; there are {', '.join(CALLERS)}")
    if format_ not in ("text", "json"):
        raise UsageError(f"--format {format_}: there are text and json")
    chosen = release.parse(at) if at else release.parse(release.newest().version)
    if len(chosen.releases) != 1:
        raise UsageError(f"--at {at} is a series; name one of {', '.join(r.version for r in chosen.releases)}")
    if chosen.note:
        print(f"xtrace: {chosen.note}", file=sys.stderr)
    call = facts.lookup(chosen.releases[0].version, caller, hypercall_number(hypercall))
    rows = [
        {
            "number": b.number,
            "operation": b.operation,
            "codec": b.codec,
            "home": codec(b.codec).home,
            "unit": b.unit,
            "total": b.total,
            "first": b.first,
            "stride": b.stride,
            "guard": b.guard,
            "caveats": list(b.caveats),
            "note": b.note,
            "cites": list(b.cites),
        }
        for _, b in sorted(call.by_number.items())
    ]
    if format_ == "json":
        head = {"hypercall": call.name, "number": call.number, "release": call.release, "caller": caller, "status": call.status}
        print(json.dumps({**head, "why": call.why, "operations": rows}, indent=1))
        return 0
    print(f"{call.name} ({call.number}) at {call.release} for {caller}: {call.status}" + (f", {call.why}" if call.why else ""))
    if call.dispatch is not None:
        d = call.dispatch
        shift = "" if d.shift is None else f", progress from bit {d.shift}"
        print(f"  command: arg0 & {d.mask:#x}{shift}; a number without operation gets {d.unmatched}")
    for row in rows:
        keeps = "never continues" if row["codec"] == "none" else f"{row['codec']}, progress in {row['home']}"
        caveats = call.by_number[int(str(row["number"]))].caveats
        who = "" if row["guard"] == "any" else f", issued by {row['guard']}"
        notes = f", {' and '.join(caveats)}" if caveats else ""
        print(f"  {row['number']:3} {row['operation']}: {keeps}{who}{notes}")
    return 0


@app.command()
def verify(
    xen_git: Annotated[str, typer.Option("--xen-git", metavar="DIR", help="A Xen repository with its release tags.")],
    tag: Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Check at this tag instead of the cites' own.")] = None,
) -> int:
    """Check every cite against Xen's sources: file, symbol and value at the ends of its range.

    Exit status: 0 all hold, 8 some do not.
    """
    from xtrace.replay.verify import verify as check
    from xtrace.replay.xentree import XenTree

    done = bad = 0
    with XenTree(xen_git) as tree:
        for c in check(tree, tag):
            done += 1
            if c.problem is not None:
                bad += 1
                print(f"{c.file}: {c.cite} at {c.tag}: {c.problem}")
    print(f"xtrace: {done:,} checks, {bad:,} do not hold", file=sys.stderr)
    return 8 if bad else 0
