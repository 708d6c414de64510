"""Register samples in Linux tracing text: counts of the README, what a line proves, damage."""

from __future__ import annotations

import io
import re
from pathlib import Path

import polars as pl
import pytest

from xtrace import schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.linux_trace import READER
from xtrace.ingest.source import Source

SAMPLES = Path(__file__).parents[2] / "samples" / "dom0-4.17.7"
FILES = [
    ("j3_hcload_parked.txt.zst", {12: 262, 13: 119, 26: 59, 20: 47, 18: 23, 36: 9}, {0, 1}),
    ("j5_tiny_parked.txt", {12: 26, 26: 14, 20: 12, 13: 8}, {0}),
    ("j4_pvh_parked.txt", {36: 20, 1: 4}, {0, 1}),
    ("j3_save_all_parked.txt", {36: 7, 1: 2}, {0, 1}),
    ("j5_linux_aligned_ftrace.txt.zst", {12: 23}, {0}),
]
LINE = (
    b"  hcload-138     [001] d.h..  78514840775: up: (__xen_pv_evtchn_do_upcall+0x0/0x30) ip=0xffffffff81a39073 ax=0xc"
    b" di=0xda86 si=0x7f4a70369000 dx=0x0 r10=0x1 r8=0x2 r9=0x3 sp=0xffffc9004046bb70 flags=0x246\n"
)


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(source, batch_rows=1 << 20, tsc_khz=None):
    recording = READER.open(source, ReadOptions(batch_rows=batch_rows, tsc_khz=tsc_khz))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    return frame, recording


@pytest.mark.parametrize(("name", "ops", "vcpus"), FILES)
def test_counts(name, ops, vcpus):
    with Source(SAMPLES / name) as source:
        assert READER.sniff(source.head()) >= 60
        frame, recording = read(source)
        source.file.seek(0)
        text = source.file.read().decode()
    frame = frame.filter(pl.col("kind") == "sample")
    assert dict(frame["op"].value_counts().iter_rows()) == ops
    ledger = recording.ledger
    assert (ledger.samples, ledger.skipped_lines) == (sum(ops.values()), 0)
    assert ledger.records == len(re.findall(r"(?m)^[^#\n]", text))
    assert ledger.noise_lines + ledger.records == text.count("\n")
    assert set(frame["vcpu"]) == vcpus
    assert frame["tsc"].is_sorted()
    assert frame["rip"].unique().to_list() == [0xFFFFFFFF81A39073]
    assert frame["caller"].cast(pl.String).unique().to_list() == ["pv64"]
    for unknown in ("on_insn", "pcpu", "domid", "time_ns", "result", "memory"):
        assert frame[unknown].null_count() == len(frame)
    # Slow twin: one regular expression a line.
    want = [
        (int(m["cpu"]), int(m["tsc"]), *(int(m[k], 16) for k in ("ip", "ax", "di", "si", "dx", "r10", "r8", "r9")))
        for m in re.finditer(
            r"(?m)^.*\[(?P<cpu>\d+)\] \S+ +(?P<tsc>\d+): up: \(\S+\) ip=(?P<ip>\S+) ax=(?P<ax>\S+) di=(?P<di>\S+) "
            r"si=(?P<si>\S+) dx=(?P<dx>\S+) r10=(?P<r10>\S+) r8=(?P<r8>\S+) r9=(?P<r9>\S+) ",
            text,
        )
    ]
    assert frame.select("vcpu", "tsc", "rip", "op", *schema.ARGS).rows() == want


@pytest.mark.parametrize("name", [name for name, *_ in FILES])
def test_batches_do_not_matter(name):
    with Source(SAMPLES / name) as source:
        whole, first = read(source)
        parts, second = read(source, 150)
    assert whole.equals(parts)
    assert (first.ledger, first.observed) == (second.ledger, second.observed)


def test_one_line():
    row = read(Bytes(LINE))[0].to_dicts()[0]
    assert (row["tsc"], row["vcpu"], row["op"], row["arg0"], row["arg3"], row["arg5"]) == (
        78514840775,
        1,
        12,
        0xDA86,
        1,
        3,
    )
    assert (row["line"], row["offset"], row["kind"], row["cut"]) == (1, 0, "sample", 0)


def test_filter_comment_proves_the_instruction():
    data = LINE + b"# up filter: ip == 0xffffffff81a39073\n" + LINE + LINE.replace(b"39073", b"39075")
    for batch_rows in (1, 100):
        assert read(Bytes(data), batch_rows)[0]["on_insn"].to_list() == [None, True, False]


def test_another_function_proves_no_caller():
    data = LINE.replace(b"__xen_pv_evtchn_do_upcall", b"sysvec_xen_hvm_callback")
    assert read(Bytes(data))[0]["caller"].to_list() == [None]
    assert read(Bytes(LINE.replace(b"(__xen_pv_evtchn_do_upcall+0x0/0x30) ", b"")))[0]["caller"].to_list() == [None]


def test_other_clocks():
    seconds = LINE.replace(b"78514840775", b"68.682912")
    counter = LINE.replace(b"78514840775", b"1234")
    frame, _ = read(Bytes(seconds + counter))
    assert frame.select("tsc", "time_ns").rows() == [(None, 68_682_912_000), (None, None)]
    assert read(Bytes(LINE), tsc_khz=1_000_000)[0]["time_ns"].to_list() == [78514840775]


def test_lost():
    data = b"# tracer: nop\n# entries-in-buffer/entries-written: 519/600   #P:2\n" + LINE + b"CPU:1 [LOST 12 EVENTS]\n" + LINE
    frame, recording = read(Bytes(data))
    assert frame.select("kind", "vcpu", "result").rows() == [
        ("lost", None, 81),
        ("sample", 1, None),
        ("lost", 1, 12),
        ("sample", 1, None),
    ]
    assert (recording.ledger.lost_events, recording.ledger.lost_records) == (2, 93)


def test_step_back_is_a_segment():
    data = LINE + LINE.replace(b"78514", b"68514") + LINE.replace(b"[001]", b"[000]").replace(b"78514", b"58514")
    assert read(Bytes(data))[0]["segment"].to_list() == [0, 1, 0]


def test_every_cut():
    whole, _ = read(Bytes(LINE + LINE))
    for end in range(0, len(LINE) * 2 + 1, 5):
        frame, _ = read(Bytes((LINE + LINE)[:end]))
        assert frame.equals(whole[: len(frame)])
    short = LINE[: LINE.index(b" sp=")]
    _, recording = read(Bytes(short))
    assert (recording.ledger.truncated, recording.ledger.samples) == (True, 0)  # r9=0x3 may have been longer
    _, recording = read(Bytes(LINE[:-3]))
    assert (recording.ledger.truncated, recording.ledger.samples) == (True, 0)


@pytest.mark.parametrize(
    "line",
    [
        LINE.replace(b"ax=0xc", b"ax=0x1ffffffff"),
        LINE.replace(b"di=0xda86", b"di=0x11111111111111111"),
        LINE.replace(b"di=0xda86", b"di=-1"),
        LINE.replace(b" ip=0xffffffff81a39073", b" ip=", 1),
        LINE.replace(b"78514840775", b"now"),
        LINE.replace(b"[001]", b"[x]"),
        LINE.replace(b"di=0xda86", b"di=0xda\x0086"),
    ],
)
def test_hostile_lines(line):
    frame, recording = read(Bytes(b"\xff\x00\n" + line + LINE))
    assert frame["line"].to_list() == [3]
    assert (recording.ledger.skipped_lines, recording.ledger.noise_lines) == (1, 1)
    assert (recording.ledger.problems[0].line, recording.ledger.problems[0].offset) == (2, 3)


def test_task_names_may_hold_anything():
    line = LINE.replace(b"hcload-138", b"a [9] b: ip=1 c-138")
    assert read(Bytes(line))[0]["vcpu"].to_list() == [1]


def test_long_line_is_skipped():
    frame, recording = read(Bytes(b" ip=" * (3 << 20) + b"\n" + LINE), 1000)
    assert len(frame) == 1
    assert recording.ledger.skipped_lines == 1


def test_sniff():
    assert READER.sniff(LINE) >= 90
    for other in (b"", b"xtrace: call op=1\n", b"up: ip=0x1\n", bytes(range(256))):
        assert READER.sniff(other) == 0
