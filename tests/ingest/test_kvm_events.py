"""Xen hypercalls of KVM guests: QEMU's log and simple backends, KVM's tracepoint; against plain regular expressions."""

from __future__ import annotations

import io
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest import linux_trace
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.kvm_events import READER

LOG = b"kvm_xen_hypercall xen_hypercall: cpu 2 cpl 0 input 12 a0 0x7 a1 0xffffffff82003d40 a2 0x0 ret 0xffffffffffffffda\n"
OLD = b"4711@1690000000.123456:" + LOG
ISO = b"2025-11-05T10:00:00.123456Z " + LOG
SIMPLE = b"kvm_xen_hypercall 12.345 pid=4711 cpu=0x2 cpl=0x0 input=0xc a0=0x7 a1=0xffffffff82003d40 a2=0x0 ret=0xffffffffffffffda\n"
KVM = (
    b"       CPU 2/KVM-4713    [005] d....  1234.567890: kvm_xen_hypercall: cpl 0 nr 0xc a0 0x7 a1 0xffffffff82003d40"
    b" a2 0x0 a3 0x9 a4 0x1 a5 2\n"
)
PERF = b"CPU 2/KVM  4713 [005]  1234.567890: kvm:kvm_xen_hypercall: nr 0x1d a0 0x0 a1 0x5 a2 0x0 a3 0x0 a4 0x0 a5 0x0\n"
OTHER = b"4711@1690000000.123457:kvm_run_exit cpu_index 2, reason 34\n"


class Bytes:
    damage = None

    def __init__(self, data: bytes) -> None:
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(data: bytes, batch_rows: int = 1 << 20):
    recording = READER.open(Bytes(data), ReadOptions(batch_rows=batch_rows))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    ledger = recording.ledger
    assert ledger.records + ledger.skipped_lines + ledger.noise_lines == ledger.lines - ledger.truncated
    return frame, recording


@pytest.mark.parametrize(
    ("line", "time_ns"),
    [(LOG, None), (OLD, 1_690_000_000_123_456_000), (ISO, 1_762_336_800_123_456_000), (SIMPLE, None)],
)
def test_qemu(line: bytes, time_ns: int | None) -> None:
    frame, recording = read(line)
    call, end = frame.rows(named=True)
    assert (call["kind"], call["op"], call["vcpu"], call["caller"]) == ("vmmcall", 12, 2, "hvm64")
    assert [call[a] for a in schema.ARGS] == [7, 0xFFFFFFFF82003D40, 0, None, None, None]
    assert (end["kind"], end["op"], end["result"], call["result"]) == ("return", 12, -38, None)
    assert frame["time_ns"].to_list() == [time_ns] * 2
    assert (recording.ledger.records, recording.ledger.vmmcalls) == (1, 1)


def test_kvm() -> None:
    row = read(KVM)[0].row(0, named=True)
    assert (row["kind"], row["op"], row["pcpu"], row["vcpu"], row["caller"]) == ("vmmcall", 12, 5, 2, "hvm64")
    assert (row["time_ns"], row["result"]) == (1_234_567_890_000, None)
    # The kernel printed a5 in a4's place for years.
    assert [row[a] for a in schema.ARGS] == [7, 0xFFFFFFFF82003D40, 0, 9, None, None]
    row = read(PERF)[0].row(0, named=True)
    assert (row["op"], row["pcpu"], row["vcpu"], row["caller"], row["arg1"]) == (29, 5, 2, None, 5)


def test_another_machine_of_the_host_has_no_vcpu_number() -> None:
    data = KVM + KVM.replace(b"4713", b"9000") + KVM.replace(b"CPU 2/KVM", b"qemu") + KVM
    for batch_rows in (1, 100):
        assert read(data, batch_rows)[0]["vcpu"].to_list() == [2, None, None, 2]


def test_what_is_something_else() -> None:
    frame, recording = read(OTHER + b"qemu: could not open disk\n" + b"CPU:1 [LOST 7 EVENTS]\n" + KVM)
    assert frame["kind"].to_list() == ["lost", "vmmcall"]
    assert (recording.ledger.records, recording.ledger.noise_lines, recording.ledger.lost_records) == (3, 1, 7)
    assert recording.ledger.unparsed == [(2, "qemu: could not open disk")]


@pytest.mark.parametrize(
    "line",
    [
        LOG.replace(b"input 12", b"input 99999999999"),
        LOG.replace(b"a0 0x7", b"a0 0x"),
        KVM.replace(b"nr 0xc", b"nr 0x1ffffffff"),
        KVM.replace(b" a3 0x9", b""),
        SIMPLE.replace(b" ret=0xffffffffffffffda", b""),
    ],
)
def test_damage(line: bytes) -> None:
    frame, recording = read(line + LOG)
    assert (frame["line"].to_list(), recording.ledger.skipped_lines) == ([2, 2], 1)


def test_every_cut() -> None:
    data = OLD + KVM + SIMPLE
    whole, _ = read(data)
    for end in range(0, len(data) + 1, 3):
        frame, _ = read(data[:end])
        assert frame.equals(whole[: len(frame)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([LOG, OLD, ISO, SIMPLE, KVM, OTHER, b"\xff\n", LOG.replace(b"cpu 2", b"cpu x")]), max_size=30),
    st.integers(1, 9),
)
def test_the_twin_agrees(lines: list[bytes], batch_rows: int) -> None:
    frame, _ = read(b"".join(lines), batch_rows)
    want = []
    for number, line in enumerate(lines, 1):
        if m := re.search(rb"(?:cpu (\d+) .*input (\d+)|cpu=0x(\d+).*input=0x(\w+)) a0", line):
            want += [(number, "vmmcall", int(m[1] or m[3]), 12), (number, "return", int(m[1] or m[3]), 12)]
        elif b" nr 0x" in line:
            want.append((number, "vmmcall", 2, 12))
    assert frame.with_columns(pl.col("kind").cast(pl.String)).select("line", "kind", "vcpu", "op").rows() == want


def test_sniff() -> None:
    assert [READER.sniff(x) for x in (LOG, OLD, ISO, SIMPLE, KVM, PERF)] == [90] * 6
    assert [READER.sniff(x) for x in (b"", OTHER, b"# tracer: nop\n", bytes(range(256)))] == [0] * 4
    assert linux_trace.READER.sniff(KVM) < 90
