"""``xtrace simulate``: traces of a simulated host, with the truth beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

NAME = "simulate"

_FORMATS = ("xtrace-log", "xentrace")


def command(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help="A TOML file (docs/simulate.md).")],
    on: Annotated[str, typer.Option("--on", metavar="RELEASE", help="Release of the host.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The trace; FILE.truth.json goes beside it.")] = "",
    migrate_to: Annotated[
        str | None, typer.Option("--migrate-to", metavar="RELEASE", help="Move the guests to a host of this release …")
    ] = None,
    at: Annotated[int | None, typer.Option("--at", metavar="K", help="… after so many calls.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the random numbers: the same gives the same bytes.")] = 0,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="xtrace-log|xentrace", help="Form of the trace; xentrace for *.xentrace.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> int:
    """Simulate a host under load and write what a recorder would, with the ground truth in FILE.truth.json.

    With --migrate-to the trace of the second host is written too, named after its release.
    """
    from xtrace.cli import common
    from xtrace.cli.options import whole
    from xtrace.errors import InputError, UsageError
    from xtrace.machine import truth as truths
    from xtrace.machine import workload as workloads
    from xtrace.machine import write_log, write_xentrace
    from xtrace.machine.simulate import simulate

    for value, name in ((on, "--on"), (output, "-o")):
        if not value:
            raise UsageError(f"{name} is missing")
    if (migrate_to is None) != (at is None):
        raise UsageError("--migrate-to and --at go together")
    if format_ is None:
        format_ = "xentrace" if output.endswith(".xentrace") else "xtrace-log"
    common.choose_format(format_, _FORMATS)
    if output == "-":
        raise UsageError("-o needs a file: the truth is written beside it")
    source = common.one_release(on, "--on")
    target = None if migrate_to is None else common.one_release(migrate_to, "--migrate-to")
    w = workloads.read(workload)
    if at is not None and not 1 <= at <= w.calls:
        raise UsageError(f"--at {at}: the workload makes {w.calls} calls; name 1 to {w.calls}")

    first = Path(output)
    traces = [first]
    if target is not None:
        traces.append(first.with_name(f"{first.stem}.to-{target}{first.suffix}"))
    truth = first.with_name(first.name + ".truth.json")
    binary = format_ == "xentrace"
    sidecars = [t.with_name(t.name + ".xtrace.toml") for t in traces] if binary else []
    if not first.parent.is_dir():
        raise InputError(output, "there is no such folder to write it to")
    if not force:
        for path in (*traces, *sidecars, truth):
            if path.exists():
                raise UsageError(f"{path} exists; --force overwrites it")

    s = simulate(w, source, seed, target, at)
    rendered = [(write_xentrace if binary else write_log).render(r) for r in s.recordings]
    document = truths.truth(s, [t.name for t in traces], "offset" if binary else "line", [where for _, where in rendered])
    files = [(t, data) for t, (data, _) in zip(traces, rendered, strict=True)]
    files += [(p, write_xentrace.sidecar(r)) for p, r in zip(sidecars, s.recordings, strict=False)]
    files.append((truth, (json.dumps(document, indent=1) + "\n").encode()))
    for path, data in files:
        with whole(path) as out:
            out.write(data)

    left = [k for c in s.calls for k in c.left]
    print(f"{source}, seed {seed}: {len(s.calls):,} calls, {len(left):,} continuations, {sum(k.parked for k in left):,} parked")
    if target is not None:
        caught = [k for k in left if k.caught]
        outcomes: dict[str, int] = {}
        for k in caught:
            name = k.verdict.outcome if k.verdict is not None else "unknown"
            outcomes[name] = outcomes.get(name, 0) + 1
        text = ", ".join(f"{name} {n}" for name, n in sorted(outcomes.items())) or "none"
        print(f"in flight at the move to {target}, after {at:,} calls: {text}")
    for path, data in files:
        print(f"  {len(data):>10,} bytes  {path}")
    return 0
