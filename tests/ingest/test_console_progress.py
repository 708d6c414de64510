"""Xen's lines about memory_ops that ended early, in every wording."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest

from xtrace import pipeline, schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.console import READER

SAMPLES = Path(__file__).parents[2] / "samples" / "console"


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(text):
    recording = READER.open(Bytes(text.encode()), ReadOptions())
    return pl.concat([schema.empty(schema.EVENTS), *recording.batches()]), recording


@pytest.mark.parametrize(
    ("line", "domid", "vcpu", "arg0", "done", "total"),
    [
        ("common/memory.c:277:d0v10 Could not allocate order=9 extent: id=1 memflags=0xc0 (0 of 4)", 0, 10, 6, 0, 4),
        ("common/memory.c:278:d0v2 Could not allocate order=9 extent: id=24 memflags=0xc0 (3 of 4)", 0, 2, 6, 3, 4),
        ("common/memory.c:278:d20v2 Could not allocate order=20 extent: id=209 memflags=0x20 (3 of 20)", 20, 2, 6, 3, 20),
        ("common/memory.c:135:d7v0 Could not allocate order=0 extent: id=7 memflags=0 (12 of 16)", 7, 0, None, 12, 16),
        ("memory.c:130:d0 Could not allocate order=9 extent: id=3 memflags=0 (1 of 2)", 0, None, None, 1, 2),
        ("memory.c:257:d[IDLE]v1 Could not allocate order=18 extent: id=1 memflags=c0 (0 of 1)", None, None, None, 0, 1),
        ("(file=memory.c, line=62) Could not allocate order=0 extent: id=1 flags=0 (5 of 9)", None, None, None, 5, 9),
    ],
)
def test_wordings(line, domid, vcpu, arg0, done, total):
    for text in (f"(XEN) {line}\n", f"> (XEN) {line.replace(' id=', chr(10) + '> id=')}\n", f"(XEN) {line.replace('=', '=3D')}\n"):
        frame, recording = read(text)
        call, end = frame.rows(named=True)
        assert (call["kind"], call["op"], call["domid"], call["vcpu"], call["arg0"]) == ("hypercall", 12, domid, vcpu, arg0)
        assert call["memory"] == [{"field": "nr_extents", "value": total}]
        assert (end["kind"], end["op"], end["result"], end["domid"]) == ("return", 12, done, domid)
        for unknown in ("arg1", "caller", "pcpu", "rip", "on_insn", "result"):
            assert call[unknown] is None
        assert recording.ledger.records == 1


def test_not_understood():
    frame, recording = read(
        "(XEN) Could not allocate order=9 extent: id=1 memflags=0xc0 (5 of 4)\n(XEN) Could not allocate order=9\n"
    )
    assert (len(frame), recording.ledger.skipped_lines) == (0, 2)


def test_analysis():
    result = pipeline.analyze([SAMPLES / "driver-domain-4.18.txt"], pipeline.Options(source="4.18.0", targets=("4.22.0",)))
    assert (result.calls, result.proved, result.inferred) == (3, 0, 0)
    # The wording says which command it was, so nothing has to be reviewed for what it was not.
    (row,) = result.surface
    assert (row.subop, row.calls, row.total) == ("XENMEM_populate_physmap", 3, 4)
    assert result.bits == 0
