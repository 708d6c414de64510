"""``xtrace identify``: which releases a trace can come from, and what rules out the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from xtrace.cli.options import Callers, InputFormat, Output, TscKhz

if TYPE_CHECKING:
    from xtrace.pipeline import Input
    from xtrace.replay.identify import Identification

NAME = "identify"

_WIDTH = 80


def command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace; - is standard input.")],
    caller: Callers = None,
    tsc_khz: TscKhz = None,
    input_format: InputFormat = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the output.")] = "text",
    output: Output = None,
) -> int:
    """Say which Xen releases a trace can come from, and which record rules out each of the others.

    Exit status: 0 some release is left, 4 not the one that the trace itself names, 16 the trace contradicts itself or is
    incomplete.
    """
    from xtrace.analyze.exposure import EXIT_INCOMPLETE, EXIT_REVIEW
    from xtrace.cli import options as shared
    from xtrace.cli.common import announce
    from xtrace.errors import InputError, UsageError

    if format_ not in ("text", "json"):
        raise UsageError(f"--format {format_}: there are text and json")
    said = shared.parse_callers(caller)

    from xtrace.pipeline import Options, identify_trace

    with shared.progress("reading") as tick:
        item, found = identify_trace(trace, Options(callers=said, tsc_khz=tsc_khz, progress=tick, input_format=input_format))
    observed = item.observed
    fits = observed.release is None or _is_left(observed.release, found)
    with shared.opened(output) as out:
        (_text if format_ == "text" else _json)(item, found, fits, out)
    if found.left:
        announce(item, losses=True)
    if not found.left:
        raise InputError(trace, found.contradiction(), exit_bits=EXIT_INCOMPLETE)
    return (EXIT_INCOMPLETE if item.incomplete else 0) | (0 if fits else EXIT_REVIEW)


def _is_left(named: str, found: Identification) -> bool:
    """Say whether what the trace itself names is left; a name that stands for no release is not."""
    from xtrace import release
    from xtrace.errors import UnknownRelease

    try:
        return any(release.base(r.version) in found.left for r in release.parse(named).releases)
    except UnknownRelease:
        return False


def _text(item: Input, found: Identification, fits: bool, out: TextIO) -> None:
    from xtrace import release
    from xtrace.report.common import clean

    def put(text: str, indent: int = 0) -> None:
        for line in _fold(clean(text), indent):
            print(line, file=out)

    left = release.fold_text(found.left)
    put(f"{item.path}: {left if found.left else 'no release is left'}", 2)
    put(f"{len(found.left)} of the {len(found.known)} releases known are left; it was read as {item.format}.", 0)
    if item.observed.release:
        verdict = "which is among them" if fits else "which is not among them"
        put(f"The trace itself names {item.observed.release}, {verdict}.")
    if item.observed.unsourced:
        put("CSV, NDJSON and tables made elsewhere do not hold which record layouts their trace had, which tells the most: "
            "identify the trace itself, or its Parquet or Arrow table; elsewhere name the release with --from.")  # fmt: skip
    if len(found.left) == len(found.known):
        put("Nothing in it tells releases apart.")
        return
    print("\nRuled out:", file=out)
    for gone, e in found.ruled_out():
        put(f"  {release.fold_text(gone)}", 4)
        put(f"      {e.place}: {e.what}; {e.why}", 8)


def _fold(text: str, indent: int) -> list[str]:
    import textwrap

    lead = len(text) - len(text.lstrip())
    return textwrap.wrap(
        text.strip(), _WIDTH, initial_indent=" " * lead, subsequent_indent=" " * max(indent, lead),
        break_on_hyphens=False, break_long_words=True,
    )  # fmt: skip


def _json(item: Input, found: Identification, fits: bool, out: TextIO) -> None:
    import json

    from xtrace import release
    from xtrace.report.ledger import ledger
    from xtrace.schema import SCHEMA_VERSION

    document = {
        "schema": SCHEMA_VERSION,
        "trace": item.path,
        "format": item.format,
        "named": item.observed.release,
        "named_is_left": fits if item.observed.release else None,
        "left": list(found.left),
        "left_folded": release.fold(found.left),
        "ruled_out": [
            {
                "releases": list(gone),
                "releases_folded": release.fold(gone),
                "kind": e.kind,
                "what": e.what,
                "why": e.why,
                "seq": e.seq,
                "offset": e.offset,
                "line": e.line,
            }
            for gone, e in found.ruled_out()
        ],
        "losses": ledger(item),
        "unsourced": item.observed.unsourced,
    }
    json.dump(document, out, indent=2, ensure_ascii=False)
    out.write("\n")
