"""``xtrace analyze``: what would break."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtrace.cli.options import Callers, From, HostInfo, InputFormat, Output, TscKhz

NAME = "analyze"

#: Names of the exit bits for --fail-on.
_BITS = {"break": 8, "review": 4, "incomplete": 16, "never": 0}


def command(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE…", help="Traces of one host; - is standard input.")],
    source: From = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="RELEASE", help="Release or series to judge against; several times for more."),
    ] = None,
    caller: Callers = None,
    tsc_khz: TscKhz = None,
    input_format: InputFormat = None,
    host_info: HostInfo = None,
    one_recording: Annotated[
        bool,
        typer.Option(
            "--one-recording", help="The traces are parts of one recording (a file for each pCPU, or rotated): merge them."
        ),
    ] = False,
    format_: Annotated[str, typer.Option("--format", metavar="text|json|jsonl", help="Form of the report.")] = "text",
    output: Output = None,
    fail_on: Annotated[
        str, typer.Option("--fail-on", metavar="break,review,incomplete|never", help="Exit bits to keep.")
    ] = "break,review,incomplete",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every finding.")] = False,
) -> int:
    """Replay traces and say which continuations would break at other releases.

    Exit status, a mask: 0 clean, 1 cannot be read, 3 wrong use, 4 review, 8 a break, 16 the trace is incomplete.
    """
    from xtrace.cli import options as shared
    from xtrace.cli.common import announce
    from xtrace.errors import UsageError

    keep = _keep(fail_on)
    if format_ not in ("text", "json", "jsonl"):
        raise UsageError(f"--format {format_}: there are text, json and jsonl")
    callers = shared.parse_callers(caller)

    from xtrace.pipeline import Options, analyze
    from xtrace.report import common, json, text

    with shared.progress("reading") as tick:
        result = analyze(
            traces,
            Options(
                source=source, targets=tuple(to or ()), callers=callers, tsc_khz=tsc_khz, host_info=host_info,
                input_format=input_format, one_recording=one_recording,
                progress=tick,
            ),
        )  # fmt: skip
    for error in result.failed:
        print(f"xtrace: {common.clean(str(error))}", file=sys.stderr)
    for item in result.inputs:
        announce(item)
    if result.inputs:
        with shared.opened(output) as out:
            if format_ == "text":
                text.write_text(result, out, verbose=verbose)
            elif format_ == "json":
                json.write_json(result, out)
            else:
                json.write_jsonl(result, out)
    return result.bits & (keep | 1)


def _keep(fail_on: str) -> int:
    from xtrace.errors import UsageError

    bits = 0
    for word in fail_on.split(","):
        if word.strip() not in _BITS:
            raise UsageError(f"--fail-on {fail_on}: there are {', '.join(_BITS)}")
        bits |= _BITS[word.strip()]
    return bits
