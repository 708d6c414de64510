"""Coverage-guided fuzzing of every reader that is not binary xentrace, each forced on each input.

No traceback other than InputError, no hang, ledger counts that cannot be negative, lines inside the file, and for one reader
each the same events whatever the size of the batches. Readers are those of the registry, so new ones are covered at once.
Run by ``fuzz/run``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["xtrace.ingest"]):
    from xtrace.ingest import registry
    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.source import Source

    #: Binary xentrace has a target of its own.
    READERS = [registry.reader(name) for name in registry.names() if not name.startswith("xentrace") or name == "xentrace-format"]

import polars as pl

from xtrace import schema
from xtrace.errors import InputError

if TYPE_CHECKING:
    from xtrace.ingest.base import Reader

COUNTS = (
    "records", "lines", "hypercalls", "subcalls", "vmmcalls", "samples", "lost_records", "lost_events", "skipped_bytes",
    "skipped_lines", "noise_lines", "unattributed", "problems_dropped",
)  # fmt: skip


def read(reader: Reader, source: Source, rows: int) -> pl.DataFrame | None:
    """Return the events; None where the reader refuses the input."""
    try:
        recording = reader.open(source, ReadOptions(batch_rows=rows))
        batches = list(recording.batches())
    except InputError:
        return None
    for batch in batches:
        assert dict(batch.schema) == dict(schema.EVENTS), (reader.name, batch.schema)
    ledger = recording.ledger
    for name in COUNTS:
        assert getattr(ledger, name) >= 0, (reader.name, name)
    events = pl.concat(batches) if batches else schema.empty(schema.EVENTS)
    lines = events.get_column("line").drop_nulls()
    if ledger.lines and len(lines):
        assert int(lines.min()) >= 1 and int(lines.max()) <= ledger.lines, reader.name
    return events


def one(data: bytes) -> None:
    """Read one input with every reader."""
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        try:
            source = Source(f"/proc/self/fd/{fd}")
        except InputError:
            return
        with source:
            with contextlib.suppress(InputError):
                registry.detect(source)
            # One of them reads it twice; all twice would halve the inputs a second, of which there are only a few.
            twice = READERS[zlib.crc32(data) % len(READERS)]
            for reader in READERS:
                source.file.seek(0)
                events = read(reader, source, 1 << 18)
                if reader is twice:
                    source.file.seek(0)
                    again = read(reader, source, 5)
                    assert (events is None) == (again is None), reader.name
                    assert events is None or events.equals(again), f"{reader.name}: the size of batches changes the events"
    finally:
        os.close(fd)


if __name__ == "__main__":
    one(b"CALL n=0 op=12\n# xtrace-log\n")  # what is loaded when first needed is not the first input's fault
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
