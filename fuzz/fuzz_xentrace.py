"""Coverage-guided fuzzing of the binary readers: windowed and fixed-size xentrace records.

Each input is read by both binary readers, each twice: with sizes of rounds, blocks and batches as usual, and with small
ones; and shown to both. Beyond "no traceback, no hang" it checks what must hold whatever the bytes are: see
``invariants``. Run by ``fuzz/run``.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["xtrace.ingest"]):
    from xtrace.ingest import registry
    from xtrace.ingest.base import ReadOptions
    from xtrace.ingest.fixed import guess
    from xtrace.ingest.source import Source
    from xtrace.ingest.xentrace import XentraceRecording
    from xtrace.ingest.xentrace_fixed import FixedRecording

    WINDOWED, FIXED = registry.reader("xentrace"), registry.reader("xentrace-fixed")

import polars as pl

from xtrace import schema
from xtrace.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from xtrace.ingest.base import Ledger, Observed, Recording

COUNTS = (
    "records", "lines", "hypercalls", "subcalls", "vmmcalls", "samples", "lost_records", "lost_events", "skipped_bytes",
    "skipped_lines", "noise_lines", "unattributed", "problems_dropped",
)  # fmt: skip


def frame(batches: list[pl.DataFrame]) -> pl.DataFrame:
    """Join batches, each of which has the right columns."""
    for batch in batches:
        assert dict(batch.schema) == dict(schema.EVENTS), batch.schema
    return pl.concat(batches) if batches else schema.empty(schema.EVENTS)


def invariants(recording: Recording, events: pl.DataFrame, size: int) -> None:
    """Check one reading of ``size`` bytes."""
    ledger, seen = recording.ledger, recording.observed
    for name in COUNTS:
        assert getattr(ledger, name) >= 0, name
    assert ledger.skipped_bytes <= size
    assert ledger.records == sum(seen.event_ids.values())
    assert len(ledger.problems) <= ledger.KEEP
    assert all(p.offset is None or 0 <= p.offset <= size for p in ledger.problems)
    assert all(0 <= at < size for at in seen.forms.values())
    if ledger.skipped_bytes:
        assert ledger.problems, "bytes were skipped without a word"
    kinds = dict(events.get_column("kind").cast(pl.String).value_counts().iter_rows())
    assert kinds.get("hypercall", 0) == ledger.hypercalls
    assert kinds.get("subcall", 0) == ledger.subcalls
    assert kinds.get("vmmcall", 0) == ledger.vmmcalls
    if not len(events):
        return
    assert events.get_column("seq").to_list() == list(range(len(events)))
    assert int(events.get_column("offset").max()) < size
    # A record has one place; on a pCPU file order is time order, segment by segment.
    real = events.filter(pl.col("op").is_not_null())
    assert real.get_column("offset").is_unique().all()
    for _, mine in events.group_by("pcpu"):
        assert mine.get_column("offset").is_sorted()
        assert mine.get_column("segment").is_sorted()
    order = events.select("segment", pl.col("tsc").fill_null(0), "pcpu")
    assert order.equals(order.sort("segment", "tsc", "pcpu", maintain_order=True))


def read(make: Callable[[], Recording], size: int) -> tuple[pl.DataFrame, Ledger, Observed]:
    """Read to the end and check."""
    recording = make()
    events = frame(list(recording.batches()))
    invariants(recording, events, size)
    return events, recording.ledger, recording.observed


def chunk(data: bytes) -> int:
    """Return a small size of rounds that goes with an input: the smallest for small ones."""
    return 64 if len(data) < 512 else 1024


def one(data: bytes) -> None:
    """Read one input in all ways."""
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        try:
            source = Source(f"/proc/self/fd/{fd}")
        except InputError:
            return
        with source:
            size = source.size
            usual, tiny = ReadOptions(), ReadOptions(batch_rows=20)
            # Usually one of them reads and the other skips all, which is soon done.
            windowed = read(lambda: XentraceRecording(source, usual), size)
            assert_same(windowed, read(lambda: XentraceRecording(source, tiny, chunk=chunk(data), block=10), size))
            fixed = read(lambda: FixedRecording(source, usual), size)
            assert_same(fixed, read(lambda: FixedRecording(source, tiny, chunk=chunk(data)), size))
            assert fixed[1].records * guess(source.head())[1].stride + fixed[1].skipped_bytes == size
            head = source.head()
            assert not FIXED.sniff(head) or fixed[1].records
            assert not WINDOWED.sniff(head) or windowed[1].records
            assert min(FIXED.sniff(head), WINDOWED.sniff(head)) < 90
    finally:
        os.close(fd)


def assert_same(a: tuple, b: tuple) -> None:
    """Check that two readings of one input agree."""
    assert a[0].equals(b[0]), "the size of rounds or batches changes the events"
    assert a[1].records == b[1].records and a[1].skipped_bytes == b[1].skipped_bytes
    assert a[2] == b[2]


if __name__ == "__main__":
    one(bytes.fromhex("03f001200000000010000000 0d100090 0100000000000000 0c000000"))  # loads what is loaded when first needed
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
