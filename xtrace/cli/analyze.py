"""``xtrace analyze``: what would break."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xtrace.pipeline import Options, Result

from xtrace.cli.options import Callers, From, HostInfo, InputFormat, Output, TscKhz

NAME = "analyze"

#: Names of the exit bits for --fail-on.
_BITS = {"break": 8, "review": 4, "incomplete": 16, "never": 0}


def command(
    context: typer.Context,
    traces: Annotated[list[str], typer.Argument(metavar="TRACE…", help="Traces of one host; - is standard input.")],
    source: From = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="RELEASE", help="Release or series to judge against; several times for more."),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            "--path", metavar="A,B,C", help="Hosts that the domains meet, the traced one first: judge every hop and the chain."
        ),
    ] = None,
    migration: Annotated[
        list[str] | None,
        typer.Option(
            "--migration",
            metavar="KIND",
            help="cooperative, non_cooperative, live_update or fork_restore; several times for more. Others do not count.",
        ),
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
    follow: Annotated[
        bool, typer.Option("--follow", help="The trace still grows: tell findings as they appear; Ctrl-C ends it with the report.")
    ] = False,
    idle: Annotated[
        float | None, typer.Option("--idle", metavar="SECONDS", min=0.0, help="With --follow: end after so long without growth.")
    ] = None,
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
    from xtrace.cli.given import given
    from xtrace.errors import UsageError

    keep = _keep(fail_on)
    if format_ not in ("text", "json", "jsonl"):
        raise UsageError(f"--format {format_}: there are text, json and jsonl")
    callers = shared.parse_callers(caller)
    if path is not None and to and _on_command_line(context, "to"):
        raise UsageError("--path names the targets; leave out --to")

    from xtrace.pipeline import Options, analyze
    from xtrace.report import common, json, text

    said = given(context)
    chosen = Options(
        suppressions=said.settings.suppressions, notes=said.notes(traces), said_by=said.origin("from"),
        source=source, targets=() if path is not None else tuple(to or ()), callers=callers, migration=tuple(migration or ()),
        path=() if path is None else tuple(path.split(",")),
        tsc_khz=tsc_khz, host_info=host_info,
        input_format=input_format, one_recording=one_recording,
    )  # fmt: skip
    if follow:
        if len(traces) != 1:
            raise UsageError("--follow takes one trace")
        result = _follow(traces[0], chosen, format_, idle, output)
    else:
        if idle is not None:
            raise UsageError("--idle goes with --follow")
        with shared.progress("reading") as tick:
            result = analyze(traces, replace(chosen, progress=tick))
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
                json.write_jsonl(result, out, told=follow and output is None)
    return result.bits & (keep | 1)


def _follow(trace: str, chosen: Options, form: str, idle: float | None, output: str | None) -> Result:
    """Follow a growing trace until it ends or the first Ctrl-C; the second one interrupts."""
    import signal
    import threading

    from xtrace.pipeline import follow
    from xtrace.report.live import Live

    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ended(_signal: int, _frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    # What goes to a file, or is one document, is written at the end; then the terminal is told meanwhile.
    live = Live(sys.stdout, form) if output is None and form != "json" else Live(sys.stderr, "text")
    signal.signal(signal.SIGINT, ended)
    try:
        return follow(trace, chosen, found=live, idle=idle, stopped=stop.is_set)
    finally:
        signal.signal(signal.SIGINT, before)


def _on_command_line(context: typer.Context, name: str) -> bool:
    """Say whether an option was given there, not by a setting: that one makes way for another option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _keep(fail_on: str) -> int:
    from xtrace.errors import UsageError

    bits = 0
    for word in fail_on.split(","):
        if word.strip() not in _BITS:
            raise UsageError(f"--fail-on {fail_on}: there are {', '.join(_BITS)}")
        bits |= _BITS[word.strip()]
    return bits
