"""``xtrace replay``: what one release makes of each recorded call."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtrace.cli.options import Callers, InputFormat, Output, TscKhz

NAME = "replay"


def command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace; - is standard input.")],
    at: Annotated[str, typer.Option("--at", metavar="RELEASE", help="The release that replays it.")],
    caller: Callers = None,
    tsc_khz: TscKhz = None,
    input_format: InputFormat = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|jsonl", help="Form of the output.")] = "text",
    output: Output = None,
) -> int:
    """Replay a trace: name, sub-operation and progress of each call, and the first record the model cannot explain.

    Exit status: 0 all explained, 4 a record cannot be explained or is not modelled, 16 the trace is incomplete.
    """
    from xtrace import release
    from xtrace.cli import options as shared
    from xtrace.cli.common import announce
    from xtrace.errors import UsageError
    from xtrace.report.common import clean

    if format_ not in ("text", "jsonl"):
        raise UsageError(f"--format {format_}: there are text and jsonl")
    chosen = release.parse(at)
    if chosen.note:
        print(f"xtrace: {chosen.note}", file=sys.stderr)
    if len(chosen.releases) != 1:
        raise UsageError(f"--at {at} is a series; name one of {', '.join(r.version for r in chosen.releases)}")

    from xtrace.pipeline import Options, replay
    from xtrace.report import account

    with shared.opened(output) as out:
        run = replay(
            trace,
            chosen.releases[0].version,
            Options(callers=shared.parse_callers(caller), tsc_khz=tsc_khz, input_format=input_format),
        )
        for batch in run.batches():
            (account.write_text if format_ == "text" else account.write_jsonl)(batch, out)
        out.flush()
    if run.input is not None:
        announce(run.input, losses=True)
    for line in account.closing(run):
        print(f"xtrace: {clean(line)}", file=sys.stderr)
    return run.bits
