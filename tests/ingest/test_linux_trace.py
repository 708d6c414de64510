"""Linux tracing text: dialects, multicalls, samples; against the slow twin and against Xen's own record of the same run."""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ingest.linux_twin import twin
from xtrace import schema
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.linux_trace import READER
from xtrace.ingest.source import Source

SAMPLES = Path(__file__).parents[2] / "samples"
DOM0 = SAMPLES / "dom0-4.17.7"
ALIGNED = DOM0 / "j5_linux_aligned_ftrace.txt.zst"
HEAD = SAMPLES / "linux" / "j3_xen_tracepoints_head.txt.zst"
COLUMNS = ("line", "kind", "vcpu", "op", *schema.ARGS, "rip", "result")


class Bytes:
    damage = None

    def __init__(self, data: bytes) -> None:
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(data: bytes, batch_rows: int = 1 << 20, reader=READER):
    recording = reader.open(Bytes(data), ReadOptions(batch_rows=batch_rows))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    ledger = recording.ledger
    assert ledger.records + ledger.skipped_lines + ledger.noise_lines == ledger.lines - ledger.truncated
    return frame, recording


@cache
def text(path: Path) -> bytes:
    with Source(path) as source:
        return source.file.read()


@cache
def events(path: Path) -> pl.DataFrame:
    with Source(path) as source:
        reader = registry.detect(source)
        return pl.concat(list(reader.open(source, ReadOptions()).batches()))


def line(event: str, stamp: int = 10**9, cpu: int = 0) -> bytes:
    return f"              sh-125     [{cpu:03d}] d..1. {stamp}: {event}\n".encode()


def alloc(n: int) -> str:
    return f"xen_mc_entry_alloc: alloc entry {n} arg bytes"


def flush(n: int, size: int) -> str:
    return f"xen_mc_flush: flushing {n} hypercalls, {size} arg bytes, 0 callbacks"


MMUEXT = "xen_mc_entry: op 26(mmuext_op) args [ffff88803e71ead0, 1, 0, 7ff0, 0, 0]"
VA = "xen_mc_entry: op 14(update_va_mapping) args [ffff88800e89d000, 8000000105896061, 2, 0, 0, 0]"
MORE = "xen_mc_extend_args: extending op 26(mmuext_op) by 24 bytes res OK"
UP = "up: (__xen_pv_evtchn_do_upcall+0x0/0x30) ip=0xffffffff81a39073 ax=0xc di=0x41 si=0x7 dx=0x0 r10=0x1 r8=0x2 r9=0x3 flags=0x246"


def rows(frame: pl.DataFrame) -> list[tuple]:
    return frame.with_columns(pl.col("kind").cast(pl.String)).select(COLUMNS).rows()


def expected(data: bytes) -> list[tuple]:
    return [(r[0], r[1], r[2], *r[4:]) for r in twin(data.decode("utf-8", "replace"))]


@pytest.mark.parametrize("path", [ALIGNED, HEAD, DOM0 / "j5_tiny_parked.txt"])
def test_the_twin_agrees(path: Path) -> None:
    data = text(path)
    frame, recording = read(data)
    assert rows(frame) == expected(data)
    stamps = [r[3] for r in twin(data.decode())]
    assert frame["tsc"].to_list() == [int(s[0]) if s[1] is None else None for s in stamps]
    assert frame["time_ns"].to_list() == [None if s[1] is None else int(s[0] + s[1].ljust(9, "0")) for s in stamps]
    assert recording.ledger.skipped_lines == 0
    assert set(frame["caller"].cast(pl.String)) == {"pv64"}
    for unknown in ("pcpu", "domid", "on_insn"):
        assert frame[unknown].null_count() == len(frame)


@pytest.mark.parametrize("batch_rows", [1, 7, 100, 5000])
def test_blocks_do_not_matter(batch_rows: int) -> None:
    part = b"".join(text(ALIGNED).splitlines(keepends=True)[2000 : 2000 + min(400 * batch_rows, 13_000)])
    whole, first = read(part)
    parts, second = read(part, batch_rows)
    assert whole.equals(parts)
    assert (first.ledger, first.observed) == (second.ledger, second.observed)


LINES = [
    line(e)
    for e in (alloc(24), alloc(0), MMUEXT, VA, MORE, MORE.replace("OK", "BAD_OP"), MORE.replace("OK", "NO_SPACE"), flush(0, 0), UP)
]
LINES += [line(flush(n, s)) for n in (1, 2, 3) for s in (0, 24, 48)] + [
    b"CPU:0 [LOST 3 EVENTS]\n",
    line("xen_mmu_write_cr3: kernel cr3 6"),
]
LINES += [x.replace(b"[000]", b"[001]") for x in LINES]
LINES += [line("xen_mc_entry: op 7 args [0, 5, 0, 1, 0, 0]"), b"# tracer: nop\n", b"\xff\x00\n"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=40), st.integers(1, 9))
def test_shuffled_lines_agree_with_the_twin(lines: list[bytes], batch_rows: int) -> None:
    data = line(MMUEXT, cpu=7) + b"".join(lines)  # the kernel is known from the first line on
    frame, _ = read(data, batch_rows)
    assert rows(frame) == expected(data)


def test_xen_saw_what_linux_issued() -> None:
    """Same clock: behind every flush Xen's next record of that hypercall has the same count (852 have one)."""
    linux = events(ALIGNED).filter(pl.col("kind") == "hypercall").select("tsc", "op", count=pl.col("arg1"))
    xen = events(DOM0 / "j5_linux_aligned.xentrace.zst").filter(pl.col("kind") == "hypercall").sort("tsc")
    both = linux.sort("tsc").join_asof(
        xen.select("op", "arg1", at="tsc"), left_on="tsc", right_on="at", by="op", strategy="forward", check_sortedness=False
    )
    assert len(both) == 1104
    assert both["at"].null_count() == 0
    assert (both["at"] - both["tsc"]).max() < 200_000  # within 80 µs
    recorded = both.drop_nulls("arg1")
    assert len(recorded) == 852
    assert recorded.filter(pl.col("arg1") != pl.col("count")).is_empty()
    # Of the 225 sub-calls that Xen records one is an entry that was preempted and ran again.
    subs = [events(p).filter(pl.col("kind") == "subcall") for p in (ALIGNED, DOM0 / "j5_linux_aligned.xentrace.zst")]
    assert [len(s) for s in subs] == [224, 225]
    again = subs[1].filter(pl.col("arg1") >= 1 << 31)
    assert subs[0]["op"].to_list() == subs[1].filter(~pl.col("seq").is_in(again["seq"].implode()))["op"].to_list()


@pytest.mark.parametrize(
    ("samples", "trace", "found", "compared"),
    [
        ("j3_hcload_parked.txt.zst", "j3_hcload_pv.xentrace.zst", 519, 225),
        ("j5_tiny_parked.txt", "j5_tiny_pv.xentrace", 60, 34),
        ("j5_linux_aligned_ftrace.txt.zst", "j5_linux_aligned.xentrace.zst", 23, 0),
        ("j3_save_all_parked.txt", "j3_save_all.xentrace.zst", 9, 2),
        ("j4_pvh_parked.txt", "j4_pvh.xentrace.zst", 5, 4),  # of 24: the others were taken when xentrace had stopped
    ],
)
def test_samples_agree_with_the_xentrace_of_the_run(samples: str, trace: str, found: int, compared: int) -> None:
    """Behind each sample Xen's next record of that hypercall has its count."""
    taken = events(DOM0 / samples).filter(pl.col("kind") == "sample").select("tsc", "op", "arg1", "arg2").sort("tsc")
    xen = events(DOM0 / trace).filter(pl.col("kind").is_in(["hypercall", "vmmcall"])).sort("tsc", "seq")
    both = taken.join_asof(
        xen.select("op", at="tsc", x1="arg1", x2="arg2"), left_on="tsc", right_on="at", by="op", strategy="forward",
        check_sortedness=False,
    ).drop_nulls("at")  # fmt: skip
    assert len(both) == found
    pairs = [both.select(mine=pl.col(f"arg{i}") & 0xFFFFFFFF, xen=f"x{i}").drop_nulls() for i in (1, 2)]
    assert sum(map(len, pairs)) == compared
    assert all(p["mine"].equals(p["xen"].rename("mine")) for p in pairs)


def test_trace_cmd_prints_the_same_in_three_ways() -> None:
    """Although it prints the results of extensions wrongly without -R."""
    plain, raw, latency = (
        events(SAMPLES / "linux" / f"j3_trace_cmd_report{x}.txt.zst").drop("offset") for x in ("", "_raw", "_latency")
    )
    assert dict(plain["kind"].cast(pl.String).value_counts().iter_rows()) == {"hypercall": 54, "subcall": 49}
    assert plain.equals(latency)
    # Bare fields say how many arguments there are, and 48 bytes of them are those of a 64-bit kernel from the first line on.
    assert plain.drop("caller").equals(raw.drop("caller"))


FIELDS = b"op 26(mmuext_op) args [ffff88803e71ead0, 1, 0, 7ff0, 0, 0]"
DIALECTS = {
    "ftrace": b"  sh-125     [001] d..1.    46.925295: EVENT: ",
    "no flags": b"  sh-125     [001]    46.925295: EVENT: ",
    "tgid": b"  sh-125     (    125) [001] d..1.    46.925295: EVENT: ",
    "no tgid known": b"  sh-125     (-------) [001] d..1.    46.925295: EVENT: ",
    "a task's name": b"  a [9] b: 12 [0] c-125     [001] d..1.    46.925295: EVENT: ",
    "trace-cmd": b"  sh-125   [001]    46.925295: EVENT:         ",
    "trace-cmd -l": b"   sh-125     1d..3.    46.925295: EVENT:         ",
    "latency-format": b"      sh-125       1d..1. 46925295us : EVENT: ",
    "latency-format +": b"      sh-125       1dNh1. 46925295us+: EVENT: ",
    "perf script": b"              sh   125 [001]    46.925295: xen:EVENT: ",
    "perf, pid/tid": b"sh   125/126   [001]    46.925295:          xen:EVENT: ",
    "perf, period": b"sh   125 [001]    46.925295:          1 xen:EVENT: ",
    "perf -F -cpu": b"              sh   125    46.925295: xen:EVENT: ",
    "perf -F -time": b"              sh   125 [001] xen:EVENT: ",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(dialect: str) -> None:
    prefix = DIALECTS[dialect]
    data = b"".join(
        prefix.replace(b"EVENT", event) + fields + b"\n"
        for event, fields in (
            (b"xen_mc_entry", FIELDS),
            (b"xen_mc_extend_args", b"extending op 26(mmuext_op) by 24 bytes res OK"),
            (b"xen_mc_flush", b"flushing 1 hypercalls, 48 arg bytes, 0 callbacks"),
        )
    )
    frame, recording = read(data)
    row = frame.row(0, named=True)
    assert (len(frame), row["op"], row["arg0"], row["arg1"], row["arg4"]) == (1, 26, 0xFFFF88803E71EAD0, 2, None)
    assert row["vcpu"] == (None if dialect == "perf -F -cpu" else 1)
    assert row["time_ns"] == (None if dialect == "perf -F -time" else 46_925_295_000)
    assert row["tsc"] is None
    assert (recording.ledger.records, recording.ledger.skipped_lines) == (3, 0)
    assert READER.sniff(data) == 90


def test_latency_format_counts_from_its_own_start() -> None:
    data = (
        b"      sh-125       1d..1. 4692529500: xen_mc_entry: "
        + FIELDS
        + b"\n      sh-125       1d..1. 4692529500: "
        + flush(1, 24).encode()
    )
    assert read(data + b"\n")[0].select("tsc", "time_ns").rows() == [(None, None)]


def test_threads_stand_for_cpus_where_perf_prints_none() -> None:
    a, b = (f"sh {pid} 46.925295: xen:".encode() for pid in (125, 126))
    data = (
        a + VA.encode() + b"\n" + b + MMUEXT.encode() + b"\n" + a + flush(1, 0).encode() + b"\n" + b + flush(1, 24).encode() + b"\n"
    )
    assert read(data)[0].select("kind", "op").rows() == [("hypercall", 14), ("hypercall", 26)]


def test_order_and_arguments_of_a_batch() -> None:
    data = b"".join(map(line, [alloc(24), MMUEXT, MORE, alloc(0), VA, flush(2, 48)]))
    frame, _ = read(data)
    assert frame.select("line", "kind", "op", *schema.ARGS).rows() == [
        (6, "hypercall", 13, None, 2, None, None, None, None),
        (2, "subcall", 26, 0xFFFF88803E71EAD0, 2, 0, 0x7FF0, None, None),
        (5, "subcall", 14, 0xFFFF88800E89D000, 0x8000000105896061, 2, None, None, None),
    ]
    assert frame["tsc"].to_list() == [10**9] * 3


@pytest.mark.parametrize(
    ("events", "count"),
    [
        ([alloc(24), MMUEXT, flush(1, 24)], 1),
        ([alloc(24), MMUEXT, MORE, flush(1, 48)], 2),
        ([alloc(24), MMUEXT, flush(1, 72)], 3),  # two extensions were not traced: the bytes tell
        ([MMUEXT, flush(1, 48)], None),  # 48 bytes may be a list of two, or one and a mask of CPUs
        ([alloc(32), MMUEXT, flush(1, 32)], 1),  # one and a mask of CPUs
        ([alloc(24), MMUEXT, flush(1, 30)], None),
        ([alloc(24), MMUEXT, MORE, flush(1, 24)], None),
        ([MMUEXT, MORE.replace("OK", "NO_SPACE"), flush(1, 48)], 2),  # as trace-cmd prints OK
        ([MMUEXT, MORE.replace("OK", "NO_SPACE"), flush(1, 24)], 1),
        ([alloc(24), MMUEXT, MORE.replace("26(mmuext_op)", "1(mmu_update)"), flush(1, 24)], 1),
    ],
)
def test_counts_must_fit_the_bytes(events: list[str], count: int | None) -> None:
    assert read(b"".join(map(line, events)))[0]["arg1"].to_list() == [count]


def test_missing_entries_are_a_loss() -> None:
    frame, recording = read(b"".join(map(line, [flush(1, 24), flush(3, 0), MMUEXT, flush(3, 24), flush(1, 24)])))
    assert frame.select("kind", "op", "result").rows() == [
        ("lost", None, 3),
        ("hypercall", 13, None),
        ("lost", None, 2),
        ("hypercall", 13, None),
        ("subcall", 26, None),
        ("lost", None, 1),
    ]
    # What was issued before any entry was traced is no loss, only nameless.
    assert [p.text for p in recording.ledger.problems] == [
        "1 hypercalls were issued whose number is not recorded (no xen_mc_entry before them)"
    ]
    assert (recording.ledger.problems[0].line, recording.ledger.problems[0].offset) == (1, 0)


def test_what_was_queued_before_a_loss_is_not_issued() -> None:
    for lost in (b"CPU:0 [LOST 12 EVENTS]\n", b"CPU:0 [12 EVENTS DROPPED]\n", b"CPU:0 [EVENTS DROPPED]\n"):
        frame, _ = read(line(VA) + lost + line(MMUEXT) + line(flush(1, 24)))
        assert frame.select("kind", "op").rows() == [("lost", None), ("hypercall", 26)]


def test_a_32_bit_kernel() -> None:
    entry = "xen_mc_entry: op 26(mmuext_op) args [c1a0b0c0, 1, 0, 7ff0, 0, 0]"
    va = "xen_mc_entry: op 14(update_va_mapping) args [c1a0b000, 61, 1, 2, 0, 0]"
    frame, _ = read(
        b"".join(map(line, [va, flush(1, 0), alloc(12), entry, MORE.replace("24", "12"), flush(1, 24), va, flush(1, 0)]))
    )
    assert frame.select("caller", "arg1", "arg3").rows() == [(None, 0x61, None), ("pv32", 2, 0x7FF0), ("pv32", 0x61, 2)]
    raw = "xen_mc_entry: op=26 nargs=4 args=ARRAY[" + ", ".join(["c0", "b0", "a0", "c1", "01", *["00"] * 19]) + "]"
    frame, _ = read(b"".join(map(line, [raw, "xen_mc_flush: mcidx=1 argidx=12 cbidx=0"])))
    assert frame.select("caller", "arg0", "arg1").rows() == [("pv32", 0xC1A0B0C0, 1)]


def test_registers_of_32_bit_frames_and_in_any_order() -> None:
    narrow = "up: (xen_pv_evtchn_do_upcall+0x0/0x30) ax=0xc ip=0xc1001187 bx=0x41 cx=0x7 dx=0x0 si=0x1 di=0x2 bp=0x3"
    wide = "p: rax=0xd rip=0xffffffff81a39073 rdi=0x41 rsi=7"
    frame, _ = read(line(narrow) + line(wide) + line("page_fault_user: ip=0x1 address=0x2"))
    assert frame.select("caller", "op", *schema.ARGS, "rip").rows() == [
        ("pv32", 12, 0x41, 7, 0, 1, 2, 3, 0xC1001187),
        ("pv32", 13, 0x41, 7, None, None, None, None, 0xFFFFFFFF81A39073),
    ]


def test_every_cut_and_every_flipped_byte() -> None:
    data = b"".join(map(line, [alloc(24), MMUEXT, MORE, VA, flush(2, 48), UP])) + b"CPU:0 [LOST 12 EVENTS]\n"
    whole, _ = read(data)
    for end in (*range(0, len(data), 29), *range(len(data) - 20, len(data) + 1)):
        frame, recording = read(data[:end])
        assert frame.equals(whole[: len(frame)])
        assert recording.ledger.lines == data[:end].count(b"\n") + (end > 0 and data[end - 1] != 10)
    dice = random.Random(5)
    for _ in range(25):
        at = dice.randrange(len(data))
        read(data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :], dice.choice([1, 1000]))


def test_damage_is_named() -> None:
    frame, recording = read(
        line(MMUEXT.replace("7ff0", "7fg0")) + line(flush(1, 24).replace("24", "x")) + b"xen_mc_flush: 1\n" + b"x" * 70_000 + b"\n"
    )
    ledger = recording.ledger
    assert (len(frame), ledger.skipped_lines, ledger.noise_lines) == (0, 4, 0)
    assert [p.line for p in ledger.problems] == [1, 2, 3, 4]
    _, recording = read(b"cpus=2\nhello\n# tracer: nop\n" + line("sched_switch: prev_comm=a"))
    assert (recording.ledger.records, recording.ledger.noise_lines, recording.ledger.unparsed) == (1, 3, [(2, "hello")])


def test_unflushed_entries_do_not_pile_up() -> None:
    from xtrace.ingest.linux_xen_events import _MOST

    recording = READER.open(Bytes(line(MMUEXT) * 5000 + line(flush(300, 0))), ReadOptions(batch_rows=100))
    frame = pl.concat(list(recording.batches()))
    assert (frame["kind"] == "subcall").sum() == _MOST
    assert len(recording._batches._queued) == 0


def test_sniff() -> None:
    assert [READER.sniff(x) for x in (line(MMUEXT), line(UP), b"# tracer: nop\n#\n", b"cpus=2\n")] == [90, 90, 60, 60]
    assert READER.sniff(b"  sh 125 [001]    46.925295: sched:sched_switch: prev_comm=sh\n") == 40
    for other in (b"", b"xtrace: call op=1\n", b"up: ip=0x1\n", bytes(range(256)), b"[   46.925295] xen: foo\n"):
        assert READER.sniff(other) == 0
