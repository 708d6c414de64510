"""``xtrace ingest``: the events of a trace as a table."""

from __future__ import annotations

from typing import Annotated

import typer

from xtrace.cli.options import InputFormat, TscKhz

NAME = "ingest"


def command(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace; - is standard input.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="events.parquet, .arrow, .csv or .ndjson; the ending decides.")
    ],
    tsc_khz: TscKhz = None,
    input_format: InputFormat = None,
) -> int:
    """Read a trace and write its events as Parquet, Arrow IPC, CSV or NDJSON."""
    from xtrace import config
    from xtrace.analyze.exposure import EXIT_INCOMPLETE
    from xtrace.errors import UsageError
    from xtrace.report.tables import ENDINGS, writer

    if tsc_khz is None and (sidecar := config.load_sidecar(trace)) is not None:
        tsc_khz = sidecar.tsc_khz
    if not output.endswith(ENDINGS):
        raise UsageError(f"-o {output}: the name must end with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")

    from xtrace.cli.common import announce
    from xtrace.cli.options import progress
    from xtrace.ingest import carried
    from xtrace.pipeline import Input, Options, open_input

    source, recording = open_input(trace, Options(tsc_khz=tsc_khz, input_format=input_format))
    account = lambda: {carried.KEY: carried.pack(recording)}  # noqa: E731
    item = Input(trace, recording.format, recording.ledger, recording.observed)
    with source, progress("reading") as tick, writer(output, closing=account) as put:
        for batch in recording.batches():
            put(batch)
            item.losses.feed(batch)
            if tick is not None and len(batch):
                tick(int(batch.get_column("offset").max() or 0), source.size)  # type: ignore[arg-type]
    announce(item, problems=20, losses=True)
    return EXIT_INCOMPLETE if item.incomplete else 0
