"""``xtrace abi matrix``: release by release, the worst that can become of a continuation."""

from __future__ import annotations

import json
from typing import Annotated

import typer

NAME = "matrix"

#: How an outcome is shown; what is not here is a resume.
LETTERS = {
    "misdirected": "M", "wrong_result": "W", "skips": "S", "redoes": "R", "restarts": "B", "lost": "L", "absent": "A",
    "refused": "F", "undecidable": "?", "unknown": "?", "resumes": ".",
}  # fmt: skip

_LEGEND = (
    "M misdirected, W wrong result, S skips, R redoes, B begins again (harmful), L lost, A absent, F refused, "
    "? not known, . resumes"
)


def command(
    releases: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RELEASE…]", help="Releases, series or ranges; the newest of each series without."),
    ] = None,
    exposure: Annotated[
        str, typer.Option("--exposure", metavar="WHO", help="Who issues: guest, device_model, control; all without it.")
    ] = "all",
    caller: Annotated[list[str] | None, typer.Option("--caller", metavar="KIND", help="Caller ABI; all without it.")] = None,
    hypercall: Annotated[list[str] | None, typer.Option("--hypercall", metavar="NAME", help="All without it.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
) -> int:
    """Show for every pair of releases the worst outcome of any continuation, for each kind of issuer.

    A row is the release that left it, a column the one that resumes it. Caveats (machine frames, domids) are not counted.
    """
    from xtrace.analyze.compare import ISSUER
    from xtrace.analyze.matrix import matrix
    from xtrace.cli import common
    from xtrace.errors import UsageError
    from xtrace.release import get

    form = common.choose_format(format_)
    kinds = list(ISSUER.values()) if exposure == "all" else [exposure]
    if exposure not in ("all", *ISSUER.values()):
        raise UsageError(f"--exposure {exposure}: there are all, {', '.join(ISSUER.values())}")
    chosen = common.newest_points(releases)
    names = common.callers(caller)
    out = []
    for kind in kinds:
        cells = matrix(chosen, chosen, names, kind, common.hypercalls(hypercall))
        if form == "json":
            for (source, target), cell in cells.items():
                out.append(
                    {
                        "exposure": kind,
                        "source": source,
                        "target": target,
                        "outcome": cell.outcome,
                        "errno": cell.errno,
                        "caller": cell.caller,
                        "hypercall": cell.hypercall,
                        "operation": cell.operation,
                    }
                )
            continue
        print(common.wrap(f"issued by {kind} ({', '.join(names)}); from the left to the top", "", "  "))
        width = max(len(r) for r in chosen)
        heads = [get(r).series for r in chosen]
        if len(set(heads)) != len(heads):
            heads = list(chosen)
        for k in range(max(map(len, heads))):
            print(" " * (width + 1) + " ".join(h.rjust(max(map(len, heads)))[k] for h in heads))
        for source in chosen:
            print(f"{source:{width}} " + " ".join(LETTERS[cells[source, t].outcome] for t in chosen))
        print()
    if form == "json":
        print(json.dumps(out, indent=1))
    else:
        print(common.wrap(_LEGEND, "", "  "))
    return 0
