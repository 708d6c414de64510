"""``xtrace ingest``: the events of a trace as a table."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtrace.cli.options import TscKhz

NAME = "ingest"


def command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace; - is standard input.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="events.parquet, .arrow or .csv; the ending decides.")
    ],
    tsc_khz: TscKhz = None,
) -> int:
    """Read a trace and write its events as Parquet, Arrow IPC or CSV."""
    from xtrace import config
    from xtrace.analyze.exposure import EXIT_INCOMPLETE
    from xtrace.errors import UsageError
    from xtrace.report.common import clean
    from xtrace.report.tables import writer

    if tsc_khz is None and (sidecar := config.load_sidecar(trace)) is not None:
        tsc_khz = sidecar.tsc_khz
    if not output.endswith((".parquet", ".arrow", ".csv")):
        raise UsageError(f"-o {output}: the name must end with .parquet, .arrow or .csv")

    from xtrace.cli.options import progress
    from xtrace.pipeline import Input, Options, open_input

    source, recording = open_input(trace, Options(tsc_khz=tsc_khz))
    with source, progress("reading") as tick, writer(output) as put:
        for batch in recording.batches():
            put(batch)
            if tick is not None and len(batch):
                tick(int(batch.get_column("offset").max() or 0), source.size)  # type: ignore[arg-type]
    item = Input(trace, recording.format, recording.ledger, recording.observed)
    ledger = recording.ledger
    print(
        f"xtrace: {clean(trace)}: read as {recording.format}, {ledger.records:,} records, {ledger.hypercalls:,} hypercalls, "
        f"{ledger.subcalls:,} sub-calls, {ledger.vmmcalls:,} vmmcalls",
        file=sys.stderr,
    )
    for p in ledger.problems:
        where = f"line {p.line}" if p.line is not None else f"byte {p.offset}"
        print(f"xtrace: {clean(trace)}: {where}: {clean(p.text)}", file=sys.stderr)
    return EXIT_INCOMPLETE if item.incomplete else 0
